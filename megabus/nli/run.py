"""One evaluation from the checkpoint to the scores, on every rank of an engine; fine-tuning trains the same engine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from megabus.checkpoint.save import save_weights
from megabus.config.schema import OptimizerConfig
from megabus.convert.begin import begin, origin_of
from megabus.convert.hugging_face import longest_of
from megabus.convert.load import tokenizer_of_model
from megabus.data.order import nth_visited
from megabus.durable import make_directory
from megabus.engine.engine import Engine
from megabus.model.cost import count_parameters
from megabus.nli.pairs import Hub, PairSet, read_jsonl
from megabus.nli.score import CONTENT_FREE, Encoder, Scorer
from megabus.nli.settings import Settings
from megabus.parallel.agree import agreement, rank_0_says, rank_0_tells
from megabus.scoring.harness import Scores
from megabus.scoring.likelihood import SequenceLoss, train_step
from megabus.train.environment import environment
from megabus.train.log import describe
from megabus.train.schedule import learning_rate
from megabus.train.watchdog import watched


@dataclass(frozen=True)
class Data:
    """reported: what the report is about; watched: what a fine-tuning's curve is measured on, never a test split."""

    train: PairSet | None
    watched: PairSet | None
    reported: list[PairSet]


@dataclass(frozen=True)
class Outcome:
    """What every rank knows in the end. scores: of a model, "zero-shot" and perhaps "fine-tuned", in the order of
    data.reported; facts: all that they depend on, as JSON has it."""

    data: Data
    scores: dict[str, list[Scores]]
    facts: dict[str, Any]


def read_data(settings: Settings) -> Data:
    """Everything that will be read, in the form in which it will be used."""
    if settings.data is not None:
        hub = Hub(settings.data)
        train = hub.read("train") if "train" in hub.splits or settings.fine_tune else None
        watched = hub.read(hub.watched) if settings.fine_tune and hub.watched in hub.splits else None
        reported = [hub.read(split) for split in settings.split or hub.reported]
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
    begun = time.perf_counter()
    origin = origin_of(settings.checkpoint)
    with agreement():
        train, optimizer, stage = settings.engine_parts(origin.state.model, longest_of(origin), dist.get_world_size())
        tokenizer = tokenizer_of_model(origin.folder, settings.tokenizer, stage.model.vocab_size)
        encoder = Encoder(tokenizer, settings.template, stage.seq_len)
    for key, folder in (("--out", settings.out), ("--save", settings.save)):
        if folder is not None:  # before hours of work, not after them
            rank_0_tells(partial(make_directory, key, folder))
    data = rank_0_tells(lambda: read_data(settings))  # one reader: all ranks have the same pairs
    used = {"max_length": stage.seq_len, "micro_batch_size": stage.micro_batch_size, "content_free": CONTENT_FREE}
    parameters, tuning = count_parameters(stage.model), None
    with watched(settings.hang_timeout, dist.get_rank()) as watchdog:
        engine = Engine(train, optimizer, stage, SequenceLoss())
        begin(origin, engine, watchdog.heartbeat)
        machine, scorer = environment(engine.device), Scorer(engine, encoder, watchdog.heartbeat)
        rank_0_says(f"{origin.folder}: {describe(stage)}, {parameters:,} parameters, {settings.precision}")
        scores = {"zero-shot": [scorer.score(pairs) for pairs in data.reported]}
        if settings.fine_tune:
            curve = list(fine_tune(scorer, data, settings, optimizer))
            scores["fine-tuned"] = [scorer.score(pairs) for pairs in data.reported]
            sections = {"train": train.model_dump(), "optimizer": optimizer.model_dump(), "growth": {"stages": []}}
            steps, saved = curve[-1]["step"], None
            if settings.save is not None:
                saved = str(save_weights(settings.save, engine, steps, sections, tokenizer.files))
                rank_0_says(f"saved: {saved}")
            tuning = {"steps": steps, "watched": data.watched and data.watched.facts(), "curve": curve, "saved": saved}
        unit_error = engine.unit_error()
        engine.close()
    facts = {
        "environment": machine,
        "checkpoint": {"path": str(origin.folder.resolve()), "step": origin.state.progress.step},
        "model": stage.model.model_dump() | {"parameters": parameters},
        "layout": asdict(stage.layout),
        "settings": settings.model_dump(mode="json") | used,
        "train": data.train and data.train.facts(),
        "fine_tuning": tuning,
        "unit_error": unit_error,
        "seconds": time.perf_counter() - begun,
    }
    return Outcome(data, scores, facts)


def fine_tune(scorer: Scorer, data: Data, settings: Settings, optimizer: OptimizerConfig) -> Iterator[dict[str, Any]]:
    """Train on the gold labels, epoch after epoch, each in an order of its own; points of the curve. A last batch that
    is not full is filled from the epoch that would follow. Collective."""
    assert data.train is not None
    pairs, watched, batch = data.train.pairs, data.watched, scorer.engine.stage.global_batch_size
    steps, losses = math.ceil(len(pairs) * settings.epochs / batch), list[float]()
    rank_0_says(f"fine-tuning on {len(pairs):,} pairs: {steps:,} steps of {batch}")

    def point(step: int, lr: float) -> dict[str, Any]:
        """It is told: losses are in nats a label, that of training the mean since the last point."""
        mean, accuracy, loss = sum(losses) / len(losses) if losses else None, None, None
        text = f"step {step:>5}" + ("" if mean is None else f" | loss {mean:.4f}  lr {lr:.2e}")
        if watched is not None:
            table, gold = scorer.score(watched).log_likelihood, np.array(watched.labels)
            accuracy, loss = float((table.argmax(1) == gold).mean()), float(-table[np.arange(len(gold)), gold].mean())
            text += f" | valid loss {loss:.4f}  accuracy {accuracy:.1%}"
        rank_0_says(text)
        row = {"step": step, "pairs": step * batch, "lr": lr, "train_loss": mean}
        return row | {"valid_accuracy": accuracy, "valid_loss": loss}

    yield point(0, 0.0)
    for step in range(1, steps + 1):
        lr = learning_rate(optimizer, optimizer.lr, (step - 0.5) / steps)  # at its middle, as in pre-training
        some = [pairs[nth_visited(n, len(pairs), settings.seed)] for n in range((step - 1) * batch, step * batch)]
        sequences = [scorer.encoder.encode(pair, pair.label).sequence for pair in some]
        losses.append(train_step(scorer.engine, sequences, lr, step, scorer.heartbeat))
        if step % settings.curve_every == 0 or step == steps:
            yield point(step, lr)
            losses.clear()
