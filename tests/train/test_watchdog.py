"""A rank that makes no progress ends, and tells where it and all others were."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch.distributed as dist

from megabus.parallel.hosts import Host
from megabus.testing.ranks import run_ranks
from megabus.train import roll_call, watchdog
from megabus.train.watchdog import EXIT_CODE, watched
from tests.support.small_runs import after_step, attempt, run_config, start, write_corpus

LIMIT = 30.0  # seconds after which a process of these tests is ended from outside


def forked(tmp_path, job):
    """Run `job()` in a forked process, its stderr in a file: exit code, seconds, stderr.

    The watching thread has a second to tell and to end the process before faulthandler's does."""
    log = tmp_path / "stderr"

    def run():
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        watchdog.GRACE = 1.0
        job()
        os._exit(0)

    process = get_context("fork").Process(target=run)
    begun = time.monotonic()
    process.start()
    process.join(LIMIT)
    process.kill()
    process.join()
    return process.exitcode, time.monotonic() - begun, log.read_text()


def lost_in_thought():
    while True:
        time.sleep(0.01)


def beating(seconds, pause=0.1):
    with watched(3.0, rank=3) as dog:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(pause)
            dog.heartbeat()


# ---- one process ----------------------------------------------------------------------------------------------


def test_no_progress_ends_the_process(tmp_path, monkeypatch):
    """torchrun, whose page about ranks comes last, is line why."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def job():
        with watched(3.0, rank=3):
            threading.Thread(target=lost_in_thought, name="other", daemon=True).start()
            time.sleep(LIMIT)

    code, seconds, said = forked(tmp_path, job)
    assert code == EXIT_CODE == 70
    assert 2 <= seconds < 10
    assert said.startswith("rank 3: no progress for 2 s (faults.hang_timeout, less 1 s to say so):\n")
    assert "in job" in said  # the main thread's stack
    assert "in lost_in_thought" in said  # and any other's
    line = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert line == said.partition(":\n")[0]


def test_a_log_that_takes_no_more_is_not_waited_for(tmp_path, monkeypatch):
    """Nor a place for temporary files, which a full disk has none of."""

    def job():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        with watched(3.0, rank=3):
            time.sleep(LIMIT)

    code, seconds, said = forked(tmp_path, job)
    assert (code, said) == (EXIT_CODE, "")
    assert seconds < 10


def test_progress_keeps_it_quiet(tmp_path):
    """For longer than the time-out; the same without the beats ends."""
    assert forked(tmp_path, lambda: beating(4.0))[::2] == (0, "")
    assert forked(tmp_path, lambda: beating(4.0, pause=4.0))[0] == EXIT_CODE


def test_code_that_holds_the_interpreter(tmp_path):
    """No Python runs in any thread, so the watching one cannot; faulthandler's own thread needs none."""

    def job():
        with watched(0.5, rank=0):
            ctypes.PyDLL(None).sleep(int(LIMIT))  # unlike CDLL it keeps the lock

    code, seconds, said = forked(tmp_path, job)
    assert code == 1
    assert 0.5 <= seconds < 8
    assert "Timeout" in said
    assert "in job" in said


def test_closing_calls_it_off(tmp_path):
    def job():
        with watched(1.5, rank=0) as dog:
            dog.heartbeat()
        assert threading.active_count() == 1
        time.sleep(2.0)

    assert forked(tmp_path, job)[::2] == (0, "")


def test_an_exception_calls_it_off(tmp_path):
    def job():
        with pytest.raises(ZeroDivisionError), watched(1.5, rank=0):
            raise ZeroDivisionError
        time.sleep(2.0)

    assert forked(tmp_path, job)[::2] == (0, "")


# ---- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def impatient(log):
    """Ranks that tell in a file of their own, and soon."""

    def change():
        with Path(f"{log}.{dist.get_rank()}").open("wb") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        watchdog.GRACE = 1.0

    return change


def within(seconds):
    """Not from the start: on a busy machine that alone takes a second."""

    def change(run):
        run.watchdog.timeout = seconds
        run.watchdog.heartbeat()

    return change


@pytest.mark.parametrize(("layout", "hung"), [({"dp": 2}, 1), ({"pp": 2}, 0)], ids=["dp", "pp"])
def test_a_rank_that_hangs_ends_all(corpus, tmp_path, layout, hung):
    """One loops in Python for ever and the other waits for it in a collective: both show where they are and end."""
    config = run_config(corpus, tmp_path / "run", [layout, {}, {}])
    log, times = tmp_path / "stderr", tmp_path / "begun"

    def hang(run):
        times.write_text(str(time.monotonic()))
        lost_in_thought()

    with pytest.raises(RuntimeError, match=r"ranks ended with \[(70, 70|70, 1|1, 70)\]"):  # 1: its peer was faster
        attempt(config, 2, impatient(log), after_step(2, within(3.0)), after_step(3, hang, hung))
    assert time.monotonic() - float(times.read_text()) < 3.0 + 8  # of which run_ranks waits 1 s for the others
    said = [Path(f"{log}.{rank}").read_text() for rank in (0, 1)]
    for rank in (0, 1):
        assert said[rank].startswith(f"rank {rank}: no progress for 2 s (faults.hang_timeout, less 1 s to say so):\n")
        assert ("in lost_in_thought" in said[rank]) == (rank == hung)
    assert "in all_reduce" in said[1 - hung] or "in recv" in said[1 - hung]
    assert "megabus/train/loop.py" in said[1 - hung]


def test_a_run_that_works_is_left_alone(corpus, tmp_path):
    """However long it takes, if no step takes longer than the time-out."""
    config = run_config(corpus, tmp_path / "run", [{"dp": 2}] * 3, train__max_tokens=768)
    log = tmp_path / "stderr"
    steps = [after_step(step, lambda run: time.sleep(0.8)) for step in range(2, 7)]
    ranks = start(config, 2, impatient(log), after_step(1, within(2.5)), *steps)
    assert [rank.numbers[-1] for rank in ranks] == [6, 6]
    assert [Path(f"{log}.{rank}").read_text() for rank in (0, 1)] == ["", ""]


def test_a_rank_that_has_asked_and_left_is_not_silent():
    """Ranks find out one after the other that a peer is gone, and who knows ends."""
    assert run_ranks(3, _asks_in_turn) == [
        "no answer from elsewhere (rank 2), last heard of in a save",
        "no answer from elsewhere (rank 2), last heard of in a save",
        "",
    ]


def _asks_in_turn():
    roll_call.PERIOD, rank = 0.1, dist.get_rank()
    roll = roll_call.RollCall()
    roll.host = Host("elsewhere", "2") if rank == 2 else Host("here", "1")
    roll.sign("a save" if rank == 2 else "a step")
    dist.barrier()
    line = ""
    if rank == 1:
        line = roll.report("a step", 5.0)
        roll.store.set("asked", "")
    elif rank == 0:
        while not roll.store.check(["asked"]):
            roll.sign("a step")
            time.sleep(0.02)
        line = roll.report("a step", 5.0)
    dist.barrier()
    return line.partition(": ")[2]
