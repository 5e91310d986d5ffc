"""Whether a model computes as on a GPU: some ways are faster there, and take more memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_ANYWHERE = ContextVar("_ANYWHERE", default=False)


def on_gpu(x: Tensor) -> bool:
    """Of what is computed from x; tensors that only have shapes are on none, unless `as_on_gpu`."""
    return _ANYWHERE.get() or x.device.type not in ("cpu", "meta")


@contextmanager
def as_on_gpu(whether: bool = True) -> Iterator[None]:
    """Within, tensors of any device are computed with as those of a GPU: to estimate one where there is none."""
    before = _ANYWHERE.set(whether)
    try:
        yield
    finally:
        _ANYWHERE.reset(before)
