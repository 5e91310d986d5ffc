"""Tiny experiments of benchmarks/growth, and a runner whose processes are forks of this one."""

from __future__ import annotations

import json
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path

import yaml

import megabus.report.page as page
import megabus.report.plots as plots
from benchmarks.growth import runner
from benchmarks.growth.experiment import Experiment, load_experiment, make_job
from benchmarks.growth.results import Point, Result, Results, _identity
from megabus.testing.ranks import preload
from tests.support import launching, small_runs
from tests.support.tiny_config import changed

TWICE = {"write": "tilt", "max_tokens": 1024, "stages": [{"d_model": 52, "n_heads": 3, "d_ff": 90}]}
TRIGGER = {"predictor": "constant", "constant": 1.5, "kappa": 0.99}
BY_CAPS = {"stages": TWICE["stages"], "trigger": {"predictor": "constant", "constant": 0.0, "kappa": 1.0}}
UNIT = 4.5e8  # FLOPs: some 20 steps of the first size


def spec(corpus="nowhere", **changes):
    """What the YAML of a small experiment holds."""
    tree = {
        "name": "tiny",
        "budget": UNIT,
        "seeds": [0],
        "reference": "scratch",
        "versus": "scratch",
        "base": {
            "model": {"vocab_size": 67, "d_model": 36, "n_layers": 2, "n_heads": 2, "head_dim": 6, "d_ff": 62},
            "train": {"seq_len": 16, "micro_batch_size": 8, "global_batch_size": 8},
            "optimizer": {"schedule": "wsd", "decay_share": 0.3},
            "data": {"train": f"{corpus}/train", "valid": f"{corpus}/valid"},
            "eval": {"every": 4, "tokens": 256},
            "checkpoint": {"every": 4},
        },
        "arms": {"scratch": {"about": "from scratch", "lr": 0.01}},
    }
    return tree | changes


def arm(**keys):
    return {"about": "an arm", "lr": 0.01} | keys


def write(folder, tree):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def load(folder, tree) -> Experiment:
    return load_experiment(write(folder, tree))


def tree_of(experiment_spec, **changes):
    """A run's configuration; `section__key=value` changes it, and null takes a key away."""
    tree = {**experiment_spec["base"], "run_dir": "x"}
    tree["train"] = tree["train"] | {"max_flops": 100.0}
    tree["optimizer"] = tree["optimizer"] | {"lr": 0.01}
    return changed(tree, changes)


def result(experiment, name, seed=0, budget=1.0, loss=3.0, lr=0.01, flops=None, growths=()):
    """Made by hand. A failed run has loss infinity."""
    job, spent = make_job(experiment, name, seed, lr, budget), flops or budget * experiment.budget
    curve = [Point(0.0, 0, 0.0, 4.2), Point(spent / 2, 500, 0.1, loss + 0.3), Point(spent, 1000, 0.2, loss)]
    rest = {"steps": 10, "hours": 0.2, "n_params": 1000, "machine": "m", "date": "d"}
    return Result(**_identity(job), loss=loss, flops=spent, tokens=1000, growths=list(growths), curve=curve, **rest)


# ---- running


class Forked:
    """As subprocess.Popen, of the launcher, without starting Python anew."""

    def __init__(self, command, cwd, env, stdout, **_):
        preload()
        self._process = get_context("fork").Process(target=_launch, args=(command, cwd, env, stdout.fileno()))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise runner.TimeoutExpired("launcher", timeout)

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        if self._process.is_alive():
            os.kill(self._process.pid, number)


def _launch(command, cwd, env, log):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(cwd)
    os.environ.update(env)
    plots.plot_loss = page.write_page = lambda *_: None  # a second a run
    # The log holds this process's own words only.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code, out, err = launching.run_launcher(tuple(command[2:]))
    print(out, err, sep="", flush=True)
    os._exit(code)


def forking(monkeypatch):
    monkeypatch.setattr(runner, "Popen", Forked)
    monkeypatch.setattr(runner, "POLL", 0.02)


def corpus(folder):
    return small_runs.write_corpus(folder)


def new_runner(experiment, folder: Path) -> runner.Runner:
    return runner.Runner(experiment, Results(folder / "results.jsonl"), folder / "runs", "here")


def told(results: Results):
    """All results by label, without what no two runs share."""
    return {
        (r.arm, r.lr, r.seed, r.budget): (
            r.loss, r.flops, r.tokens, r.steps, r.n_params, r.failure,
            [(p.flops, p.tokens, p.loss) for p in r.curve],
            [{k: v for k, v in g.items() if k != "stall_s"} for g in r.growths],
        )
        for r in results
    }  # fmt: skip


def tensors(run_dir: Path) -> dict[str, bytes]:
    """All that the last checkpoint holds but its JSON."""
    last = max((run_dir / "checkpoints").glob("step-????????"))
    found = {path.name: _without_metadata(path.read_bytes()) for path in last.glob("*.safetensors")}
    assert found
    return {last.name: b""} | found


def json_line(row) -> str:
    return json.dumps(row) + "\n"


def _without_metadata(data: bytes) -> bytes:
    """Names and values: each save writes an identity of its own beside them."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + data[end:]


def kept(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's directory of them."""
    return [path for path in folder.glob("step-*") if path.suffix == ""]
