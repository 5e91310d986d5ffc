"""Paths in a YAML file, which no shell has read: `~` and variables are expanded here."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expanded(path: str) -> str:
    """`path` with `~`, `~user`, `$NAME` and `${NAME}` in it written out. Raises ValueError for what has no value."""
    if "\0" in path:
        raise ValueError("holds a NUL, which no path may; write it out without")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:  # half of a surrogate pair, or a letter that LC_ALL=C has none of
        raise ValueError(f"cannot be a file's name here ({error.reason}); write it in other letters") from error
    for match in VARIABLE.finditer(path):
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"names the variable {name}, which is not set; set it, or write the path out")
    path = VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)
    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError("begins with a home that is not known; write the path out, or ./~ for a file of this name")
    return home


Pathname = Annotated[str, AfterValidator(expanded)]
