"""Small growing runs in forked ranks: started, watched step by step, interrupted and started again."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

import megabus.train.loop as loop  # here once: it takes a second
import megabus.train.run as run_room
from megabus.checkpoint.state import Progress
from megabus.config import RunConfig, parse_config
from megabus.data.indexed import IndexedTokens, IndexedWriter
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from tests.support.tiny_config import changed

VOCAB = 67
TIMES = (
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "stall_s",
    "write_s",
    "wait_s",
    "seconds",
    "environment",
)  # all that a run cannot repeat

Change = Callable[[], None]  # of a rank's code, made in the forked rank


def write_corpus(folder):
    """Tokens with something to learn: each is mostly a function of the one before it."""
    table = np.random.default_rng(0).integers(0, VOCAB, VOCAB)
    for name, seed in (("train", 1), ("valid", 2)):
        rng, tokens = np.random.default_rng(seed), [0]
        for _ in range(20_000):
            tokens.append(int(table[tokens[-1]] if rng.random() < 0.9 else rng.integers(VOCAB)))
        write_tokens(folder / name, tokens)
    return folder


def write_tokens(prefix, tokens):
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.append(tokens)
    return prefix


def read_tokens(prefix):
    corpus = IndexedTokens(str(prefix))
    return np.array(corpus.tokens(0, corpus.n_tokens))


STAGES = [
    {"d_model": 52, "n_heads": 3, "d_ff": 90, "max_tokens": 1024},
    {"n_layers": 5, "seq_len": 32, "micro_batch_size": 2, "lr": 3e-3},
]


def run_config(corpus, run_dir, layouts, **changes):
    """Three stages, growing at 1024 and 2048 tokens; `section__key=value` changes it."""
    tree = {
        "run_dir": str(run_dir),
        "model": {"vocab_size": VOCAB, "d_model": 36, "n_layers": 3, "n_heads": 2, "head_dim": 6, "d_ff": 62},
        "layout": layouts[0],
        "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "max_tokens": 4000},
        "optimizer": {"lr": 1e-2},
        "growth": {
            "moments": "grow",
            "max_tokens": 1024,
            "trigger": {"predictor": "constant", "constant": 1.5, "kappa": 0.99},
            "stages": [stage | {"layout": layout} for stage, layout in zip(STAGES, layouts[1:], strict=True)],
        },
        "data": {"train": str(corpus / "train"), "valid": str(corpus / "valid")},
        "eval": {"every": 4, "tokens": 256},
        "log": {"unit_norm_every": 1},
        "preflight": {"enabled": False},  # half a second of every start
    }
    return parse_config(changed(tree, changes))


def quick_config(corpus, run_dir, layouts, **changes):
    """`run_config` with two micro batches in every step of 8 samples, and half as many tokens in a validation: ranks on
    CPUs spend most of their time on the small collectives of each micro batch."""
    ranks = max(map(_ranks, layouts))
    stages = [stage | {"layout": layout} for stage, layout in zip(STAGES, layouts[1:], strict=True)]
    stages = [stage | _halved(stage["layout"], ranks) for stage in stages]
    if "growth__stages" in changes and "train__micro_batch_size" not in changes:
        given = changes["growth__stages"]
        changes["growth__stages"] = [_halved(s["layout"], ranks) | s if "layout" in s else s for s in given]
    micro = _halved(layouts[0], ranks)["micro_batch_size"]
    quick = {"train__micro_batch_size": micro, "eval__tokens": 128, "growth__stages": stages}
    return run_config(corpus, run_dir, layouts, **quick | changes)


def _halved(layout, ranks):
    """ranks: of the run, where the layout does not say its dp."""
    return {"micro_batch_size": 4 // (layout.get("dp") or ranks // _ranks(layout))}


def _ranks(layout):
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


def rows_of(config, event):
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        return [row for row in map(json.loads, file) if row["event"] == event]


def untimed(rows):
    """What a run tells, without what no two runs share."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# ---- a start of a run, and what its ranks saw --------------------------------------------------------------


class Step(NamedTuple):
    """A rank after an optimizer step. samples: rows of the global batch that this rank computed."""

    step: int
    stage: int
    position: int
    digest: str
    optimizer_step: int
    samples: dict[int, bytes]


class Told(NamedTuple):
    """One rank's start of a run. steps: all that it computed; digests: the state before the first one."""

    checkpoint: str | None
    stopped: bool
    error: str | None
    begun: str
    steps: list[Step]
    progress: Progress | None

    @property
    def numbers(self) -> list[int]:
        return [step.step for step in self.steps]


def attempt(config: RunConfig, world: int, *changes: Change) -> list[Told]:
    """`train(config)` on forked ranks, after `changes`; what each rank saw."""
    return run_ranks(world, _start, config, changes)


def start(config: RunConfig, world: int, *changes: Change) -> list[Told]:
    """An attempt that ends well."""
    ranks = attempt(config, world, *changes)
    errors = {rank.error for rank in ranks}
    assert errors == {None}, errors
    return ranks


def refusal(config: RunConfig, world: int, *changes: Change) -> str:
    """The one line in which all ranks refuse to start."""
    ranks = attempt(config, world, *changes)
    assert all(not rank.steps and rank.error == ranks[0].error for rank in ranks)
    assert ranks[0].error is not None
    assert "\n" not in ranks[0].error
    return ranks[0].error


def _start(config: RunConfig, changes: tuple[Change, ...]) -> Told:
    steps: list[Step] = []
    runs, begun = [], []
    samples: dict[int, bytes] = {}
    _record_samples(samples)
    train_step, start_run = loop.train_step, run_room.start

    def starting(*args):
        runs.append(start_run(*args))
        begun.append(digest(runs[-1].engine))
        return runs[-1]

    def stepping(run):
        position = run.progress.position
        samples.clear()
        train_step(run)
        engine = run.engine
        steps.append(
            Step(run.progress.step, run.stage.index, position, digest(engine), engine.optimizer_step, dict(samples))
        )

    run_room.start, loop.train_step = starting, stepping
    for change in changes:
        change()
    try:
        outcome = loop.train(config)
    except UserError as error:
        return Told(None, False, str(error), "".join(begun), steps, runs[-1].progress if runs else None)
    checkpoint = None if outcome.checkpoint is None else str(outcome.checkpoint)
    return Told(checkpoint, outcome.stopped, None, "".join(begun), steps, runs[-1].progress if runs else None)


def _record_samples(samples):
    true_step = Engine.train_step

    def train_step(self, batches, lr):
        for micro, (inputs, targets, *_) in enumerate(batches):
            rows = self.micro_rows(micro)
            samples.update(
                (row, np.append(x, y[-1]).tobytes())
                for row, x, y in zip(rows, inputs.numpy(), targets.numpy(), strict=True)
            )
        return true_step(self, batches, lr)

    Engine.train_step = train_step


def digest(engine):
    """Of this rank's masters, moments and model weights, to the bit."""
    made = hashlib.sha256()
    for piece, tensors in engine.read().items():
        for kind, values in tensors.items():
            made.update(f"{piece} {kind}".encode() + values.contiguous().numpy().tobytes())
    for parameter in engine.module.parameters():
        made.update(parameter.detach().float().contiguous().numpy().tobytes())
    return made.hexdigest()


def consumed(ranks: list[Told], batch: int) -> dict[int, list[bytes]]:
    """The global batch of every step, put together from all ranks, which must agree."""
    steps: dict[int, dict[int, bytes]] = {}
    for rank in ranks:
        for step in rank.steps:
            for row, sample in step.samples.items():
                assert steps.setdefault(step.step, {}).setdefault(row, sample) == sample
    assert all(sorted(rows) == list(range(batch)) for rows in steps.values())
    return {step: [rows[row] for row in range(batch)] for step, rows in steps.items()}


# ---- what may happen to it ---------------------------------------------------------------------------------


def after_step(step: int, act: Callable, rank: int | None = None, times: int | None = None) -> Change:
    """`act(run)` on that rank (None: on all) when a step was computed, before anything else is done about it; so many
    times (None: always)."""

    def change():
        train_step, acted = loop.train_step, []

        def acting(run):
            train_step(run)
            if run.progress.step == step and rank in (None, dist.get_rank()) and len(acted) != times:
                acted.append(step)
                act(run)

        loop.train_step = acting

    return change


def stop_after(step: int, rank: int = 0, number: int = signal.SIGTERM) -> Change:
    """One rank alone gets the signal."""
    return after_step(step, lambda run: os.kill(os.getpid(), number), rank)


def killed_after(step: int) -> Change:
    """All ranks are gone, without a word, once no save is under way."""

    def die(run):
        run.saver.wait()
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    return after_step(step, die)


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())


def read_state_of(config: RunConfig, step: int) -> dict:
    """What the checkpoint of a step holds beside tensors."""
    return json.loads((Path(config.run_dir) / f"checkpoints/step-{step:08d}/state.json").read_text())
