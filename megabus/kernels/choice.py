"""Which form of the functions a run computes with."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from megabus.errors import UserError
from megabus.kernels.checked import why_unchecked
from megabus.kernels.form import EAGER, Kernels
from megabus.kernels.generation import older_than
from megabus.kernels.width import too_wide

Choice = Literal["auto", "eager", "compiled", "triton"]
# The oldest GPUs that each form runs on, as Triton's README and torch/_inductor/exc.py:GPUTooOldForTriton say.
OLDEST = {"triton": (8, 0), "compiled": (7, 0)}


def automatic(device: torch.device, rows: Iterable[Sequence[int]] = ()) -> tuple[Choice, str | None]:
    """What `auto` stands for where kernels get such rows (see `too_wide`), and on a GPU why it is not Triton's form.

    On a CPU, compiling takes a minute once a machine, and pays only in runs of hours. On a GPU nobody gets Triton's
    kernels unasked before they have been found right on it.
    """
    if device.type != "cuda":
        return "eager", None
    problems = (why_not("triton", device), *(why_not_wide("triton", *axes) for axes in rows))
    problem = next((problem for problem in problems if problem is not None), None) or why_unchecked(device)
    return ("triton", None) if problem is None else ("eager", problem)


def select(choice: Choice, device: torch.device, rows: Iterable[Sequence[int]] = ()) -> Kernels:
    """The form that `train.kernels` asks for, of kernels that get such rows. Raises `UserError` where it cannot run on
    `device`."""
    if choice == "auto":
        choice, _ = automatic(device, rows)
    problem = why_not(choice, device)
    if problem is not None:
        raise UserError("train.kernels", choice, problem, "use auto or eager")
    # Imported when asked for: they need packages that are not everywhere, and time.
    if choice == "compiled":
        from megabus.kernels.compiled import COMPILED

        return COMPILED
    if choice == "triton":
        from megabus.kernels.triton_form import TRITON

        return TRITON
    return EAGER


def why_not_wide(choice: Choice, *axes: int) -> str | None:
    """Why a form cannot hold rows of so many entries along `axes`, or None; only Triton's has a limit, for which `auto`
    takes another."""
    return too_wide(*axes) if choice == "triton" else None


def why_not(choice: Choice, device: torch.device) -> str | None:
    """Why a form cannot run on a device, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "triton" and find_spec("triton") is None:
        return "needs the package triton, which comes with torch for CUDA"
    if choice == "triton" and device.type != "cuda" and not interpreted:
        return f"needs an NVIDIA GPU, and this run is on the {device.type}"
    if choice == "compiled" and device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs the package triton on a GPU"
    if choice in OLDEST and device.type == "cuda" and (older := older_than(OLDEST[choice], device)) is not None:
        return older
    if choice == "compiled":
        return _no_compiler("torch.compile", device)
    return _no_compiler("Triton", device) if choice == "triton" and not interpreted else None


def _no_compiler(who: str, device: torch.device) -> str | None:
    """Why code cannot be compiled when a step first asks for it, or None. On a GPU too: what starts a kernel is C."""
    language, names = "C++", [os.environ.get("CXX", "g++")]
    if device.type != "cpu":
        language, names = "C", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"{who} needs a {language} compiler, and there is no {' or '.join(names)}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"{who} compiles against Python.h, and there is no {header} (package python3-dev or python3-devel)"
    return None
