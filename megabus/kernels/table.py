"""Which form of the functions runs where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any, Literal

import torch

from megabus.errors import UserError
from megabus.kernels import eager

Choice = Literal["auto", "eager", "compiled", "triton"]
# On a CPU, compiling (a minute, once a machine) pays only in runs of hours. On a GPU the other forms have not been run
# yet: until they are measured there to be right and faster, nobody gets them without asking.
AUTO: Choice = "eager"
# A Triton kernel holds a row whole, in registers: twice as many entries would spill (tests/support/compile_triton.py looks).
MAX_WIDTH = 8192


@dataclass(frozen=True)
class Kernels:
    """The functions of `megabus.kernels.eager` in one form; see there what each computes."""

    name: str
    residual: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_unit: Callable[..., Any]
    gate: Callable[..., Any]
    unit_rows_: Callable[..., Any]


FUNCTIONS = tuple(name for name in Kernels.__dataclass_fields__ if name != "name")
EAGER = Kernels("eager", **{name: getattr(eager, name) for name in FUNCTIONS})


def select(choice: Choice, device: torch.device) -> Kernels:
    """The functions that `train.kernels` asks for. Raises `UserError` where they cannot run on `device`."""
    if choice == "auto":
        choice = AUTO
    problem = why_not(choice, device)
    if problem is not None:
        raise UserError("train.kernels", choice, problem, "use auto or eager")
    if choice == "compiled":
        from megabus.kernels.compiled import COMPILED

        return COMPILED
    if choice == "triton":
        from megabus.kernels.triton_table import TRITON

        return TRITON
    return EAGER


def padded(*axes: int) -> int:
    """Entries of a row of Triton's: each axis is filled up to a power of two."""
    return prod(1 << (max(length, 1) - 1).bit_length() for length in axes)


def why_not_wide(choice: Choice, *axes: int) -> str | None:
    """Why a form cannot hold rows of so many entries along `axes` (d_model, or heads and head_dim), or None."""
    width = padded(*axes)
    if (AUTO if choice == "auto" else choice) != "triton" or width <= MAX_WIDTH:
        return None
    filled = f", padded to {width}," if width != prod(axes) else ""
    return f"rows of {' x '.join(map(str, axes))}{filled} exceed {MAX_WIDTH}"


def why_not(choice: Choice, device: torch.device) -> str | None:
    """Why a form cannot run on a device, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "triton" and find_spec("triton") is None:
        return "needs the package triton, which comes with torch for CUDA"
    if choice == "triton" and device.type != "cuda" and not interpreted:
        return f"needs an NVIDIA GPU, and this run is on the {device.type}"
    if choice == "compiled" and device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs the package triton on a GPU"
    compiler = os.environ.get("CXX", "g++")
    if choice == "compiled" and device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return None
