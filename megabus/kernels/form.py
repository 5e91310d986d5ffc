"""One form of the functions, and the form that runs anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from megabus.kernels import eager


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions of `megabus.kernels.eager` in one form; see there what each computes.

    lean: `cross_entropy_` makes nothing of the logits' size, so that more of them are held at a time.
    """

    name: str
    lean: bool = False
    residual: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_unit: Callable[..., Any]
    attention: Callable[..., Any]
    gate: Callable[..., Any]
    cross_entropy_: Callable[..., Any]
    unit_rows_: Callable[..., Any]


FUNCTIONS = tuple(field.name for field in fields(Kernels) if field.name not in ("name", "lean"))
EAGER = Kernels(name="eager", **{name: getattr(eager, name) for name in FUNCTIONS})
