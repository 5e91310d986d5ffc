"""The head's loss in Triton: one pass over the logits for their softmax's sums, one that turns them into gradients.

The largest logit and the sum of exponentials are found together (Milakov & Gimelshein 2018, arXiv 1805.02867); what
ranks hold of the vocabulary is brought to the largest of all afterwards. Logits exist in the dtype of the product
alone, and each becomes its own gradient in place. Arithmetic is in fp32, rounded once. A program has a row, of any
length. fp64 logits take the eager form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabus.kernels import eager
from megabus.kernels.eager import Targets
from megabus.kernels.triton_launch import has_fp64

BLOCK, WARPS = 4096, 8


@triton.jit
def _larger(a, b):
    """A NaN is larger than all else: a plain maximum drops it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logits(raw_ptr, gain_ptr, row, col, V, S, GAIN: tl.constexpr):
    """Of columns beyond the last one minus infinity."""
    at = row.to(tl.int64) * S + col  # N * V may exceed 2^31
    x = tl.load(raw_ptr + at, mask=col < V, other=float("-inf")).to(tl.float32)
    if GAIN:
        x *= tl.load(gain_ptr + col, mask=col < V, other=1.0).to(tl.float32)
    return x


@triton.jit
def _sums(raw_ptr, gain_ptr, row_ptr, top_ptr, total_ptr, own_ptr, V, S, GAIN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, V, BLOCK):
        x = _logits(raw_ptr, gain_ptr, row, first + tl.arange(0, BLOCK), V, S, GAIN)
        new = _larger(top, tl.reduce(x, 0, _larger))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    own = _logits(raw_ptr, gain_ptr, row, tl.load(row_ptr + row), V, S, GAIN)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    tl.store(own_ptr + row, own)


@triton.jit
def _gradient_(
    raw_ptr, gain_ptr, row_ptr, top_ptr, scale_ptr, own_ptr, V, S, GAIN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """scale exp(logit - top), and with `own` added where the target is; scale: the token's share over its sum."""
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _logits(raw_ptr, gain_ptr, row, col, V, S, GAIN)
    grad = tl.exp(x - tl.load(top_ptr + row)) * tl.load(scale_ptr + row)
    grad += tl.where(col == tl.load(row_ptr + row), tl.load(own_ptr + row), 0.0)
    tl.store(raw_ptr + row.to(tl.int64) * S + col, grad, mask=col < V)


def cross_entropy_(
    raw_NV: Tensor,
    gain_V: Tensor | None,
    targets: Targets,
    over_max: Callable[[Tensor], Tensor],
    over_sum: Callable[[Tensor], Tensor],
    learns: bool,
) -> Tensor:
    """Losses (N,) of tokens whose logits are gain raw, and their gradients in raw's place (see
    `eager.cross_entropy_`)."""
    (N, V), S = raw_NV.shape, raw_NV.stride(0)
    if has_fp64(raw_NV, gain_V) or raw_NV.stride(1) != 1 or not raw_NV.numel():
        return eager.cross_entropy_(raw_NV, gain_V, targets, over_max, over_sum, learns)
    constants = {"GAIN": gain_V is not None, "BLOCK": min(BLOCK, triton.next_power_of_2(V)), "num_warps": WARPS}
    gain_V, row_N = None if gain_V is None else gain_V.contiguous(), targets.row.contiguous()
    here_N, total_N, own_N = raw_NV.new_empty(3, N, dtype=torch.float32).unbind()
    _sums[(N,)](raw_NV, gain_V, row_N, here_N, total_N, own_N, V, S, **constants)
    top_N = over_max(here_N.clone())
    total_N.mul_(here_N.sub_(top_N).exp_())
    total_N, own_N = over_sum(torch.stack((total_N, own_N.sub_(top_N).mul_(targets.here))))
    if learns:
        scale_N = targets.share / total_N
        grid = (N, triton.cdiv(V, constants["BLOCK"]))
        _gradient_[grid](raw_NV, gain_V, row_N, top_N, scale_N, targets.own.contiguous(), V, S, **constants)
    return total_N.log() - own_N
