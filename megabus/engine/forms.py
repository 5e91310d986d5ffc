"""Which form of the kernels all ranks compute with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megabus.kernels.choice import Choice, automatic
from megabus.parallel.agree import on_any_rank


def agreed_form(choice: Choice, device: torch.device, rows: Iterable[Sequence[int]]) -> Choice:
    """What `auto` stands for on every rank: eager if it is so on any, for the GPUs of a run need not be of one kind.
    Every other choice is itself. Collective for `auto` on GPUs."""
    if choice != "auto" or device.type != "cuda":
        return choice
    form, _ = automatic(device, rows)
    return "eager" if on_any_rank([form == "eager"], device)[0] else form
