"""Paths in a YAML file, which no shell has read: `~` and variables are expanded here."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expanded(path: str) -> str:
    """`path` with `~`, `~user`, `$NAME` and `${NAME}` in it written out. Raises ValueError for what has no value."""
    _check_name(path)
    for match in VARIABLE.finditer(path):
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"names the variable {name}, which is not set; set it, or write the path out")
    path = VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)
    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError("begins with a home that is not known; write the path out, or ./~ for a file of this name")
    _check_name(home)
    return home


def _check_name(path: str) -> None:
    """Raise ValueError for what no file can be called, or no checkpoint could tell, whose texts are UTF-8."""
    if "\0" in path:
        raise ValueError("holds a NUL, which no path may; write it out without")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:  # half of a surrogate pair, or a letter that LC_ALL=C has none of
        raise ValueError(f"cannot be a file's name here ({error.reason}); write it in other letters") from error
    try:
        path.encode()
    except UnicodeEncodeError as error:  # a byte of a variable's value, say, that is none
        raise ValueError(f"is {path!a}, which is not UTF-8; give the directory another name") from error


Pathname = Annotated[str, AfterValidator(expanded)]
