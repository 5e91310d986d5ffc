"""A data set that is a local folder: its own regular files are read, each once, and what is passed over is told."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from megabus.data.documents import some_of
from megabus.data.inputs import NAMED
from megabus.errors import UserError
from megabus.plain_file import NotPlainError, check_regular, inside, read_regular

CARD, SETTINGS, SIZES = "README.md", ".huggingface.yaml", "dataset_infos.json"  # what `datasets` reads beside the data
AS_INPUTS = "give what is meant as inputs, without --dataset"
DEPTH = 3  # of a configuration: splits, their patterns; deeper `datasets` reads none


def check_card(folder: Path) -> None:
    """Raise `UserError` for a folder whose card leads out of it: to an address, another folder, or by a link. Before
    `datasets` sees it, which would ask there what files there are."""
    for name in (CARD, SETTINGS, SIZES):
        path = folder / name
        if not os.path.lexists(path):
            continue
        _check_own(folder, path)
        if name != SIZES:
            for place in _places(_said(path)):
                parts = Path(place).parts
                if "::" in place or "://" in place or os.path.isabs(place) or ".." in parts:
                    raise UserError("dataset", path, f"names {place}, which is outside of the folder", AS_INPUTS)


def own_files(folder: Path, files: Iterable[str]) -> list[str]:
    """Those that differ, in their order. Raises `UserError` for one that the folder does not hold, or that is none."""
    found: dict[str, str] = {}  # by what the links in their paths lead to
    for file in files:
        _check_own(folder, Path(file))
        found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def passed_over(folder: Path, splits: dict[str, list[str]], split: str) -> list[str]:
    """What of a folder is in no split, and what this one holds twice, in a line, or none. splits: files by name."""
    top, here = folder.resolve(), splits.get(split, [])
    known = {os.path.abspath(file) for files in splits.values() for file in files}
    found = [os.path.relpath(path, top) for path in _below(top) if os.path.abspath(path) not in known]
    found = [name for name in found if name not in (CARD, SETTINGS, SIZES) and not name.endswith(".py")]
    left = [name for name in found if not any(part.startswith(".") for part in Path(name).parts)]
    parts = [f"{len(found) - len(left)} hidden"] if len(found) > len(left) else []
    if again := len(here) - len({os.path.realpath(file) for file in here}):
        parts.append(f"{again} matched before")
    if left:
        parts.append(f"{len(left)} in no split of it ({some_of(left, NAMED)})")
    return [f"of {folder} passed over: {', '.join(parts)}"] if parts else []


def _check_own(folder: Path, path: Path) -> None:
    try:
        check_regular(inside(path, folder), links=True)
    except NotPlainError as error:
        raise UserError("dataset", path, str(error), AS_INPUTS) from error
    except OSError as error:
        raise UserError("dataset", path, f"cannot be read ({error.strerror})", "check the folder") from error


def _said(path: Path) -> Any:
    """The values at the head of a card, or of a file of them."""
    try:
        text = read_regular(path, links=True).decode("utf-8")
        if path.name == CARD:
            lines = text.lstrip("\ufeff \n").split("\n")
            ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
            text = "\n".join(lines[1 : ends[1]]) if ends[:1] == [0] and len(ends) > 1 else ""
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            "dataset", path, f"is no card that can be read ({' '.join(str(error).split())})", "mend it"
        ) from error


def _places(said: Any) -> Iterator[str]:
    """The paths that configurations name, patterns as they stand."""
    configurations = said.get("configs") if isinstance(said, dict) else None
    for configuration in configurations if isinstance(configurations, list) else []:
        if isinstance(configuration, dict):
            for key in ("data_files", "data_dir"):
                yield from _texts(configuration.get(key))


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth < DEPTH:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner, depth + 1)


def _below(folder: Path) -> list[Path]:
    return sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
