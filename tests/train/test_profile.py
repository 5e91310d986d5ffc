"""A profile of some steps: a trace and a table a rank, of just those steps, and no bit of the training is another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megabus.config import resolve_stages
from megabus.config.faults import ProfileConfig
from megabus.errors import UserError
from megabus.train import profile as room
from megabus.train.profile import Profile, check_profile, folder_of_profile
from tests.support.small_runs import attempt, rows_of, run_config, start, write_corpus

STEP = 16 * 8  # tokens
OWN_FILE = """
from megabus import Callback

class File(Callback):
    def __init__(self, path):
        self.file = open(path, "a")

    def on_row(self, run, row):
        if run.is_rank_0:
            self.file.write(row["event"] + chr(10))

    def on_end(self, run):
        self.file.close()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, steps=5, **changes):
    changes = {"growth__stages": [], "growth__max_tokens": None, "eval__every": 100} | changes
    return run_config(corpus, run_dir, [{"pp": 2}, {}, {}], train__max_tokens=STEP * steps, **changes)


def test_a_trace_and_a_table_a_rank(corpus, tmp_path):
    config = configured(corpus, tmp_path / "run", log={"profile": {"start": 2, "steps": 2}})
    looked_at, plain = start(config, 2), start(configured(corpus, tmp_path / "plain"), 2)
    assert [step.digest for step in looked_at[0].steps] == [step.digest for step in plain[0].steps]
    folder = folder_of_profile(config.run_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank-0000{rank}.{form}" for rank in (0, 1) for form in ("json", "txt")
    ]
    for rank in (0, 1):
        events = json.loads((folder / f"rank-0000{rank}.json").read_text())["traceEvents"]
        steps = [event for event in events if event.get("name") == "Optimizer.step#SegmentedAdamW.step"]
        assert len(steps) == 2 * 2  # of two groups of parameters
        assert "aten::mm" in (folder / f"rank-0000{rank}.txt").read_text()
    (row,) = rows_of(config, "profile")
    assert (row["step"], row["first"], row["last"], row["folder"]) == (3, 2, 3, str(folder))
    assert len(row["shares"]) == 5
    assert 0 < sum(row["shares"].values()) <= 1


def test_one_that_is_not_over_ends_with_the_run_and_what_cannot_be_written_is_told(corpus, tmp_path):
    (tmp_path / "file.py").write_text(OWN_FILE)
    own = {"name": f"{tmp_path / 'file.py'}:File", "arguments": {"path": str(tmp_path / "rows.txt")}}
    config = configured(corpus, tmp_path / "run", log={"profile": {"start": 5, "steps": 9}}, callbacks=[own])
    Path(config.run_dir).mkdir()
    folder_of_profile(config.run_dir).write_text("no directory")
    start(config, 2)
    assert [(row["first"], row["last"]) for row in rows_of(config, "profile")] == [(5, 5)]
    assert (tmp_path / "rows.txt").read_text().endswith("save\nprofile\n")  # before the user's own callback has ended


def test_what_cannot_be_looked_at_is_refused(corpus, tmp_path):
    late = configured(corpus, tmp_path / "late", log={"profile": {"start": 6}})
    assert {rank.error for rank in attempt(late, 2)} == {
        "log.profile.start = 6: comes after the end of the run, which has 5 steps at most; lower it"
    }
    memory = configured(corpus, tmp_path / "memory", log={"profile": {"start": 1, "memory": True}})
    assert {rank.error for rank in attempt(memory, 2)} == {
        "log.profile.memory = true: is a snapshot of a GPU's memory, and this run has none; leave it out"
    }


def test_the_last_step_is_that_of_the_smallest_batches(corpus, tmp_path):
    """A phase's count: 640 tokens are 10 steps at most."""

    def check(first):
        phases = [{"share": 0.5, "global_batch_size": 4}]
        config = configured(corpus, tmp_path, log={"profile": {"start": first}}, train__phases=phases)
        check_profile(config, resolve_stages(config, 2))

    check(10)
    with pytest.raises(UserError, match="which has 10 steps at most"):
        check(11)


class Steps:
    """As much of a run as a profile asks for."""

    def __init__(self):
        self.progress, self.watchdog, self.rows = self, self, []
        self.step, self.is_rank_0 = 0, True

    def heartbeat(self, doing):
        pass

    def tell(self, event, row):
        self.rows.append((event, row["first"], row["last"]))


def test_a_snapshot_of_memory_is_of_those_steps(monkeypatch, tmp_path):
    """Without a GPU: what is asked of torch.cuda.memory, and when."""
    run, asked = Steps(), []
    monkeypatch.setattr(room.dist, "get_rank", lambda: 7)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: asked.append((run.step, how)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: asked.append((run.step, path)))
    watched = Profile(ProfileConfig(start=3, steps=2, memory=True), tmp_path)
    for event, step in (("start", 0), ("step", 1), ("step", 2), ("skip", 3), ("step", 4), ("resume", 2), ("step", 3)):
        run.step = step
        torch.ones(2) @ torch.ones(2)
        watched.on_row(run, {"event": event, "step": step})
    watched.on_end(run)
    snapshot = str(tmp_path / "profile/rank-00007.pickle")
    assert asked == [(2, {"max_entries": room.EVENTS}), (4, snapshot), (4, {"enabled": None})]
    assert run.rows == [("profile", 3, 4)]  # once, though the run comes there again


def test_a_run_that_goes_on_later_looks_at_nothing(tmp_path, capfd):
    """And says so, unless an earlier start of the run has."""
    run, watched = Steps(), Profile(ProfileConfig(start=3), tmp_path)
    for event, step in (("resume", 5), ("step", 6), ("step", 7)):
        run.step = step
        watched.on_row(run, {"event": event, "step": step})
    watched.on_end(run)
    told = "warning: log.profile.start = 3: no step is looked at, as the run goes on from step 5; raise it\n"
    assert capfd.readouterr().err == told
    assert (run.rows, list(tmp_path.iterdir())) == ([], [])
    watched.folder.mkdir()
    watched.on_row(run, {"event": "resume", "step": 5})
    assert capfd.readouterr().err == ""
