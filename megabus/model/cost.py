"""What a model costs: parameters, training FLOPs, and the share of a device's peak that a run reaches (MFU)."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch

from megabus.config import ModelConfig
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape

# Dense bf16 tensor-core peaks in TFLOP/s without sparsity, from the vendors' data sheets.
PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,  # after the others of its kind: the first name that is part of the GPU's counts
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
}


@lru_cache(maxsize=64)
def count_parameters(model: ModelConfig) -> int:
    """All parameters, embedding and head included."""
    return sum(prod(global_shape(spec, model)) for spec in param_specs(model).values())


@lru_cache(maxsize=64)
def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of a token, forward and backward, nothing recomputed.

    6 for every matrix entry that multiplies (the head does, the embedding only looks up; Kaplan et al. 2020), and
    for attention 6 * layers * heads * head_dim * seq_len: a token sees half of the sequence on average, and its
    scores and its weighted sum take 2 FLOPs each an entry, three times over (forward, and twice backward).
    """
    matrices = [spec for spec in param_specs(model).values() if spec.is_matrix and not spec.lookup]
    dense = sum(prod(global_shape(spec, model)) for spec in matrices)
    return 6.0 * dense + 6.0 * model.n_layers * model.n_heads * model.head_dim * seq_len


def peak_flops(tflops: float | None, precision: str) -> float | None:
    """One device's peak in FLOP/s: as configured, or this GPU's for bf16 where it is known, or None."""
    if tflops is not None:
        return tflops * 1e12
    if precision == "bf16" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None
