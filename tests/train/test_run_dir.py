"""One run at a time writes into a run_dir, and nothing keeps the next one from it."""

from __future__ import annotations

import fcntl
import os
import time
from multiprocessing import get_context

import pytest

import megabus.train.run as run_room
from megabus.config import parse_config
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from megabus.train.loop import train
from megabus.train.run_dir import RunLock
from tests.support.launching import tree
from tests.support.small_runs import (
    after_step,
    attempt,
    killed_after,
    refusal,
    rows_of,
    run_config,
    start,
    stop_after,
    untimed,
    write_corpus,
)

PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, steps=6, **changes):
    return run_config(corpus, run_dir, [{"tp": 1}] * 3, train__max_tokens=128 * steps, **changes)


def wait_for(file):
    begun = time.monotonic()
    while not file.exists():
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.01)


def test_two_runs_at_once(corpus, tmp_path):
    """The second is refused and leaves no trace; the first one does not notice."""
    undisturbed = configured(corpus, tmp_path / "undisturbed", checkpoint={"every": 2})
    start(undisturbed, 1)
    config = configured(corpus, tmp_path / "run", checkpoint={"every": 2})
    arrived, go = tmp_path / "arrived", tmp_path / "go"

    def wait(run):
        run.saver.wait()
        arrived.touch()
        wait_for(go)

    first = get_context("fork").Process(target=start, args=(config, 1, after_step(3, wait)))
    first.start()
    try:
        wait_for(arrived)
        before = tree(tmp_path)
        assert "run/checkpoints/step-00000002" in before
        for resume in ("auto", "never"):
            line = refusal(config.model_copy(update={"resume": resume}), 2)
            assert line == f"run_dir = {tmp_path / 'run'}: is in use by another run; wait for it, or choose another"
        assert tree(tmp_path) == before
    finally:
        go.touch()
        first.join(PATIENCE)
        first.kill()
    assert first.exitcode == 0
    for event in ("step", "eval"):
        assert untimed(rows_of(config, event)) == untimed(rows_of(undisturbed, event))
    assert not rows_of(config, "resume")


def test_a_killed_run_leaves_no_lock(corpus, tmp_path):
    config = configured(corpus, tmp_path / "run", checkpoint={"every": 2})
    with pytest.raises(RuntimeError, match=r"ended with \[-9\]"):
        attempt(config, 1, killed_after(3))
    (rank,) = start(config, 1)
    assert rank.numbers == [3, 4, 5, 6]


def test_a_lock_that_is_refused_removes_what_it_made_and_no_more(tmp_path):
    run = tmp_path / "runs/run"

    def acquired():
        lock = RunLock(run)
        lock.acquire()
        return lock

    acquired().release()
    assert tree(tmp_path) == {}
    first = acquired()
    for _ in range(2):
        second = RunLock(run)
        with pytest.raises(UserError, match="in use"):
            second.acquire()
        second.release()
    assert tree(tmp_path).keys() == {"runs", "runs/run", "runs/run/.lock"}
    (tmp_path / "runs/other").mkdir()
    first.release()
    assert tree(tmp_path).keys() == {"runs", "runs/other"}
    kept = acquired()
    kept.keep()
    kept.release()
    acquired().release()  # of the run that is there
    assert tree(tmp_path).keys() == {"runs", "runs/other", "runs/run", "runs/run/.lock"}


def test_software_that_is_not_there_is_refused_before_anything_is_written(corpus, tmp_path):
    config = configured(corpus, tmp_path / "run")
    optimizer = config.optimizer.model_copy(update={"implementation": "apex"})
    line = refusal(config.model_copy(update={"optimizer": optimizer}), 2)
    assert line.startswith("optimizer.implementation = apex: cannot be used here")
    assert "run" not in tree(tmp_path)


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"^run_dir = .*: cannot be written \(No such device or address\)"):
        RunLock(tmp_path).acquire()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """A run that is refused removes its lock while another one is about to take it."""
    refused, run = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    refused.acquire()
    flock = fcntl.flock

    def late(*args):
        refused.release()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="in use"):
        run.acquire()
    run.release()
    assert tree(tmp_path) == {}


def _in_one_process(configs):
    """Whether each was refused, one after the other, with all errors still at hand."""
    errors = []
    for config in configs:
        try:
            train(config)
            errors.append(None)
        except UserError as error:
            errors.append(error)
    return [None if error is None else str(error) for error in errors]


def test_starts_of_one_process(corpus, tmp_path):
    """As from a notebook: the lock is free once `train` has returned or raised."""
    config = configured(corpus, tmp_path / "run", steps=2)
    never = config.model_copy(update={"resume": "never"})
    longer = configured(corpus, tmp_path / "run", steps=3)
    refused = f"run_dir = {tmp_path / 'run'}: holds a run; choose another, or resume=auto"
    (errors,) = run_ranks(1, _in_one_process, [config, never, longer])
    assert errors == [None, refused, None]
    assert [row["step"] for row in rows_of(longer, "step")] == [1, 2, 3]


def test_a_run_dir_that_is_read_anew(corpus, tmp_path):
    """What was written down is a configuration that goes on, also where the run_dir was moved."""
    config = configured(corpus, tmp_path / "run", steps=3)
    start(config, 1, stop_after(2))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = parse_config(config.model_dump(mode="json") | {"run_dir": str(tmp_path / "moved"), "resume": "strict"})
    (rank,) = start(moved, 1)
    assert rank.numbers == [3]
    assert rows_of(moved, "resume")[0]["changes"] == []


def test_old_checkpoints_that_rank_0_cannot_delete(corpus, tmp_path):
    """The last thing that a start does, and rank 0 alone: all ranks end with what it says."""

    def failing(*_):
        raise UserError("checkpoint", "there", "cannot be read", "mend the file system")

    def change():
        run_room.prune = failing

    assert refusal(configured(corpus, tmp_path / "run"), 2, change).startswith("checkpoint = there: cannot be read")
