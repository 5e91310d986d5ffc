"""What a configuration asks of GPUs that they cannot do; known before anything is built."""

from __future__ import annotations

from megabus.config import RunConfig
from megabus.errors import UserError


def check_deterministic(config: RunConfig) -> None:
    """Raises `UserError` where `train.deterministic` asks for what has no deterministic form on GPUs.

    Attention has one in every precision: FlashAttention's gradients in bf16, and in fp32, or of heads too long for it,
    those of PyTorch's memory-efficient attention, which under `torch.use_deterministic_algorithms` is not split along
    the keys (ATen/native/transformers/cuda/attention_backward.cu). Neither holds the scores.
    """
    if config.train.deterministic and config.train.kernels == "compiled":
        problem = "torch.compile cuts sums by the sizes that it sees first, which a resumed run sees in another order"
        raise UserError("train.deterministic", "true", problem, "set train.kernels to auto, eager or triton")
