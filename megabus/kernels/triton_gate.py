"""The gated MLP's product in Triton: one pass forward, one backward from u and v alone.

Arithmetic is in fp32, rounded once. Nothing is summed along a row, so rows are cut into runs of at most 1024 units and
F may be any number. fp64 inputs take the eager form. u and v that are the two halves of the rows of one product are
read where they lie, and their gradients are left in the same order, so that the product's backward pass can take them
as one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabus.kernels import eager
from megabus.kernels.adjacent import joined
from megabus.kernels.triton_launch import blocks, expect, has_fp64, programs

RUN = 1024


@triton.jit
def _gain(ptr, col, F):
    return tl.load(ptr + col, mask=col < F, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N"])
def _forward(
    u_ptr, v_ptr, gain_u_ptr, gain_v_ptr, y_ptr, N, F, S,
    GAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * F + col[None, :]  # N * F may exceed 2^31
    cut = row.to(tl.int64)[:, None] * S + col[None, :]  # in u and v, whose rows begin S entries apart
    mask = (row < N)[:, None] & (col < F)[None, :]
    u = tl.load(u_ptr + cut, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + cut, mask=mask, other=0.0).to(tl.float32)
    if GAIN:
        u, v = u * _gain(gain_u_ptr, col, F), v * _gain(gain_v_ptr, col, F)
    tl.store(y_ptr + at, u * (v * tl.sigmoid(v)), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _backward(
    u_ptr, v_ptr, gain_u_ptr, gain_v_ptr, g_ptr, du_ptr, dv_ptr, share_u_ptr, share_v_ptr, N, F, S,
    GAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(v gain_v): SiLU' = s (1 + v gain_v (1 - s))."""
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if GAIN:
        gain_u, gain_v = _gain(gain_u_ptr, col, F), _gain(gain_v_ptr, col, F)
        total_u = tl.zeros((BLOCK,), tl.float32)
        total_v = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * F + col[None, :]
        cut = row.to(tl.int64)[:, None] * S + col[None, :]
        mask = (row < N)[:, None] & (col < F)[None, :]
        u = tl.load(u_ptr + cut, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + cut, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        w = v
        if GAIN:
            w = v * gain_v
        s = tl.sigmoid(w)
        du = g * (w * s)  # of u gain_u, as dv is of v gain_v
        dv = g * u * (s * (1.0 + w * (1.0 - s)))
        if GAIN:
            dv = dv * gain_u
            total_u += tl.sum(du * u, 0)
            total_v += tl.sum(dv * v, 0)
            du, dv = du * gain_u, dv * gain_v
        tl.store(du_ptr + cut, du, mask=mask)
        tl.store(dv_ptr + cut, dv, mask=mask)
    if GAIN:
        at_share = tl.program_id(0).to(tl.int64) * F + col
        tl.store(share_u_ptr + at_share, total_u, mask=col < F)
        tl.store(share_v_ptr + at_share, total_v, mask=col < F)


def _as_one(u: Tensor, v: Tensor) -> Tensor | None:
    """(..., 2 F), contiguous, of which u and v are the halves; None where they are not."""
    both = joined((u, v), -1)
    halves = both is not None and both.is_contiguous() and u.shape == v.shape
    return both if halves else None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, gain_u_F: Tensor | None, gain_v_F: Tensor | None) -> Tensor:
        F = u.shape[-1]
        apart = F if _as_one(u, v) is None else 2 * F  # entries from one row to the next
        if apart == F:
            u, v = u.contiguous(), expect(v, u.shape, "v")
        if gain_u_F is not None and gain_v_F is not None:
            gain_u_F, gain_v_F = expect(gain_u_F, (F,), "gain_u"), expect(gain_v_F, (F,), "gain_v")
        y = u.new_empty(u.shape)
        if y.numel():
            N = u.numel() // F
            block, tile, warps = blocks(min(F, RUN))
            grid, gain = (triton.cdiv(N, tile), triton.cdiv(F, block)), gain_u_F is not None
            _forward[grid](u, v, gain_u_F, gain_v_F, y, N, F, apart, gain, tile, block, num_warps=warps)
        ctx.save_for_backward(u, v, gain_u_F, gain_v_F)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        u, v, gain_u_F, gain_v_F = ctx.saved_tensors
        F = u.shape[-1]
        N = u.numel() // max(F, 1)
        block, tile, warps = blocks(min(F, RUN))
        runs = triton.cdiv(F, block)
        count = min(triton.cdiv(programs(u.device), max(runs, 1)), triton.cdiv(N, tile))
        both = _as_one(u, v)
        du, dv = (torch.empty_like(u), torch.empty_like(v)) if both is None else torch.empty_like(both).split(F, -1)
        gain = gain_u_F is not None
        shares = u.new_empty(2, count, F, dtype=torch.float32) if gain else (None, None)
        if u.numel():
            tensors = (u, v, gain_u_F, gain_v_F, g.contiguous(), du, dv, *shares)
            _backward[(count, runs)](*tensors, N, F, F if both is None else 2 * F, gain, tile, block, num_warps=warps)
        if not isinstance(shares, Tensor):
            return du, dv, None, None
        sums = shares.sum(1)
        return du, dv, sums[0].to(gain_u_F.dtype), sums[1].to(gain_v_F.dtype)


def gate(u: Tensor, v: Tensor, gain_u_F: Tensor | None, gain_v_F: Tensor | None) -> Tensor:
    """u gain_u SiLU(v gain_v) for u and v (..., F): nGPT's eqs. 20 to 22; without gains where one is None
    (see `eager.gate`)."""
    if has_fp64(u, v, gain_u_F, gain_v_F):
        return eager.gate(u, v, gain_u_F, gain_v_F)
    if gain_u_F is None or gain_v_F is None:
        gain_u_F = gain_v_F = None
    return _Gate.apply(u, v, gain_u_F, gain_v_F)
