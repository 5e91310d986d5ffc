"""Files that others may have written: only regular ones are opened, their size is bounded, and JSON is plain JSON."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

LARGEST = 64 << 20  # bytes of a JSON file: it takes some twenty times as much in memory
VALUES, BULK = 1 << 21, 1 << 23  # values of a JSON file, and of one with millions: each takes a hundred bytes of memory
DEEPEST = 32  # levels of lists and objects in each other: more would end in Python's limit of recursion
_HALF = re.compile("[\ud800-\udfff]")  # what no UTF-8 can hold
SHOWN = 60  # characters of a value in a message


class NotPlainError(ValueError):
    """A file is there, and is not one that may be read."""


def check_regular(path: Path, links: bool = False) -> int:
    """Its bytes. Raises `NotPlainError` for a link (unless `links`), a device, a pipe or a directory; OSError."""
    return _checked(path.stat() if links else path.lstat())


def open_regular(path: Path, links: bool = False) -> IO[bytes]:
    """The file, open to be read; a pipe that nobody writes to is not waited for. Raises as `check_regular` does."""
    check_regular(path, links)  # a device may act on being opened
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
    try:
        _checked(os.fstat(file))  # the name may mean another file by now
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def _checked(found: os.stat_result) -> int:
    if stat.S_ISLNK(found.st_mode):
        raise NotPlainError("is a symbolic link, and only regular files are read")
    if not stat.S_ISREG(found.st_mode):
        raise NotPlainError("is no regular file")
    return found.st_size


def read_regular(path: Path, limit: int = LARGEST, links: bool = False) -> bytes:
    """Its bytes. Raises `NotPlainError` too where there are more than `limit`."""
    with open_regular(path, links) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise NotPlainError(f"has more than {limit} bytes")
    return raw


BLOBS, SNAPSHOTS = "blobs", "snapshots"  # of a model in the hub's cache, whose snapshots hold links to its blobs


def inside(path: Path, root: Path | None = None) -> Path:
    """What a file of a directory is, or leads to. Raises `NotPlainError` for a link out of the directory (`root`, of a
    file further below it), unless to the blobs of the same model in the hub's cache: else whoever makes a directory has
    any file of ours read or copied."""
    try:
        folder, found = (root or path.parent).resolve(), path.resolve()
    except RuntimeError as error:  # links in a circle
        raise NotPlainError(f"cannot be read ({error})") from error
    blobs = [folder.parents[1] / BLOBS] if folder.parent.name == SNAPSHOTS else []
    if not any(found.is_relative_to(place) for place in (folder, *blobs)):
        if path.is_symlink() or root is None:
            raise NotPlainError(f"is a link to {found}, outside of the directory")
        raise NotPlainError(f"leads to {found}, outside of the directory")
    return found


def parse_json(raw: bytes) -> Any:
    """What JSON in UTF-8 says. Raises ValueError for what is none, and for what JSON allows and nobody writes: a key
    twice, NaN and infinities, more than `DEEPEST` levels or `VALUES` values, and NUL or half a character (a lone
    surrogate) in a text."""
    tree = parse_bulk_json(raw, VALUES)
    _check_plain(tree)
    return tree


def parse_bulk_json(raw: bytes, most: int = BULK) -> Any:
    """The same for files of millions of values, of which only a few are looked at: texts may hold NUL, and numbers may
    be beyond what a float holds. most: values that it may hold, told by the signs before and between them."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"holds more than {most} values")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"nests deeper than {DEEPEST} levels") from None


def shown(value: object) -> str:
    """A value in a message: short, in one line, and without what a terminal would obey."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return tree


def deeper_than(tree: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other deeper than that."""
    return any(depth > levels for depth, _ in _by_level(tree))


def _by_level(tree: Any) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """The values of a tree with their dotted keys, and how many lists and objects they stand in: level by level, since
    it may be deeper than Python can call."""
    depth, level = 0, [("", tree)]
    while level:
        yield depth, level
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                below += [(f"{key}.{name}" if key else name, part) for name, part in value.items()]
            elif isinstance(value, list):
                below += [(f"{key}.{number}", part) for number, part in enumerate(value)]
        depth, level = depth + 1, below


def _check_plain(tree: Any) -> None:
    for depth, level in _by_level(tree):
        if depth > DEEPEST:
            raise ValueError(f"{shown(level[0][0])} nests deeper than {DEEPEST} levels")
        for key, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{shown(key)} is {value}")
            for text in (key, value) if isinstance(value, str) else (key,):
                if "\0" in text:
                    raise ValueError(f"{shown(key)} holds a NUL")
                if not text.isascii() and _HALF.search(text):
                    raise ValueError(f"{shown(key)} holds a lone surrogate")
