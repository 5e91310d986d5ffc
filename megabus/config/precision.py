"""How many bytes an entry takes."""

from __future__ import annotations

from typing import Literal

FP32_BYTES = 4  # of an entry of masters, moments and summed gradients, whatever a run computes in


def itemsize(precision: Literal["fp32", "bf16"]) -> int:
    """Bytes of an entry of weights and activations under `train.precision`."""
    return 2 if precision == "bf16" else FP32_BYTES
