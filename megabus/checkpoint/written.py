"""A configuration as a checkpoint holds it: all of a version's keys, each as a program writes its value."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megabus.config import RunConfig
from megabus.plain_file import shown


def less(section: Any, said: Any) -> Any:
    """A section less those of its keys that came later than what is said of it. What is none stays as it is."""
    if not (isinstance(section, dict) and isinstance(said, dict)):
        return section
    return {key: less(value, said[key]) for key, value in section.items() if key in said}


def check_types(config: dict[str, Any]) -> None:
    """Raise ValueError for a value of another type than its key has, and for a key that is missing: what came later has
    a default. Ranges may have been others in other versions."""
    try:
        read = RunConfig.model_validate(config)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            wrong = one["type"].endswith(("_type", "_parsing", "_from_float")) or isinstance(one["input"], bool)
            if wrong or one["type"] == "missing":
                raise ValueError(f"config.{'.'.join(map(str, one['loc']))}: {one['msg']}") from error
    else:
        _check_written("config", config, read.model_dump(mode="json"))


def _check_written(key: str, said: Any, now: Any) -> None:
    """A program wrote it: what a person may write otherwise, "9" or 9.0 or true for a number, is damage."""
    if isinstance(said, dict) and isinstance(now, dict):
        for name in said.keys() & now.keys():
            _check_written(f"{key}.{name}", said[name], now[name])
    elif isinstance(said, list) and isinstance(now, list):
        for number, (one, other) in enumerate(zip(said, now, strict=False)):
            _check_written(f"{key}.{number}", one, other)
    elif type(said) is not type(now) and not (type(said) is int and type(now) is float):
        raise ValueError(f"{key}: {shown(said)} is no {type(now).__name__} as it is saved")


def section_of(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {shown(value)} is no section")
    return value
