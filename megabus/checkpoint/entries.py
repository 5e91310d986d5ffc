"""Entries that no save writes: a weight or moment that is not finite, a mean of squares below zero. They are looked at
while a shard is hashed, so that it is read once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from megabus.checkpoint.digests import Digest
from megabus.checkpoint.manifest import BLOCK, Heartbeat
from megabus.parallel.fragments import Kind
from megabus.plain_file import open_regular

ENTRY = 4  # bytes of an fp32 entry
LENGTH = 8  # bytes before a safetensors header that say how long it is
HEADER, NAMING = 1 << 16, 1 << 10  # bytes that it may have, and so many more for each tensor
Kinds = Mapping[str, tuple[Kind, int]]  # by a tensor's name in the file, its kind and its entries


def longest_header(tensors: int) -> int:
    """Bytes of a safetensors header that names so many tensors: what is longer would take memory that nobody counts."""
    return HEADER + NAMING * tensors


def odd_entry(kind: Kind, values: Tensor) -> str | None:
    """What a tensor of this kind holds that it cannot hold, if it does. values: not empty."""
    low, high = (bound.item() for bound in values.aminmax())  # NaN where there is one
    if math.isnan(low):
        return "NaN"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "an infinity"
    return f"{low:g}, and a mean of squares is 0 or more" if kind == "exp_avg_sq" and low < 0 else None


class Scanned(NamedTuple):
    """A shard's digest, and where the first entry is that it cannot hold: (the tensor's name, what). covered: whether
    its header told where all tensors lie; else `odd_by_name` must look."""

    digest: str
    odd: tuple[str, str] | None
    covered: bool


class _Range(NamedTuple):
    """Bytes [start, stop) behind the header."""

    start: int
    stop: int
    key: str
    kind: Kind


def scan(path: Path, tensors: Kinds, heartbeat: Heartbeat, like: str) -> Scanned:
    """Read a shard, whatever it holds: nothing in it is believed before its digest, of the kind of `like`, is
    compared."""
    digest, odd, at = Digest(like), None, 0
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    with open_regular(path) as file:
        head = file.read(LENGTH)
        length = int.from_bytes(head, "little")
        header = file.read(length) if length <= longest_header(len(tensors)) else b""
        digest.update(head)
        digest.update(header)
        ranges = _ranges(header, tensors)
        first = 0
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(view[:count])
            while first < len(ranges) and ranges[first].stop <= at:
                first += 1
            odd = odd or _odd_in(buffer, at, count, ranges[first:] if first else ranges)
            at += count
            heartbeat()
    return Scanned(digest.text, odd, bool(ranges))


def odd_by_name(path: Path, tensors: Kinds) -> tuple[str, str] | None:
    """The same of the entries alone, by the library's reading of the header."""
    with safe_open(path, framework="pt") as file:
        for key, (kind, numel) in tensors.items():
            values = file.get_slice(key)
            for start in range(0, numel, BLOCK):
                if (odd := odd_entry(kind, values[start : min(start + BLOCK, numel)])) is not None:
                    return key, odd
    return None


def _ranges(header: bytes, tensors: Kinds) -> list[_Range]:
    """Where these tensors lie, in order; nothing where the header does not say it of all of them."""
    try:
        tree = json.loads(header)
        found = [(*tree[key]["data_offsets"], key, kind, numel) for key, (kind, numel) in tensors.items()]
        ranges = sorted(_Range(start, stop, key, kind) for start, stop, key, kind, _ in found)
        # A float would do as a number here, and as no place in a buffer.
        fits = all(type(place) is int and place >= 0 for part in ranges for place in part[:2])
        fits = fits and all(start % ENTRY == 0 and stop - start == ENTRY * numel for start, stop, _, _, numel in found)
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return ranges if fits else []


def _odd_in(buffer: bytearray, at: int, count: int, ranges: Sequence[_Range]) -> tuple[str, str] | None:
    """In a block of `count` bytes that begins `at` so many behind the header."""
    for part in _within(ranges, at + count):
        low, high = max(part.start, at) - at, min(part.stop, at + count) - at
        if (entries := (high - low) // ENTRY) > 0:
            values = torch.frombuffer(buffer, dtype=torch.float32, count=entries, offset=low)
            if (odd := odd_entry(part.kind, values)) is not None:
                return part.key, odd
    return None


def _within(ranges: Sequence[_Range], end: int) -> Iterator[_Range]:
    return takewhile(lambda part: part.start < end, ranges)
