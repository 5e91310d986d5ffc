"""One stage's training engine: a decoder under DeepSpeed, with or without a pipeline, behind the same few calls."""

from __future__ import annotations

import contextlib
import gc
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from torch import Tensor, nn

from megabus.config import Stage
from megabus.config.schema import OptimizerConfig, TrainConfig
from megabus.engine.adam import make_adam
from megabus.engine.averages import Averages
from megabus.engine.boost import Boost
from megabus.engine.ds_config import deepspeed_config
from megabus.engine.forms import agreed_form
from megabus.engine.fragments import (
    flat_partitions,
    initial_fragments,
    optimizer_step_count,
    own_parameters,
    places,
    read_fragments,
    write_fragments,
)
from megabus.engine.gains import gain_percentiles
from megabus.engine.gate import Gate
from megabus.engine.gradients import flatten_gradients
from megabus.engine.hardware import compute_deterministically
from megabus.engine.rates import set_rates
from megabus.engine.tied import Pipeline, tied_rows
from megabus.engine.turns import AngleCap
from megabus.engine.unit_rows import UnitRows
from megabus.engine.vectors import Vectors
from megabus.kernels.choice import select
from megabus.model.decoder import Decoder
from megabus.model.documents import Documents
from megabus.model.layers import KVCache, kernel_rows
from megabus.model.params import spec_of
from megabus.model.rates import relative_rate
from megabus.parallel.fragments import Fragments, Kind
from megabus.parallel.mesh import Mesh
from megabus.parallel.placement import Placement
from megabus.parallel.topology import layers_at
from megabus.upload import upload

# Inputs and targets, (micro_batch_size, seq_len) int64, and the documents of the inputs where these are kept apart.
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Documents]
Loss = Callable[[Decoder, Tensor, Tensor], Tensor]  # the last layers, their hidden states (B, T, D), targets (B, T)


def mean_loss(decoder: Decoder, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """The mean loss of a micro batch's tokens in nats."""
    return decoder.loss(h_BTD, targets_BT)[0]


@dataclass(frozen=True)
class StepResult:
    """Mean loss of the global batch in nats (before the update) and the gradient norm (before clipping).

    Where the norm is not finite, DeepSpeed has left weights and moments as they were; where `refused`, the engine's
    user has had it so.
    """

    loss: float
    grad_norm: float
    refused: bool = False

    @property
    def is_finite(self) -> bool:
        """The same on every rank: the norm is of all ranks' gradients, and a loss that is not finite makes its own
        gradients NaN (`Engine._module`)."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def updates(self) -> bool:
        """Whether it has moved the weights; the same on every rank."""
        return self.is_finite and not self.refused


def _read(loss: Tensor, grad_norm: Tensor | float) -> StepResult:
    """By one copy from the device, which waits for all that is queued there. A norm that is no tensor is infinity."""
    if isinstance(grad_norm, Tensor):
        return StepResult(*torch.stack((loss.detach().double(), grad_norm.double())).tolist())
    return StepResult(float(loss), float(grad_norm))


class DecoderWithLoss(nn.Module):
    """What the engine without a pipeline runs: token ids and targets in, loss out."""

    def __init__(self, decoder: Decoder, loss: Any) -> None:
        super().__init__()
        self.decoder, self.loss = decoder, loss

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, documents: Documents | None = None) -> Tensor:
        return self.loss(self.decoder.hidden(inputs_BT, documents=documents), targets_BT)


class PipelineLayers(Decoder):
    """What the engine with a pipeline runs. The last pipeline rank returns hidden states too: the loss is computed from
    them, without logits.

    coming: documents of the micro batches to come, where they are kept apart. Every pipeline rank computes the micro
    batches forward in the same order, and each knows their documents: nothing is sent but h.
    """

    coming: Iterator[Documents] | None = None

    def forward(self, x: Tensor, cache: KVCache | None = None, documents: Documents | None = None) -> Tensor:
        return self.hidden(x, cache, documents if self.coming is None else next(self.coming))


class Engine:
    """A stage of the run, ready to train. Weights are undefined until `write` or `write_initial` is called.

    train: its precision, memory and kernel settings; batch sizes are the stage's.
    heartbeat: called at every micro batch, of which a step may take many; its user may set it.
    refuses: asked by every rank about a finite step before it moves anything, and answers the same on all; its user may
    set it. It waits for the device where nothing else would.
    loss: a micro batch's, in training and in evaluation. Losses of micro batches are averaged, so only means over B do
    not depend on how a batch is cut.
    Collective: every rank constructs it, and every rank makes every call.
    """

    def __init__(self, train: TrainConfig, optimizer: OptimizerConfig, stage: Stage, loss: Loss = mean_loss) -> None:
        self.train, self.stage, self.loss = train, stage, loss
        self.mesh = Mesh(stage.layout, train.sequence_parallel)
        self.placement = Placement(stage.model, stage.layout)
        device = torch.device(get_accelerator().device_name())
        rows = kernel_rows(stage.model, stage.layout.tp).values()
        self.kernels = select(agreed_form(train.kernels, device, rows), device, rows)
        if train.deterministic and device.type != "cpu":
            compute_deterministically(device)
        with device:  # weights are made where they are computed with, and take no memory elsewhere before
            self.module = self._module()
        own = own_parameters(self.module, self.placement, self.mesh.rank)
        groups = [
            {
                "params": [p for p in own if spec_of(p).is_matrix == matrix],
                "weight_decay": decay,
            }
            for matrix, decay in ((True, optimizer.weight_decay), (False, 0.0))
        ]
        for parameter in self.module.parameters():
            # So DeepSpeed marks a tensor-parallel shard. A replica with the mark would count tp times in norms.
            if spec_of(parameter).sharded:
                parameter.model_parallel = True  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints on stdout from several places
            adam = make_adam(optimizer, groups, device)
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=adam,
                config=deepspeed_config(train, stage),
                mpu=None if isinstance(self.module, Pipeline) else self.mesh.grid,
            )
        if stage.model.tie_embeddings and isinstance(self.module, Pipeline):
            self.module.tied = tied_rows(self.module, self.mesh, train.precision == "bf16")
        flatten_gradients(self.deepspeed)
        self.places = list(places(self.module, self.placement, self.mesh.rank))
        if (tuned := optimizer.transfer) is not None:
            rate = partial(relative_rate, model=stage.model, d_model=tuned.d_model)
            set_rates(self.deepspeed, self.places, rate)
        # Hooks run in this order: rows that a boost has moved are turned back and made unit afterwards.
        self.boost = Boost(self.deepspeed, self.places)
        vectors, max_angle = self._unit_vectors(), optimizer.max_angle or math.inf
        self.angle_cap = None if vectors is None else AngleCap(self.deepspeed, vectors, self._looked_up(), max_angle)
        self.unit_rows = None if vectors is None else UnitRows(self.deepspeed, vectors, self.kernels.unit_rows_)
        self.averages = Averages(self.deepspeed, self.places, train.ema, self.unit_rows)
        self._pipe_seq_len = stage.seq_len
        self.refuses: Callable[[StepResult], bool] | None = None
        self._gate, self._losses = Gate(self.deepspeed, self._refused), list[Tensor]()
        self.heartbeat: Callable[[], object] | None = None
        self._heartbeat_hook = self.module.register_forward_pre_hook(self._call_heartbeat)

    def _call_heartbeat(self, *_: Any) -> None:
        if self.heartbeat is not None:
            self.heartbeat()

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    @property
    def decoder(self) -> Decoder:
        """This rank's layers."""
        return next(module for module in self.module.modules() if isinstance(module, Decoder))

    def _module(self) -> nn.Module:
        model, layout = self.stage.model, self.stage.layout
        how = (self.mesh.tp, self.train.recompute, self.kernels, self.train.logit_power)

        def loss(h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
            loss = self.loss(self.decoder, h_BTD, targets_BT)
            # DeepSpeed looks at gradients alone, so a loss that is not finite gets NaNs for its gradients.
            return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

        if layout.pp == 1:
            return DecoderWithLoss(Decoder(model, None, *how), loss)
        # One spec a pipeline rank: which layers a rank holds is megabus's decision, not DeepSpeed's partitioner's.
        parts = [layers_at(model.n_layers, layout.pp, pp_rank) for pp_rank in range(layout.pp)]
        specs = [LayerSpec(PipelineLayers, model, layers, *how) for layers in parts]
        with contextlib.redirect_stdout(io.StringIO()):
            return Pipeline(specs, topology=self.mesh.topology, loss_fn=loss, partition_method="uniform")

    def _unit_vectors(self) -> Vectors | None:
        """Of this rank's partition of the matrices; None for a model without unit rows."""
        matrices = [p for p in self.module.parameters() if spec_of(p).is_matrix]
        if not all(spec_of(p).unit for p in matrices):
            return None
        total = sum(p.numel() for p in matrices)
        return Vectors(flat_partitions(self.deepspeed)[0], self.stage.model.d_model, total, self.mesh.dp_group)

    def _looked_up(self) -> list[slice]:
        """Where the embedding lies in that partition."""
        return [x.part for x in self.places if x.spec.lookup]

    def train_step(self, batches: Sequence[Batch], lr: float, seq_len: int | None = None) -> StepResult:
        """One optimizer step over this data-parallel rank's `grad_accum` micro batches, which may be none where it
        needs no tokens. seq_len: their length where it is not the stage's."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._gate.open()
        if isinstance(self.module, Pipeline):
            loss = self.deepspeed.train_batch(self._expect(batches, seq_len or self.stage.seq_len))
            self.deepspeed.timers(TRAIN_BATCH_TIMER).reset()  # it keeps two events a step until somebody asks for them
            self._meet_ends()
        else:
            self._losses = []
            self.deepspeed.train()
            for batch in batches:
                micro = self.deepspeed(*self._all_on_device(batch))
                self.deepspeed.backward(micro)
                self._losses.append(micro.detach())
                self.deepspeed.step()
            loss = self._mean(self._losses)
            self._losses = []
        result = _read(loss, self.deepspeed.get_global_grad_norm())
        return replace(result, refused=bool(self._gate.refused))

    def _refused(self) -> bool:
        """Of the step that Adam is about to make; see `refuses`."""
        if self.refuses is None:
            return False
        # DeepSpeed's pipeline tells its loss after Adam: this is where it gets it from, so it is the same to the bit.
        pipeline = isinstance(self.module, Pipeline)
        loss = self.deepspeed._aggregate_total_loss() if pipeline else self._mean(self._losses)
        result = _read(loss, self.deepspeed.optimizer._global_grad_norm)
        return result.is_finite and self.refuses(result)

    def rebatch(self, stage: Stage) -> None:
        """From here on steps take the samples of `stage`, which is the present one but for them."""
        micro = self.stage.micro_batch_size
        self.stage = stage
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed.set_train_micro_batch_size(stage.micro_batch_size)
            self.deepspeed.set_train_batch_size(stage.global_batch_size)
        # DeepSpeed ends a step where this count is a multiple of what is accumulated, which is another number now.
        self.deepspeed.micro_steps = 0
        if isinstance(self.module, Pipeline) and micro != stage.micro_batch_size:
            self.deepspeed.reset_activation_shape()

    def _meet_ends(self) -> None:
        """The rows of a tied head that this rank borrows or lends are the owner's again."""
        if isinstance(self.module, Pipeline) and self.module.tied is not None:
            self.module.tied.take_over()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], steps: int, seq_len: int) -> float:
        """Mean loss in nats over `steps` micro batches a data-parallel rank, the same on every rank."""
        if isinstance(self.module, Pipeline):
            coming = self._expect(batches, seq_len)
            return float(self.deepspeed.eval_batch(coming, num_micro_batches=steps))
        self.deepspeed.eval()
        return float(self._mean([self.deepspeed(*self._all_on_device(batch)) for batch in batches]))

    def _expect(self, batches: Sequence[Batch], seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, on the device as they are asked for: DeepSpeed's pipeline would copy them from where they
        lie, and wait. It agrees on the activations' shape once; tell it when that changes."""
        layers = self.decoder
        assert isinstance(layers, PipelineLayers)
        documents = [batch[2] for batch in batches if len(batch) == 3]
        layers.coming = (each.moved(self._on_device) for each in documents) if documents else None
        if seq_len != self._pipe_seq_len:
            self.deepspeed.reset_activation_shape()
            self._pipe_seq_len = seq_len
        return ((self._on_device(batch[0]), self._on_device(batch[1])) for batch in batches)

    def _all_on_device(self, batch: Batch) -> tuple[Tensor | Documents, ...]:
        return tuple(x.moved(self._on_device) if isinstance(x, Documents) else self._on_device(x) for x in batch)

    def _on_device(self, tokens: Tensor) -> Tensor:
        return upload(tokens, self.device)

    def _mean(self, losses: list[Tensor]) -> Tensor:
        loss = torch.stack(losses).float().mean()
        dist.all_reduce(loss, group=self.mesh.dp_group)
        return loss / self.stage.layout.dp

    def read(self) -> Fragments:
        """This rank's masters, moments and running means: views, valid until the next step."""
        fragments = read_fragments(self.deepspeed, self.places)
        for piece, means in self.averages.read().items():
            fragments[piece] |= means
        return fragments

    def write(
        self, fragments: Fragments, optimizer_step: int = 0, averaged: Mapping[Kind, int] = MappingProxyType({})
    ) -> None:
        """Set this rank's masters, and moments where given, which are taken out of `fragments`; collective. averaged:
        the running means that it has, and of how many updates they are; others of the engine's begin with the
        weights."""
        write_fragments(self.deepspeed, self.places, fragments, optimizer_step)
        self.averages.write(fragments, averaged)
        self._meet_ends()

    @contextmanager
    def computing_with(self, kind: Kind) -> Iterator[None]:
        """Until the block ends the model computes with a running mean of its weights: evaluate, and take no step.
        Collective."""
        try:
            with self.averages.in_place_of_masters(kind):
                self._refresh()
                yield
        finally:
            self._refresh()

    def _refresh(self) -> None:
        """Make the weights that the model computes with anew of the masters."""
        self.deepspeed.optimizer.update_lp_params()
        self._meet_ends()

    def write_initial(self, seed: int) -> None:
        """Set this rank's masters to their part of the initial state that `seed` stands for; collective."""
        self.write(initial_fragments(self.placement, self.mesh.rank, seed, self.device))

    @property
    def optimizer_step(self) -> int:
        return optimizer_step_count(self.deepspeed)

    def unit_error(self) -> float | None:
        """Largest | |row| - 1 | over all unit rows of all ranks' masters; None for a model without unit rows."""
        if self.unit_rows is None:
            return None
        worst = self.unit_rows.error()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return float(worst)

    def gain_percentiles(self) -> dict[str, dict[str, float]]:
        """By kind of gain, percentiles of its effective values over all ranks' masters. Collective."""
        return gain_percentiles(self.placement, self.read(), self.mesh.rank, self.device)

    def micro_rows(self, micro_step: int) -> range:
        """Rows of the global batch that this data-parallel rank computes in a micro step."""
        size, at = self.stage.micro_batch_size, self.mesh.at.dp
        first = (micro_step * self.stage.layout.dp + at) * size
        return range(first, first + size)

    @property
    def needs_data(self) -> bool:
        """Only the first and the last pipeline rank read tokens; all need documents that are kept apart."""
        return self.mesh.at.pp in (0, self.stage.layout.pp - 1)

    def close(self) -> None:
        """Free the engine; the process groups stay for the next one."""
        for hooked in (self.boost, self.angle_cap, self.unit_rows, self.averages, self._heartbeat_hook):
            if hooked is not None:
                hooked.remove()
        self.deepspeed.destroy()
        if isinstance(self.module, Pipeline):
            # The last loss's graph holds hooks that hold the engine: a cycle through C++, which gc cannot see.
            for name in ("loss", "total_loss", "fwd_outputs", "pipe_buffers"):
                setattr(self.deepspeed, name, None)
        del self.deepspeed, self.module, self.unit_rows, self.angle_cap, self.boost, self._gate, self.averages
        gc.collect()
        get_accelerator().empty_cache()
