"""SplitMix64 (Steele, Lea & Flood 2014) on Python's integers. `megabus.counter.hash64` is the same on tensors."""

from __future__ import annotations

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK_64 = (1 << 64) - 1


def mix64(x: int) -> int:
    """Avalanching hash of a 64-bit integer: one step of the generator."""
    x = (x + GOLDEN) & MASK_64
    x = ((x ^ (x >> 30)) * MIX1) & MASK_64
    x = ((x ^ (x >> 27)) * MIX2) & MASK_64
    return x ^ (x >> 31)
