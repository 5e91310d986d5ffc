"""The loss of the next token from the hidden states, without ever holding their logits.

The vocabulary is spread over tensor-parallel ranks (Shoeybi et al. 2019, section 3); tokens are taken in chunks, whose
gradients are computed at once, while their logits exist. So nothing is computed twice, and memory holds one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabus.kernels.eager import wide
from megabus.model.tensor_parallel import TensorParallel

IGNORED = -100  # a target that is none: padding, or a prompt
CHUNK = 1 << 26  # logits held at a time: 256 MiB in fp32, and about as much for what follows from them
# Tokens taken at a time at least: every chunk adds to the head's whole fp32 gradient, which with few tokens and a large
# vocabulary takes longer than the products. From 65,536 rows of it on this holds more than CHUNK.
LEAST = 1024
TILE = 128  # tokens of a product that a GPU's processor computes at a time; LEAST has whole ones
MOST = 1024  # blocks of the head's rows that a gain's gradient is made of: an estimate may ask for any vocabulary

Reduce = Callable[[Tensor], Tensor]


def head_loss(
    h_BTD: Tensor,
    weight_VD: Tensor,
    gain_V: Tensor | None,
    targets_BT: Tensor,
    reduce: Reduce,
    start: int,
    tp: TensorParallel,
    power: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(reduce of the token losses, the token losses themselves (B, T) without gradients), the same on every rank.

    The logits are gain * (h W^T). A token's loss is the negative log-likelihood of its target in nats, 0 where that is
    IGNORED. weight and gain: this rank's vocabulary rows, the first of which is global row `start`; targets: global
    token ids. reduce: any linear function of the token losses (a mean, a weighted sum) that gives one number.
    power: q of `preconditioned`, for which there must be a gain; None leaves the gradients true.
    """
    assert power is None or gain_V is not None, "without gains there is nothing to precondition by"
    with torch.enable_grad():
        ones = torch.ones_like(targets_BT, dtype=torch.promote_types(h_BTD.dtype, torch.float32), requires_grad=True)
        (share_BT,) = torch.autograd.grad(reduce(ones), ones)  # what each token's loss counts for
    flat = h_BTD.reshape(-1, h_BTD.shape[-1])
    learns = torch.is_grad_enabled()  # inside the function it never is
    slope_V = gain_V
    if power is not None and gain_V is not None and learns:
        slope_V = preconditioned(gain_V.detach(), power, tp)
    parts = (slope_V, targets_BT.reshape(-1), share_BT.reshape(-1), start, tp, learns)
    loss, losses_N = _HeadLoss.apply(flat, weight_VD, gain_V, *parts)
    return loss, losses_N.view_as(targets_BT)


def preconditioned(gain_V: Tensor, power: float, tp: TensorParallel) -> Tensor:
    """What takes the place of the gain s in dL/du = s dL/dz of logits z = s u: (s / mean |s|)^power, (V,), the mean
    over the whole vocabulary. The loss keeps its value, and s its true gradient.

    Logit gradient preconditioning ("Training nGPT", arXiv 2608.01284). At power 1 only the scale of s is
    gone, which grows in training: Adam does not see that, but clipping does, and s weighs more in the norm. At 0 all
    rows count alike. The paper's mean is of s, which is the same while every s is positive. A negative s keeps its
    sign, so that a step goes down.
    """
    total, count = tp.sum(torch.stack((gain_V.abs().sum(), gain_V.new_tensor(float(len(gain_V))))))
    ratio_V = gain_V * (count / total)
    return ratio_V.sign() * ratio_V.abs().pow(power)


def _tokens_at_once(h_ND: Tensor, rows: int) -> int:
    """Of a head of `rows` rows. On GPUs whole tiles: products of a few tokens more than these take one tile more."""
    step = max(LEAST, CHUNK // rows)
    return step if h_ND.device.type in ("cpu", "meta") else step - step % TILE


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        gain_V: Tensor | None,
        slope_V: Tensor | None,
        targets_N: Tensor,
        share_N: Tensor,
        start: int,
        tp: TensorParallel,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        losses_N = torch.empty_like(share_N)
        grad_h = torch.empty_like(h_ND) if learns else None
        grad_w = torch.zeros_like(weight_VD, dtype=share_N.dtype) if learns else None
        scaled_VD = weight_VD
        if learns and slope_V is not None:
            scaled_VD = torch.mul(weight_VD, slope_V[:, None], out=torch.empty_like(weight_VD))
        step = _tokens_at_once(h_ND, len(weight_VD))
        for part in (slice(first, first + step) for first in range(0, len(h_ND), step)):
            h, targets = h_ND[part], targets_N[part]
            raw = F.linear(h, weight_VD)
            if gain_V is None:
                logits = wide(raw)
            else:
                logits = raw.mul_(gain_V) if raw.dtype == gain_V.dtype else raw * gain_V
            top = tp.max(logits.amax(-1))
            local = targets - start
            here = (local >= 0) & (local < len(weight_VD))
            local = local.clamp(0, len(weight_VD) - 1)[:, None]
            own = (logits.gather(1, local)[:, 0] - top) * here
            exp = logits.sub_(top[:, None]).exp_()
            total, own = tp.sum(torch.stack((exp.sum(-1), own)))
            counts = targets != IGNORED
            losses_N[part] = (total.log() - own) * counts
            if grad_h is None or grad_w is None:
                continue
            # d loss / d logit = share (softmax - one_hot), on this rank's rows.
            share = share_N[part] * counts
            grad = exp.mul_((share / total)[:, None]).scatter_add_(1, local, -(share * here)[:, None])
            narrow = grad.to(h.dtype)
            grad_h[part] = narrow @ scaled_VD
            grad_w += narrow.T @ h
            del raw, logits, exp, grad, narrow  # before anything else of the head's size is made
        grad_gain = None
        if slope_V is not None and grad_w is not None:
            # logit = gain (h w): both gradients follow from that by gain w, without another pass over the logits.
            rows = max(LEAST, len(weight_VD) // MOST)
            blocks = zip(grad_w.split(rows), weight_VD.split(rows), strict=True)
            grad_gain = torch.cat([(grad * weight).sum(-1) for grad, weight in blocks])
            grad_w.mul_(slope_V[:, None])
        ctx.save_for_backward(grad_h, grad_w, grad_gain)
        ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_N)
        return (share_N * losses_N).sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_h, grad_w, grad_gain = ctx.saved_tensors
        scale = grads[0]
        gain = None if grad_gain is None else grad_gain * scale
        weight = torch.empty_like(grad_w, dtype=ctx.dtype)
        torch.mul(grad_w, scale, out=weight)  # rounded as it is multiplied: no third copy of the head
        return (grad_h * scale).to(grad_h.dtype), weight, gain, None, None, None, None, None, None
