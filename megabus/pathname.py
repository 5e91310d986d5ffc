"""Paths that no shell has read, of YAML files and quoted words of a command: `~` and variables are expanded here."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from errno import ENAMETOOLONG
from pathlib import Path

SHOWN = 40  # characters of a name in a message
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
    _check_length(home)
    return home


def _check_length(path: str) -> None:
    """Else each look at it would raise."""
    if "://" in path:  # no file's
        return
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == ENAMETOOLONG:
            raise ValueError(f"{path[:SHOWN]}... is longer than a file's name can be; shorten it") from error


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


def path_text(word: str) -> str:
    """A word of a command that names a path, as `type` of an argument: what there is under this very name, else
    `expanded`. A name of the hub stays as it is."""
    try:
        _check_length(word)
        as_named = os.path.lexists(word) or not (word.startswith("~") or VARIABLE.search(word))
        return word if as_named else expanded(word)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def path_of(word: str) -> Path:
    """The same as a `Path`."""
    return Path(path_text(word))
