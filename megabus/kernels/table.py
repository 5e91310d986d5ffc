"""Which form of the functions runs where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megabus.kernels import eager


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
