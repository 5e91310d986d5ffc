"""How long a step takes, from FLOPs, bytes and an alpha-beta model of the links. Predicted: no GPU has been measured.

Products of matrices and attention take their FLOPs at shares of the peak, what lies between them its bytes at a share
of the memory's bandwidth (a roofline of each kind). Nothing overlaps, and no kernel waits to be launched.
"""

from __future__ import annotations

from dataclasses import dataclass

from megabus.config import RunConfig, Stage
from megabus.config.precision import FP32_BYTES, itemsize
from megabus.config.stages import Layout
from megabus.estimate.devices import Device, Interconnect
from megabus.estimate.memory import micro_batch_footprint
from megabus.model.cost import flops_per_token
from megabus.parallel.placement import Placement
from megabus.parallel.topology import layers_at, rank_of

REACHED = 0.8  # of a memory's bandwidth by its data sheet, assumed: what kernels that only copy come to


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. compute (products and attention), between (these), tensor, pipeline: of the slowest pipeline
    rank, over all micro batches; bubble: its waiting; data: gradients summed over ranks and weights gathered, a tied
    head's too; update: Adam. model_flops: of the whole step."""

    compute: float
    between: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    update: float
    model_flops: float

    @property
    def total(self) -> float:
        return self.compute + self.between + self.tensor + self.pipeline + self.bubble + self.data + self.update

    def mfu(self, device: Device, precision: str, world: int) -> float:
        return self.model_flops / (self.total * world * device.peak(precision))


def ring(link: Interconnect, ranks: int, n_bytes: float, passes: int) -> float:
    """Seconds of a ring collective: 2 passes for an all-reduce, 1 for a gather or a scatter of `n_bytes` in all."""
    steps = ranks - 1
    return passes * link.seconds(n_bytes * steps / ranks, steps)


def links(layout: Layout, device: Device) -> tuple[Interconnect, Interconnect, Interconnect]:
    """Of tensor-parallel, pipeline and data-parallel neighbours.

    Ranks fill nodes in order. A data-parallel ring that crosses nodes has as many rails as it has ranks in each.
    """
    node = device.nodes_of
    tensor = device.intra if _together(0, layout.tp - 1, node) else device.inter
    pipe = device.intra if layout.pp == 1 or _together(0, rank_of(layout, 1, 0, 0), node) else device.inter
    if _together(0, layout.dp * layout.tp - 1, node):
        return tensor, pipe, device.intra
    rails = max(1, min(layout.dp, node // layout.tp))
    width = min(device.intra.bandwidth, rails * device.inter.bandwidth)
    return tensor, pipe, Interconnect(device.inter.latency, width)


def _together(one: int, other: int, node: int) -> bool:
    return one // node == other // node


def step_time(config: RunConfig, stage: Stage, placement: Placement, device: Device) -> StepTime:
    """Of one optimizer step of a stage."""
    layout, model, train = stage.layout, stage.model, config.train
    precision, micro = train.precision, stage.grad_accum
    entry = itemsize(precision)
    tokens = stage.micro_batch_size * stage.seq_len
    tensor, pipe, data = links(layout, device)
    per_token = flops_per_token(model, stage.seq_len)
    head = 6.0 * model.vocab_size * model.d_model
    attention = 6.0 * model.n_heads * model.head_dim * stage.seq_len
    block = (per_token - head) / max(1, model.n_layers) - attention
    speed = device.peak(precision) * layout.tp
    h_bytes = tokens * model.d_model * entry
    slowest = (0.0, 0.0, 0.0)
    for pp in range(layout.pp):
        begin, end = layers_at(model.n_layers, layout.pp, pp)
        passes = (end - begin) * (4 / 3 if train.recompute else 1.0)
        products = passes * block + (head if pp == layout.pp - 1 else 0.0)
        seconds = tokens / speed * (products / device.efficiency + passes * attention / device.attention)
        footprint = micro_batch_footprint(train, stage, pp, layout.tp - 1, device.on_gpu)
        moved = footprint.moved / (REACHED * device.memory_bandwidth)
        # A block sums h over ranks twice forward and twice backward, and twice more where it is recomputed; under
        # sequence parallelism each sum is a scatter and a gather, which is as much. Embedding and head: once more each.
        sums = (end - begin) * (6 if train.recompute else 4) + (pp == 0) + (pp == layout.pp - 1)
        slowest = max(slowest, (seconds, moved, sums * ring(tensor, layout.tp, h_bytes, 2)), key=sum)
    compute, between, sent = slowest
    cut = layout.tp if train.sequence_parallel else 1
    hops = 0.0 if layout.pp == 1 else 2 * pipe.seconds(h_bytes / cut)
    one = compute + between + sent + hops
    groups = [group for pp in {0, layout.pp - 1} for group in placement.groups(pp, 0)]
    entries = max(sum(g.entries for g in groups[:2]), sum(g.entries for g in groups[-2:]))
    # DeepSpeed sums whole gradients on every rank: ZeRO-1 once a step, ZeRO-2 after every micro batch. In fp32 always.
    reductions = 1 if train.zero_stage == 1 else micro
    reduced = reductions * ring(data, layout.dp, FP32_BYTES * entries, 2)
    gathered = ring(data, layout.dp, entry * entries, 1)
    # The two ends of a pipeline sum the gradients of a tied matrix, and one sends it to the other.
    tied = model.vocab_size * model.d_model / layout.tp if model.tie_embeddings and layout.pp > 1 else 0.0
    met = ring(pipe, 2, FP32_BYTES * tied, 2) + pipe.seconds(entry * tied) if tied else 0.0
    # Reads of gradient, master and two moments, and writes of the last three, and of the weight. A running mean is read
    # and written, and the master read again.
    update = entries / layout.dp * ((7 + 3 * len(train.ema)) * FP32_BYTES + entry) / device.memory_bandwidth
    return StepTime(
        compute=micro * compute,
        between=micro * between,
        tensor=micro * sent,
        pipeline=micro * hops,
        bubble=(layout.pp - 1) * one,
        data=reduced + gathered + met,
        update=update,
        model_flops=per_token * stage.tokens_per_step,
    )
