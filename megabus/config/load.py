"""From a YAML file and `key=value` overrides to a typed `RunConfig`, or one line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megabus.config.auto import AUTO, written_out
from megabus.config.schema import RunConfig, Section
from megabus.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply dotted overrides (`train.max_tokens=1e6`, `growth.stages.0.d_model=96`), validate.

    Raises `UserError` naming the first key that is unknown, of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("--config", path, "no such file", "give the path of a YAML file such as configs/demo.yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("--config", path, f"not valid YAML ({error})", "mend the file") from error
    if not isinstance(tree, dict):
        raise UserError("--config", path, "holds no keys", "start from configs/demo.yaml")
    had_stages = isinstance(tree.get("growth"), dict) and bool(tree["growth"].get("stages"))
    for override in overrides:
        _apply(tree, override)
    if had_stages and tree.get("growth") == AUTO:
        problem = "would end with the file's first size, and the file names larger ones"
        raise UserError("growth", AUTO, problem, "write it into a file whose model section is the size to end with")
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Validate a plain tree of keys and values; `growth: auto` is written out."""
    try:
        if tree.get("growth") == AUTO:
            tree = tree | written_out(RunConfig.model_validate(tree | {"growth": {}}))
        if isinstance(tree.get("growth"), str):
            raise UserError("growth", tree["growth"], "is no section of keys", f"write {AUTO}, or the sizes to grow to")
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _first(error, RunConfig) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError("override", override, "is not of the form key=value", "write e.g. train.max_tokens=1e6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(key, text, f"is not a YAML value ({error})", "quote the value") from error
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, key, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str, upto: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    child = node.setdefault(part, {})
    if child is None:
        child = node[part] = {}
    if not isinstance(child, dict | list):
        raise UserError(key, child, f"{upto} is a value, not a section", f"override {upto} itself")
    return child


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        remedy = f"use 0 to {len(node) - 1}" if node else "give the whole list"
        raise UserError(key, part, f"is no index of a list of {len(node)}", remedy)
    return int(part)


def _first(error: ValidationError, root: type[Section]) -> UserError:
    first = error.errors()[0]
    where, known = _locate(root, first["loc"])
    key, value = ".".join(where), first["input"]
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(sorted(known))}"
        return UserError(".".join([*where, unknown]), value, "unknown key", hint)
    if first["type"] == "missing":
        return UserError(key, "(missing)", "this key is needed", "add it to the file or as an override")
    return UserError(key, value, first["msg"], "give a value of that kind")


def _locate(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """The known part of an error's path, and the keys known at its end.

    Pydantic names the tried members of a union in the path; they are no keys, and are passed over.
    """
    path: list[str] = []
    known = root.model_fields
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
        elif part in known:
            path.append(part)
            leaves = _flatten(known[part].annotation)
            sections = [t for t in leaves if isinstance(t, type) and issubclass(t, BaseModel)]
            known = sections[0].model_fields if sections else {}
    return path, list(known)


def _flatten(annotation: Any) -> list[Any]:
    return [annotation, *(leaf for arg in get_args(annotation) for leaf in _flatten(arg))]
