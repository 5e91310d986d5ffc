"""What a rank holds while it trains a stage: states as DeepSpeed lays them out, activations as the model does.

Sizes are in bytes. P: entries of the weights that a rank computes with, each group padded by ZeRO; p = P / dp: entries
that it owns. Which tensors DeepSpeed 0.19 really holds was read
in its code and is compared with what ranks hold by `benchmarks/memory.py` and by tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megabus.config import RunConfig, Stage
from megabus.config.precision import FP32_BYTES, itemsize
from megabus.config.schema import TrainConfig
from megabus.engine import ds_config
from megabus.estimate.activations import Footprint, Shape, footprint, layer_bytes
from megabus.parallel.placement import Placement
from megabus.parallel.topology import coordinate, layers_at, rank_of

# DeepSpeed adds up the fp32 sums of bf16 training in one buffer for all groups, unless the first is larger than this.
WHOLE_REDUCTION = 500_000_000


@dataclass(frozen=True)
class RankMemory:
    """Bytes. Weights, masters and moments are always there; of what else there is, the worst of three moments counts.

    moments: both of Adam's, and running means of the weights.
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


def held_copies(config: RunConfig, stage: Stage) -> int:
    """Copies of the masters that are held while Adam steps in this stage: by `growth.boost` of the rows that it moves,
    before and after, which at most are all; by a cap on angles, before."""
    growth, grown = config.growth, stage.index > 0
    capped = config.optimizer.max_angle is not None or (growth.settle is not None and grown)
    return 2 * (growth.boost is not None and grown) + capped


def rank_memory(train: TrainConfig, stage: Stage, rank: int, on_gpu: bool = False) -> RankMemory:
    """Of a rank of the world while it trains a stage, without what `held_copies` counts."""
    at = coordinate(stage.layout, rank)
    return memory_at(train, stage, Placement(stage.model, stage.layout), at.pp, at.tp, at.dp, on_gpu=on_gpu)


def memory_at(
    train: TrainConfig,
    stage: Stage,
    placement: Placement,
    pp: int,
    tp: int,
    dp: int = 0,
    held: int = 0,
    on_gpu: bool = False,
) -> RankMemory:
    """The same of the rank at these coordinates; its data-parallel neighbours have much the same."""
    states = states_at(train, stage, placement, pp, tp, dp, held)
    sums = _sums(train, stage, placement, pp, tp, dp)
    one = micro_batch_footprint(train, stage, pp, tp, on_gpu)
    begin, end = layers_at(stage.model.n_layers, stage.layout.pp, pp)
    gone = max(0, end - begin - 1) * layer_bytes(shape_of(train, stage, tp, on_gpu))
    early = one.peak - one.later if sums.late_buckets else 0
    return replace(
        states,
        gradients=states.gradients - min(sums.late, gone),
        buckets=states.buckets - min(states.buckets, early),
        activations=activation_bytes(train, stage, pp, tp, on_gpu),
    )


def states_at(
    train: TrainConfig, stage: Stage, placement: Placement, pp: int, tp: int, dp: int = 0, held: int = 0
) -> RankMemory:
    """The same without activations, and so no more than that: no model is run, not even one without entries."""
    sums = _sums(train, stage, placement, pp, tp, dp)
    owned = sum(group.partition for group in placement.groups(pp, tp))
    left = _left_in_pipeline(stage, pp) * shape_of(train, stage, tp).boundary
    borrowed = _borrowed(stage, placement, pp, tp)
    left += FP32_BYTES * borrowed  # the sum of their gradients is there all the time
    return RankMemory(
        weights=itemsize(train.precision) * (owned * stage.layout.dp + borrowed),
        masters=FP32_BYTES * owned,
        moments=(2 + len(train.ema)) * FP32_BYTES * owned,
        gradients=sums.gradients + FP32_BYTES * borrowed,
        buckets=sums.buckets,
        activations=0,
        reduction=sums.reduction + left,
        update=sums.sums + left + max(sums.norm, held * FP32_BYTES * owned),
    )


def _borrowed(stage: Stage, placement: Placement, pp: int, tp: int) -> int:
    """Entries of the rows that a tied head on the last pipeline rank has of the first one's embedding."""
    return _tied(stage, placement, pp, tp) if pp > 0 else 0


def _tied(stage: Stage, placement: Placement, pp: int, tp: int) -> int:
    """Entries of the rows that both ends of a pipeline have, on one of its ends."""
    if stage.layout.pp == 1 or 0 < pp < stage.layout.pp - 1:
        return 0
    tied = [name for name, spec in placement.specs.items() if spec.tied]
    owner = rank_of(stage.layout, 0, 0, tp)
    return sum(len(placement.shard(name, owner)) for name in tied)


@dataclass(frozen=True)
class _Sums:
    """What DeepSpeed's optimizers hold of gradients; see `RankMemory`.

    sums: what there is of them when all are summed; norm: what their norm takes beside, before Adam begins.
    late: of `gradients`, what is made as the activations go; late_buckets: whether buckets are only there from a micro
    batch's first gradient on.
    """

    gradients: int
    buckets: int
    reduction: int
    sums: int
    norm: int = 0
    late: int = 0
    late_buckets: bool = False


def _sums(train: TrainConfig, stage: Stage, placement: Placement, pp: int, tp: int, dp: int) -> _Sums:
    layout, several = stage.layout, stage.grad_accum > 1
    groups = placement.groups(pp, tp)
    entries, owned = sum(g.entries for g in groups), FP32_BYTES * sum(g.partition for g in groups)
    room = ds_config.BUCKET_ENTRIES
    buckets = room * itemsize(train.precision) * (2 if train.overlap_comm else 1)
    if train.precision == "bf16" and train.zero_stage == 1:
        # BF16_Optimizer: whole fp32 sums, never given back; both groups in one message, copied to be sent.
        whole = owned * layout.dp
        copied = whole if groups[0].partition * layout.dp <= WHOLE_REDUCTION else 0
        return _Sums(gradients=whole, buckets=0, reduction=whole + copied, sums=whole)
    pieces = placement.owned(rank_of(layout, pp, dp, tp))
    norm = 2 * FP32_BYTES * max(map(len, pieces), default=0)  # of one parameter, in fp64
    last = FP32_BYTES * (entries % room if entries > room else entries)  # in the last bucket
    if train.precision == "bf16":
        # ZeRO-2 with fp32 sums of the partition: a bucket of bf16, which is summed over ranks in fp32.
        reduction = owned + buckets + last + last // layout.dp
        return _Sums(owned, buckets, reduction, owned, norm, late_buckets=True)
    # `engine/gradients.py`: sums of what is owned in one tensor, made with the first gradient that comes into it.
    if layout.dp == 1:
        kept = FP32_BYTES * _tied(stage, placement, pp, tp)
        gradients, late = (owned + kept, 0) if several else (0, owned + kept)
        return _Sums(gradients, late, owned + kept, owned, norm, late_buckets=True)
    if train.zero_stage == 2:
        late = owned if entries > room and not several else 0
        gradients, reduction = owned * several + late, buckets + owned + last // layout.dp
        return _Sums(gradients, buckets, reduction, owned, norm, late, late_buckets=True)
    # ZeRO-1: all gradients. When a bucket comes back what is owned of it moves on, beside what is not sent yet.
    # Pipelines take a second bucket for that.
    whole = FP32_BYTES * entries
    reduction = max(whole, owned + FP32_BYTES * max(0, entries - room)) + buckets * (2 if layout.pp > 1 else 1)
    return _Sums(whole, buckets, reduction, owned, norm, late=0 if several else whole, late_buckets=not several)


def shape_of(train: TrainConfig, stage: Stage, tp: int, on_gpu: bool = False) -> Shape:
    sizes = (stage.layout.tp, tp, stage.micro_batch_size, stage.seq_len)
    recompute, cut, kernels = train.recompute, train.sequence_parallel, train.kernels
    return Shape(stage.model, *sizes, train.precision, recompute, cut, kernels, on_gpu)


def in_flight(layout_pp: int, pp: int, grad_accum: int) -> int:
    """Micro batches of which a pipeline rank holds the activations at a time (1F1B)."""
    return min(layout_pp - pp, grad_accum)


def activation_bytes(train: TrainConfig, stage: Stage, pp: int, tp: int, on_gpu: bool = False) -> int:
    """The most that forward and backward hold on a pipeline rank, beside weights, gradients and buckets.

    Of every micro batch in flight DeepSpeed's pipeline has h twice as it came, and on the last rank besides what its
    other buffer keeps of the micro batch before (counted on ranks, as was `_left_in_pipeline`).
    """
    layout, one = stage.layout, micro_batch_footprint(train, stage, pp, tp, on_gpu)
    first, last = pp == 0, pp == layout.pp - 1
    alive = in_flight(layout.pp, pp, stage.grad_accum)
    kept = 0
    if layout.pp > 1 and not first:
        kept = 4 + min(2, stage.grad_accum) if last else 2 * alive
    return one.peak + (alive - 1) * one.saved + kept * shape_of(train, stage, tp).boundary


def micro_batch_footprint(train: TrainConfig, stage: Stage, pp: int, tp: int, on_gpu: bool = False) -> Footprint:
    """Of one micro batch on a pipeline and tensor-parallel rank."""
    begin, end = layers_at(stage.model.n_layers, stage.layout.pp, pp)
    return footprint(shape_of(train, stage, tp, on_gpu), end - begin, pp == 0, pp == stage.layout.pp - 1)


def _left_in_pipeline(stage: Stage, pp: int) -> int:
    """Tensors of the size of h that DeepSpeed's pipeline still holds when all micro batches are done: what it receives
    into, and on the last rank three for each of its two buffers that was used."""
    if stage.layout.pp == 1:
        return 0
    return 1 + 3 * min(2, stage.grad_accum) if pp == stage.layout.pp - 1 else 1
