"""Models and tokenizers by their names on the Hugging Face hub, as directories on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megabus.errors import UserError

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
LONGEST = 100  # letters of what is said of an error
OF_FILES = (".model", ".json", ".tiktoken")  # how names of files end, and none of the hub's


def of_hub(path: str | os.PathLike[str], key: str = "model") -> bool:
    """Whether it is an `owner/name`, and nothing on this machine: where there is such a directory as `owner`, a name in
    it that is not there is a slip. key: what a path that cannot be looked for is told under."""
    there = Path(path)
    try:
        if there.exists() or there.is_symlink():
            return False
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise UserError(key, path, f"cannot be looked for ({error.strerror})", "give another path") from error
    named = NAME.fullmatch(os.fspath(path)) is not None and there.suffix not in OF_FILES
    return named and not there.parent.is_dir()


def _why(error: Exception) -> str:
    """In a line: the library's own errors go on about connections and caches."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "it knows no such name, or one that needs a login: hf auth login"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return said.removeprefix("Got: ")[:LONGEST]


def local_copy(path: str | os.PathLike[str], files: Sequence[str], key: str = "model") -> Path:
    """The path itself, or the directory of what has that name on the hub, of which `files` (patterns) are fetched if
    this machine has them not yet. Raises `UserError` under `key` where the hub does not give it."""
    if not os.fspath(path):
        raise UserError(key, "''", "names nothing", "give a path, or a name of the hub")
    if not of_hub(path, key):
        return Path(path)
    name = os.fspath(path)
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the library it asks by

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError, HTTPError) as error:  # of the first two the library's own errors are
        problem = f"is nothing on this machine, and the hub does not give it ({_why(error)})"
        remedy = f"give a path, or fetch it elsewhere (hf download {name}) and give what that makes"
        raise UserError(key, name, problem, remedy) from error
