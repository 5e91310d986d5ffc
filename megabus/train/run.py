"""A run: what it is made of, how it starts and how it ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megabus.checkpoint.save import save_model
from megabus.config import RunConfig, Stage, resolve_stages
from megabus.data.sources import open_sources
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.kappa.monitor import KappaMonitor, KappaSettings, KappaView
from megabus.kappa.predictors import make_predictor
from megabus.model.init import initial_rows
from megabus.parallel.agree import agreement
from megabus.parallel.fragments import Fragments
from megabus.train.corpora import Corpora
from megabus.train.flops import count_parameters
from megabus.train.metrics import Metrics, describe
from megabus.train.schedule import spent_share

CHECKPOINT = "checkpoint"  # of the final state, in the run's directory


@dataclass
class Run:
    """All that changes while a run goes on. `position` is the place in the data order, in tokens: it runs ahead
    of `tokens` only where a longer sequence must start at a multiple of itself."""

    config: RunConfig
    stages: list[Stage]
    corpora: Corpora
    engine: Engine
    monitor: KappaMonitor | None  # on rank 0
    metrics: Metrics | None  # on rank 0
    step: int = 0
    tokens: int = 0
    position: int = 0
    flops: float = 0.0
    stage_start: tuple[int, float] = (0, 0.0)  # tokens and FLOPs at which the present stage began
    view: KappaView | None = None
    pace: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))  # (clock, share)

    @property
    def stage(self) -> Stage:
        return self.engine.stage

    @property
    def share(self) -> float:
        return spent_share(self.config.train, self.step, self.tokens, self.flops)

    @property
    def totals(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "flops": self.flops, "stage": self.stage.index}

    @property
    def can_grow(self) -> bool:
        return self.stage.index + 1 < len(self.stages)


def start(config: RunConfig) -> Run:
    """Check everything that can be checked, then build the first stage with its initial weights."""
    with agreement():
        stages = resolve_stages(config, dist.get_world_size())
        corpora = Corpora(open_sources(config, stages))
        kappa = _kappa_settings(config)
    with agreement():  # only once every rank is content: a refused run leaves nothing behind
        metrics = _open_sinks(config) if dist.get_rank() == 0 else None
    engine = Engine(config, stages[0])
    engine.write(initial_fragments(engine, config.train.seed))
    run = Run(config, stages, corpora, engine, monitor=None, metrics=None)
    if metrics is not None:
        run.metrics, run.monitor = metrics, KappaMonitor(kappa)
        run.metrics.write("start", run.totals | {"sizes": sizes(run.stage), "layout": str(run.stage.layout)})
        print(f"{len(stages)} stage(s), first: {describe(run.stage)}, {count_parameters(run.stage.model):,} parameters")
        watch_stage(run)
    return run


def _open_sinks(config: RunConfig) -> Metrics:
    path = Path(config.run_dir)
    if (path / CHECKPOINT).exists():
        raise UserError("run_dir", path, "holds a finished run", "choose another run_dir, or remove that one")
    try:
        path.mkdir(parents=True, exist_ok=True)
        _set_aside(path / "metrics.jsonl")
        _set_aside(path / "config.yaml")
        (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return Metrics(config)
    except OSError as error:
        raise UserError("run_dir", path, f"cannot be written ({error.strerror})", "choose a writable place") from error


def _set_aside(file: Path) -> None:
    """Keep what a run that did not finish has left, under the first free name."""
    if file.exists():
        names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in count(1))
        file.rename(next(name for name in names if not name.exists()))


def _kappa_settings(config: RunConfig) -> KappaSettings:
    trigger = config.growth.trigger
    options: dict[str, Any] = {
        "constant": {"loss": trigger.constant},
        "scaling_law": trigger.scaling_law.model_dump(),
        "reference": {"table": trigger.reference},
        "fit": {"min_points": trigger.min_evals},
    }[trigger.predictor]
    return KappaSettings(
        kappa=trigger.kappa,
        predictor=make_predictor(trigger.predictor, **options),
        smoothing=trigger.smoothing,
        patience=trigger.patience,
        min_evals=trigger.min_evals,
        start=trigger.start,
        max_std=trigger.max_std,
    )


def initial_fragments(engine: Engine, seed: int) -> Fragments:
    """This rank's part of the initial state, drawn without drawing any other."""
    fragments: Fragments = {}
    for piece in engine.placement.owned(engine.mesh.rank):
        width = engine.placement.width(piece.name)
        first, last = piece.start // width, -(-piece.stop // width)
        rows = initial_rows(engine.stage.model, piece.name, seed, first, last, engine.device).reshape(-1)
        offset = piece.start - first * width
        fragments[piece] = {"weight": rows[offset : offset + len(piece)]}
    return fragments


def watch_stage(run: Run) -> None:
    """Point rank 0's monitor at the stage that the run is in now."""
    if run.monitor is not None:
        stage = run.stage
        run.monitor.start_stage(
            stage.index,
            count_parameters(stage.model),
            stage.kappa,
            stage.max_tokens,
            stage.max_flops,
            tokens=run.tokens,
            flops=run.flops,
        )


def sizes(stage: Stage) -> dict[str, int]:
    model = stage.model
    return {
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.kv_heads,
        "d_ff": model.d_ff,
        "n_params": count_parameters(model),
    }


def finish(run: Run) -> Path:
    """Save the canonical state and close everything."""
    folder = Path(run.config.run_dir) / CHECKPOINT
    save_model(run.engine, run.config, folder, run.totals)
    if run.metrics is not None:
        run.metrics.close()
    run.engine.close()
    return folder
