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

from megabus.kernels.eager import Targets
from megabus.kernels.form import EAGER, Kernels
from megabus.model.tensor_parallel import TensorParallel
from megabus.model.where import on_gpu

IGNORED = -100  # a target that is none: padding, or a prompt
CHUNK = 1 << 26  # logits held at a time: 256 MiB in fp32, and about as much for what follows from them
LEAN = 4  # times as many where nothing follows from them, and a logit takes 2 bytes in place of 8
# Tokens taken at a time at least: every chunk adds to the head's whole fp32 gradient, which with few tokens and a large
# vocabulary takes longer than the products. From 65,536 rows of it on this holds more than CHUNK.
LEAST = 1024
TILE = 128  # tokens of a product that a GPU's processor computes at a time; LEAST has whole ones
MOST = 1024  # blocks of the head's rows that a gain's gradient is made of: an estimate may ask for any vocabulary
ALIGNED = 16  # bytes that tensor cores read in one piece, and that a row of logits has whole ones of

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
    kernels: Kernels = EAGER,
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
    parts = (slope_V, targets_BT.reshape(-1), share_BT.reshape(-1), start, tp, kernels, learns)
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


def _tokens_at_once(h_ND: Tensor, rows: int, lean: bool) -> int:
    """Of a head of `rows` rows; lean: see `Kernels`. On GPUs whole tiles, in chunks of one size: products of a few
    tokens more than these take one tile more, and a few tokens that are left over keep few of its processors busy."""
    step = max(LEAST, (LEAN if lean and h_ND.element_size() == 2 else 1) * CHUNK // rows)
    if not on_gpu(h_ND):
        return step
    step -= step % TILE
    even = -(-len(h_ND) // max(1, -(-len(h_ND) // step)))
    return max(1, -(-even // TILE)) * TILE


def _aligned(weight_VD: Tensor) -> Tensor:
    """The head's rows, on GPUs with zeros behind them up to a number that tensor cores take in one piece: an odd shard
    of a vocabulary would have all three products read or write logits entry by entry."""
    more = -len(weight_VD) % (ALIGNED // weight_VD.element_size()) if on_gpu(weight_VD) else 0
    return F.pad(weight_VD, (0, 0, 0, more)) if more else weight_VD


def _local(row_N: Tensor, rows: int, share_N: Tensor) -> Targets:
    """row: of the targets, counted from the first of this rank's `rows` rows; share: of their losses in the whole."""
    here_N = (row_N >= 0) & (row_N < rows)
    return Targets(row_N.clamp(0, rows - 1), here_N, share_N, -(share_N * here_N))


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
        kernels: Kernels,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, weight_VD = len(weight_VD), _aligned(weight_VD)
        losses_N = torch.empty_like(share_N)
        grad_h = torch.empty_like(h_ND) if learns else None
        grad_w = torch.zeros_like(weight_VD, dtype=share_N.dtype) if learns else None
        scaled_VD = weight_VD
        if learns and slope_V is not None:
            padded_V = slope_V if len(weight_VD) == rows else F.pad(slope_V, (0, len(weight_VD) - rows))
            scaled_VD = torch.mul(weight_VD, padded_V[:, None], out=torch.empty_like(weight_VD))
        counts_N = targets_N != IGNORED
        targets = _local(targets_N - start, rows, share_N * counts_N)
        step = _tokens_at_once(h_ND, rows, kernels.lean)
        for part in (slice(first, first + step) for first in range(0, len(h_ND), step)):
            h, raw = h_ND[part], F.linear(h_ND[part], weight_VD)
            losses_N[part] = kernels.cross_entropy_(raw[:, :rows], gain_V, targets.part(part), tp.max, tp.sum, learns)
            if grad_h is not None and grad_w is not None:
                torch.mm(raw, scaled_VD, out=grad_h[part])
                grad_w += raw.T @ h
            del raw  # before anything else of the head's size is made
        losses_N.mul_(counts_N)
        if grad_w is not None:
            grad_w, weight_VD = grad_w[:rows], weight_VD[:rows]
        grad_gain = None
        if slope_V is not None and grad_w is not None:
            # logit = gain (h w): both gradients follow from that by gain w, without another pass over the logits.
            block = max(LEAST, rows // MOST, CHUNK // weight_VD.shape[1] if on_gpu(h_ND) else 0)
            blocks = zip(grad_w.split(block), weight_VD.split(block), strict=True)
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
        return (grad_h * scale).to(grad_h.dtype), weight, gain, *[None] * 7
