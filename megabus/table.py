"""Tables for terminals, and how numbers are written in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Columns under a ruled header: those numbered in `left` to the left, the others, being numbers, to the right.
    A last column of words has no need of a width: its rule is as long as its header."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    if len(header) - 1 in left:
        widths[-1] = len(header[-1])
    lines.insert(1, ["─" * width for width in widths])

    def one(line: Sequence[str]) -> str:
        cells = enumerate(zip(line, widths, strict=True))
        return "  ".join(f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in cells).rstrip()

    return "\n".join(one(line) for line in lines)


def visible(text: str) -> str:
    """What a model wrote, with three new lines or more in a row, and new lines without a word, as `\\n`: they would be
    nothing but height."""
    if not text.strip():
        return text.replace("\n", "\\n")
    return re.sub(r"\n{3,}", lambda found: "\\n" * len(found[0]) + "\n", text)


def si(number: float | None) -> str:
    """12.3M, 1.3B: three digits and a suffix."""
    if number is None:
        return "–"
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * scale:  # what rounds up to 1000 belongs to the next suffix
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}"


def in_bytes(number: float) -> str:
    """12.3 MB, 1.3 GB: three digits and a unit of powers of 1000."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= 0.9995 * scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.3g} B"


def clock(seconds: float) -> str:
    """`4:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
