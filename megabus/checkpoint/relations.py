"""What holds between the values of a checkpoint's state: each may be in its range, and no run was ever there.

All is told as ValueError or `UserError`, the key first. Nothing is made by a size that the state says.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from megabus.checkpoint.manifest import validated
from megabus.checkpoint.written import check_types, less, section_of
from megabus.config.model import INITIAL_VALUES, ModelConfig
from megabus.config.pair import whole_sizes
from megabus.config.reasons import REASONS
from megabus.config.stages import check_cut
from megabus.data.order import BLEND_PERIOD, align_up, slots
from megabus.kappa.monitor import SAVED, KappaState, check_saved
from megabus.model.cost import count_parameters, counted_sizes
from megabus.parallel.fragments import KINDS, decay_of, ema_kind, ema_kinds
from megabus.plain_file import shown

if TYPE_CHECKING:
    from megabus.checkpoint.state import Progress, SavedState

ROUNDING = 1e-9  # of FLOPs that were added up step by step

Whole = Annotated[int, Field(ge=0, lt=2**63)]
Length = Annotated[int, Field(ge=1, lt=2**31)]


class _Loose(BaseModel):
    """Other keys depend on the version that wrote them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Batches(_Loose):
    seq_len: Length | None = None
    global_batch_size: Length | None = None


class _Caps(_Loose):
    max_tokens: float | None = None
    max_flops: float | None = None


class _Stage(_Batches, _Caps):
    kappa: float | None = None


class _Trigger(_Loose):
    rule: str | None = None
    kappa: float | None = None


class _Growth(_Caps):
    stages: list[_Stage]
    trigger: _Trigger = _Trigger()


class _Train(_Batches):
    seq_len: Length
    ema: list[float] = []
    phases: list[_Batches] = []


class _Files(_Loose):
    train: str | list[Any] = ""
    valid: str = ""
    document_mask: bool = False


class _Eval(_Loose):
    tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None


class _Config(_Loose):
    """What `SavedState.config` must hold. What came later than the version that wrote it has its default, and is not in
    `model_fields_set`."""

    train: _Train
    growth: _Growth
    data: _Files = _Files()
    eval: _Eval = _Eval()


class _Source(_Loose):
    tokens: list[Whole]
    blend: list[Whole]
    chunk_len: Length
    tokenizers: list[str]


class _Data(_Loose):
    """What `SavedState.data` must hold."""

    train: _Source
    valid: _Source
    valid_tokens: Whole


class _GrowthRow(_Loose):
    """What a row of `Progress.growths` must hold."""

    step: Whole
    tokens: Whole
    flops: Annotated[float, Field(ge=0)]
    stage: Whole
    reason: str
    old: dict[str, Whole]
    new: dict[str, Whole]


_CONFIG: TypeAdapter[_Config] = TypeAdapter(_Config)
_DATA: TypeAdapter[_Data] = TypeAdapter(_Data)
_GROWTHS: TypeAdapter[list[_GrowthRow]] = TypeAdapter(list[_GrowthRow])


def check_relations(path: Path, state: SavedState) -> None:
    """Raise `DamagedError` about the file at `path`, ValueError or `UserError` unless some run can have saved that."""
    growths = validated(_GROWTHS, state.progress.growths, path, "progress.growths")
    monitor = validated(SAVED, state.monitor, path, "monitor") if state.monitor else None
    config = validated(_CONFIG, state.config, path, "config") if state.config else None
    data = validated(_DATA, state.data, path, "data") if state.data else None
    if monitor is not None:
        check_saved(monitor)
        _check_monitor(monitor, state)
    if config is not None:
        _at_most("stage", state.stage, "growths in config", len(config.growth.stages))
    _check_whole(state)
    _check_growths(growths, state)
    _check_account(state)
    if monitor is None:  # weights without a run, made by a conversion or an evaluation
        if data is not None:
            raise ValueError("monitor: is empty, and data is not")
        return
    if config is None or data is None:
        raise ValueError(f"{'config' if config is None else 'data'}: is empty, and monitor is not")
    _check_config(config, state)
    _check_watched(monitor, state, config.growth)
    _check_data(data, state, config)
    _check_deals(data, state, config)
    changes = [*config.growth.stages, *config.train.phases]
    longest = max([config.train.seq_len, *(change.seq_len or 0 for change in changes)])
    for key, source in (("train", data.train), ("valid", data.valid)):
        _agree(f"data.{key}.chunk_len", source.chunk_len, "the longest sequence in config", longest)
    if not data.valid_tokens or data.valid_tokens % longest:
        raise ValueError(f"data.valid_tokens: {data.valid_tokens} are no whole sequences of {longest}")
    _at_most("data.valid_tokens", data.valid_tokens, "those of data.valid", sum(data.valid.tokens))


def _check_whole(state: SavedState) -> None:
    now, layout = state.progress, state.layout
    for key, value in asdict(layout).items():
        if not 0 < value < 2**31:
            raise ValueError(f"layout.{key}: {value} is no number of ranks")
    check_cut(state.model, layout)
    kinds = (*(KINDS if state.optimizer_step else KINDS[:1]), *state.averaged)
    _agree("kinds", state.kinds, "those of optimizer_step and averaged", kinds)
    for kind, updates in state.averaged.items():
        _check_mean(kind, updates, now)
    _agree("progress.growths", len(now.growths), "stage", state.stage)
    _at_most("optimizer_step", state.optimizer_step, "progress.step", now.step)
    _at_most("progress.tokens", now.tokens, "progress.position", now.position)
    _at_most("progress.stage_tokens", now.stage_tokens, "progress.tokens", now.tokens)
    _at_most("progress.stage_flops", now.stage_flops, "progress.flops", now.flops)
    _at_most("progress.nonfinite_in_a_row", now.nonfinite_in_a_row, "progress.nonfinite", now.nonfinite)
    _at_most("progress.nonfinite_in_a_row", now.nonfinite_in_a_row, "progress.step", now.step)
    _at_most("progress.rollbacks", now.rollbacks, "progress.nonfinite", now.nonfinite)
    _at_most("progress.spikes", now.spikes, "progress.nonfinite", now.nonfinite)
    if now.rollbacks and now.position == now.tokens:
        raise ValueError(f"progress.rollbacks: {now.rollbacks} returns have passed over no data")


def _check_mean(kind: str, updates: int, now: Progress) -> None:
    try:
        decay = float(decay_of(kind) or "nan")
    except ValueError:
        decay = math.nan
    if not 0 < decay < 1 or kind != ema_kind(decay):
        raise ValueError(f"averaged: {shown(kind)} is the kind of no running mean")
    _at_most(f"averaged.{kind}", updates, "progress.step", now.step)
    # A level of spikes that was accepted ends the count of those in a row.
    if not updates and now.step and not (now.nonfinite_in_a_row or now.spikes):
        raise ValueError(f"averaged.{kind}: 0, and the last step has moved the weights")


def _check_growths(rows: list[_GrowthRow], state: SavedState) -> None:
    """Each growth comes after the one before it, from the sizes that that one led to, and the last led to the model."""
    now = state.progress
    for number, row in enumerate(rows):
        key = f"progress.growths.{number}"
        _agree(f"{key}.stage", row.stage, "the number of growths so far", number + 1)
        if row.reason not in REASONS:
            raise ValueError(f"{key}.reason: {shown(row.reason)} is none of {', '.join(REASONS)}")
        for name in row.old.keys() & row.new.keys():
            _at_most(f"{key}.old.{name}", row.old[name], f"{key}.new.{name}", row.new[name])
        for name, value, limit in (
            ("step", row.step, now.step),
            ("tokens", row.tokens, now.tokens),
            ("flops", row.flops, now.flops),
        ):
            _at_most(f"{key}.{name}", value, f"progress.{name}", limit)
    for number, (before, after) in enumerate(pairwise(rows), 1):
        key, other = f"progress.growths.{number}", f"progress.growths.{number - 1}"
        for name in ("step", "tokens", "flops"):
            if getattr(after, name) <= getattr(before, name):
                raise ValueError(f"{key}.{name}: {getattr(after, name)} is no more than {other}.{name}")
        _agree_sizes(f"{key}.old", after.old, f"{other}.new", before.new)
        _at_most(f"{key}.step, from that before", after.step - before.step, "its tokens", after.tokens - before.tokens)
    if rows:
        last, key = rows[-1], f"progress.growths.{len(rows) - 1}"
        _agree(f"{key}.tokens", last.tokens, "progress.stage_tokens", now.stage_tokens)
        _agree(f"{key}.flops", last.flops, "progress.stage_flops", now.stage_flops)
        _agree_sizes(f"{key}.new", last.new, "the model's", counted_sizes(state.model))
    else:
        _agree("progress.stage_tokens", now.stage_tokens, "0, where nothing has grown", 0)
        _agree("progress.stage_flops", now.stage_flops, "0, where nothing has grown", 0)
    for number, row in enumerate(rows):
        for side, sizes in (("old", row.old), ("new", row.new)):
            _check_sizes(f"progress.growths.{number}.{side}", sizes, state.model)
    steps = now.step - (rows[-1].step if rows else 0)
    _at_most("recent: its updates", len(state.recent), "the stage's steps", steps)


def _check_sizes(key: str, sizes: dict[str, int], model: ModelConfig) -> None:
    """They are those of a model of which this one can have grown: all of them, and as many parameters as follow."""
    wanted = whole_sizes(model)
    for name in (*wanted, "n_params"):
        if name not in sizes:
            raise ValueError(f"{key}.{name}: is missing")
    was = model.model_copy(update={name: sizes[name] for name in wanted})
    if min(sizes[name] for name in wanted if name != "n_layers") < 1 or was.n_heads % was.kv_heads:
        raise ValueError(f"{key}: {shown(sizes)} are the sizes of no model")
    _agree(f"{key}.n_params", sizes["n_params"], "those of its sizes", count_parameters(was))


def _agree_sizes(key: str, sizes: dict[str, int], other: str, wanted: dict[str, int]) -> None:
    for name in wanted.keys() & sizes.keys():
        _agree(f"{key}.{name}", sizes[name], f"{other}: {name}", wanted[name])


def _check_account(state: SavedState) -> None:
    """Steps of one kind add the same each time, and each that was finite has moved the weights once."""
    now, since = state.progress, state.progress.since
    if since is None:
        if state.monitor:
            raise ValueError("progress.since: is missing, and monitor is not empty")
        return  # weights without a run
    for name in ("step", "tokens", "position", "flops", "nonfinite"):
        _at_most(f"progress.since.{name}", getattr(since, name), f"progress.{name}", getattr(now, name))
    _at_most("progress.stage_tokens", now.stage_tokens, "progress.since.tokens", since.tokens)
    _at_most("progress.stage_flops", now.stage_flops, "progress.since.flops", since.flops)
    _at_most("progress.since.optimizer_step", since.optimizer_step, "progress.since.step", since.step)
    for row in now.growths[-1:]:
        _at_most("progress.growths: the last step", row["step"], "progress.since.step", since.step)
        if row["tokens"] == since.tokens:
            _agree("progress.growths: the last step", row["step"], "progress.since.step", since.step)
    steps, skipped = now.step - since.step, now.nonfinite - since.nonfinite
    added = steps * since.step_tokens
    _agree("progress.tokens", now.tokens, "what its steps add up to", since.tokens + added)
    _agree("progress.position", now.position, "where its steps lead to", since.position + added)
    _agree("optimizer_step", state.optimizer_step, "its finite steps", since.optimizer_step + steps - skipped)
    flops = since.flops + steps * since.step_flops
    if abs(now.flops - flops) > ROUNDING * flops:
        raise ValueError(f"progress.flops: {now.flops} is not what its steps add up to, {flops}")


def _check_config(config: _Config, state: SavedState) -> None:
    """The stage that the configuration describes is the one that was saved."""
    now, before = state.progress, config.growth.stages[: state.stage]
    possible = _batches_of(config, before)  # as many as the stage has phases: how far each lasts, its budget says
    if all(now.position % length for length, _ in possible):
        lengths = " or ".join(map(str, sorted({length for length, _ in possible})))
        raise ValueError(f"progress.position: {now.position} is no multiple of the stage's seq_len, {lengths}")
    wanted = [batch * length for length, batch in possible if batch is not None]
    if now.since is not None and wanted and now.since.step_tokens not in wanted:
        _agree("progress.since.step_tokens", now.since.step_tokens, "the stage's batch in config", wanted[0])
    check_types(state.config)
    if state.kinds != KINDS[:1]:  # weights alone have left them behind
        _agree(
            "averaged", [*state.averaged], "those of config.train.ema", [*dict.fromkeys(ema_kinds(config.train.ema))]
        )
    said = dict(section_of(state.config.get("model"), "config.model"))
    for stage in state.config["growth"]["stages"][: state.stage]:
        said |= {key: value for key, value in section_of(stage, "config.growth.stages").items() if value is not None}
    optimizer = section_of(state.config.get("optimizer"), "config.optimizer")
    transferred = INITIAL_VALUES if optimizer.get("transfer") else ()
    for key, value in state.model.model_dump(mode="json").items():
        if key in said and key not in transferred:  # those that came later are not there
            _agree(f"config: {key} of stage {state.stage}", said[key], f"model.{key}", less(value, said[key]))


def _batches_of(config: _Config, growths: list[_Stage]) -> list[tuple[int, int | None]]:
    """(seq_len, global_batch_size) of each phase of a stage that comes after `growths`."""
    length, batch = config.train.seq_len, config.train.global_batch_size
    for growth in growths:
        length, batch = growth.seq_len or length, growth.global_batch_size or batch
    found = [(length, batch)]
    for phase in config.train.phases:
        found.append((phase.seq_len or found[-1][0], phase.global_batch_size or found[-1][1]))
    return found


def _check_deals(data: _Data, state: SavedState, config: _Config) -> None:
    """Each deal begins in what was read so far, with slots for all corpora; with phases, every run had one."""
    deals, train = state.progress.deals, data.train
    if not deals and "phases" in config.train.model_fields_set:
        raise ValueError("progress.deals: is empty, and samples were dealt out")
    for number, deal in enumerate(deals):
        key = f"progress.deals.{number}"
        _agree(f"{key}.counts", len(deal.counts), "the corpora in data.train.blend", len(train.blend))
        if min(deal.counts) < 0 or sum(deal.counts) != BLEND_PERIOD:
            raise ValueError(f"{key}.counts: {shown(deal.counts)} are no slots that add up to {BLEND_PERIOD}")
        before = deals[number - 1].start if number else -1
        if deal.start <= before or (number == 0 and deal.start):
            raise ValueError(f"{key}.start: {deal.start} is out of order")
        _at_most(f"{key}.start, in tokens", deal.start * train.chunk_len, "progress.position", state.progress.position)


def _check_monitor(monitor: KappaState, state: SavedState) -> None:
    """κ remembers this stage, and no losses from after the end."""
    now, span = state.progress, monitor.span
    _agree("monitor.span.index", span.index, "stage", state.stage)
    _agree("monitor.span.n_params", span.n_params, "the model's", count_parameters(state.model))
    _agree("monitor.span.tokens", span.tokens, "progress.stage_tokens", now.stage_tokens)
    _agree("monitor.span.flops", span.flops, "progress.stage_flops", now.stage_flops)
    _at_most("monitor.past", len(monitor.past), "stage", state.stage)
    sizes = {row["old"].get("n_params") for row in now.growths}
    for number, path in enumerate(monitor.past):
        if path.n_params not in sizes:
            raise ValueError(f"monitor.past.{number}.n_params: {path.n_params} is no size that has grown")
    steps = now.step - max((row["step"] for row in now.growths), default=0)
    _at_most("monitor.nonfinite", monitor.nonfinite, "the stage's validations, one a step and one before", steps + 1)
    _at_most("monitor.met", monitor.met, "the losses in monitor.curve", len(monitor.curve))
    for point in monitor.curve[-1:]:
        _at_most("monitor.curve: the last tokens", point.tokens, "progress.tokens", now.tokens)
        _at_most("monitor.curve: the last FLOPs", point.flops, "progress.flops", now.flops)


def _check_watched(monitor: KappaState, state: SavedState, growth: _Growth) -> None:
    """κ and the caps that the monitor holds are those that the configuration gives this stage. Keys that came later
    than the configuration are not there."""
    number, span, trigger = state.stage, monitor.span, growth.trigger
    before = growth.stages[:number]
    said: _Caps = [growth, *before][number]
    key = f"config.growth.stages.{number - 1}" if number else "config.growth"
    for name in ("max_tokens", "max_flops"):
        if name in said.model_fields_set:
            _agree(f"monitor.span.{name}", getattr(span, name), f"{key}.{name}", getattr(said, name))
    kappas = [kappa for kappa in (trigger.kappa, *(stage.kappa for stage in before)) if kappa is not None]
    if trigger.kappa is not None and trigger.rule != "marginal":  # which asks for none
        _agree("monitor.span.kappa", span.kappa, "that of this stage in config", kappas[-1])
    if span.last and number < len(growth.stages):
        raise ValueError(f"monitor.span.last: True, and config grows on from stage {number}")


def _check_data(data: _Data, state: SavedState, config: _Config) -> None:
    """The files that were read are as many as the configuration names, and validated is no less than it asks for."""
    said, asked = config.data, config.eval.tokens
    for place, files in (("train", len(said.train) if isinstance(said.train, list) else 1), ("valid", 1)):
        source = getattr(data, place)
        if place in said.model_fields_set:
            for name in ("tokens", "blend"):
                _agree(f"data.{place}.{name}", len(getattr(source, name)), f"the files in config.data.{place}", files)
    for place in ("train", "valid"):
        if sum(blend := getattr(data, place).blend) != BLEND_PERIOD:
            raise ValueError(f"data.{place}.blend: {shown(blend)} are no slots that add up to {BLEND_PERIOD}")
    if isinstance(said.train, list):
        weights = [section_of(corpus, "config.data.train").get("weight", 1.0) for corpus in said.train]
        _agree("data.train.blend", data.train.blend, "that of the weights in config", [*slots(weights)])
    if "document_mask" in said.model_fields_set:
        _agree("data.document_mask", state.data.get("document_mask", False), "config's", said.document_mask)
    if asked is not None and data.valid_tokens < (least := align_up(asked, data.valid.chunk_len)):
        raise ValueError(
            f"data.valid_tokens: {data.valid_tokens} is less than what config.eval.tokens asks for, {least}"
        )


def _agree(key: str, value: Any, other: str, wanted: Any) -> None:
    if value != wanted:
        raise ValueError(f"{key}: {shown(value)} is not {other}, {shown(wanted)}")


def _at_most(key: str, value: float, other: str, limit: float) -> None:
    if value > limit:
        raise ValueError(f"{key}: {value} exceeds {other}, {limit}")
