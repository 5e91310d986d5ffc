"""What a configuration asks of GPUs that they cannot do; known before anything is built."""

from __future__ import annotations

import torch

from megabus.config import RunConfig
from megabus.errors import UserError
from megabus.kernels.generation import AMPERE, older_than


def check_deterministic(config: RunConfig) -> None:
    """Raises `UserError` where `train.deterministic` asks for what has no deterministic form on GPUs.

    Attention has one in every precision: FlashAttention's gradients in bf16, and in fp32, or of heads too long for it,
    those of PyTorch's memory-efficient attention, which under `torch.use_deterministic_algorithms` is not split along
    the keys (ATen/native/transformers/cuda/attention_backward.cu). Neither holds the scores.
    """
    if config.train.deterministic and config.train.kernels == "compiled":
        problem = "torch.compile cuts sums by the sizes that it sees first, which a resumed run sees in another order"
        raise UserError("train.deterministic", "true", problem, "set train.kernels to auto, eager or triton")


def check_bf16(config: RunConfig, device: torch.device) -> None:
    """Raises `UserError` where a GPU has no arithmetic in bf16.

    Products would be emulated, and neither of PyTorch's attention kernels that never hold the scores takes bf16 there
    (ATen/native/transformers/cuda/sdp_utils.cpp: less_than_sm80_mem_efficient_dtypes).
    """
    problem = older_than(AMPERE, device) if config.train.precision == "bf16" else None
    if problem is not None:
        raise UserError("train.precision", "bf16", problem, "set it to fp32")
