"""Growth's experiments as they are run: what runs share changes no bit of them, nor does stopping."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.growth import prefix, runner
from benchmarks.growth.experiment import jobs
from benchmarks.growth.results import Results
from megabus.errors import UserError
from tests.support import growth_experiments as small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small.corpus(tmp_path_factory.mktemp("corpus"))


def growing(corpus):
    growth = small.TWICE | {"trigger": small.TRIGGER}
    arms = {
        "scratch": small.arm(budgets=[1, 2]),
        "tilt": small.arm(set={"growth": growth}),
        "clone": small.arm(like="tilt", set={"growth": {"write": "clone"}}),
        # A trunk that grows at a place of its own: its first decay begins before that.
        "trunk": small.arm(set={"growth": small.BY_CAPS}, caps_at=[0.3], budgets=[0.4, 1]),
    }
    return small.spec(corpus, arms=arms)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Every run of the experiment from its own beginning: (results, last tensors by label, its folder)."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        small.forking(patch)
        patch.setattr(runner, "go_on_from_others", lambda *_: None)
        return *ran(small.load(folder, growing(corpus)), folder), folder


def ran(experiment, folder, side_by_side=1):
    one = small.new_runner(experiment, folder)
    assert one.run(side_by_side)
    found = {job.label: small.tensors(one.folder(job)) for job in jobs(experiment, one.results.loss_of)}
    return small.told(one.results), found


def test_going_on_from_another_run_changes_no_bit(corpus, alone, tmp_path, monkeypatch, capsys):
    small.forking(monkeypatch)
    results, tensors = ran(small.load(tmp_path, growing(corpus)), tmp_path)
    said = capsys.readouterr().out
    shared = [line.split(":")[0] for line in said.splitlines() if ": the same as" in line]
    arms = ["scratch-lr0.01-seed0-x2", "clone-lr0.01-seed0-x1", "trunk-lr0.01-seed0-x0.4", "trunk-lr0.01-seed0-x1"]
    assert shared == arms
    assert results == alone[0]
    assert tensors == alone[1]
    grown = next(value for key, value in results.items() if key[0] == "clone")
    assert [row["reason"] for row in grown[-1]] == ["cap"]
    assert [len(results["trunk", 0.01, 0, budget][-1]) for budget in (0.4, 1.0)] == [0, 1]


@pytest.mark.parametrize("broken", ["decay", "manner", "cap"])
def test_sharing_too_much_is_seen(corpus, alone, tmp_path, monkeypatch, broken):
    """The test above would notice it."""
    small.forking(monkeypatch)
    if broken == "decay":
        monkeypatch.setattr(prefix, "_constant_until", lambda done, new: math.inf)
        name, key = "scratch-lr0.01-seed0-x2", ("scratch", 0.01, 0, 2.0)
    elif broken == "cap":
        monkeypatch.setattr(prefix, "cap_is_reached", lambda *_: False)
        name, key = "trunk-lr0.01-seed0-x1", ("trunk", 0.01, 0, 1.0)
    else:
        monkeypatch.setattr(prefix, "MANNER", ())
        monkeypatch.setattr(prefix, "_common_growths", lambda *_: (1, (None, None)))
        name, key = "clone-lr0.01-seed0-x1", ("clone", 0.01, 0, 1.0)
    tree = growing(corpus)
    kept = {"decay": ("scratch",), "manner": ("tilt", "clone"), "cap": ("scratch", "trunk")}[broken]
    tree["arms"] = {k: v for k, v in tree["arms"].items() if k in kept}
    for one in tree["arms"].values() if broken == "cap" else ():
        one["budgets"] = [1]
    tree |= {"reference": key[0], "versus": key[0]}
    results, tensors = ran(small.load(tmp_path, tree), tmp_path)
    assert tensors[name] != alone[1][name]
    assert results[key][0] != alone[0][key][0]


def piece(one):
    """Run until there is a new checkpoint; whether all was done before that."""
    before, collect = checkpoints(one), one._collect

    def until_saved():
        if checkpoints(one) - before:
            raise KeyboardInterrupt
        return collect()

    one._collect = until_saved
    try:
        return one.run(2)
    except KeyboardInterrupt:
        return False


def checkpoints(one):
    return {path for folder in one.work.glob("*/checkpoints") for path in small.kept(folder)}


def test_stopped_runs_go_on_side_by_side(corpus, alone, tmp_path, monkeypatch, capfd):
    """Cut into pieces, each ending with the next checkpoint of any of the two runs that go on at a time."""
    small.forking(monkeypatch)
    monkeypatch.setattr(runner, "TIDY", 0.0)  # all but what is needed is deleted at once
    tree = growing(corpus)
    del tree["arms"]["trunk"]
    experiment, pieces = small.load(tmp_path, tree), 0
    while not piece(small.new_runner(experiment, tmp_path)):
        pieces += 1
    assert pieces > 3
    again = small.new_runner(experiment, tmp_path)
    assert small.told(again.results) == {key: row for key, row in alone[0].items() if key[0] != "trunk"}
    before = again.results.path.read_bytes()
    assert again.run(2)
    assert again.results.path.read_bytes() == before
    assert before.count(b"\n") == len(small.told(again.results))
    assert all(len(small.kept(folder)) <= 3 for folder in again.work.glob("*/checkpoints"))


def test_a_second_runner_is_refused(tmp_path):
    experiment = small.load(tmp_path, small.spec())
    one = small.new_runner(experiment, tmp_path)
    for place in (one.work / ".lock", one.results.path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="is being used by another runner"):
                one.run(1)


def ending(monkeypatch, text, code):
    """Every process says the text and ends; how many were started."""
    true, started = subprocess.Popen, []

    def popen(command, **options):
        started.append(command)
        return true([sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"], **options)

    monkeypatch.setattr(runner, "Popen", popen)
    monkeypatch.setattr(runner, "POLL", 0.02)
    return started


def test_a_loss_that_is_no_number_is_a_result(tmp_path, monkeypatch, capsys):
    rates = {"tune": [0.01, 0.02]}
    tree = small.spec(arms={"scratch": small.arm(lr=rates)})
    started = ending(monkeypatch, "error: train.loss = nan: is not finite", 2)
    assert small.new_runner(small.load(tmp_path, tree), tmp_path).run(1)
    results = Results(tmp_path / "results.jsonl")
    assert [(r.loss, r.lr) for r in results] == [(math.inf, 0.01), (math.inf, 0.02)]
    assert all(r.failure.startswith("error: train.loss = nan") for r in results)
    assert "failed" in capsys.readouterr().err
    assert len(started) == 2  # neither again, nor at a rate that failed


@pytest.mark.parametrize(("text", "code", "starts"), [("oh no", 1, 2), ("oh no", -9, 2), ("error: oh no", 2, 1)])
def test_a_process_that_ends_badly_ends_the_runner(tmp_path, monkeypatch, text, code, starts):
    started = ending(monkeypatch, text, code)
    one = small.new_runner(small.load(tmp_path, small.spec()), tmp_path)
    folder = one.folder(next(jobs(one.experiment, one.results.loss_of)))
    with pytest.raises(UserError) as error:
        one.run(1)
    assert "oh no" in str(error.value)
    assert f"read {folder / 'log'}" in str(error.value)
    assert len(started) == starts
    assert list(one.results) == []


def test_only_runs_what_rates_come_from(tmp_path, monkeypatch):
    arms = {"scratch": small.arm(), "tuned": small.arm(lr={"tune": [0.01, 0.02]}), "of": small.arm(lr={"of": "tuned"})}
    arms["of"]["set"] = {"model": {"d_ff": 64}}
    one = small.new_runner(small.load(tmp_path, small.spec(arms=arms)), tmp_path)
    assert [(job.arm, job.tuning) for job in one._open(("of",))] == [("tuned", True), ("tuned", True)]
    for lr, loss in ((0.01, 3.0), (0.02, 2.0)):
        one.results.add(small.result(one.experiment, "tuned", lr=lr, loss=loss))
    assert [(job.arm, job.lr) for job in one._open(("of",))] == [("of", 0.02)]


def test_a_start_that_was_killed_begins_again(corpus, alone, tmp_path):
    """Also where it had made some of the directories."""
    one = small.new_runner(small.load(tmp_path, growing(corpus)), alone[2])
    first, second, *_ = jobs(one.experiment, one.results.loss_of)
    for killed_at in ("copytree", "rename"):
        run_dir = tmp_path / "new"
        others = [(one.folder(first), one._config(first))]
        with pytest.MonkeyPatch.context() as patch:

            def killed(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(*((prefix.shutil, "copytree") if killed_at == "copytree" else (Path, "rename")), killed)
            with pytest.raises(KeyboardInterrupt):
                prefix.go_on_from_others(run_dir, second.config(run_dir), others)
        assert prefix.complete(prefix.checkpoints_of(run_dir)) == []
        origin = prefix.go_on_from_others(run_dir, second.config(run_dir), others)
        assert origin is not None
        (whole,) = prefix.complete(prefix.checkpoints_of(run_dir))
        assert whole.name == origin.name
        assert (run_dir / "metrics.jsonl").exists()
        prefix.shutil.rmtree(run_dir)


def test_the_command_stops_and_goes_on(corpus, tmp_path):
    """With the launcher that a user starts, and a signal."""
    tree = small.spec(corpus)
    tree["budget"] *= 2
    command = [sys.executable, "-m", "benchmarks.growth", "run", str(small.write(tmp_path, tree))]
    command += ["--work", str(tmp_path / "runs"), "--results", str(tmp_path / "results.jsonl")]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert first.stdout is not None
    assert "started" in first.stdout.readline()
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 143, out
    assert "stopped" in out
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (only,) = Results(tmp_path / "results.jsonl")
    assert only.flops >= tree["budget"]
    assert math.isfinite(only.loss)
