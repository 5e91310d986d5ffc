"""Modules that are imported when they are first used, not when pytest collects the file that uses them.

Each worker collects all files, and every rank of every test is a fork of a worker: what is heavy and used by few tests
would make all forks slower.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """A module by its name; its names are asked for as of the module itself. Raises ImportError at the first one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
