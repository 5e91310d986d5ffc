"""The forms of the functions between matrix products that run here, for tests of each."""

from __future__ import annotations

import pytest
import torch

from megabus.kernels import choice as kernel_choice
from megabus.kernels.choice import select

HAS = {"eager": True, "triton": kernel_choice.find_spec("triton") is not None}
SMALL = [pytest.param(form, marks=pytest.mark.skipif(not there, reason="needs triton")) for form, there in HAS.items()]
TRITON_ONLY = pytest.mark.skipif(not HAS["triton"], reason="needs triton")


def form_of(name):
    return select(name, torch.device("cpu"))


@pytest.fixture(autouse=True)
def interpreter_rounds_to_nearest(monkeypatch):
    """As a GPU does (the last test sees the instruction); Triton's interpreter cuts bf16's lower bits off."""
    if not HAS["triton"]:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(x, source, target, mode)
        return torch.tensor(x).bfloat16().view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
