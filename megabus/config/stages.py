"""From a `RunConfig` and a world size to the run's stages, with every check that spans several keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from megabus.config.after_growth import AFTER_GROWTH
from megabus.config.checks import (
    check_extension,
    check_extra,
    check_only_ngpt,
    check_optimizer,
    check_settle,
    check_trigger,
)
from megabus.config.effects import check_effects
from megabus.config.pair import SIZES, check_pair, divides
from megabus.config.phases import KEYS, Phase, check_reached, check_schedule, phases_of
from megabus.config.schema import LayoutConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig, TrainConfig
from megabus.config.section import in_line
from megabus.config.stock import check_kind
from megabus.config.transfer import transferred
from megabus.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline and data parallelism; they multiply to the world size."""

    tp: int
    pp: int
    dp: int

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP{self.tp}/PP{self.pp}/DP{self.dp}"


@dataclass(frozen=True)
class Stage:
    """One size of the run with everything that may change at a growth. Batch sizes in samples.

    phases: by which samples change with the budget (`at`), none where they do not; weights: of the corpora.
    """

    index: int
    model: ModelConfig
    layout: Layout
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    lr: float
    kappa: float
    max_tokens: int | None
    max_flops: float | None
    weights: tuple[float, ...] = ()
    phases: tuple[Phase, ...] = ()

    def at(self, share: float) -> Stage:
        """The stage with the samples that it takes at a share of the run's budget."""
        phase = next((phase for phase in reversed(self.phases) if phase.share <= share), None)
        return self if phase is None else replace(self, **{key: getattr(phase, key) for key in KEYS})

    def onward(self, share: float = 0.0) -> list[tuple[Stage, float]]:
        """The stage from a share of the budget on: as it is in each phase, and up to which share; the last has no
        end."""
        starts = [share, *(phase.share for phase in self.phases if phase.share > share)]
        return [(self.at(start), end) for start, end in zip(starts, [*starts[1:], inf], strict=True)]

    @property
    def parts(self) -> list[Stage]:
        """The stage as it is in each phase."""
        return [part for part, _ in self.onward()]

    @property
    def grad_accum(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.layout.dp)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


# Token ids that a rank reads for a step, or for a validation, all at once: 4 GiB of int64, inputs and targets; the next
# step's are read ahead.
MOST_TOKENS = 2**28


def stage_section(index: int, first: str = "model") -> str:
    """The section of the file that a stage's keys stand in; `first`: those of the first stage, of which there are
    several."""
    return f"growth.stages.{index - 1}" if index else first


def resolve_stages(
    config: RunConfig,
    world_size: int,
    saved: bool = False,
    begun_with: Callable[[], Sequence[StageConfig]] = tuple,
    begun_at: Callable[[], int] = int,
) -> list[Stage]:
    """All stages in order, the first being the file's own sizes. Raises `UserError` on the first misfit.

    saved: what a checkpoint holds. An older version may have let keys and stages without effect through. begun_with:
    asked for the growths that the run was last saved with, if one of these has no effect: to take it out would undo it.
    begun_at: asked for the stage that it was last saved in, if one does not fit its layout: those before are over.
    """

    def fits(stage: Stage, check: Callable[[], None]) -> None:
        try:
            check()
        except UserError:
            if stage.index >= begun_at():
                raise

    _check_run(config)
    if not saved:
        check_effects(config)
        check_reached(config)
    _check_last(config)
    first = replace(
        _alone(config.model, config.layout, config.train, config.optimizer, world_size),
        kappa=config.growth.trigger.kappa,
        max_tokens=config.growth.max_tokens,
        max_flops=config.growth.max_flops,
        weights=tuple(corpus.weight for corpus in config.data.train),
    )
    stages = [_in_phases(first, config)]
    fits(first, lambda: _check_stage(first, config.train, "", "train."))
    fits(first, lambda: _check_sequence_parallel(first, None, config, "train."))
    for number, change in enumerate(config.growth.stages):
        key = f"{stage_section(number + 1)}."
        stages.append(_in_phases(_next_stage(stages[-1], change, key, world_size), config))
        if not saved and _changes_nothing(stages[-2], stages[-1]) and change not in begun_with()[number : number + 1]:
            raise _without_change(stages[-2], stages[-1], change)
        check_pair(stages[-2].model, stages[-1].model, config.growth.depth, key)
        _check_width(stages[-2], stages[-1], config.optimizer, key)
        fits(stages[-1], partial(_check_grown, stages[-2], stages[-1], config, key))
    for stage in stages:
        fits(stage, partial(_check_phases, stage, config))
    longest = longest_sequence(stages)
    for stage in stages:
        for number, part in enumerate(stage.parts):
            if longest % part.seq_len:
                raise UserError(
                    f"{_phase_section(config, 'seq_len', number) or stage_section(stage.index, 'train')}.seq_len",
                    part.seq_len,
                    f"does not divide the run's longest sequence, {longest}",
                    "choose lengths that divide it, so that data order does not depend on them",
                )
    _check_validation(config, stages, longest)
    if not saved:
        _check_export(stages[-1])
    return [_transferred(stage, config.optimizer) for stage in stages]


def longest_sequence(stages: Sequence[Stage]) -> int:
    """Tokens of the longest in any of their phases."""
    return max(part.seq_len for stage in stages for part in stage.parts)


def by_batches(stages: Sequence[Stage]) -> list[tuple[float, Stage]]:
    """The stages as they are in each of their phases that has lengths or batches of its own, and the share of the
    budget that it begins at."""
    found: dict[tuple[int, ...], tuple[float, Stage]] = {}
    for stage in stages:
        shares = [phase.share for phase in stage.phases] or [0.0]
        for share, part in zip(shares, stage.parts, strict=True):
            sizes = (stage.index, part.seq_len, part.micro_batch_size, part.global_batch_size)
            found.setdefault(sizes, (share, part))
    return list(found.values())


def _in_phases(stage: Stage, config: RunConfig) -> Stage:
    first = Phase(0.0, stage.seq_len, stage.micro_batch_size, stage.global_batch_size, stage.weights)
    return replace(stage, phases=phases_of(first, config.train.phases))


def _phase_section(config: RunConfig, name: str, number: int) -> str | None:
    """The section of the phase, of the first `number`, that has said `name` last; None where none has."""
    said = [n for n, phase in enumerate(config.train.phases[:number]) if getattr(phase, name) is not None]
    return f"train.phases.{said[-1]}" if said else None


def _check_grown(before: Stage, stage: Stage, config: RunConfig, key: str) -> None:
    _check_stage(stage, config.train, key, key)
    for part in before.parts:  # it may grow in any of its phases
        _check_sequence_parallel(stage, part, config, key)


def _check_phases(stage: Stage, config: RunConfig) -> None:
    """Every phase may come in every stage: when it grows, nobody knows before."""
    for number, part in enumerate(stage.parts[1:]):
        key = f"train.phases.{number}."
        _check_batches(part, key)
        if part.seq_len != stage.seq_len:
            _check_sequence_parallel(part, None, config, key)


def _check_export(last: Stage) -> None:
    """What `stock_class` cannot know of one stage: another may come."""
    if last.model.export_as is not None and last.model.n_layers == 0:
        problem = f"is no model that transformers knows, and model.export_as is {last.model.export_as}"
        remedy = "grow it to a layer or more, or leave model.export_as out"
        raise UserError(f"{stage_section(last.index, 'model')}.n_layers", 0, problem, remedy)


def _check_validation(config: RunConfig, stages: list[Stage], longest: int) -> None:
    """All of a validation's tokens are read before the first is seen."""
    for stage in stages:
        tokens = max(config.eval.tokens, longest) // stage.layout.dp
        if tokens > MOST_TOKENS:
            problem = f"gives a rank {tokens} tokens a validation, more than the {MOST_TOKENS} that it reads at once"
            raise UserError("eval.tokens", config.eval.tokens, problem, "lower it, or raise dp")


def single_stage(
    model: ModelConfig, layout: LayoutConfig, train: TrainConfig, optimizer: OptimizerConfig, world_size: int
) -> Stage:
    """What never grows, from its sections alone. Raises `UserError` on the first misfit."""
    stage = _alone(model, layout, train, optimizer, world_size)
    _check_stage(stage, train, "", "train.")
    return _transferred(stage, optimizer)


def _transferred(stage: Stage, optimizer: OptimizerConfig) -> Stage:
    return replace(stage, model=transferred(stage.model, optimizer.transfer))


def _alone(
    model: ModelConfig, layout: LayoutConfig, train: TrainConfig, optimizer: OptimizerConfig, world_size: int
) -> Stage:
    """A stage with the model that its section says."""
    check_optimizer(model, optimizer)
    check_only_ngpt(model, train, optimizer)
    return Stage(
        index=0,
        model=model,
        layout=_layout("layout", layout, world_size),
        seq_len=train.seq_len,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        lr=optimizer.lr,
        kappa=1.0,
        max_tokens=None,
        max_flops=None,
    )


def _next_stage(last: Stage, stage: StageConfig, key: str, world_size: int) -> Stage:
    """`last`: as it begins; phases are put into the new one afterwards."""
    model = last.model.model_copy(update={k: v for k in SIZES if (v := getattr(stage, k)) is not None})
    layout = last.layout if stage.layout is None else _layout(key + "layout", stage.layout, world_size)
    return Stage(
        index=last.index + 1,
        model=model,
        layout=layout,
        seq_len=stage.seq_len or last.seq_len,
        micro_batch_size=stage.micro_batch_size or last.micro_batch_size,
        global_batch_size=stage.global_batch_size or last.global_batch_size,
        lr=stage.lr or last.lr,
        kappa=last.kappa if stage.kappa is None else stage.kappa,
        max_tokens=stage.max_tokens,
        max_flops=stage.max_flops,
        weights=last.weights if stage.weights is None else tuple(stage.weights),
    )


def _changes_nothing(before: Stage, stage: Stage) -> bool:
    ends = replace(before, index=stage.index, kappa=stage.kappa, max_tokens=stage.max_tokens, max_flops=stage.max_flops)
    return ends == stage


def _without_change(before: Stage, stage: Stage, change: StageConfig) -> UserError:
    said = in_line(change.model_dump(exclude_none=True))
    problem = f"changes nothing of the stage before, {stage_section(before.index, 'the first')}"
    return UserError(stage_section(stage.index), said, problem, "give it a larger size, or leave it out")


def _layout(key: str, layout: LayoutConfig, world_size: int) -> Layout:
    tp, pp = layout.tp, layout.pp
    dp = layout.dp or world_size // (tp * pp)
    if tp * pp * dp != world_size:
        raise UserError(
            key,
            f"tp {tp} x pp {pp}" + (f" x dp {layout.dp}" if layout.dp else ""),
            f"cannot fill the world of {world_size} rank(s)",
            "launch a number of ranks that is tp*pp*dp, or change the degrees",
        )
    return Layout(tp, pp, dp)


def _check_run(config: RunConfig) -> None:
    train = config.train
    if not (train.max_tokens or train.max_flops or train.max_steps):
        raise UserError("train.max_tokens", "(missing)", "the run has no budget", "set it, max_flops or max_steps")
    if config.checkpoint.keep_every is not None:
        divides("checkpoint.keep_every", config.checkpoint.keep_every, "checkpoint.every", config.checkpoint.every)
    if config.preflight.measure == "never" and config.preflight.min_bandwidth is not None:
        problem = "leaves nothing to hold against min_bandwidth"
        raise UserError("preflight.measure", "never", problem, "set it to auto, or leave min_bandwidth out")
    for name in AFTER_GROWTH:
        after = getattr(config.growth, name)
        if after is not None and not config.growth.stages:
            problem = "is of what comes after a growth, and growth.stages names none"
            raise UserError(
                f"growth.{name}", in_line(after.model_dump()), problem, f"leave growth.{name} out, or add a stage"
            )
    check_extension(config)
    check_extra(config)
    check_settle(config)
    check_trigger(config)
    check_schedule(config)


def _check_width(before: Stage, stage: Stage, optim: OptimizerConfig, key: str) -> None:
    """muP is of models that were built at their size: a grown gpt's steps under it are too short (docs/rates.md)."""
    if optim.transfer is not None and stage.model.kind == "gpt" and stage.model.d_model != before.model.d_model:
        problem = f"grows a gpt from {before.model.d_model} channels, where optimizer.transfer's rates do not hold"
        remedy = "leave optimizer.transfer out, or grow in depth alone"
        raise UserError(f"{key}d_model", stage.model.d_model, problem, remedy)


def _check_last(config: RunConfig) -> None:
    """The last stage ends with the run: a cap or kappa of its own would end nothing."""
    stages = config.growth.stages
    last, section = stages[-1] if stages else config.growth, stage_section(len(stages), "growth")
    for name in ("kappa", "max_tokens", "max_flops"):
        value = getattr(last, name, None)
        if value is not None:
            raise UserError(
                f"{section}.{name}", value, "the last stage ends with the run", "remove it, or set train.max_*"
            )


def _check_stage(stage: Stage, train: TrainConfig, size_key: str, batch_key: str) -> None:
    layout = stage.layout
    check_cut(stage.model, layout, size_key or "model.")
    if train.zero_stage == 2 and layout.pp > 1:
        raise UserError(
            "train.zero_stage",
            2,
            f"cannot be combined with layout.pp = {layout.pp}: the pipeline accumulates whole gradients",
            "set it to 1",
        )
    if train.overlap_comm and train.zero_stage != 2:
        problem = "needs train.zero_stage = 2: in bf16 ZeRO-1 reduces after the last backward pass"
        raise UserError("train.overlap_comm", True, problem, "set train.zero_stage to 2, or overlap_comm to false")
    _check_batches(stage, batch_key)


def _check_batches(stage: Stage, batch_key: str) -> None:
    layout = stage.layout
    samples = stage.micro_batch_size * layout.dp
    lower = "lower micro_batch_size, " if stage.micro_batch_size > 1 else ""
    remedy = f"{lower}raise tp or pp, or choose a multiple of {samples}"
    divides(batch_key + "global_batch_size", stage.global_batch_size, "micro_batch_size*dp", samples, remedy)
    tokens = stage.tokens_per_step // layout.dp
    if tokens > MOST_TOKENS:
        problem = f"gives a rank {tokens} tokens a step, more than the {MOST_TOKENS} that it reads at once"
        raise UserError(batch_key + "global_batch_size", stage.global_batch_size, problem, "lower it, or raise dp")


def check_cut(model: ModelConfig, layout: Layout, size_key: str = "model.") -> None:
    """Raise `UserError` unless the layout's ranks can share the model; `size_key`: what names of its sizes begin
    with."""
    check_kind(model, size_key)
    if model.head_dim % 2:
        raise UserError("model.head_dim", model.head_dim, "is odd", "RoPE turns pairs: choose an even number")
    divides(size_key + "n_heads", model.n_heads, "n_kv_heads", model.kv_heads)
    for name, value in (("n_heads", model.n_heads), ("n_kv_heads", model.kv_heads), ("d_ff", model.d_ff)):
        divides(size_key + name, value, "layout.tp", layout.tp)
    if model.vocab_size < layout.tp:
        raise UserError("model.vocab_size", model.vocab_size, f"is below tp = {layout.tp}", "lower layout.tp")
    if model.n_layers < layout.pp and layout.pp > 1:
        raise UserError(
            size_key + "n_layers",
            model.n_layers,
            f"leaves some of the layout.pp = {layout.pp} pipeline ranks without a layer",
            "lower layout.pp or add layers (they need not divide evenly)",
        )


def _check_sequence_parallel(stage: Stage, before: Stage | None, config: RunConfig, key: str) -> None:
    """Every sequence that the stage sees is cut in tp parts, and just after a growth it sees those of the stage before:
    there the loss is measured once more."""
    tp = stage.layout.tp
    if not config.train.sequence_parallel:
        return
    if stage.seq_len % tp:
        problem = f"is not divisible by layout.tp = {tp}, and train.sequence_parallel is true"
        remedy = f"choose a multiple of {tp}, or set train.sequence_parallel to false"
        raise UserError(key + "seq_len", stage.seq_len, problem, remedy)
    if before is not None and before.seq_len % tp:
        problem = f"does not divide the seq_len before this growth, {before.seq_len}, on which it is measured, and "
        remedy = f"choose a divisor of {before.seq_len}, or set train.sequence_parallel to false"
        raise UserError(key + "layout.tp", tp, problem + "train.sequence_parallel is true", remedy)
