"""metrics.jsonl on a full disk: the run goes on and its rows wait, or it ends in one line, as configured."""

from __future__ import annotations

from io import FileIO

import pytest
import yaml

from megabus.testing.ranks import run_ranks
from megabus.train.metrics import RowFile
from tests.support.launching import Ended, run_launcher, the_error
from tests.support.small_runs import after_step, attempt, rows_of, run_config, start, untimed, write_corpus

FULL = "[Errno 28] No space left on device"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, **changes):
    return run_config(corpus, run_dir, [{"dp": 2}] * 3, train__max_tokens=128 * 8, **changes)


def written_to(path):
    """From here on rank 0's rows go to that file."""

    def act(run):
        run.metrics.file._file = FileIO(path, "ab")

    return act


def test_rows_wait_in_memory(corpus, tmp_path, capfd):
    """Told once; once there is room, all rows are there in their order, and the run is what it would have been."""
    undisturbed = configured(corpus, tmp_path / "undisturbed")
    whole = start(undisturbed, 2)
    capfd.readouterr()
    config = configured(corpus, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    seen = tmp_path / "seen.jsonl"
    ranks = start(
        config,
        2,
        after_step(2, written_to("/dev/full"), rank=0),
        after_step(6, lambda run: seen.write_bytes(metrics.read_bytes()), rank=0),
        after_step(6, written_to(metrics), rank=0),
    )
    assert [rank.steps for rank in ranks] == [rank.steps for rank in whole]
    warning = f"warning: {metrics} or what else is logged cannot be written ({FULL}): its rows wait in memory\n"
    assert capfd.readouterr().err == warning
    assert b'"step": 2,' in seen.read_bytes()  # control: nothing came through between
    assert b'"step": 3,' not in seen.read_bytes()
    for event in ("start", "step", "eval"):
        assert untimed(rows_of(config, event)) == untimed(rows_of(undisturbed, event))


class Tensorboard:
    """One that takes a row, or does not."""

    def __init__(self, full):
        self.full = full

    def add_scalar(self, *_):
        if self.full:
            raise OSError(28, "No space left on device")

    def close(self):
        pass


def tensorboard(full):
    def act(run):
        run.metrics.tensorboard = Tensorboard(full)

    return act


@pytest.mark.parametrize("sink", ["rows", "tensorboard"])
def test_each_outage_is_told_once(corpus, tmp_path, capfd, sink):
    """Two of them, of two steps each, with room between."""
    config = configured(corpus, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    if sink == "rows":
        full, good = written_to("/dev/full"), written_to(metrics)
    else:
        full, good = tensorboard(True), tensorboard(False)
    start(config, 2, *(after_step(step, act, 0) for step, act in ((1, full), (3, good), (5, full), (7, good))))
    warning = f"warning: {metrics} or what else is logged cannot be written ({FULL}): its rows wait in memory\n"
    assert capfd.readouterr().err == 2 * warning
    assert [row["step"] for row in rows_of(config, "step")] == list(range(1, 9))


def test_a_run_that_shall_stop_stops(corpus, tmp_path):
    config = configured(corpus, tmp_path / "run", checkpoint={"on_error": "stop"})
    ranks = attempt(config, 2, after_step(2, written_to("/dev/full"), rank=0))
    assert [rank.numbers for rank in ranks] == [[1, 2, 3]] * 2
    told = f"log = {tmp_path / 'run/metrics.jsonl'}: cannot be written ({FULL}); make room"
    assert {rank.error for rank in ranks} == {told}


def _launched(args):
    after_step(2, written_to("/dev/full"), rank=0)()
    return run_launcher(args)


def test_it_stops_in_one_line(corpus, tmp_path):
    config = configured(corpus, tmp_path / "run", checkpoint={"on_error": "stop"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    ranks = [Ended(*rank) for rank in run_ranks(2, _launched, ("--config", path))]
    told = f"error: log = {tmp_path / 'run/metrics.jsonl'}: cannot be written ({FULL}); make room"
    assert the_error(ranks) == told


# ---- the file alone -------------------------------------------------------------------------------------------


def test_what_a_full_disk_refuses_is_tried_again(tmp_path):
    path = tmp_path / "rows"
    rows = RowFile(path, keep=False)
    good = rows._file
    rows.write("one")
    assert rows.error is None
    with FileIO("/dev/full", "ab") as full:
        rows._file = full
        for line in ("two", "three"):
            rows.write(line)
            assert str(rows.error) == FULL
    assert path.read_text() == "one\n"
    rows._file = good
    rows.write("four")
    assert rows.error is None
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    rows.close()


class Narrow:
    """A disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = self.file.write(data[: self.room])
        self.room -= taken
        if not taken:
            raise OSError(28, "No space left on device")
        return taken


def test_a_row_that_is_written_in_part_is_finished_later(tmp_path):
    path = tmp_path / "rows"
    rows = RowFile(path, keep=False)
    good, rows._file = rows._file, Narrow(rows._file, 5)
    rows.write("a longer row")
    assert rows.error is not None
    assert path.read_text() == "a lon"
    rows._file = good
    rows.write("next")
    assert path.read_text() == "a longer row\nnext\n"


@pytest.mark.parametrize("left", ["", "one\n", 'one\n{"torn', '{"torn'])
def test_rows_follow_the_last_whole_one(tmp_path, left):
    path = tmp_path / "rows"
    path.write_text(left)
    rows = RowFile(path, keep=True)
    rows.write("next")
    rows.close()
    assert path.read_text() == ("one\nnext\n" if left.startswith("one") else "next\n")
    anew = RowFile(path, keep=False)
    anew.close()
    assert path.read_text() == ""
