"""YAML files and pydantic's complaints: what is read, and what is wrong with it in one line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megabus.errors import UserError
from megabus.plain_file import NotPlainError, read_regular

SHOWN = 200  # characters of a wrong value
OLD_NUMBER = re.compile(r"[-+]?0_*[0-7][0-7_]*$|.*:")  # octal, or in sixties


class NotMeantError(ValueError):
    """YAML that says something, and not what anyone means who writes it today. key: where it stands, dotted."""

    def __init__(self, key: str, value: str, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(f"{key} = {value}: {problem}; {remedy}")

    def as_user_error(self, *above: str) -> UserError:
        """As bad input. above: keys that what was read stands under."""
        return UserError(".".join(filter(None, [*above, self.key])), self.value, self.problem, self.remedy)


def _check_meant(loader: yaml.SafeLoader, root: yaml.Node) -> None:
    """YAML forbids a key twice in one mapping; PyYAML takes the last and says nothing. And it reads YAML 1.1, to which
    0100 is octal and 1:30 counts in sixties. Raises `NotMeantError` about the first such, in the order of the text."""
    left: list[tuple[str, yaml.Node]] = [("", root)]
    seen: set[int] = set()  # aliases name a part again and again
    while left:
        key, node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        inner: list[tuple[str, yaml.Node]] = []
        if isinstance(node, yaml.ScalarNode):
            _check_number(loader, key, node)
        elif isinstance(node, yaml.SequenceNode):
            inner = [(f"{key}.{number}".lstrip("."), part) for number, part in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            names: set[tuple[str, str]] = set()
            for name, part in node.value:  # as they are written: what `<<` merges comes later
                below = f"{key}.{name.value}".lstrip(".") if isinstance(name, yaml.ScalarNode) else key
                if isinstance(name, yaml.ScalarNode):
                    if (name.tag, name.value) in names:
                        value = part.value if isinstance(part, yaml.ScalarNode) else "(a section)"
                        raise NotMeantError(below, value, "stands twice", "delete one of the two")
                    names.add((name.tag, name.value))
                inner += [(below, name), (below, part)]
        left += reversed(inner)


def _check_number(loader: yaml.SafeLoader, key: str, node: yaml.ScalarNode) -> None:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind in ("int", "float") and OLD_NUMBER.match(node.value):
        read = loader.construct_yaml_int if kind == "int" else loader.construct_yaml_float
        problem = f"is {read(node)} in YAML 1.1"
        raise NotMeantError(key, node.value, problem, "write the number that is meant, or quote it")


def yaml_value(text: str) -> Any:
    """What a YAML text says. Raises ValueError where it says nothing, and `NotMeantError`."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_meant(loader, node)
        return loader.construct_document(node)
    except NotMeantError:
        raise
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets through what its own constructors of dates, numbers and switches fall over.
        raise ValueError(_short(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _short(error: Exception) -> str:
    """PyYAML's complaint with its place, and without an excerpt of the text."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error) or type(error).__name__
    context = [getattr(error, name) for name in ("context", "problem") if getattr(error, name)]
    return f"line {mark.line + 1}, column {mark.column + 1}: {', '.join(context)}"


def read_tree(path: Path, key: str, start_from: str) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises `UserError` about `key` where there is none to be had; `start_from`: a
    file that shows how one looks."""
    try:
        text = read_regular(path, links=True)
    except FileNotFoundError:
        raise UserError(key, path, "no such file", f"give the path of a YAML file such as {start_from}") from None
    except OSError as error:
        raise UserError(key, path, f"cannot be read ({error.strerror})", "name a YAML file that can") from error
    except NotPlainError as error:
        raise UserError(key, path, str(error), f"give the path of a YAML file such as {start_from}") from error
    except ValueError as error:  # a NUL in the path
        raise UserError(key, path, f"is no path ({error})", "name a YAML file") from error
    try:
        tree = yaml_value(text.decode("utf-8"))
    except NotMeantError as error:
        raise error.as_user_error() from error
    except ValueError as error:
        raise UserError(key, path, f"not valid YAML ({error})", "mend the file") from error
    if not isinstance(tree, dict):
        raise UserError(key, path, "holds no keys", f"start from {start_from}")
    return tree


def described(error: ValidationError, root: type[BaseModel], add: str = "add it") -> UserError:
    """One of pydantic's complaints about a `root`: the key as it stands in the file, and a remedy.

    `add`: the remedy for a key that is missing.
    """
    found = error.errors()
    first = _closest(root, found)
    where, known = _locate(root, first["loc"])
    key, value = ".".join(where), _shown(first["input"])
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(sorted(known))}"
        return UserError(".".join([*where, unknown]), value, "unknown key", hint)
    if first["type"] == "missing":
        return UserError(key, "(missing)", "this key is needed", add)
    # All that a union would take: pydantic complains about each of its members.
    complaints = [one for one in found if _locate(root, one["loc"])[0] == where]
    if all(one["type"] == "model_type" for one in complaints):
        remedy = f"give its keys ({', '.join(sorted(known))})"
        if isinstance(first["input"], bool):  # meant to switch on what it does
            needed = ", ".join(name for name, field in known.items() if field.is_required())
            remedy += f", {needed} at least" if needed else ", or write {} for their defaults"
        return UserError(key, value, "is no section of keys", remedy)
    if all(one["type"] == "dict_type" for one in complaints):
        return UserError(key, value, "is no section of keys", "give names and values")
    if first["type"] == "value_error":  # our own: what is wrong; what to do
        problem, _, remedy = str(first["ctx"]["error"]).partition("; ")
        return UserError(key, value, problem, remedy or "give another value")
    kinds = dict.fromkeys(one["msg"] for one in complaints)
    return UserError(key, value, ", or: ".join(kinds), "give a value of that kind")


class _Short(reprlib.Repr):
    """What stands for a value whose whole text may be endless: aliases of YAML name a part again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict = 4, 20, 20
        self.maxstring = self.maxlong = self.maxother = 2 * SHOWN


def _shown(value: Any) -> Any:
    """A value, or the beginning of a long one, such as a whole line of a file."""
    text = _Short().repr(value) if isinstance(value, dict | list | tuple | set) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _closest(root: type[BaseModel], found: Sequence[Any]) -> Any:
    """The complaint to tell: of an unknown key, since what is missing may be there, misspelt; else the first, or of
    those within its value the deepest, where a union comes closest to what was meant."""
    if unknown := next((one for one in found if one["type"] == "extra_forbidden"), None):
        return unknown
    where = _locate(root, found[0]["loc"])[0]
    paths = [_locate(root, one["loc"])[0] for one in found]
    return max(zip(paths, found, strict=True), key=lambda x: len(x[0]) if x[0][: len(where)] == where else -1)[1]


def _locate(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], dict[str, FieldInfo]]:
    """The known part of an error's path, and the keys known at its end.

    Pydantic names the tried members of a union in the path; they are no keys, and are passed over.
    """
    path: list[str] = []
    known = root.model_fields
    any_name = False  # the next part is a key of a mapping of sections, which has any name
    for part in loc:
        if isinstance(part, int) or any_name:
            path.append(str(part))
            any_name = False
        elif part in known:
            path.append(part)
            leaves = parts_of(known[part].annotation)
            sections = [t for t in leaves if isinstance(t, type) and issubclass(t, BaseModel)]
            any_name = bool(sections) and get_origin(known[part].annotation) is dict
            known = sections[0].model_fields if sections else {}
    return path, known


def parts_of(annotation: Any) -> list[Any]:
    """A type, and all the types that it is made of."""
    return [annotation, *(leaf for arg in get_args(annotation) for leaf in parts_of(arg))]
