"""Training. The package can be called, since `megabus.train(config, callbacks=...)` is what it is for."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megabus.train.callbacks import Callback
    from megabus.train.loop import Outcome


class _Room(ModuleType):
    def __call__(self, config: Any, callbacks: Sequence[Callback] = ()) -> Outcome:
        from megabus.train.face import train  # slow to import

        return train(config, callbacks)


sys.modules[__name__].__class__ = _Room
