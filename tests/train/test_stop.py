"""Asked to stop, by a signal to any rank or by a file, all ranks finish the same step, save and end."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from megabus.testing.ranks import run_ranks
from megabus.train import loop, stop
from megabus.train import run as run_room
from megabus.train.stop import SIGNALS, StopRequests, listening
from tests.support.launching import Ended, launch_forked, run_launcher
from tests.support.small_runs import (
    after_step,
    checkpoints,
    consumed,
    read_state_of,
    rows_of,
    run_config,
    start,
    stop_after,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(corpus, tmp_path):
    def make(layout, **changes):
        changes = {"train__max_tokens": 128 * 6, "train__micro_batch_size": 4} | changes
        return run_config(corpus, tmp_path / "run", [layout, {}, {}], **changes)

    return make


def looks_always():
    """A run of short steps would hear of the file a second later."""
    stop.LOOK_EVERY = 0.0


@pytest.mark.parametrize(
    ("number", "layout", "rank"),
    [
        (signal.SIGTERM, {"pp": 2}, 1),
        (signal.SIGUSR1, {"tp": 2}, 1),
        (signal.SIGINT, {"dp": 2}, 0),
    ],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_to_one_rank_stops_all(config, number, layout, rank):
    """After the step that it came in, with a checkpoint; the next start goes on behind it."""
    run = config(layout)
    ranks = start(run, 2, stop_after(3, rank, number))
    assert [(told.numbers, told.stopped) for told in ranks] == [([1, 2, 3], True)] * 2
    assert {told.checkpoint for told in ranks} == {f"{run.run_dir}/checkpoints/step-00000003"}
    assert checkpoints(run) == ["latest", "step-00000003"]
    ranks = start(run, 2)
    assert [(told.numbers, told.stopped) for told in ranks] == [([4, 5, 6], False)] * 2
    assert len(consumed(ranks, 8)) == 3


def test_a_file_stops_all(config, capfd):
    run = config({"dp": 2})
    file = Path(run.run_dir) / "stop"
    ranks = start(run, 2, looks_always, after_step(3, lambda run: file.touch(), rank=0))
    assert [(told.numbers, told.stopped) for told in ranks] == [([1, 2, 3], True)] * 2
    assert not file.exists()  # or the next start would stop as well
    assert f"asked to stop by the file {file}: saving" in capfd.readouterr().out
    ranks = start(run, 2, looks_always)
    assert [(told.numbers, told.stopped) for told in ranks] == [([4, 5, 6], False)] * 2


def test_a_stop_in_the_step_of_a_growth(config):
    """The growth is finished and saved: the next start is of the larger size."""
    run = config({"dp": 2}, growth__max_tokens=384)
    ranks = start(run, 2, stop_after(3))
    assert [told.numbers for told in ranks] == [[1, 2, 3]] * 2
    assert read_state_of(run, 3)["stage"] == 1
    assert [row["step"] for row in rows_of(run, "growth")] == [3]
    assert [row["step"] for row in rows_of(run, "save")] == [3]


def test_a_stop_in_the_last_step_is_the_end(config):
    """Nothing is left to go on with: a scheduler must not queue it again."""
    run = config({"dp": 2})
    ranks = start(run, 2, stop_after(6))
    assert [(told.numbers, told.stopped) for told in ranks] == [([1, 2, 3, 4, 5, 6], False)] * 2
    assert checkpoints(run) == ["latest", "step-00000006"]


# ---- during the start -------------------------------------------------------------------------------------


def asked_in(place, rank=0, number=signal.SIGTERM):
    """The signal comes when a part of the start begins: a function of the module of runs, or of the loop's."""

    def change():
        module = run_room if hasattr(run_room, place) else loop
        before = getattr(module, place)

        def asking(*args, **words):
            if dist.get_rank() == rank:
                os.kill(os.getpid(), number)
            return before(*args, **words)

        setattr(module, place, asking)

    return change


@pytest.mark.parametrize(("place", "ranks"), [("preflight", 2), ("find_checkpoint", 1), ("validate", 2)])
def test_a_run_is_stopped_before_its_first_step(config, place, ranks):
    """Nothing is saved, for nothing was trained; the next start is a first one."""
    run = config({"dp": ranks})
    told = start(run, ranks, asked_in(place, rank=ranks - 1))
    assert [(one.numbers, one.stopped, one.checkpoint) for one in told] == [([], True, None)] * ranks
    assert not list(Path(run.run_dir).glob("checkpoints/*"))


def test_a_run_that_goes_on_is_stopped_in_its_start(config):
    run = config({})
    start(run, 1, stop_after(3, 0))
    for place, newest in (("find_checkpoint", None), ("restore", f"{run.run_dir}/checkpoints/step-00000003")):
        (told,) = start(run, 1, asked_in(place))
        assert (told.numbers, told.stopped, told.checkpoint) == ([], True, newest)
        assert checkpoints(run) == ["latest", "step-00000003"]
    (told,) = start(run, 1)
    assert told.numbers == [4, 5, 6]
    assert [row["step"] for row in rows_of(run, "step")] == [1, 2, 3, 4, 5, 6]


# ---- through the launcher -----------------------------------------------------------------------------------


def _launched(args):
    stop_after(2, rank=1)()
    return run_launcher(args)


def test_the_exit_code_says_that_the_run_goes_on(config, tmp_path, monkeypatch):
    """By a signal, then by a file that waits already; then to the end. So says the outcome, where a file is named."""
    run = config({"dp": 2}, faults__stop_exit_code=75)
    outcome = tmp_path / "outcome"
    monkeypatch.setenv("MEGABUS_OUTCOME", str(outcome))
    path, folder = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))

    def told(ranks, code, said):
        assert [(rank.code, rank.err) for rank in ranks] == [(code, "")] * 2
        assert said in ranks[0].out
        assert ranks[1].out == ""

    goes_on = "stopped and saved: {}/checkpoints/step-0000000{}; the same command goes on from there\n"
    signalled = [Ended(*rank) for rank in run_ranks(2, _launched, ("--config", path))]
    told(signalled, 75, goes_on.format(folder, 2))
    assert "asked to stop by a signal to another rank: saving" in signalled[0].out
    assert outcome.read_text() == "stopped\n"
    (folder / "stop").touch()  # before the first step of a start, of which nothing is saved
    told(launch_forked("--config", path), 75, "stopped during the start, before anything was trained; the same command")
    assert not (folder / "stop").exists()
    assert outcome.read_text() == "stopped\n"
    assert checkpoints(run) == ["latest", "step-00000002"]
    told(launch_forked("--config", path), 0, f"checkpoint: {folder}/checkpoints/step-00000006\n")
    assert outcome.read_text() == "finished\n"
    assert (folder / "loss.png").exists()
    assert [row["step"] for row in rows_of(run, "step")] == [1, 2, 3, 4, 5, 6]


# ---- one rank alone -----------------------------------------------------------------------------------------


def test_the_file_is_not_looked_for_at_every_step(tmp_path, monkeypatch):
    looked, clock = [], [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Path, "exists", lambda self: looked.append(self) or False)
    requests, others = StopRequests(tmp_path, looks=True), StopRequests(tmp_path, looks=False)
    for _ in range(10):
        assert not requests.poll()
        assert not others.poll()
    assert looked == [tmp_path / "stop"]
    clock[0] += stop.LOOK_EVERY
    requests.poll()
    assert len(looked) == 2


def test_asked_twice_from_the_keyboard(tmp_path):
    """The second time it ends at once; a scheduler's repeated signals do nothing more."""
    with listening(tmp_path, looks=True) as requests:
        requests.begun = True
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert requests.poll()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_asked_from_the_keyboard_during_the_start(tmp_path):
    """There is nothing to save: it ends at once."""
    with listening(tmp_path, looks=True) as requests:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        requests.begun = True
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.poll()


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(ZeroDivisionError), listening(tmp_path, looks=True) as requests:
        assert [signal.getsignal(number) for number in SIGNALS] == [requests.hear] * 3
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
