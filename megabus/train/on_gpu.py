"""What a configuration asks of GPUs that they cannot do, or do slowly; known before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from megabus.config import RunConfig, Stage
from megabus.errors import UserError

ALIGNED = 16  # bytes that a row of a product begins at a multiple of, where tensor cores read it in one piece
LARGEST_FLASH = 256  # entries of a head


def check_deterministic(config: RunConfig, stages: list[Stage]) -> None:
    """Raises `UserError` where `train.deterministic` asks for what has no deterministic form on GPUs."""
    train = config.train
    if not train.deterministic:
        return
    attention = "PyTorch's attention with deterministic gradients that never holds the scores"
    if train.precision != "bf16":
        problem = f"{attention} computes in 16 bits, and train.precision is {train.precision}"
        raise UserError("train.deterministic", "true", problem, "set train.precision to bf16")
    head_dim = max(stage.model.head_dim for stage in stages)
    if head_dim > LARGEST_FLASH:
        problem = f"{attention} has heads of {LARGEST_FLASH} entries at most, and model.head_dim is {head_dim}"
        raise UserError("train.deterministic", "true", problem, "use smaller heads, and more of them")
    if train.kernels == "compiled":
        problem = "torch.compile cuts sums by the sizes that it sees first, which a resumed run sees in another order"
        raise UserError("train.deterministic", "true", problem, "set train.kernels to auto, eager or triton")


def slow_heads(config: RunConfig, stages: list[Stage]) -> Iterator[str]:
    """A line for the vocabulary whose logits are computed by slow products: one row of them after the other begins at
    an address that tensor cores cannot read at once."""
    entries = ALIGNED // (2 if config.train.precision == "bf16" else 4)
    for stage in stages:
        vocab, tp = stage.model.vocab_size, stage.layout.tp
        if any((rank + 1) * vocab // tp % entries for rank in range(tp)):
            better = -(-vocab // (entries * tp)) * entries * tp
            problem = f"shards under layout.tp = {tp} are no multiples of {entries} rows, which slows the head on GPUs"
            remedy = f"with {better}, the rest being tokens that never occur, they are"
            yield str(UserError("model.vocab_size", vocab, problem, remedy))
            return
