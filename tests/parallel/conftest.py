from __future__ import annotations

import pytest
import torch

from megabus.engine import fragments
from megabus.model import init


@pytest.fixture
def lively_gains(monkeypatch):
    """Models begin with gains that differ from row to row, in every process and under every layout alike."""
    plain_rows = init.initial_rows

    def rows(model, name, seed, start, stop, device="cpu"):
        values = plain_rows(model, name, seed, start, stop, device)
        return values if values.ndim == 2 else values * (1 + 0.5 * torch.sin(torch.arange(start, stop) * 1.7))

    for room in (init, fragments):
        monkeypatch.setattr(room, "initial_rows", rows)
