"""A model by its name on the Hugging Face hub, as a directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from megabus.convert.hf_rest import TOKENIZER_FILES
from megabus.errors import UserError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]  # no code, no pickles


def local_copy(path: str | Path) -> Path:
    """The path itself where there is something, or where it is no `owner/name`; else that model of the hub, which is
    fetched if this machine has it not yet. Raises `UserError` where the hub does not give it."""
    name = str(path)
    try:
        there = Path(path).exists()
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise UserError("model", name, f"cannot be looked for ({error.strerror})", "give another path") from error
    if there or not NAME.fullmatch(name):
        return Path(path)
    remedy = f"give a directory, or fetch it elsewhere (hf download {name}) and give what that makes"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        problem = "is no directory, and for models of the hub huggingface_hub is needed"
        raise UserError("model", name, problem, "install it, or give a directory") from error
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        problem = f"is no directory, and the hub does not give it ({' '.join(str(error).split())[:200]})"
        raise UserError("model", name, problem, remedy) from error
