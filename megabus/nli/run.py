"""One evaluation from the checkpoint to the scores, on every rank of an engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megabus.checkpoint.load import checkpoint_at
from megabus.checkpoint.restore import Found, restore, verified
from megabus.checkpoint.save import TOKENIZER, Saver
from megabus.checkpoint.state import Progress, SavedState
from megabus.checkpoint.store import checkpoints_of
from megabus.config import RunConfig, Stage, resolve_stages
from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from megabus.nli.finetune import Row, Tuning, fine_tune, steps_of
from megabus.nli.pairs import Hub, PairSet, hub_data, read_jsonl
from megabus.nli.prompt import Encoder
from megabus.nli.score import LabelLoss, Scores, score_pairs
from megabus.nli.settings import Settings, run_config
from megabus.parallel.agree import agreement, rank_0_tells
from megabus.train.metrics import describe
from megabus.train.watchdog import watched


@dataclass(frozen=True)
class Data:
    """reported: what the report is about; watched: what a fine-tuning's curve is measured on, never a test split."""

    train: PairSet | None
    watched: PairSet | None
    reported: list[PairSet]


@dataclass(frozen=True)
class Outcome:
    """All that is known when the ranks part, the same on each. Scores are in the order of data.reported.

    curve: see `fine_tune`, empty without one; unit_error: largest | |row| - 1 | afterwards; saved: the new checkpoint.
    """

    checkpoint: Path
    step: int
    stage: Stage
    data: Data
    zero_shot: list[Scores]
    fine_tuned: list[Scores] | None
    curve: list[Row]
    unit_error: float | None
    saved: Path | None
    seconds: dict[str, float]


def read_data(settings: Settings) -> Data:
    """Everything that will be read, in the form in which it will be used."""
    if settings.data is not None:
        hub, facts = Hub(settings.data), hub_data(settings.data)
        has_train, has_watched = "train" in hub.splits, facts.watched in hub.splits
        train = hub.read("train") if has_train or settings.fine_tune else None
        watched = hub.read(facts.watched) if settings.fine_tune and has_watched else None
        reported = [hub.read(split) for split in settings.split or facts.reported]
    else:
        train = None if settings.train is None else read_jsonl(settings.train, "--train")
        watched = None if settings.valid is None else read_jsonl(settings.valid, "--valid")
        reported = [] if watched is None else [watched]
        if settings.test is not None:
            reported.append(read_jsonl(settings.test, "--test"))
    return Data(
        None if train is None else train.sample(settings.train_limit, settings.seed),
        None if watched is None else watched.first(settings.limit).sample(settings.curve_pairs, settings.seed),
        [pairs.first(settings.limit) for pairs in reported],
    )


def evaluate(settings: Settings) -> Outcome:
    """Score the pairs, fine-tune if asked to, and score them again; the settings are checked ones. Collective."""
    begun, rank = time.perf_counter(), dist.get_rank()
    found = verified(rank_0_tells(lambda: checkpoint_at(settings.checkpoint)))
    with agreement():
        config = run_config(settings, found.state, dist.get_world_size())
        stage = resolve_stages(config, dist.get_world_size())[0]
        tokenizer = open_tokenizer(settings, found)
        encoder = Encoder(tokenizer, settings.template, stage.seq_len)
    rank_0_tells(lambda: make_directories(settings))
    data = rank_0_tells(lambda: read_data(settings))  # one reader: all ranks have the same pairs
    with watched(settings.hang_timeout, rank) as watchdog:
        engine = Engine(config.train, config.optimizer, stage, LabelLoss())
        weights = replace(found.state, kinds=("weight",), optimizer_step=0)
        restore(replace(found, state=weights), engine, watchdog.heartbeat)
        _say(f"{found.folder}: {describe(stage)}, {count_parameters(stage.model):,} parameters, {settings.precision}")
        seconds = {"start": time.perf_counter() - begun}
        score = partial(_timed, seconds, "scoring", score_pairs, engine, encoder, heartbeat=watchdog.heartbeat)
        zero_shot = [score(pairs=pairs) for pairs in data.reported]
        fine_tuned, curve, saved = None, [], None
        if settings.fine_tune:
            assert data.train is not None
            tuning = Tuning(settings.epochs, settings.curve_every, settings.seed)
            steps = steps_of(len(data.train), stage.global_batch_size, settings.epochs)
            _say(f"fine-tuning on {len(data.train):,} pairs: {steps:,} steps of {stage.global_batch_size}")
            measure = partial(_measure, engine, encoder, data.watched, watchdog.heartbeat)
            tune = partial(fine_tune, engine, config.optimizer, encoder, data.train, tuning, measure, _tell)
            curve = _timed(seconds, "fine-tuning", tune, watchdog.heartbeat)
            fine_tuned = [score(pairs=pairs) for pairs in data.reported]
            saved = _save(settings, config, engine, tokenizer, steps)
        outcome = Outcome(
            checkpoint=found.folder,
            step=found.state.progress.step,
            stage=stage,
            data=data,
            zero_shot=zero_shot,
            fine_tuned=fine_tuned,
            curve=curve,
            unit_error=engine.unit_error(),
            saved=saved,
            seconds=seconds,
        )
        engine.close()
    return outcome


def make_directories(settings: Settings) -> None:
    """Before hours of work, not after them."""
    for key, path in (("--out", settings.out), ("--save", settings.save)):
        try:
            if path is not None:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise UserError(key, path, problem, "choose a writable place") from error


def open_tokenizer(settings: Settings, found: Found) -> Tokenizer:
    tokenizer = Tokenizer(settings.tokenizer or found.folder / TOKENIZER)
    if tokenizer.vocab_size != found.state.model.vocab_size:
        problem = f"has {tokenizer.vocab_size} pieces, the model {found.state.model.vocab_size}"
        raise UserError("--tokenizer", tokenizer.path, problem, "give the one that made its data")
    return tokenizer


def _timed(seconds: dict[str, float], name: str, work: Any, *args: Any, **kwargs: Any) -> Any:
    """What `work` returns; its time is added under `name`."""
    begun = time.perf_counter()
    result = work(*args, **kwargs)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
    return result


def _measure(engine: Engine, encoder: Encoder, pairs: PairSet | None, heartbeat: Any) -> Row:
    """A point of the curve; the loss in nats a gold label."""
    if pairs is None:
        return {"valid_accuracy": None, "valid_loss": None}
    table, gold = score_pairs(engine, encoder, pairs, heartbeat).log_likelihood, np.array(pairs.labels)
    hits = table.argmax(1) == gold
    return {"valid_accuracy": float(hits.mean()), "valid_loss": float(-table[np.arange(len(gold)), gold].mean())}


def _save(settings: Settings, config: RunConfig, engine: Engine, tokenizer: Tokenizer, steps: int) -> Path | None:
    """Write the fine-tuned weights, without moments, as a checkpoint of `steps` steps. Collective."""
    if settings.save is None:
        return None
    saver = Saver(checkpoints_of(settings.save), 1, None, False, str(tokenizer.path))
    state = SavedState(
        progress=Progress(step=steps),
        stage=0,
        model=engine.stage.model,
        layout=engine.stage.layout,
        optimizer_step=0,
        kinds=("weight",),
        monitor={},
        config=config.model_dump(mode="json"),
        data={},
    )
    saver.start(state, engine.placement, engine.read())
    save = saver.wait()
    assert save is not None
    if save.error is not None:
        raise save.error
    return save.folder


def _tell(row: Row) -> None:
    parts = [f"step {row['step']:>5}"]
    if row["train_loss"] is not None:
        parts.append(f"loss {row['train_loss']:.4f}  lr {row['lr']:.2e}")
    if row["valid_loss"] is not None:
        parts.append(f"valid loss {row['valid_loss']:.4f}  accuracy {row['valid_accuracy']:.1%}")
    _say(" | ".join(parts))


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
