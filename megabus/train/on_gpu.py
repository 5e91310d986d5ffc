"""What a configuration asks of GPUs that they cannot do, or do slowly; known before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from megabus.config import RunConfig, Stage
from megabus.config.precision import itemsize
from megabus.errors import UserError

ALIGNED = 16  # bytes that a row of a product begins at a multiple of, where tensor cores read it in one piece


def check_deterministic(config: RunConfig) -> None:
    """Raises `UserError` where `train.deterministic` asks for what has no deterministic form on GPUs.

    Attention has one in every precision: FlashAttention's gradients in bf16, and in fp32, or of heads too long for it,
    those of PyTorch's memory-efficient attention, which under `torch.use_deterministic_algorithms` is not split along
    the keys (ATen/native/transformers/cuda/attention_backward.cu). Neither holds the scores.
    """
    if config.train.deterministic and config.train.kernels == "compiled":
        problem = "torch.compile cuts sums by the sizes that it sees first, which a resumed run sees in another order"
        raise UserError("train.deterministic", "true", problem, "set train.kernels to auto, eager or triton")


def slow_heads(config: RunConfig, stages: list[Stage]) -> Iterator[str]:
    """A line for the vocabulary whose logits are computed by slow products: one row of them after the other begins at
    an address that tensor cores cannot read at once."""
    entries = ALIGNED // itemsize(config.train.precision)
    for stage in stages:
        vocab, tp = stage.model.vocab_size, stage.layout.tp
        if any((rank + 1) * vocab // tp % entries for rank in range(tp)):
            better = -(-vocab // (entries * tp)) * entries * tp
            problem = f"shards under layout.tp = {tp} are no multiples of {entries} rows, which slows the head on GPUs"
            remedy = f"with {better}, the rest being tokens that never occur, they are"
            yield str(UserError("model.vocab_size", vocab, problem, remedy))
            return
