"""The planted faults, read from `faults.yaml`, which says what its keys mean."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml


class Fault(NamedTuple):
    """In `file` the text `old` becomes `new`, and one of `tests` is to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _read() -> list[Fault]:
    rooms = yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text(encoding="utf-8"))
    return [Fault(**fault | {"tests": tuple(fault["tests"])}) for faults in rooms.values() for fault in faults]


FAULTS = _read()
