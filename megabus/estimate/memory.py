"""What a rank holds while it trains a stage: states as DeepSpeed lays them out, activations as the model does.

Sizes are in bytes. P: entries of the weights that a rank computes with, each group padded by ZeRO; p = P / dp: entries
that it owns; O: entries of the parameters that it owns any part of. Which tensors DeepSpeed 0.19 really holds was read
in its code and is compared with what ranks hold by `benchmarks/memory.py` and by tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megabus.config import RunConfig, Stage
from megabus.engine import ds_config
from megabus.estimate.activations import Shape, footprint, layer_bytes
from megabus.parallel.placement import Placement
from megabus.parallel.topology import coordinate, stage_layers

FP32 = 4
# DeepSpeed adds up the fp32 sums of bf16 training in one buffer for all groups, unless the first is larger than this.
WHOLE_REDUCTION = 500_000_000


@dataclass(frozen=True)
class RankMemory:
    """Bytes. Weights, masters and moments are always there; of what else there is, the worst of three moments counts.

    gradients: sums of gradients while micro batches run; buckets: what they are sent from, then; activations: the most
    that forward and backward hold beside these, in-flight micro batches and what pipelines keep of h included.
    reduction: all that is there beside the states while gradients are summed over ranks; update: while Adam steps.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    buckets: int
    activations: int
    reduction: int
    update: int

    @property
    def states(self) -> int:
        return self.weights + self.masters + self.moments

    @property
    def total(self) -> int:
        return self.states + max(self.gradients + self.buckets + self.activations, self.reduction, self.update)


def rank_memory(config: RunConfig, stage: Stage, rank: int) -> RankMemory:
    """Of a rank of the world while it trains `stage` of `config`."""
    at = coordinate(stage.layout, rank)
    return memory_at(config, stage, Placement(stage.model, stage.layout), at.pp, at.tp, at.dp)


def memory_at(config: RunConfig, stage: Stage, placement: Placement, pp: int, tp: int, dp: int = 0) -> RankMemory:
    """The same of the rank at these coordinates. Data-parallel neighbours differ in O alone, and that in fp32."""
    states = states_at(config, stage, placement, pp, tp, dp)
    return replace(states, activations=activation_bytes(config, stage, pp, tp))


def states_at(config: RunConfig, stage: Stage, placement: Placement, pp: int, tp: int, dp: int = 0) -> RankMemory:
    """The same without activations: no model is run, not even one without entries."""
    train, layout = config.train, stage.layout
    groups = placement.groups(pp, tp)
    entries, owned = sum(g.entries for g in groups), sum(g.partition for g in groups)
    padded, bf16 = owned * layout.dp, train.precision == "bf16"
    weight = 2 if bf16 else FP32
    room = ds_config.BUCKET_ENTRIES
    bucket = room * weight * (2 if train.overlap_comm else 1)
    if bf16 and train.zero_stage == 1:
        # BF16_Optimizer: whole fp32 sums, never given back; both groups in one message, copied to be sent.
        gradients, buckets = FP32 * padded, 0
        reduction = gradients + (FP32 * padded if groups[0].partition * layout.dp <= WHOLE_REDUCTION else 0)
        update = gradients
    elif bf16:
        # ZeRO-2 with compact fp32 partitions: a bucket of bf16, which is summed over ranks in fp32.
        gradients, buckets = FP32 * owned, bucket
        sent = FP32 * min(entries, room)
        reduction = gradients + buckets + sent + sent // layout.dp
        update = 2 * FP32 * owned
    else:
        touched = FP32 * _touched(placement, pp, tp, dp)
        buckets = bucket
        if train.zero_stage == 1:
            # Those of the first micro batch come as its activations go: with no second one only what exceeds these.
            gone = _all_but_one_layer(config, stage, pp, tp) if stage.grad_accum == 1 else 0
            gradients = max(0, FP32 * entries - gone)
            # Pipelines take a second bucket for the reduction.
            unsent = FP32 * max(0, entries - room)  # when the first bucket comes back and takes its place
            reduction = max(FP32 * entries, touched + unsent) + buckets * (2 if layout.pp > 1 else 1)
        else:
            # The sums so far, and a new copy of this micro batch's gradients once a bucket is full.
            gradients = touched * ((stage.grad_accum > 1) + (entries > room))
            reduction = buckets + touched * (1 + (stage.grad_accum > 1)) + FP32 * min(entries, room)
        update = touched + FP32 * owned
    if config.growth.boost is not None and stage.index:
        update += 2 * FP32 * owned  # the rows that it moves, before and after Adam; at most all
    left = _left_in_pipeline(stage, pp) * shape_of(config, stage, tp).boundary
    return RankMemory(
        weights=weight * padded,
        masters=FP32 * owned,
        moments=2 * FP32 * owned,
        gradients=gradients,
        buckets=buckets,
        activations=0,
        reduction=reduction + left,
        update=update + left,
    )


def _touched(placement: Placement, pp: int, tp: int, dp: int) -> int:
    """O: entries of the parameters that the rank owns any part of."""
    layout = placement.layout
    rank = (pp * layout.dp + dp) * layout.tp + tp
    return sum(len(placement.shard(piece.name, rank)) for piece in placement.owned(rank))


def shape_of(config: RunConfig, stage: Stage, tp: int) -> Shape:
    train = config.train
    assert train.precision != "fp16"  # resolve_stages refuses it
    fused = train.kernels in ("compiled", "triton")
    sizes = (stage.layout.tp, tp, stage.micro_batch_size, stage.seq_len)
    return Shape(stage.model, *sizes, train.precision, train.recompute, train.sequence_parallel, fused)


def in_flight(layout_pp: int, pp: int, grad_accum: int) -> int:
    """Micro batches of which a pipeline stage holds the activations at a time (1F1B)."""
    return min(layout_pp - pp, grad_accum)


def activation_bytes(config: RunConfig, stage: Stage, pp: int, tp: int) -> int:
    """The most that forward and backward hold on a pipeline stage, beside weights, gradients and buckets.

    Of every micro batch in flight DeepSpeed's pipeline has h twice as it came, and on the last stage besides what its
    other buffer keeps of the micro batch before (counted on ranks, as was `_left_in_pipeline`).
    """
    layout, shape = stage.layout, shape_of(config, stage, tp)
    first, last = pp == 0, pp == layout.pp - 1
    begin, end = stage_layers(stage.model.n_layers, layout.pp, pp)
    one = footprint(shape, end - begin, first, last)
    alive = in_flight(layout.pp, pp, stage.grad_accum)
    kept = 0
    if layout.pp > 1 and not first:
        kept = 4 + min(2, stage.grad_accum) if last else 2 * alive
    return one.peak + (alive - 1) * one.saved + kept * shape.boundary


def _all_but_one_layer(config: RunConfig, stage: Stage, pp: int, tp: int) -> int:
    begin, end = stage_layers(stage.model.n_layers, stage.layout.pp, pp)
    return (end - begin - 1) * layer_bytes(shape_of(config, stage, tp))


def _left_in_pipeline(stage: Stage, pp: int) -> int:
    """Tensors of the size of h that DeepSpeed's pipeline still holds when all micro batches are done: what it receives
    into, and on the last stage three for each of its two buffers that was used."""
    if stage.layout.pp == 1:
        return 0
    return 1 + 3 * min(2, stage.grad_accum) if pp == stage.layout.pp - 1 else 1
