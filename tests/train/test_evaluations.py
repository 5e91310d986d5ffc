"""Evaluations while a run trains: further token files on the engine, tasks by another process, both for nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megabus
import megabus.train.before as before
import megabus.train.loop as loop
from megabus import evaluation
from megabus.config import resolve_stages
from megabus.data.batches import TokenSource
from megabus.data.indexed import meta_path
from megabus.data.sources import VALID_SEED
from megabus.errors import UserError
from megabus.evaluation import token_file_loss
from megabus.report.looks import evaluation_table, time_table
from megabus.report.run_facts import faults, read_run
from megabus.testing.ranks import run_ranks
from megabus.train.evaluations import Evaluations
from megabus.train.task_runs import TaskRuns
from tests.support.small_runs import (
    VOCAB,
    after_step,
    quick_config,
    refusal,
    rows_of,
    start,
    untimed,
    write_corpus,
    write_tokens,
)
from tests.support.small_tokenizer import make_tokenizer

LAYOUTS = [{"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}, {"tp": 1, "pp": 1}]
LINES = Path(__file__).parents[2] / "configs/eval/lines"
SCORES = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(file,) = folder.glob("checkpoints/step-*/state.json")
assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "RANK" not in os.environ
width = json.loads(file.read_text())["model"]["d_model"]
if width == 36 and folder.name == "step-00000008-step":
    sys.exit("this task fails")
(folder / "scores.json").write_text(json.dumps({"data": {}, "tasks": {"told/d_model": width}}))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    make_tokenizer(folder)
    write_tokens(folder / "other", [(number * number) % VOCAB for number in range(100)])
    meta = {"vocab_size": VOCAB, "n_tokens": 100, "n_bytes": 250}
    meta_path(folder / "other").write_text(json.dumps(meta))
    return folder


def configured(corpus, run_dir, extra, **changes):
    keys = {"data__tokenizer": str(corpus / "t.model"), "model__vocab_size": 301, "train__max_tokens": 2400}
    return quick_config(corpus, run_dir, LAYOUTS, eval__extra=extra, **keys | changes)


def stub():
    """In place of lm-evaluation-harness, which takes seconds to import."""
    TaskRuns.command = lambda self, folder: [sys.executable, "-c", SCORES, str(folder)]


def few_groups():
    """However many snapshots: none of them is ever freed."""
    made, new_group = [], dist.new_group

    def counted(*args, **options):
        made.append(options.get("backend"))
        return new_group(*args, **options)

    dist.new_group = counted
    after_step(17, lambda run: check(made.count("gloo") == 2))()  # one of the checkpoints, one of all snapshots


def check(what):
    assert what


def test_before_and_after_each_growth_and_at_the_end(corpus, tmp_path, capfd):
    """One evaluation fails, which is told; and all of it leaves training alone. Where `every` meets a growth the same
    weights are measured once."""
    extra = {"every": 8, "data": {"other": str(corpus / "other")}, "tasks": ["megabus_next_line"]}
    shutil.copy(corpus / "t.model", tmp_path / "t.model")
    own = {"data__tokenizer": str(tmp_path / "t.model")}
    config = configured(corpus, tmp_path / "run", extra | {"task_path": str(LINES)}, **own)
    removed = after_step(5, lambda run: (tmp_path / "t.model").unlink(), rank=0)  # it was read at the start
    ranks = start(config, 2, stub, few_groups, removed)
    out, last = capfd.readouterr().out, ranks[0].numbers[-1]
    moments = [(8, "step"), (8, "after growth"), (16, "step"), (16, "after growth"), (last, "end")]
    for event in ("evaluation", "tasks"):
        assert [(row["step"], row["when"]) for row in rows_of(config, event)] == moments
    losses = rows_of(config, "evaluation")
    for at in (0, 2):  # exact growths
        assert abs(losses[at]["loss"]["other"] - losses[at + 1]["loss"]["other"]) <= 1e-6
    for row in losses:
        expected = row["loss"]["other"] / math.log(2) * 100 / 250
        assert row["bits_per_byte"]["other"] == pytest.approx(expected, rel=1e-12)
    source = TokenSource([(str(corpus / "other"), 1.0)], 32, VALID_SEED, 301)
    alone = token_file_loss(megabus.load(config.run_dir), source, 96, 32, False)
    assert abs(losses[-1]["loss"]["other"] - alone) <= 1e-5

    tasks = rows_of(config, "tasks")
    told = [row.get("scores", {}).get("told/d_model", row.get("error")) for row in tasks]
    assert told == ["exit code 1: this task fails", 52, 52, 52, 52]
    assert [row["stage"] for row in tasks] == [0, 1, 1, 2, 2]
    assert tasks[-1]["wait_s"] > 0
    assert "step     8 | tasks (step): failed, exit code 1: this task fails\n" in out
    assert f"step {last:>5} | tasks (end): told/d_model 52.0000\n" in out
    assert not list((tmp_path / "run/evaluations").iterdir())
    report = read_run(config.run_dir, "run")
    header, measures = evaluation_table(report)
    moments = ["step 8, before growth", "step 8, after growth", "step 16, before growth", "step 16, after growth"]
    assert header[1:-1] == moments
    (why,) = (row for row in measures if row[0] == "tasks")
    assert why[1:] == ["failed: exit code 1: this task fails", "–", "–", "–", "–"]
    assert [(fault["what"], fault["row"]["step"]) for fault in faults(report)] == [("failed evaluation", 8)]
    assert "waiting for tasks at the end" in time_table(report)
    plain = configured(corpus, tmp_path / "plain", {})
    assert [rank.steps for rank in ranks] == [rank.steps for rank in start(plain, 2)]
    assert untimed(rows_of(plain, "eval")) == untimed(rows_of(config, "eval"))


def test_a_start_evaluates_what_the_one_before_has_left(corpus, tmp_path):
    """But for what comes after the step that it goes on from."""
    config = configured(corpus, tmp_path / "run", {"tasks": ["megabus_next_line"], "task_path": str(LINES)})
    first = TaskRuns(config)
    for step in (4, 8, 12):
        folder = tmp_path / f"run/evaluations/step-{step:08d}-step"
        (folder / "checkpoints/step-00000001").mkdir(parents=True)
        (folder / "checkpoints/step-00000001/state.json").write_text('{"model": {"d_model": 52}}')
        first.add(folder, {"step": step, "when": "step"})
    for name, about in (("half-written", None), ("full-disk", ""), ("list", "[]"), ("nameless", '{"step": 1}')):
        shutil.copytree(folder, tmp_path / "run/evaluations" / name)
        (tmp_path / "run/evaluations" / name / "about.json").unlink()
        if about is not None:
            (tmp_path / "run/evaluations" / name / "about.json").write_text(about)
    second = TaskRuns(config)
    assert second.command(folder)[-2:] == ["--end-with", str(os.getpid())]
    second.command = lambda folder: [sys.executable, "-c", SCORES, str(folder)]
    second.restart(8)
    assert [folder.name[:13] for folder in second.waiting] == ["step-00000004", "step-00000008"]
    assert len(list((tmp_path / "run/evaluations").iterdir())) == 2
    rows = [*second.ended(), *second.ended(60.0), *second.ended(60.0)]
    assert [(row["step"], row["scores"]) for row in rows] == [(4, {"told/d_model": 52}), (8, {"told/d_model": 52})]
    assert not second.waiting


def test_a_snapshot_that_is_lost_is_told(corpus, tmp_path):
    """Before its row is there, before its evaluation begins, and during it: the run that asks goes on."""
    tasks = TaskRuns(configured(corpus, tmp_path / "run", {"tasks": ["megabus_next_line"]}))
    tasks.command = lambda folder: [sys.executable, "-Sc", "pass"]
    for step in (1, 2, 3):
        folder = tasks.root / f"step-{step:08d}-step"
        (folder / "checkpoints").mkdir(parents=True)
        if step == 1:
            (folder / "about.json").mkdir()
        tasks.add(folder, {"step": step, "when": "step"})
    assert [row["step"] for row in tasks.waiting.values()] == [2, 3]
    assert not (tasks.root / "step-00000001-step").exists()
    (first,) = tasks.ended()  # the second has begun
    assert first["step"] == 1
    assert first["error"].startswith(f"{folder.parent / 'step-00000001-step'} cannot be written (")
    shutil.rmtree(tasks.root)
    second, third = tasks.ended(60.0)
    assert (second["step"], third["step"], third["when"]) == (2, 3, "step")
    assert second["error"].startswith("exit code 0, and what it has left cannot be read (")
    assert "No such file" in third["error"]
    assert not tasks.ended()


def ended_by_an_error(config):
    """A rank that fails amid steps: whether its process of tasks, its profiler and its metrics go on."""
    pids, files = [], []

    def fail(run):
        (evaluations,) = (callback for callback in run.callbacks if isinstance(callback, Evaluations))
        pids.append(evaluations.tasks._process.pid)
        files.append(run.metrics.file._file)
        check(torch.autograd._profiler_enabled() and not files[0].closed)
        raise RuntimeError("planted")

    before.check_tasks = lambda *_: None  # imports lm-evaluation-harness
    TaskRuns.command = lambda self, folder: [sys.executable, "-Sc", "import time; time.sleep(60)"]
    after_step(3, fail)()
    with pytest.raises(RuntimeError, match="planted"):
        loop.train(config)
    return Path(f"/proc/{pids[0]}").exists(), torch.autograd._profiler_enabled(), not files[0].closed


def test_nothing_outlives_a_run_that_fails(corpus, tmp_path):
    """But the snapshot, for the next start."""
    keys = {"layout": {}, "growth": {}, "log__profile": {"start": 2, "steps": 9}}
    extra = {"tasks": ["megabus_next_line"], "task_path": str(LINES), "every": 2}
    config = configured(corpus, tmp_path / "run", extra, **keys)
    assert run_ranks(1, ended_by_an_error, config) == [(False, False, False)]
    assert [folder.name for folder in (tmp_path / "run/evaluations").iterdir()] == ["step-00000002-step"]


def test_what_cannot_be_measured_is_refused_at_the_start(corpus, tmp_path):
    def keys(**extra):
        return configured(corpus, tmp_path / "run", extra, layout={}, growth={})

    folder, missing = str(tmp_path / "nowhere"), str(corpus / "none")
    told = f"eval.extra.task_path = {folder}: is no directory; name one"
    assert refusal(keys(tasks=["megabus_next_line"], task_path=folder), 1) == told
    assert refusal(keys(data={"other": missing}), 1).startswith(f"eval.extra.data.other = {missing}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^eval\.extra\.limit = 3: is of tasks, and there are none; "):
        resolve_stages(keys(limit=3), 1)
    with pytest.raises(UserError, match=r"^eval\.extra\.every = 3: measures nothing; "):
        resolve_stages(keys(every=3), 1)
    with pytest.raises(UserError, match=r"^data\.tokenizer = \(missing\): eval\.extra\.tasks needs it; "):
        resolve_stages(configured(corpus, "r", {"tasks": ["a"]}, data__tokenizer=None, layout={}, growth={}), 1)
    with pytest.raises(UserError, match=r"^eval\.extra\.data = a/b: "):
        keys(data={"a/b": missing})


def test_a_task_is_looked_for_among_files_first(monkeypatch):
    """The harness's own are many: reading their names takes seconds, which the test does without."""
    asked, true = [], evaluation._manager

    def manager(task_path, metadata, include_defaults):
        asked.append(include_defaults)
        return true(task_path, metadata, False)

    monkeypatch.setattr(evaluation, "_manager", manager)
    evaluation.check_tasks("--tasks", ["megabus_next_line"], LINES)
    assert asked == [False]
    told = r"^eval\.extra\.tasks = megabus_nextline: is no task of .*; did you mean megabus_next_line\?$"
    with pytest.raises(UserError, match=told):
        evaluation.check_tasks("eval.extra.tasks", ["megabus_next_line", "megabus_nextline"], LINES)
    assert asked == [False, False, True]
