"""How wide rows may be for Triton's kernels; known without Triton."""

from __future__ import annotations

from math import prod

# A kernel keeps a whole row in registers, and twice as long a row would not fit: tests/support/compile_triton.py looks.
MAX_WIDTH = 8192


def padded(*axes: int) -> int:
    """Entries of a row of Triton's: each axis is filled up to a power of two."""
    return prod(1 << (max(length, 1) - 1).bit_length() for length in axes)


def too_wide(*axes: int) -> str | None:
    """Why Triton's kernels cannot hold rows of `axes` entries (d_model, or heads and head_dim), or None."""
    width = padded(*axes)
    if width <= MAX_WIDTH:
        return None
    filled = f", padded to {width}," if width != prod(axes) else ""
    return f"rows of {' x '.join(map(str, axes))}{filled} exceed {MAX_WIDTH}"
