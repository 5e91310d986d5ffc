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

_DRAWS = 3  # 64-bit words an entry takes: twelve 16-bit uniforms
_LANES, _LOW = 0x0000FFFF0000FFFF, 0xFFFFFFFF


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return (word + 2**63) % 2**64 - 2**63


_GOLDEN, _MIX1, _MIX2 = map(_signed, (GOLDEN, MIX1, MIX2))


def key(*parts: object) -> int:
    """A signed 64-bit key from any printable parts, e.g. (seed, parameter name, purpose)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(x: Tensor, bits: int, out: Tensor) -> Tensor:
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)  # logical, not arithmetic


def hash64(counter: Tensor, key: int) -> Tensor:
    """SplitMix64 (Steele, Lea & Flood 2014) of an int64 counter, any shape; wraps modulo 2^64."""
    z = counter * _GOLDEN + key
    return _mix_(z, torch.empty_like(z))


def _mix_(z: Tensor, spare: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place. spare: of z's shape, to compute in."""
    z.bitwise_xor_(_shift(z, 30, spare)).mul_(_MIX1)
    z.bitwise_xor_(_shift(z, 27, spare)).mul_(_MIX2)
    return z.bitwise_xor_(_shift(z, 31, spare))


def normals(key: int, rows: Tensor, columns: int) -> Tensor:
    """Near-normal draws, mean 0 and variance 1, fp64 of shape (len(rows), columns); `rows` are global numbers.

    Each is a sum of twelve 16-bit uniforms (Irwin-Hall), exact in integers: kurtosis 2.9, tails end at 6.
    """
    cell = rows[:, None] * columns + torch.arange(columns, device=rows.device)
    # Word d of a cell is hash64(cell * _DRAWS + d), whose first product is made once for all of them.
    start = cell.mul_(_signed(_DRAWS * GOLDEN)).add_(key)
    total, word, spare = torch.zeros_like(start), torch.empty_like(start), torch.empty_like(start)
    for draw in range(_DRAWS):
        torch.add(start, _signed(draw * GOLDEN), out=word)
        _mix_(word, spare)
        # Of four 16-bit numbers the first and third, then the others: two sums in one word, of six addends each.
        total += torch.bitwise_and(word, _LANES, out=spare)
        total += word.bitwise_right_shift_(16).bitwise_and_(_LANES)
    torch.bitwise_and(total, _LOW, out=spare)
    total.bitwise_right_shift_(32).add_(spare)
    return total.double().sub_(12 * 32767.5).div_(65536)


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
