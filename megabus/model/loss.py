"""Cross-entropy over a vocabulary whose logits are spread over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabus.kernels.eager import wide
from megabus.model.tensor_parallel import TensorParallel

IGNORED = -100  # a target that is none: padding, or a prompt


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, start: int, tp: TensorParallel) -> Tensor:
        logits = wide(logits_NV)
        top_N = tp.max(logits.amax(-1))
        exp_NV = (logits - top_N[:, None]).exp()
        local_N = target_N - start
        here_N = (local_N >= 0) & (local_N < logits.shape[1])
        counts_N = target_N != IGNORED
        local_N = local_N.clamp(0, logits.shape[1] - 1)
        own_N = (logits.gather(1, local_N[:, None])[:, 0] - top_N) * here_N
        total_N, own_N = tp.sum(torch.stack((exp_NV.sum(-1), own_N)))
        ctx.save_for_backward(exp_NV.div_(total_N[:, None]), here_N, local_N, counts_N)
        ctx.dtype = logits_NV.dtype
        return (total_N.log() - own_N) * counts_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probs_NV, here_N, local_N, counts_N = ctx.saved_tensors
        # d loss / d logit = softmax - one_hot, on this rank's rows.
        grad_NV = probs_NV.scatter_add(1, local_N[:, None], -here_N[:, None].to(probs_NV.dtype))
        return (grad_NV * (grads[0] * counts_N)[:, None]).to(ctx.dtype), None, None, None


def token_losses(logits_BTV: Tensor, targets_BT: Tensor, start: int, tp: TensorParallel) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T), the same on every rank; 0 where the target is IGNORED
    (Shoeybi et al. 2019, section 3).

    logits: this rank's vocabulary rows, the first of which is global row `start`; targets: global token ids.
    """
    flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    return _VocabParallelCrossEntropy.apply(flat, targets_BT.reshape(-1), start, tp).view_as(targets_BT)
