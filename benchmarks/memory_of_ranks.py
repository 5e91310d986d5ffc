"""What ranks really hold while they train, to compare `megabus.estimate.memory` with."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megabus.config import Layout
from megabus.engine import ds_config
from megabus.engine.engine import Batch, Engine
from megabus.engine.fragments import flat_partitions, inner_optimizer
from megabus.estimate.live_bytes import LiveBytes
from megabus.parallel.fragments import MOMENTS
from megabus.testing.training import Training, make_training

# Sizes that nothing divides evenly: rows that partitions cut, a vocabulary that tp does not divide, grouped queries.
MODEL = {"vocab_size": 509, "d_model": 76, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2, "head_dim": 14, "d_ff": 202}


def memory_training(
    kind: str,
    layout: Layout,
    micro_batches: int = 3,
    model: dict[str, int] | None = None,
    optimizer: dict[str, float] | None = None,
    **train: Any,
) -> Training:
    """A small training whose activations outweigh its states, as they may in a large one."""
    batch = {"seq_len": 62, "micro_batch_size": 3} | train
    batch["global_batch_size"] = batch["micro_batch_size"] * layout.dp * micro_batches
    return make_training({"kind": kind, **MODEL, **(model or {})}, layout, batch, {"lr": 1e-3, **(optimizer or {})})


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank. `computing`, `reducing`, `updating`: the most beside the first three in each part of a step,
    gradients and buckets included."""

    weights: int
    masters: int
    moments: int
    computing: int
    reducing: int
    updating: int

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.moments + max(self.computing, self.reducing, self.updating)


def measure(training: Training, bucket: int | None = None) -> Measured:
    """Train for three steps and count in the third. Collective; on CPUs, whose tensors are counted.

    bucket: entries of DeepSpeed's buckets in place of the usual number, beside which a small model is nothing.
    """
    ds_config.BUCKET_ENTRIES = bucket or ds_config.BUCKET_ENTRIES
    stage = training.stage
    engine = Engine(training.train, training.optimizer, stage)
    engine.write_initial(training.train.seed)
    batches = [_batch(engine, micro) for micro in range(stage.grad_accum)] if engine.needs_data else []
    for _ in range(2):
        engine.train_step(batches, 1e-3)
    gc.collect()
    tokens = [tensor for batch in batches for tensor in batch[:2]]
    held = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.device.type == "cpu"]
    with LiveBytes(tokens) as live:
        for tensor in held:
            live.count(tensor)
        del held, tensor
        marks = _Marks(live)
        pipeline = stage.layout.pp > 1 and training.train.precision == "bf16"
        marks.around(engine.deepspeed, "_bf16_reduce_grads" if pipeline else "allreduce_gradients", "reducing")
        marks.around(engine.deepspeed.optimizer, "step", "updating")
        engine.train_step(batches, 1e-3)
        marks.note("computing")
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in engine.module.parameters()}
    masters = flat_partitions(engine.deepspeed)
    state = inner_optimizer(engine.deepspeed).state
    parts = (
        sum(weights.values()),
        sum(flat.nbytes for flat in masters),
        sum(state[flat][kind].nbytes for flat in masters for kind in MOMENTS),
    )
    return Measured(*parts, *(marks.worst[what] - sum(parts) for what in ("computing", "reducing", "updating")))


def _batch(engine: Engine, micro: int) -> Batch:
    stage, draw = engine.stage, torch.Generator().manual_seed(micro)
    shape = (stage.micro_batch_size, stage.seq_len)
    inputs, targets = (torch.randint(stage.model.vocab_size, shape, generator=draw) for _ in range(2))
    return inputs, targets


class _Marks:
    """The peak in every part of a step: that of `around`'s calls, and `computing` between them."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.worst = live, dict.fromkeys(("computing", "reducing", "updating"), 0)
        live.peak = live.now

    def note(self, what: str) -> None:
        self.worst[what] = max(self.worst[what], self.live.peak)
        self.live.peak = self.live.now

    def around(self, owner: Any, name: str, what: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.note("computing")
            found = inner(*args, **options)
            self.note(what)
            return found

        setattr(owner, name, call)
