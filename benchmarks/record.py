"""The record of what was measured, a part of the benchmarks at a time, and the tables that a page shows of it.

The record is a JSON file by parts (`step`, `gpu step`): each with its rows, the machine, the date, the commit, how long
it took and how busy the machine was when it began. Measuring a part anew replaces that part alone. Where a page has a
line `<!-- bench: PART -->`, everything up to `<!-- end -->` is the record's, and a test holds the page to it.
`python -m benchmarks.record` fills docs/performance.md in anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.comparisons import Comparison, markdown

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "benchmarks/measured.json"
PAGE = ROOT / "docs/performance.md"
PART = re.compile(r"(<!-- bench: ((?:gpu )?\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Record = dict[str, dict[str, Any]]


def read(path: Path) -> Record:
    """Empty where there is none yet. Raises ValueError on one that is not JSON."""
    return json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}


def keep(path: Path, part: str, found: list[Comparison], facts: Mapping[str, Any]) -> None:
    record = read(path) | {part: {**facts, "rows": [row.as_dict() for row in found]}}
    path.write_text(json.dumps(record, indent=1) + "\n")


def comparisons(part: Mapping[str, Any]) -> list[Comparison]:
    found = []
    for row in part["rows"]:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        del fields["met"]
        found.append(Comparison(**fields))
    return found


def shown(record: Record, name: str) -> str:
    """A part's table and where its figures come from; nothing of a part that was not measured."""
    if name not in record:
        return ""
    part = record[name]
    facts = f"{part['machine']}; torch {part['torch']}; {part['date']}, commit {part['commit']}"
    took = f"{part['seconds']:.0f} s, load {part['load']:.1f} before"
    words = " ".join([*(["--gpu"] if name.startswith("gpu ") else []), "--only", name.split()[-1]])
    return f'{markdown(comparisons(part))}\n\n(`make bench BENCH="{words}"`: {facts}; {took}.)\n'


def filled(text: str, record: Record) -> str:
    """A page with the record's tables in their places."""
    return PART.sub(lambda match: match[1] + shown(record, match[2]) + match[3], text)


def fill() -> None:
    """docs/performance.md, from the record of this repository."""
    PAGE.write_text(filled(PAGE.read_text(), read(OURS)))


if __name__ == "__main__":
    fill()
