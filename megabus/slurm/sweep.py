"""Sweeps: from what a user writes to the overrides of every member of an array job."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path

from megabus.errors import UserError
from megabus.plain_file import NotPlainError, read_regular

OPEN, CLOSE, QUOTES = "[{(", ")}]", "\"'"


def expand(sweeps: Sequence[str], overrides: Sequence[str] = ()) -> list[list[str]]:
    """The members of a sweep, each a list of `key=value` overrides: all combinations of what is given.

    Each of `sweeps` is `key=value,value,...` (commas inside brackets and quotes do not separate), or the path of a file
    with one member a line, written as overrides are on a command line; `#` begins a comment.
    Raises `UserError` for one that is neither, and for a key that a member would have twice, or that `overrides` give
    to all members.
    """
    members = [list(chain(*parts)) for parts in product(*map(_members, sweeps))]
    given = [override.partition("=")[0] for override in overrides]
    for member in members:
        keys = Counter(override.partition("=")[0] for override in member)
        twice = [key for key, times in keys.items() if times > 1]
        if twice:
            raise UserError("--array", " ".join(member), f"gives {twice[0]} twice", "give each key once")
        common = [key for key in given if any(_overlap(key, other) for other in keys)]
        if common:
            problem = f"changes {common[0]}, which the command line gives to all members"
            raise UserError("--array", " ".join(member), problem, "give the key in one of the two places")
        if "run_dir" in keys:
            problem = "gives run_dir, and every member gets one of its own under the run_dir of the file"
            raise UserError("--array", " ".join(member), problem, "leave it out")
    for number, member in enumerate(members):
        if member in members[:number]:
            raise UserError("--array", " ".join(member), "is given twice", "name every member once")
    return members


def _overlap(one: str, other: str) -> bool:
    """Whether one key is the other or lies within it."""
    short, long = sorted((f"{one}.", f"{other}."), key=len)
    return long.startswith(short)


def folder(index: int, member: Sequence[str]) -> str:
    """The name of a member's directory: its place in the sweep, and what it changes as far as a file name can say."""
    said = re.sub(r"[^\w.=,+-]+", "_", ",".join(member), flags=re.ASCII)
    return f"{index}_{said}"[:100]


def _members(text: str) -> list[list[str]]:
    key, equals, values = text.partition("=")
    if not equals or os.path.isfile(text):
        return _lines(Path(text))
    found = _split(values)
    if not key or "" in found:
        raise UserError("--array", text, "is not of the form key=value,value", "write e.g. optimizer.lr=1e-3,2e-3")
    return [[f"{key}={value}"] for value in found]


def _lines(path: Path) -> list[list[str]]:
    try:
        lines = [
            shlex.split(line, comments=True) for line in read_regular(path, links=True).decode("utf-8").splitlines()
        ]
    except NotPlainError as error:
        raise UserError("--array", path, str(error), "give key=value,value or a file with one member a line") from error
    except OSError as error:
        remedy = "give key=value,value or a file with one member a line"
        raise UserError("--array", path, f"cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise UserError("--array", path, f"is not text as a shell reads it ({error})", "mend the file") from error
    members = [line for line in lines if line]
    if not members:
        raise UserError("--array", path, "has no member", "write one line of key=value overrides a member")
    return members


def _split(values: str) -> list[str]:
    """At commas that no bracket or quote encloses."""
    parts, depth, quote = [""], 0, ""
    for char in values:
        if char == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += char
        if quote:
            quote = "" if char == quote else quote
        elif char in QUOTES:
            quote = char
        else:
            depth += (char in OPEN) - (char in CLOSE)
    return [part.strip() for part in parts]
