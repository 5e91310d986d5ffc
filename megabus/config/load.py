"""From a YAML file and `key=value` overrides to a typed `RunConfig`, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megabus.config.after_growth import AFTER_GROWTH
from megabus.config.auto import AUTO, written_out
from megabus.config.read import NotMeantError, described, read_tree, yaml_value
from megabus.config.schema import RunConfig
from megabus.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply dotted overrides (`train.max_tokens=1e6`, `growth.stages.0.d_model=96`), validate.

    Raises `UserError` naming the first key that is unknown, of the wrong type or out of range.
    """
    tree = read_tree(Path(path), "--config", "configs/demo.yaml")
    had_stages = isinstance(tree.get("growth"), dict) and bool(tree["growth"].get("stages"))
    for override in overrides:
        _apply(tree, override)
    _check_undone(tree, overrides)
    if had_stages and _at(tree, "growth.stages") == []:
        _drop_growths(tree["growth"], overrides)
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
        raise described(error, RunConfig, "add it to the file or as an override") from None


def _drop_growths(growth: dict[str, Any], overrides: Sequence[str]) -> None:
    """`growth.stages=[]` says "do not grow": where the file's first size would have ended, and how the steps after a
    growth would have differed, matters no more."""
    for name in ("max_tokens", "max_flops", *AFTER_GROWTH):
        if not any(override.startswith((f"growth.{name}=", f"growth.{name}.")) for override in overrides):
            growth.pop(name, None)


def _check_undone(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """The same key again is a change of mind. A section over a key of its own is an accident."""
    said = [override.partition("=")[::2] for override in overrides]
    for number, (key, text) in enumerate(said):
        above = [(other, value) for other, value in said[number + 1 :] if key.startswith(f"{other}.")]
        if above and _at(tree, key) != yaml_value(text):
            other, value = above[-1]
            raise UserError(other, value, f"would undo {key}={text}, which comes before", "leave one of the two out")


def _at(tree: Any, key: str) -> Any:
    """The value that a key has in the end; None where there is none, which is what a key set to null has."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)] if part.isdecimal() and int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError("override", override, "is not of the form key=value", "write e.g. train.max_tokens=1e6")
    try:
        value = yaml_value(text)
    except NotMeantError as error:
        raise error.as_user_error(key) from error
    except ValueError as error:
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
    """A section or list within another; a section that is not there, or null, is made."""
    at: Any = _index(node, part, key) if isinstance(node, list) else part
    child = node[at] if isinstance(node, list) else node.get(at)
    if child is None:
        child = node[at] = {}
    if not isinstance(child, dict | list):
        raise UserError(upto, child, "is a value, not a section", f"leave out {key}, or override {upto} itself")
    return child


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        remedy = f"use 0 to {len(node) - 1}" if node else "give the whole list"
        raise UserError(key, part, f"is no index of a list of {len(node)}", remedy)
    return int(part)
