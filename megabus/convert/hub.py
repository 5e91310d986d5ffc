"""A model by its name on the Hugging Face hub, as a directory on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megabus.convert.hf_rest import TOKENIZER_FILES
from megabus.errors import UserError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]  # no code, no pickles


def of_hub(path: str | Path) -> bool:
    """Whether it is an `owner/name`, and nothing on this machine."""
    try:
        there = Path(path).exists()
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise UserError("model", path, f"cannot be looked for ({error.strerror})", "give another path") from error
    return NAME.fullmatch(str(path)) is not None and not there


def local_copy(path: str | Path, files: Sequence[str] = FILES) -> Path:
    """The path itself, or the directory of a model of the hub, of which `files` (patterns) are fetched if this machine
    has them not yet. Raises `UserError` where the hub does not give it."""
    name = str(path)
    if not of_hub(path):
        return Path(path)
    remedy = f"give a directory, or fetch it elsewhere (hf download {name}) and give what that makes"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        problem = "is no directory, and for models of the hub huggingface_hub is needed"
        raise UserError("model", name, problem, "install it, or give a directory") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        problem = f"is no directory, and the hub does not give it ({' '.join(str(error).split())[:200]})"
        raise UserError("model", name, problem, remedy) from error
