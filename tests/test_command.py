"""How a command ends, on each rank, whatever becomes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.launching import ROOT, environment

from megabus import command
from megabus.command import RankParser, run, run_rank
from megabus.errors import UserError

GONE = "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4321\nand more"


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("rank", ["0", "1"])
def test_bad_input_is_told_by_rank_0(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    for runner, tells in ((run, True), (run_rank, rank == "0")):  # a tool of one process may be called by any rank
        assert runner(raising(UserError("key", 3, "is odd", "give 4"))) == 2
        assert capsys.readouterr() == ("", "error: key = 3: is odd; give 4\n" if tells else "")
    assert waited == ([] if rank == "0" else [command.PATIENCE])  # the others must not end before rank 0 has told


def test_the_outcome_is_left_where_it_is_asked_for(monkeypatch, tmp_path):
    """By rank 0 alone; a place that cannot be written ends no run. What is no bad input leaves none."""
    file, bad = tmp_path / "outcome", raising(UserError("key", 3, "is odd", "give 4"))
    monkeypatch.setattr(command, "PATIENCE", 0)
    for rank, main, left in (("1", bad, False), ("0", raising(OSError()), False), ("0", bad, True)):
        monkeypatch.setenv("RANK", rank)
        for place in (file, tmp_path / "nowhere/outcome"):
            monkeypatch.setenv("MEGABUS_OUTCOME", str(place))
            assert run_rank(main) == (1 if main is not bad else 2)
        assert file.exists() == left
    assert file.read_text() == "refused\n"


def test_other_ends_of_a_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run_rank(lambda: 75) == 75
    assert run_rank(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")
    assert run_rank(raising(RuntimeError(GONE))) == 1
    told = capsys.readouterr().err
    assert told.startswith("rank 1: lost the connection to another rank, which has probably ended: its log says why.")
    assert told.endswith(f" (main: {GONE.splitlines()[0]})\n")
    assert run_rank(raising(ValueError("odd"))) == 1
    told = capsys.readouterr().err
    assert told.startswith("rank 1 failed:\nTraceback ")
    assert told.endswith("ValueError: odd\n\n")


def test_a_wrong_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "--local_rank=1", "two words"])
    assert RankParser().parse_args(["--local_rank=1"]).local_rank == 1
    with pytest.raises(UserError, match=r"^command line = --local_rank=1 'two words': unrecognized arguments: two w"):
        RankParser().parse_args()


def test_the_process_ends_at_once():
    """A thread that waits for ranks that are gone does not keep it, nor does a full disk."""
    script = """
import threading, time
from megabus.command import end_rank
def main():
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("told")
    return 75
end_rank(main)
"""
    with open("/dev/full", "w") as full:
        for out in (subprocess.PIPE, full):
            ended = subprocess.run(
                [sys.executable, "-c", script], stdout=out, text=True, timeout=30, cwd=ROOT, env=environment()
            )
            assert ended.returncode == 75
            assert ended.stdout in ("told\n", None)


@pytest.mark.parametrize("tool", ["launcher/train.py", "tools/evaluate_nli.py"])
def test_a_wrong_command_line_of_a_rank(tool):
    for rank, told in (("0", "error: command line = --confg: "), ("1", "")):
        command = [sys.executable, str(ROOT / tool), "--confg"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment(RANK=rank))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith(told)
        assert len(ended.stderr.splitlines()) == (rank == "0")
