"""GPUs that this machine has, whether torch sees them or not, and what makes them repeat their bits."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from megabus.errors import UserError

NVIDIA, DISPLAY = "0x10de", "0x03"  # of PCI: the vendor, and how the class of a graphics card begins
ROOT = Path("/")
CUBLAS, DETERMINISTIC_CUBLAS = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # as torch demands them


def nvidia_gpus(root: Path = ROOT) -> int:
    """NVIDIA GPUs that the system knows of: by their device files, or on the PCI bus where there is no driver."""
    files = [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    cards = [
        device
        for device in (root / "sys/bus/pci/devices").glob("*")
        if _text(device / "vendor") == NVIDIA and _text(device / "class").startswith(DISPLAY)
    ]
    return max(len(files), len(cards))


def check_no_gpu_is_missed(root: Path = ROOT) -> None:
    """Raises `UserError` where there is a GPU that torch does not see, unless the CPU has been asked for: by
    DS_ACCELERATOR=cpu, or by a CUDA_VISIBLE_DEVICES that names none."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return
    count = nvidia_gpus(root)
    if count and not torch.cuda.is_available():
        driver = _text(root / "sys/module/nvidia/version")
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        remedy = "install a driver or a torch that go together, or set DS_ACCELERATOR=cpu to train on the CPU"
        if torch.version.cuda is None:
            remedy = "install a torch that is built for CUDA, or set DS_ACCELERATOR=cpu to train on the CPU"
        problem = f"this machine has {count}, and torch {torch.__version__}, built for {build}, sees none of them"
        raise UserError("NVIDIA GPUs", "0", f"{problem} (driver: {driver or 'none is loaded'})", remedy)


def compute_deterministically(device: torch.device) -> None:
    """From now on what has no deterministic form raises. Raises `UserError` where cuBLAS has none, which reads its
    setting with the first product (`prepare_environment`)."""
    found = os.environ.get(CUBLAS)
    if device.type == "cuda" and found not in DETERMINISTIC_CUBLAS:
        problem = "cuBLAS adds up in one order, as train.deterministic asks for, with either of "
        problem += f"{' and '.join(DETERMINISTIC_CUBLAS)}"
        raise UserError(CUBLAS, found or "unset", problem, f"set it to {DETERMINISTIC_CUBLAS[0]} in the environment")
    torch.use_deterministic_algorithms(True)
    # Nothing is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # gone, or not for everybody to read
        return ""
