"""A gate before Adam: whether an optimizer step moves anything, decided when its gradients are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megabus.engine.fragments import inner_optimizer


class Gate:
    """Asks `refuses` once an optimizer step, before Adam makes it: masters, moments and Adam's count stay as they are
    where the answer is yes, and what comes after Adam does not come.

    engine: DeepSpeed's. It knows its gradient norm then, has clipped the gradients, and drops them as after any step.
    `open` begins the next step: ZeRO in fp32 steps one group at a time, and one answer holds for all.
    """

    def __init__(self, engine: Any, refuses: Callable[[], bool]) -> None:
        self.refused: bool | None = None
        self._refuses = refuses
        inner = inner_optimizer(engine)
        self._step = inner.step
        setattr(inner, "step", self._ask)  # noqa: B010  # hooks cannot keep a step from being made

    def open(self) -> None:
        self.refused = None

    def _ask(self) -> Any:
        if self.refused is None:
            self.refused = self._refuses()
        return None if self.refused else self._step()
