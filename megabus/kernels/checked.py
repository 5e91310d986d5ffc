"""On which GPUs, with which versions, `make gpu-check` has found the Triton kernels to be right (`RECORDS`).

An entry counts for the kernels that were checked. Once their code changes, it has to be checked anew.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch

ROOM = Path(__file__).parent
RECORDS = ROOM / "checked_devices.json"
CODE = ("triton_*.py", "width.py", "adjacent.py")


def this_device(device: torch.device) -> dict[str, str]:
    """What an entry must agree in: the GPU, versions, and a hash of the kernels' code."""
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "kernels": _code(),
    }


def why_unchecked(device: torch.device) -> str | None:
    """What is missing for the Triton kernels to be trusted on a GPU, or None."""
    mine = this_device(device)
    if any(mine.items() <= entry.items() for entry in json.loads(RECORDS.read_text())):
        return None
    where = f"{mine['device']} with torch {mine['torch']} and triton {mine['triton']}"
    return f"the Triton kernels, as they are now, have not been checked on {where}: `make gpu-check` does that"


def record(mine: dict[str, str], date: str, path: Path) -> None:
    """Write down that the check has passed on what `this_device` told; entries of older kernels go."""
    entries = [entry for entry in json.loads(path.read_text()) if entry["kernels"] == mine["kernels"]]
    entries = [entry for entry in entries if not mine.items() <= entry.items()]
    path.write_text(json.dumps([*entries, mine | {"date": date}], indent=1) + "\n")


@lru_cache(maxsize=1)
def _code() -> str:
    files = sorted(path for pattern in CODE for path in ROOM.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
