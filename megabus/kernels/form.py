"""One form of the functions, and the form that runs anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from megabus.kernels import eager


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions of `megabus.kernels.eager` in one form; see there what each computes."""

    name: str
    residual: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_unit: Callable[..., Any]
    attention: Callable[..., Any]
    gate: Callable[..., Any]
    unit_rows_: Callable[..., Any]


FUNCTIONS = tuple(field.name for field in fields(Kernels) if field.name != "name")
EAGER = Kernels(name="eager", **{name: getattr(eager, name) for name in FUNCTIONS})
