"""Which files the inputs of `megabus preprocess` stand for, and what of them is passed over."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megabus.data.documents import KINDS_TOLD, kind_of, some_of
from megabus.errors import UserError

RESOURCE_FORKS = "__MACOSX"  # where archives made on a Mac keep them
JSON = ".json"  # one array, or objects line by line
OF_JSON = "call it .jsonl if each line is an object, or give its folder as --dataset, which reads arrays too"
NAMED = 3  # how many of what is passed over are named in full


def expand_inputs(patterns: list[str]) -> tuple[list[Path], list[str]]:
    """Files named, matched, or lying under the folders named: sorted within each pattern, each file once.

    A file that is named in full is read, hidden or not, if it is of a kind that can be. What a pattern matches or a
    folder holds is passed over if it is hidden, of another kind, no regular file, or a link to a folder; the second
    list has a line for each pattern that says so. Raises UserError for a pattern that stands for no file, and for a
    file named in full of a kind that is not read.
    """
    files: dict[str, Path] = {}  # by what the links in their paths lead to
    messages: list[str] = []
    for pattern in patterns:
        passed = PassedOver()
        try:
            found = _matches(pattern, passed)
        except OSError as error:
            raise UserError("input", pattern, f"cannot be read ({error})", "check the path") from error
        if not found:
            remedy = "check the path or quote the glob"
            if not glob.has_magic(pattern) and not os.path.lexists(pattern):
                raise UserError("input", pattern or "''", "does not exist" if pattern else "names nothing", remedy)
            problem = f"no readable file is there{passed.text(' (passed over: {})')}"
            arrays = JSON in passed.endings
            raise UserError("input", pattern, problem, OF_JSON if arrays else remedy)
        for file in found:
            if files.setdefault(os.path.realpath(file), file) is not file:
                passed.counts["matched before"] += 1
        if passed.text("{}"):
            messages.append(passed.text(f"of {pattern} passed over: {{}}"))
    return list(files.values()), messages


class PassedOver:
    """What one pattern has matched and is not read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.links: list[Path] = []  # to folders

    def text(self, around: str) -> str:
        """`around` with all of it in place of the braces, or nothing if it is nothing."""
        parts = [f"{count} {what}" for what, count in self.counts.items() if count]
        if self.endings:
            endings = ", ".join(f"{ending or 'none'} {count}" for ending, count in self.endings.most_common())
            parts.append(f"{self.endings.total()} of other endings ({endings})")
        if links := [*dict.fromkeys(self.links)]:
            parts.append(f"{len(links)} links to folders ({some_of(map(str, links), NAMED)})")
        return around.replace("{}", ", ".join(parts)) if parts else ""


def _matches(pattern: str, passed: PassedOver) -> list[Path]:
    path = Path(pattern)
    if pattern and path.is_dir():
        return _below(path, passed)
    if path.is_file():
        if kind_of(path) is None:
            remedy = OF_JSON if JSON in path.suffixes else f"give {KINDS_TOLD}"
            raise UserError("input", path, "unknown kind of file", remedy)
        return [path]
    found: list[Path] = []
    matches = {*map(Path, glob.glob(pattern, recursive=True))}
    # glob has passed over names with a dot that it was not asked for: these are told too, each folder once.
    left = {*map(Path, glob.glob(pattern, recursive=True, include_hidden=True))} - matches
    hidden = {_hidden_top(match, path.parts) or match for match in left}
    for match in sorted(matches):
        if top := _hidden_top(match, path.parts):
            hidden.add(top)
        elif link := _link_above(match, path.parts):
            passed.links.append(link)
        elif not match.is_dir():
            found += [match] if _is_read(match, passed) else []
        elif match.is_symlink():
            passed.links.append(match)
        elif "**" not in pattern:  # which matches what lies below by itself
            found += _below(match, passed)
    passed.counts["hidden"] += len(hidden)
    return found


def _hidden_top(match: Path, parts: Sequence[str]) -> Path | None:
    """The outermost part of a match that is hidden and that the pattern does not ask for."""
    hidden = (depth for depth, name in enumerate(match.parts, 1) if _is_hidden(name) and not _asks_for(name, parts))
    depth = next(hidden, None)
    return None if depth is None else Path(*match.parts[:depth])


def _below(top: Path, passed: PassedOver) -> list[Path]:
    """The files under a folder; what it is called itself does not count."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for root, folders, names in os.walk(top, onerror=refuse):
        hidden = {name for name in (*folders, *names) if _is_hidden(name)}
        passed.counts["hidden"] += len(hidden)
        links = {name for name in folders if name not in hidden and Path(root, name).is_symlink()}
        passed.links += [Path(root, name) for name in sorted(links)]
        found += [path for path in (Path(root, name) for name in names if name not in hidden) if _is_read(path, passed)]
        folders[:] = [name for name in folders if name not in hidden | links]
    return sorted(found)


def _link_above(match: Path, parts: Sequence[str]) -> Path | None:
    """The outermost link to a folder by which `**` came to a match: links that are not named are not followed."""
    fixed = parts.index("**") if "**" in parts else len(match.parts)
    return next((path for path in reversed(match.parents) if len(path.parts) > fixed and path.is_symlink()), None)


def _is_read(path: Path, passed: PassedOver) -> bool:
    if not path.is_file():
        passed.counts["no regular file"] += 1
    elif kind_of(path) is None:
        passed.endings[path.suffix] += 1
    else:
        return True
    return False


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == RESOURCE_FORKS


def _asks_for(name: str, parts: Sequence[str]) -> bool:
    """Whether a pattern spells out that it wants what is hidden, as shells have it."""
    return any(part[:1] == name[:1] and fnmatch.fnmatch(name, part) for part in parts)
