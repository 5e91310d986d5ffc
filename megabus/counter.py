"""Arithmetic that gives the same bits on every device, under every sharding and for every tensor shape.

Random numbers are functions of (key, row, column): a rank draws just the rows it holds. Sums run over a fixed
tree of element-wise additions, so a row's sum does not depend on its neighbours. Nothing transcendental is
called, since vectorised and scalar versions of log or cos differ in the last bit.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megabus.splitmix import GOLDEN, MIX1, MIX2

_GOLDEN, _MIX1, _MIX2 = (c - 2**64 for c in (GOLDEN, MIX1, MIX2))  # as signed integers
_DRAWS = 3  # 64-bit words an entry takes: twelve 16-bit uniforms


def key(*parts: object) -> int:
    """A signed 64-bit key from any printable parts, e.g. (seed, parameter name, purpose)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic


def hash64(counter: Tensor, key: int) -> Tensor:
    """SplitMix64 (Steele, Lea & Flood 2014) of an int64 counter, any shape; wraps modulo 2^64."""
    z = counter * _GOLDEN + key
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def normals(key: int, rows: Tensor, columns: int) -> Tensor:
    """Near-normal draws, mean 0 and variance 1, fp64 of shape (len(rows), columns); `rows` are global numbers.

    Each is a sum of twelve 16-bit uniforms (Irwin-Hall), exact in integers: kurtosis 2.9, tails end at 6.
    """
    cell = rows[:, None] * columns + torch.arange(columns, device=rows.device)
    total = torch.zeros_like(cell)
    for draw in range(_DRAWS):
        word = hash64(cell * _DRAWS + draw, key)
        for bits in (0, 16, 32, 48):
            total += (word >> bits) & 0xFFFF
    return (total.double() - 12 * 32767.5) / 65536


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis by halving: (..., n) -> (..., 1)."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        low = x[..., :half].clone()
        low[..., : n - half] += x[..., half:]
        x = low
    return x


def divisor(value: float, x: Tensor) -> Tensor:
    """A number to divide x by, where x lies and in its dtype, (). Of any other PyTorch's CUDA kernel takes the
    reciprocal and multiplies by that (ATen/native/cuda/BinaryDivTrueKernel.cu), which rounds twice."""
    return x.new_full((), value)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| over the last axis."""
    return x / row_sum(x * x).sqrt()
