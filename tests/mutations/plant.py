"""Where a fault's text stands in a checkout, and putting the fault there."""

from __future__ import annotations

from pathlib import Path

from tests.mutations.faults import Fault

ROOMS = ("megabus", "launcher", "tools")


def place_of(fault: Fault, root: Path) -> Path:
    """The file: the one that is named, or where it was renamed the only other one with that text.

    Raises LookupError where the text does not stand exactly once.
    """
    named = root / fault.file
    if named.is_file() and (count := _read(named).count(fault.old)):
        if count > 1:
            raise LookupError(f"{fault.file} has {count} times: {fault.old}")
        return named
    found = [path for room in ROOMS for path in sorted((root / room).rglob("*.py")) if fault.old in _read(path)]
    if len(found) != 1 or _read(found[0]).count(fault.old) != 1:
        raise LookupError(f"{fault.file}, or {len(found)} other files, once: {fault.old}")
    return found[0]


def runs_of(fault: Fault, root: Path) -> list[list[str]]:
    """pytest's arguments for each of its tests that are there; an older checkout has them all in one folder."""
    runs = []
    for test in fault.tests:
        path, _, chosen = test.partition(" ")
        whole = root / "tests" / path
        if not whole.is_file():
            whole = root / "tests" / Path(path).name
        if whole.is_file():
            runs.append([str(whole), *(["-k", chosen.strip("'")] if chosen else [])])
    return runs


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
