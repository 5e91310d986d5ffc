"""RoPE, and nGPT's RoPE with unit norm and gain, in Triton: one pass forward, one backward.

Arithmetic is in fp32, rounded once. A tile is ROWS tokens with all their heads, (ROWS, H, C/2) twice: the halves of
each head's vector that RoPE turns together. So cos and sin are read once for all heads of a token. x, and the gradient
from attention, are read by their strides (both come as transposed views); results are contiguous (B, T, H, C). A
backward pass starts from the inputs alone. fp64 inputs take the eager form. A token's heads are held whole, so H and C
that multiply to more than `table.MAX_WIDTH`, each filled up to a power of two, are refused.
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
from megabus.kernels.width import padded


@triton.jit
def _tile(block, N, H, HALF, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Token, head and column of a tile's entries, each along its own axis, and which entries exist."""
    token = (block * ROWS + tl.arange(0, ROWS))[:, None, None]
    head = tl.arange(0, HEADS)[None, :, None]
    col = tl.arange(0, BLOCK)[None, None, :]
    return token, head, col, (token < N) & (head < H) & (col < HALF)


@triton.jit
def _halves(ptr, token, head, col, mask, T, HALF, SB, ST, SH):
    """Both halves in fp32 of x (B, T, H, C) with strides SB, ST, SH and 1; offsets may exceed 2^31."""
    at = (token // T).to(tl.int64) * SB + (token % T).to(tl.int64) * ST + head.to(tl.int64) * SH + col
    a = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(ptr, a, b, token, head, col, mask, H, HALF):
    at = (token.to(tl.int64) * H + head) * (2 * HALF) + col
    tl.store(ptr + at, a, mask=mask)
    tl.store(ptr + at + HALF, b, mask=mask)


@triton.jit
def _angles(cos_ptr, sin_ptr, token, col, N, T, HALF):
    at = (token % T) * HALF + col
    mask = (token < N) & (col < HALF)
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _gains(gain_ptr, head, col, H, HALF):
    at = head * (2 * HALF) + col
    mask = (head < H) & (col < HALF)
    a = tl.load(gain_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(gain_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit(do_not_specialize=["N", "T"])
def _forward(
    x_ptr, cos_ptr, sin_ptr, gain_ptr, y_ptr, N, T, H, HALF, SB, ST, SH,
    UNIT: tl.constexpr, GAIN: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RoPE of x, or with BACK its inverse, which is also its transpose; then unit length; then the gain."""
    token, head, col, mask = _tile(tl.program_id(0), N, H, HALF, ROWS, HEADS, BLOCK)
    a, b = _halves(x_ptr, token, head, col, mask, T, HALF, SB, ST, SH)
    cos, sin = _angles(cos_ptr, sin_ptr, token, col, N, T, HALF)
    if BACK:
        sin = -sin
    ya, yb = a * cos - b * sin, a * sin + b * cos
    if UNIT:
        scale = inverse(tl.sqrt_rn(tl.sum(ya * ya + yb * yb, 2)))[:, :, None]
        ya, yb = ya * scale, yb * scale
    if GAIN:
        gain_a, gain_b = _gains(gain_ptr, head, col, H, HALF)
        ya, yb = ya * gain_a, yb * gain_b
    _store(y_ptr, ya, yb, token, head, col, mask, H, HALF)


@triton.jit(do_not_specialize=["N", "T"])
def _unit_backward(
    x_ptr, cos_ptr, sin_ptr, gain_ptr, g_ptr, dx_ptr, share_ptr, N, T, H, HALF, SB, ST, SH, GB, GT, GH,
    GAIN: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With y = Norm(RoPE(x)): dy = g gain, through the norm, turned back; the gain's gradient is the sum of g y."""
    if GAIN:
        _, head, col, _ = _tile(0, N, H, HALF, ROWS, HEADS, BLOCK)
        gain_a, gain_b = _gains(gain_ptr, head, col, H, HALF)
        total_a = tl.zeros((HEADS, BLOCK), tl.float32)
        total_b = tl.zeros((HEADS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        token, head, col, mask = _tile(block, N, H, HALF, ROWS, HEADS, BLOCK)
        a, b = _halves(x_ptr, token, head, col, mask, T, HALF, SB, ST, SH)
        ga, gb = _halves(g_ptr, token, head, col, mask, T, HALF, GB, GT, GH)
        cos, sin = _angles(cos_ptr, sin_ptr, token, col, N, T, HALF)
        ya, yb = a * cos - b * sin, a * sin + b * cos
        length = tl.sqrt_rn(tl.sum(ya * ya + yb * yb, 2))[:, :, None]
        ya, yb = ya * inverse(length), yb * inverse(length)
        if GAIN:
            total_a += tl.sum(ga * ya, 0)
            total_b += tl.sum(gb * yb, 0)
            ga, gb = ga * gain_a, gb * gain_b
        dot = tl.sum(ya * ga + yb * gb, 2)[:, :, None]
        za, zb = through_unit(ga, ya, dot, length), through_unit(gb, yb, dot, length)
        _store(dx_ptr, za * cos + zb * sin, zb * cos - za * sin, token, head, col, mask, H, HALF)
    if GAIN:
        head, col = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
        at = (tl.program_id(0).to(tl.int64) * H + head) * (2 * HALF) + col
        mask = (head < H) & (col < HALF)
        tl.store(share_ptr + at, total_a, mask=mask)
        tl.store(share_ptr + at + HALF, total_b, mask=mask)


def _cut(x: Tensor) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """(N, T, H, C/2) and the tile's constants, warps among them, for x (B, T, H, C)."""
    B, T, H, C = x.shape
    if C % 2:
        raise ValueError(f"RoPE turns pairs of entries, and head_dim is {C}")
    _, tile, warps = blocks(H, C)
    constants = {"ROWS": tile, "HEADS": padded(H), "BLOCK": padded(C // 2), "num_warps": warps}
    return (B * T, T, H, C // 2), constants


def _readable(x: Tensor) -> Tensor:
    """x as it is where the entries of each head lie side by side, else a copy (a sum's gradient has strides 0)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch_forward(
    x: Tensor, cos_TC: Tensor, sin_TC: Tensor, gain_HC: Tensor | None, *, unit: bool, back: bool = False
) -> Tensor:
    (N, T, H, half), constants = _cut(x)
    x = _readable(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        flags = {"UNIT": unit, "GAIN": gain_HC is not None, "BACK": back}
        grid = (triton.cdiv(N, constants["ROWS"]),)
        _forward[grid](x, cos_TC, sin_TC, gain_HC, y, N, T, H, half, *x.stride()[:3], **flags, **constants)
    return y


def _tables(x: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[1], 1, x.shape[3] // 2)
    return expect(cos_TC, shape, "cos"), expect(sin_TC, shape, "sin")


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        cos_TC, sin_TC = _tables(x, cos_TC, sin_TC)
        ctx.save_for_backward(cos_TC, sin_TC)
        return _launch_forward(x, cos_TC, sin_TC, None, unit=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _launch_forward(g, cos_TC, sin_TC, None, unit=False, back=True), None, None


class _RotateUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TC: Tensor, sin_TC: Tensor, gain_HC: Tensor | None) -> Tensor:
        cos_TC, sin_TC = _tables(x, cos_TC, sin_TC)
        if gain_HC is not None:
            gain_HC = expect(gain_HC, tuple(x.shape[2:]), "gain")
        ctx.save_for_backward(x, cos_TC, sin_TC, gain_HC)
        return _launch_forward(x, cos_TC, sin_TC, gain_HC, unit=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        x, cos_TC, sin_TC, gain_HC = ctx.saved_tensors
        (N, T, H, half), constants = _cut(x)
        x, g = _readable(x), _readable(g)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        count = min(programs(x.device), triton.cdiv(N, constants["ROWS"]))
        shares = None if gain_HC is None else x.new_empty(count, H, 2 * half, dtype=torch.float32)
        if dx.numel():
            strides = (*x.stride()[:3], *g.stride()[:3])
            _unit_backward[(count,)](
                x, cos_TC, sin_TC, gain_HC, g, dx, shares, N, T, H, half, *strides, GAIN=shares is not None, **constants
            )
        return dx, None, None, None if shares is None or gain_HC is None else shares.sum(0).to(gain_HC.dtype)


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """RoPE on the pairs (i, i + C/2); cos and sin are (T, 1, C/2) (see `eager.rotate`)."""
    if has_fp64(x_BTHC, cos_TC, sin_TC):
        return eager.rotate(x_BTHC, cos_TC, sin_TC)
    return _Rotate.apply(x_BTHC, cos_TC, sin_TC)


def rotate_unit(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor, gain_HC: Tensor | None) -> Tensor:
    """gain * Norm(RoPE(x)) over each head's C entries: nGPT's eqs. 15 and 16 (see `eager.rotate_unit`)."""
    if has_fp64(x_BTHC, cos_TC, sin_TC, gain_HC):
        return eager.rotate_unit(x_BTHC, cos_TC, sin_TC, gain_HC)
    return _RotateUnit.apply(x_BTHC, cos_TC, sin_TC, gain_HC)
