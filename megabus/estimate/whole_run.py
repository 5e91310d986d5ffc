"""An estimate of a whole run, as tables and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from megabus.config import RunConfig, Stage
from megabus.config.stages import by_batches
from megabus.estimate.devices import Device
from megabus.estimate.growth import GrowthEstimate, estimate_growth
from megabus.estimate.layouts import Choice, Ranking, pipeline_memory, rank_layouts, settings
from megabus.estimate.memory import RankMemory, in_flight
from megabus.estimate.step_time import StepTime, step_time
from megabus.model.cost import count_parameters, flops_per_token
from megabus.parallel.placement import Placement
from megabus.parallel.topology import layers_at
from megabus.table import aligned, si

PREDICTED = "predicted, not measured"


@dataclass(frozen=True)
class StageEstimate:
    """Of a stage, or of a phase of it that has other batches, from a share of the budget on. memory: of the fullest
    rank of every pipeline rank. settings: the best of the configured layout, if any fits. growth: of the growth into
    this stage."""

    stage: Stage
    share: float
    params: int
    flops_per_token: float
    memory: list[RankMemory]
    time: StepTime
    mfu: float
    ranking: Ranking
    settings: Choice | None
    growth: GrowthEstimate | None

    @property
    def name(self) -> str:
        return f"{self.stage.index} from {self.share:.0%}" if self.share else str(self.stage.index)


def estimate_run(
    config: RunConfig, stages: Sequence[Stage], device: Device, top: int, rebuild: float
) -> list[StageEstimate]:
    found: list[StageEstimate] = []
    for share, stage in by_batches(stages):
        time = step_time(config, stage, Placement(stage.model, stage.layout), device)
        before = found[-1].stage if found and found[-1].stage.index < stage.index else None
        found.append(
            StageEstimate(
                stage=stage,
                share=share,
                params=count_parameters(stage.model),
                flops_per_token=flops_per_token(stage.model, stage.seq_len),
                memory=pipeline_memory(config, stage, device.on_gpu),
                time=time,
                mfu=time.mfu(device, config.train.precision, stage.layout.world),
                ranking=rank_layouts(config, stage, device, top),
                settings=settings(config, stage, stage.layout, device),
                growth=estimate_growth(config, before, stage, device, rebuild) if before else None,
            )
        )
    return found


def as_dict(estimates: Sequence[StageEstimate], device: Device) -> dict[str, Any]:
    """Bytes, seconds and FLOPs; for --json."""
    return {"times": PREDICTED, "device": asdict(device), "stages": [_stage_dict(one, device) for one in estimates]}


def _stage_dict(one: StageEstimate, device: Device) -> dict[str, Any]:
    stage = one.stage
    return {
        "stage": stage.index,
        "from_share": one.share,
        "model": stage.model.model_dump(),
        "layout": asdict(stage.layout),
        "micro_batch_size": stage.micro_batch_size,
        "grad_accum": stage.grad_accum,
        "params": one.params,
        "flops_per_token": one.flops_per_token,
        "memory": [asdict(memory) | {"total": memory.total} for memory in one.memory],
        "headroom": _headroom(device, one.memory),
        "step": asdict(one.time) | {"total": one.time.total, "mfu": one.mfu},
        "layouts": {
            "accepted": one.ranking.accepted,
            "own_place": one.ranking.own,
            "settings": None
            if one.settings is None
            else {"micro_batch_size": one.settings.stage.micro_batch_size, "recompute": one.settings.recompute},
            "best": [
                asdict(choice.stage.layout)
                | {"micro_batch_size": choice.stage.micro_batch_size}
                | {"seconds": choice.time.total, "memory": choice.memory.total}
                for choice in one.ranking.best
            ],
        },
        "growth": asdict(one.growth) | {"stall": one.growth.stall} if one.growth else None,
    }


def _headroom(device: Device, memory: Sequence[RankMemory]) -> float:
    return device.memory - device.reserve - max(each.total for each in memory)


def tables(estimates: Sequence[StageEstimate], device: Device) -> str:
    parts = [_runs(estimates, device), _memory(estimates, device), _steps(estimates)]
    parts += [_layouts(one, device) for one in estimates]
    if any(one.growth for one in estimates):
        parts.append(_growths(estimates))
    return "\n\n".join(parts)


def _sizes(stage: Stage) -> str:
    model = stage.model
    return f"d{model.d_model} L{model.n_layers} H{model.n_heads} KV{model.kv_heads} ff{model.d_ff}"


def _runs(estimates: Sequence[StageEstimate], device: Device) -> str:
    header = ["stage", "sizes", "params", "layout", "micro batches", "tokens/step", "FLOPs/step", "step", "tokens/s"]
    rows = []
    for one in estimates:
        stage, seconds = one.stage, one.time.total
        micro = f"{stage.grad_accum} x {stage.micro_batch_size} x {stage.seq_len}"
        row = [one.name, _sizes(stage), si(one.params), str(stage.layout), micro, si(stage.tokens_per_step)]
        row += [f"{one.time.model_flops:.2e}", _seconds(seconds), si(stage.tokens_per_step / seconds)]
        rows.append([*row, f"{one.mfu:.0%}"])
    return f"{device.name}: times are {PREDICTED}\n\n" + aligned([*header, "MFU"], rows, {1, 3, 4})


def _memory(estimates: Sequence[StageEstimate], device: Device) -> str:
    header = ["stage", "pipeline", "layers", "in flight", "weights", "masters", "moments", "gradients", "buckets"]
    header += ["activations", "reduction", "update", "total", "headroom"]
    rows = []
    for one in estimates:
        stage, layout = one.stage, one.stage.layout
        for pp, memory in enumerate(one.memory):
            begin, end = layers_at(stage.model.n_layers, layout.pp, pp)
            alive = in_flight(layout.pp, pp, stage.grad_accum)
            row = [one.name, f"{pp + 1}/{layout.pp}", str(end - begin), str(alive)]
            states = (memory.weights, memory.masters, memory.moments)
            passing = (memory.gradients, memory.buckets, memory.activations, memory.reduction, memory.update)
            row += [_bytes(part) for part in (*states, *passing, memory.total)]
            rows.append([*row, _bytes(_headroom(device, [memory]))])
    room = f"{_bytes(device.memory)} less {_bytes(device.reserve)} of reserve"
    note = f"memory of the fullest rank; {device.name}: {room}\n"
    note += "total: weights, masters, moments, and the most of gradients + buckets + activations, reduction, and update"
    return f"{note}\n\n" + aligned(header, rows)


def _steps(estimates: Sequence[StageEstimate]) -> str:
    names = ["compute", "between", "tensor", "pipeline", "bubble", "data", "update"]
    rows = []
    for one in estimates:
        parts = [getattr(one.time, name) for name in names]
        rows.append([one.name, *(_seconds(part) for part in parts), _seconds(one.time.total)])
    return f"a step, {PREDICTED}\n\n" + aligned(["stage", *names, "total"], rows)


def _layouts(one: StageEstimate, device: Device) -> str:
    ranking, stage = one.ranking, one.stage
    header = ["place", "layout", "micro batch", "step", "bubble", "memory", "which"]
    rows = [_layout_row(i + 1, choice, stage) for i, choice in enumerate(ranking.best)]
    own = "does not fit" if ranking.own is None else f"is number {ranking.own}"
    line = f"stage {one.name}: of {ranking.accepted} layouts and micro batch sizes the fastest that fit, {PREDICTED}; "
    line += f"{stage.layout} with micro batches of {stage.micro_batch_size} {own}"
    table = aligned(header, rows, {1, 6}) if rows else f"none fits a {device.name}"
    best = "" if one.settings is None else f"\nsettings of the configured layout: {one.settings} is fastest"
    return f"{line}{best}\n\n{table}"


def _layout_row(place: int, choice: Choice, stage: Stage) -> list[str]:
    time, layout = choice.time, choice.stage.layout
    note = "configured" if layout == stage.layout else ""
    if note and choice.stage.micro_batch_size != stage.micro_batch_size:
        note += f", micro batches of {stage.micro_batch_size} do not fit"
    row = [str(place), str(layout), str(choice.stage.micro_batch_size), _seconds(time.total)]
    return [*row, f"{time.bubble / time.total:.0%}", _bytes(choice.memory.total), note]


def _growths(estimates: Sequence[StageEstimate]) -> str:
    header = ["growth", "layouts", "sent", "received", "messages", "memory", "move", "grow", "rebuild", "stall"]
    rows, looked_at = [], 0
    for before, after in pairwise(estimates):
        growth = after.growth
        if growth is None:  # the same size in its next phase
            continue
        looked_at = growth.looked_at
        row = [f"{before.stage.index} to {after.stage.index}", f"{before.stage.layout} to {after.stage.layout}"]
        row += [_bytes(growth.sent), _bytes(growth.received), f"{growth.messages:,}", _bytes(growth.memory)]
        rows.append([*row, *(_seconds(s) for s in (growth.move, growth.grow, growth.rebuild, growth.stall))])
    world = estimates[0].stage.layout.world
    who = f"the most of {looked_at} ranks of {world}" if looked_at < world else "of the rank with most"
    return f"growths: bytes are {who}; times are {PREDICTED}\n\n" + aligned(header, rows, {1})


def _bytes(n: float) -> str:
    """In decimal units, as data sheets have them."""
    return f"{n / 1e9:.2f} GB" if abs(n) >= 1e9 else f"{n / 1e6:.1f} MB" if abs(n) >= 1e6 else f"{n / 1e3:.1f} kB"


def _seconds(s: float) -> str:
    return f"{s:.2f} s" if s >= 1 else f"{s * 1e3:.1f} ms"
