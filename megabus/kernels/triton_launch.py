"""What the Triton forms share: how work is cut into programs, what is refused, and the derivative of x / |x|.

A program takes tiles of ROWS rows. Forward kernels have a program for each tile. Backward ones have at most
`programs` of them, each of which walks over its tiles in a fixed order and adds up its share of a gain's gradient; the
shares are summed in a second step. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabus.errors import UserError
from megabus.kernels.width import padded, too_wide

TILE = 2048  # entries of a tile where rows are short: 16 a thread with 4 warps
EPS = tl.constexpr(1e-12)  # as in F.normalize


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs share the rows in a backward pass: a property of the device, never of timing."""
    if device.type != "cuda":
        return 3  # the interpreter runs them one after the other; several, so that tests see shares added up
    return int(4 * torch.cuda.get_device_properties(device).multi_processor_count)


def blocks(*axes: int) -> tuple[int, int, int]:
    """(BLOCK: entries of a row, each axis padded; ROWS of a tile; warps) for rows of that many entries along `axes`."""
    problem = too_wide(*axes)
    if problem is not None:
        raise UserError("train.kernels", "triton", problem, "use compiled or eager")
    block = padded(*axes)
    return block, max(1, TILE // block), min(16, max(4, block // 512))


def has_fp64(*tensors: Tensor | None) -> bool:
    """fp64 is for checks against a reference, which the eager form serves: kernels compute in fp32."""
    return any(x is not None and x.dtype == torch.float64 for x in tensors)


def expect(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """x, contiguous; kernels read raw memory, so a wrong shape must be noticed here."""
    if prod(x.shape) != prod(shape) or x.shape[-1:] != shape[-1:]:
        raise ValueError(f"{what}: shape {tuple(x.shape)}, expected {tuple(shape)}")
    return x.contiguous()


@triton.jit
def inverse(length):
    """1 / max(length, eps): a zero vector stays zero, and one with a NaN turns to NaNs (a plain maximum drops them)."""
    return tl.div_rn(1.0, tl.maximum(length, EPS, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def through_unit(g, y, dot, length):
    """Gradient of x from that of y = x / max(|x|, eps), with dot = y . g and length = |x|; below eps a constant
    divides x, which has no part in the derivative (so does F.normalize)."""
    return (g - y * tl.where(length >= EPS, dot, 0.0)) * inverse(length)
