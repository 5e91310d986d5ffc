"""The hidden state's update, RMSNorm and the masters' unit rows in Triton: one pass forward, one backward.

Arithmetic is in fp32, rounded once. A backward pass starts from the inputs and the rows' lengths: 4 bytes a row are
kept, which saves it a reduction that the next one would have to wait for. Shapes: N rows, D entries each (any number).
fp64 inputs take the eager form. Rows are held whole, so D above `table.MAX_WIDTH` is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabus.kernels import eager
from megabus.kernels.triton_launch import blocks, expect, has_fp64, inverse, programs, through_unit


@triton.jit
def _tile(block, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tile and which of them exist; offsets of its entries (int64: N * D may exceed 2^31) and likewise."""
    row = block * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    return row, row < N, at, (row < N)[:, None] & (col < D)[None, :]


@triton.jit
def _row(ptr, D, BLOCK: tl.constexpr):
    """A gain, as (1, BLOCK)."""
    col = tl.arange(0, BLOCK)
    return tl.load(ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _share(ptr, total, D, BLOCK: tl.constexpr):
    """Store this program's share of a gain's gradient, (BLOCK,), in its row of the buffer."""
    col = tl.arange(0, BLOCK)
    tl.store(ptr + tl.program_id(0).to(tl.int64) * D + col, total, mask=col < D)


@triton.jit(do_not_specialize=["N"])
def _residual_forward(h_ptr, x_ptr, alpha_ptr, y_ptr, lx_ptr, lr_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, real, at, mask = _tile(tl.program_id(0), N, D, ROWS, BLOCK)
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    length_x = tl.sqrt_rn(tl.sum(x * x, 1))
    r = h + _row(alpha_ptr, D, BLOCK) * (x * inverse(length_x)[:, None] - h)
    length_r = tl.sqrt_rn(tl.sum(r * r, 1))
    tl.store(y_ptr + at, r * inverse(length_r)[:, None], mask=mask)
    tl.store(lx_ptr + row, length_x, mask=real)
    tl.store(lr_ptr + row, length_r, mask=real)


@triton.jit(do_not_specialize=["N"])
def _residual_backward(
    h_ptr, x_ptr, alpha_ptr, lx_ptr, lr_ptr, g_ptr, dh_ptr, dx_ptr, share_ptr, N, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With u = Norm(x), r = h + alpha (u - h), y = Norm(r): the chain rule from y back to h, x and alpha."""
    alpha = _row(alpha_ptr, D, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row, real, at, mask = _tile(block, N, D, ROWS, BLOCK)
        h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        length_x = tl.load(lx_ptr + row, mask=real, other=1.0)[:, None]
        length_r = tl.load(lr_ptr + row, mask=real, other=1.0)[:, None]
        u = x * inverse(length_x)
        toward = u - h
        y = (h + alpha * toward) * inverse(length_r)
        dr = through_unit(g, y, tl.sum(y * g, 1)[:, None], length_r)
        total += tl.sum(dr * toward, 0)
        du = alpha * dr
        tl.store(dh_ptr + at, dr - du, mask=mask)
        tl.store(dx_ptr + at, through_unit(du, u, tl.sum(u * du, 1)[:, None], length_x), mask=mask)
    _share(share_ptr, total, D, BLOCK)


@triton.jit(do_not_specialize=["N"])
def _rms_forward(h_ptr, gain_ptr, y_ptr, scale_ptr, eps, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, real, at, mask = _tile(tl.program_id(0), N, D, ROWS, BLOCK)
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, 1) + eps))
    tl.store(y_ptr + at, h * scale[:, None] * _row(gain_ptr, D, BLOCK), mask=mask)
    tl.store(scale_ptr + row, scale, mask=real)


@triton.jit(do_not_specialize=["N"])
def _rms_backward(
    h_ptr, gain_ptr, scale_ptr, g_ptr, dh_ptr, share_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """With u = h scale and scale = 1 / sqrt(|h|^2 + eps): dh = scale (du - u (u . du))."""
    gain = _row(gain_ptr, D, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row, real, at, mask = _tile(block, N, D, ROWS, BLOCK)
        h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=real, other=0.0)[:, None]
        u = h * scale
        total += tl.sum(g * u, 0)
        du = g * gain
        tl.store(dh_ptr + at, scale * (du - u * tl.sum(u * du, 1)[:, None]), mask=mask)
    _share(share_ptr, total, D, BLOCK)


@triton.jit(do_not_specialize=["N"])
def _unit_rows(rows_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    _, real, at, mask = _tile(tl.program_id(0), N, D, ROWS, BLOCK)
    x = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt_rn(tl.where(real, tl.sum(x * x, 1), 1.0))  # rows that do not exist must not divide by zero
    tl.store(rows_ptr + at, tl.div_rn(x, tl.broadcast_to(length[:, None], x.shape)), mask=mask)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, alpha_D: Tensor) -> Tensor:
        D = h.shape[-1]
        block, tile, warps = blocks(D)
        h, x, alpha_D = h.contiguous(), expect(x, h.shape, "x"), expect(alpha_D, (D,), "alpha")
        N = h.numel() // max(D, 1)
        y = torch.empty_like(h)
        lengths = h.new_empty(2, N, dtype=torch.float32)
        if N:
            grid = (triton.cdiv(N, tile),)
            _residual_forward[grid](h, x, alpha_D, y, *lengths, N, D, tile, block, num_warps=warps)
        ctx.save_for_backward(h, x, alpha_D, lengths)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, x, alpha_D, lengths = ctx.saved_tensors
        N, D = lengths.shape[1], h.shape[-1]
        block, tile, warps = blocks(D)
        dh, dx = torch.empty_like(h), torch.empty_like(x)
        shares = h.new_empty(min(programs(h.device), triton.cdiv(N, tile)), D, dtype=torch.float32)
        if N:
            _residual_backward[(len(shares),)](
                h, x, alpha_D, *lengths, g.contiguous(), dh, dx, shares, N, D, tile, block, num_warps=warps
            )
        return dh, dx, shares.sum(0).to(alpha_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        D = h.shape[-1]
        block, tile, warps = blocks(D)
        h, gain_D = h.contiguous(), expect(gain_D, (D,), "gain")
        N = h.numel() // max(D, 1)
        y = torch.empty_like(h)
        scale_N = h.new_empty(N, dtype=torch.float32)
        if N:
            _rms_forward[(triton.cdiv(N, tile),)](h, gain_D, y, scale_N, eps, N, D, tile, block, num_warps=warps)
        ctx.save_for_backward(h, gain_D, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        h, gain_D, scale_N = ctx.saved_tensors
        N, D = len(scale_N), h.shape[-1]
        block, tile, warps = blocks(D)
        dh = torch.empty_like(h)
        shares = h.new_empty(min(programs(h.device), triton.cdiv(N, tile)), D, dtype=torch.float32)
        if N:
            _rms_backward[(len(shares),)](
                h, gain_D, scale_N, g.contiguous(), dh, shares, N, D, tile, block, num_warps=warps
            )
        return dh, shares.sum(0).to(gain_D.dtype), None


def residual(h: Tensor, x: Tensor, alpha_D: Tensor) -> Tensor:
    """Norm(h + alpha (Norm(x) - h)) for h and x (..., D): nGPT's eqs. 10 and 11 (see `eager.residual`)."""
    if has_fp64(h, x, alpha_D):
        return eager.residual(h, x, alpha_D)
    return _Residual.apply(h, x, alpha_D)


def rms_norm(h: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """gain * h / sqrt(|h|^2 + eps) for h (..., D) (see `eager.rms_norm`)."""
    if has_fp64(h, gain_D):
        return eager.rms_norm(h, gain_D, eps)
    return _RMSNorm.apply(h, gain_D, eps)


def unit_rows_(rows: Tensor) -> None:
    """Divide every row of (rows, D) by its length, in place, in one launch (see `eager.unit_rows_`)."""
    N, D = rows.shape
    if has_fp64(rows) or not rows.is_contiguous():
        eager.unit_rows_(rows)
    elif N and D:
        block, tile, warps = blocks(D)
        _unit_rows[(triton.cdiv(N, tile),)](rows, N, D, tile, block, num_warps=warps)
