"""One evaluation from the checkpoint to the scores, on every rank of an engine; fine-tuning trains the same engine."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megabus.checkpoint.contents import Found
from megabus.checkpoint.load import checkpoint_at, saved_tokenizer
from megabus.checkpoint.restore import restore, verified
from megabus.checkpoint.save import save_weights
from megabus.config import Stage
from megabus.data.order import permute
from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from megabus.nli.pairs import Hub, PairSet, read_jsonl
from megabus.nli.score import Encoder, Scorer, Scores
from megabus.nli.settings import Settings
from megabus.parallel.agree import agreement, rank_0_tells
from megabus.scoring.likelihood import SequenceLoss, train_step
from megabus.train.metrics import describe
from megabus.train.schedule import learning_rate
from megabus.train.watchdog import watched

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """reported: what the report is about; watched: what a fine-tuning's curve is measured on, never a test split."""

    train: PairSet | None
    watched: PairSet | None
    reported: list[PairSet]


@dataclass(frozen=True)
class Outcome:
    """What every rank knows in the end; scores in the order of data.reported. curve: see `_point`, empty without
    fine-tuning; unit_error: largest | |row| - 1 | afterwards; saved: the new checkpoint."""

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
        hub = Hub(settings.data)
        train = hub.read("train") if "train" in hub.splits or settings.fine_tune else None
        watched = hub.read(hub.facts.watched) if settings.fine_tune and hub.facts.watched in hub.splits else None
        reported = [hub.read(split) for split in settings.split or hub.facts.reported]
    else:
        files = {"--train": settings.train, "--valid": settings.valid, "--test": settings.test}
        train, watched, test = (None if path is None else read_jsonl(path, key) for key, path in files.items())
        reported = [pairs for pairs in (watched, test) if pairs is not None]
    return Data(
        train and train.sample(settings.train_limit, settings.seed),
        watched and watched.first(settings.limit).sample(settings.curve_pairs, settings.seed),
        [pairs.first(settings.limit) for pairs in reported],
    )


def evaluate(settings: Settings) -> Outcome:
    """Score the pairs, fine-tune if asked to, and score them again; the settings are checked ones. Collective."""
    seconds: dict[str, float] = defaultdict(float)
    with _timed(seconds, "start"):
        found = verified(rank_0_tells(lambda: checkpoint_at(settings.checkpoint)))
        with agreement():
            train, optimizer, stage = settings.engine_parts(found.state, dist.get_world_size())
            tokenizer = open_tokenizer(settings, found)
            encoder = Encoder(tokenizer, settings.template, stage.seq_len)
        rank_0_tells(lambda: make_directory("--out", settings.out))
        rank_0_tells(lambda: make_directory("--save", settings.save))
        data = rank_0_tells(lambda: read_data(settings))  # one reader: all ranks have the same pairs
    with watched(settings.hang_timeout, dist.get_rank()) as watchdog:
        with _timed(seconds, "start"):
            engine = Engine(train, optimizer, stage, SequenceLoss())
            weights = replace(found.state, kinds=("weight",), optimizer_step=0)
            restore(replace(found, state=weights), engine, watchdog.heartbeat)
        _say(f"{found.folder}: {describe(stage)}, {count_parameters(stage.model):,} parameters, {settings.precision}")
        scorer = Scorer(engine, encoder, watchdog.heartbeat)
        with _timed(seconds, "scoring"):
            zero_shot = [scorer.score(pairs) for pairs in data.reported]
        fine_tuned, curve, saved = None, [], None
        if settings.fine_tune:
            with _timed(seconds, "fine-tuning"):
                curve = list(fine_tune(scorer, data, settings, partial(learning_rate, optimizer, stage.lr)))
            with _timed(seconds, "scoring"):
                fine_tuned = [scorer.score(pairs) for pairs in data.reported]
            sections = {"train": train.model_dump(), "optimizer": optimizer.model_dump(), "growth": {"stages": []}}
            if settings.save is not None:
                saved = save_weights(settings.save, engine, curve[-1]["step"], sections, tokenizer.path)
        unit_error, step = engine.unit_error(), found.state.progress.step
        engine.close()
    return Outcome(found.folder, step, stage, data, zero_shot, fine_tuned, curve, unit_error, saved, seconds)


def steps_of(n_pairs: int, batch_size: int, epochs: float) -> int:
    return max(1, math.ceil(n_pairs * epochs / batch_size))


def batch_places(step: int, batch_size: int, n_pairs: int, seed: int) -> list[int]:
    """The pairs of a step, as a pure function. Epoch follows epoch, each in an order of its own; where the last batch
    is not full, it is filled from the epoch that would follow."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [permute(place % n_pairs, n_pairs, seed, place // n_pairs) for place in places]


def fine_tune(scorer: Scorer, data: Data, settings: Settings, lr_at: Callable[[float], float]) -> Iterator[Row]:
    """Train on the gold labels; points of the curve. `lr_at`: of the share of the steps. Collective. Raises `UserError`
    where the loss is not finite."""
    assert data.train is not None
    pairs, batch, losses = data.train.pairs, scorer.engine.stage.global_batch_size, []
    steps = steps_of(len(pairs), batch, settings.epochs)
    _say(f"fine-tuning on {len(pairs):,} pairs: {steps:,} steps of {batch}")
    yield _point(0, 0, 0.0, None, scorer, data.watched)
    for step in range(1, steps + 1):
        lr = lr_at((step - 0.5) / steps)  # at its middle, as in pre-training
        some = [pairs[place] for place in batch_places(step - 1, batch, len(pairs), settings.seed)]
        sequences = [scorer.encoder.encode(pair.premise, pair.hypothesis, pair.label).sequence for pair in some]
        result = train_step(scorer.engine, sequences, lr)
        if not result.is_finite:  # known to all ranks
            problem = f"the loss of step {step} is {result.loss}, its gradient's norm {result.grad_norm}"
            raise UserError("--lr", scorer.engine.stage.lr, problem, "lower it")
        scorer.heartbeat()
        losses.append(result.loss)
        if step % settings.curve_every == 0 or step == steps:
            yield _point(step, step * batch, lr, sum(losses) / len(losses), scorer, data.watched)
            losses = []


def _point(step: int, pairs: int, lr: float, train_loss: float | None, scorer: Scorer, watched: PairSet | None) -> Row:
    """A point of the curve, which is told: losses are in nats a label, that of training the mean since the last one."""
    row: Row = {"step": step, "pairs": pairs, "lr": lr, "train_loss": train_loss}
    row |= {"valid_accuracy": None, "valid_loss": None}
    text = f"step {step:>5}" + ("" if train_loss is None else f" | loss {train_loss:.4f}  lr {lr:.2e}")
    if watched is not None:
        table, gold = scorer.score(watched).log_likelihood, np.array(watched.labels)
        accuracy, loss = (table.argmax(1) == gold).mean(), -table[np.arange(len(gold)), gold].mean()
        row |= {"valid_accuracy": float(accuracy), "valid_loss": float(loss)}
        text += f" | valid loss {loss:.4f}  accuracy {accuracy:.1%}"
    _say(text)
    return row


def make_directory(key: str, path: Path | None) -> None:
    """Before hours of work, not after them."""
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(key, path, f"cannot be written ({error.strerror})", "choose a writable place") from error


def open_tokenizer(settings: Settings, found: Found) -> Tokenizer:
    tokenizer = Tokenizer(settings.tokenizer or saved_tokenizer(found.folder))
    if tokenizer.vocab_size != found.state.model.vocab_size:
        problem = f"has {tokenizer.vocab_size} pieces, the model {found.state.model.vocab_size}"
        raise UserError("--tokenizer", tokenizer.path, problem, "give the one that made its data")
    return tokenizer


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - begun


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
