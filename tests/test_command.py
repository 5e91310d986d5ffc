"""How a command ends, on each rank, whatever becomes of it."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure

from megabus import cli, command
from megabus.command import Parser, RankParser, run, run_rank
from megabus.errors import UserError, say, warn
from tests.support.launching import ROOT, environment

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


TORCH = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to\nand more"
)


@pytest.mark.parametrize(
    "error",
    [
        *(MemoryError(), MemoryError("8 GiB"), torch.OutOfMemoryError("CUDA"), RuntimeError(TORCH)),
        *(OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("CUDA error: out of memory\nCUDA kernel")),
        RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    ],
)
def test_a_lack_of_memory_is_told_in_one_line(monkeypatch, capsys, error):
    monkeypatch.setenv("RANK", "1")
    for runner, begin in ((run, "error: "), (run_rank, "rank 1: ")):
        for advice in (["use fewer"], []):
            assert runner(raising(error), *advice) == 1
            told = capsys.readouterr().err
            assert told.startswith(f"{begin}out of memory: {advice[0] if advice else 'free some, or use a machine'}")
            assert told.count("\n") == 1


def test_a_command_gives_its_own_advice(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for name, advice in (("train", "train.micro_batch_size"), ("preprocess", "--workers"), ("convert", "free some")):
        monkeypatch.setattr(f"megabus.cli.{name}.main", lambda rest: raising(MemoryError())())
        assert cli.main([name]) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: out of memory: ")
        assert advice in told
        assert ("micro_batch" in told) == (name == "train")


def test_other_ends_of_a_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run_rank(lambda: 75) == 75
    assert run_rank(raising(KeyboardInterrupt())) == run(raising(KeyboardInterrupt())) == 130
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


def test_torchruns_page_ends_with_what_a_rank_has_told(monkeypatch, tmp_path):
    """The page as torchrun makes it; the error of rank 0, whose peers wait and are ended, and of each other machine's
    first."""
    monkeypatch.setattr(command, "PATIENCE", 0)
    bad = raising(UserError("key", 3, "is odd", "give 4"))

    def last_of_page(rank, main):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        code = run_rank(main)
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))
        ErrorHandler().dump_error_file(str(file), code) if file.exists() else None  # as torchrun does before
        return str(ChildFailedError("megabus", {int(rank): failure})).rstrip().splitlines()[-2].strip()

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert last_of_page("0", bad) == "traceback : error: key = 3: is odd; give 4"
    assert "error: " not in last_of_page("1", bad)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert last_of_page("8", bad) == "traceback : error: key = 3: is odd; give 4"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "error: " not in last_of_page("9", bad)
    assert last_of_page("0", raising(MemoryError())).startswith("traceback : error: out of memory: ")
    assert last_of_page("4", raising(MemoryError())).startswith("traceback : rank 4: out of memory: ")
    assert last_of_page("2", raising(ValueError("odd"))) == "ValueError: odd"
    assert last_of_page("3", raising(RuntimeError(GONE))).startswith("traceback : rank 3: lost the connection")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere/file"))
    assert run_rank(bad) == 2


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "Ü ? ? ?"), ("ascii", "? ? ? ?"), ("utf-8", "Ü κ – ─")])
@pytest.mark.parametrize("runner", [run, run_rank])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, runner, encoding, shown):
    """By print, as tables, plans and generated text are told, and by say, note and warn."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def main():
        print("Ü κ – ─")
        say("Ü κ – ─")
        warn("Ü κ – ─")
        raise UserError("key", "Ü κ – ─", "is odd", "give 4")

    assert runner(main) == 2
    told = [stream.buffer.getvalue().decode(encoding) for stream in streams if stream.flush() is None]
    assert told == [f"{shown}\n{shown}\n", f"warning: {shown}\nerror: key = {shown}: is odd; give 4\n"]


def test_say_needs_no_command(monkeypatch):
    """Training that is called from another program."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("κ")
    assert stream.buffer.getvalue() == b"?\n"
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw, or a daemon
    say("κ")


def test_true_processes_under_the_c_locale():
    env = environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    done = subprocess.run(
        [sys.executable, "-m", "megabus", "estimate", "--help"], capture_output=True, env=env, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("unbuffered", "code"), [("", 0), ("1", 141)])
def test_a_reader_that_has_gone(unbuffered, code):
    """As `head -5` goes: no traceback, and nothing from Python when it ends."""
    read, write = os.pipe()
    os.close(read)
    env = environment(PYTHONUNBUFFERED=unbuffered)
    command = [sys.executable, "-m", "megabus", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env, cwd=ROOT, timeout=30)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize(("tell", "code"), [("print", 141), ("say", 75)])
def test_a_rank_whose_reader_has_gone(tmp_path, tell, code):
    """A log goes on without one; what is printed beside it ends the rank with a word, which torchrun has too."""
    read, write = os.pipe()
    os.close(read)
    script = "from megabus.command import end_rank; from megabus.errors import say; text = 'x' * 999\n"
    script += f"end_rank(lambda: [{tell}(text) for _ in range(99)] and 75)"
    env = environment(RANK="0", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, env=env, cwd=ROOT)
    os.close(write)
    told = f"error: {command.DEAF}" if tell == "print" else ""
    assert (done.returncode, done.stderr.decode().strip()) == (code, told)
    assert told in ((tmp_path / "error.json").read_text() if told else "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout(unbuffered):
    """It is told of a command's result; what a rank says on the way may be lost."""
    full = "error: stdout: cannot be written (No space left on device); make room, or send it elsewhere\n"
    script = "import sys; from megabus.command import end_rank, run; from megabus.errors import say\n"
    for call, code, told in (
        ("sys.exit(run(lambda: print('x') or 3))", 1 if unbuffered else 3, full),
        ("sys.exit(run(lambda: print('x' * 99999) or 0))", 1, full),
        ("end_rank(lambda: say('x') or 75)", 75, ""),
    ):
        words, env = [sys.executable, "-c", script + call], environment(PYTHONUNBUFFERED=unbuffered)
        with open("/dev/full", "w") as stdout:
            done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
        assert (done.returncode, done.stderr) == (code, told), call


def test_a_full_disk_behind_another_file_keeps_its_traceback():
    with pytest.raises(OSError, match="of another"):
        run(raising(OSError(errno.ENOSPC, "of another")))


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(tmp_path, streams):
    """No file of ours takes their place, in this process or in those that it starts, and nothing is told."""
    script = f"""
import os, subprocess, sys
from megabus.command import end_rank
from megabus.errors import say, warn
def main():
    print("x"); say("x"); warn("x")
    with open({str(tmp_path / "file")!r}, "w") as file:
        ours = [os.readlink(f"/proc/self/fd/{{number}}") for number in range(3)]
        theirs = subprocess.run(["readlink", "/proc/self/fd/0", "/proc/self/fd/2"], stdout=subprocess.PIPE, text=True)
        print(file.fileno() > 2, ours, theirs.stdout.split() == [ours[0], ours[2]], file=file)
    return 75
end_rank(main)
"""
    words = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == 75
    assert done.stdout == ("" if ">&- 2" in streams or streams == ">&-" else "x\nx\n")
    assert done.stderr == ("" if "2>&-" in streams else "warning: x\n")
    told = (tmp_path / "file").read_text()
    assert told.startswith("True [")
    assert told.endswith(" True\n")
    assert told.count("/dev/null") == 3 if streams.count("&-") == 3 else "/dev/null" in told


def test_another_pipe_that_has_broken_keeps_its_traceback():
    with pytest.raises(BrokenPipeError):
        run(raising(BrokenPipeError()))


def test_the_home_of_an_option(monkeypatch):
    """Shells expand the ~ of `--output ~/x`, and not that of `--output=~/x`."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("--output")
    parser.add_argument("words", nargs="*")
    for given, read in (("~/x", "/home/me/x"), ("~", "/home/me"), ("a~/x", "a~/x"), ("~no-one/x", "~no-one/x")):
        assert parser.parse_args([f"--output={given}", "~/as named"]).output == read
        assert parser.parse_intermixed_args(["~/as named", f"--output={given}"]).output == read
    assert parser.parse_args(["~/as named"]).words == ["~/as named"]


@pytest.mark.parametrize("command", ["plot", "preprocess"])
def test_help_on_a_full_disk_is_one_line(command):
    done = subprocess.run(
        f"{sys.executable} -m megabus {command} --help > /dev/full", shell=True, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: stdout: cannot be written (No space left on device); make room, or send it elsewhere\n"
    )
