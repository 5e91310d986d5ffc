"""`megabus preprocess` when something other than its input is at fault: the line blames that, and nothing is lost."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import sentencepiece

from megabus.cli.preprocess import parse_arguments
from megabus.data import encoding, preprocess, staging
from megabus.data.indexed import IndexedTokens
from megabus.errors import UserError
from tests.support.command import run_command
from tests.support.forked import wait_for
from tests.support.small_tokenizer import SENTENCE

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ("--split-documents", "line", "--valid-fraction", 0.3)
KINDS = ("bin", "idx", "meta.json")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preprocess, "PROGRESS_SECONDS", 3600.0)  # on a busy machine it would be told
    Path("old.txt").write_text("".join(f"old document {i}\n" for i in range(20)))
    Path("new.txt").write_text("".join(f"new document {i} of more words\n" for i in range(30)))


def run(model, *arguments, output="out/c", workers=1):
    tokenizer = ("--tokenizer", model) if model else ("--train-tokenizer", 300, "--model-type", "bpe")
    return run_command("preprocess", *arguments, *tokenizer, "--out", output, "--workers", workers)


def refused(done):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def contents(folder="out"):
    return {path.name: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).iterdir())}


def workers_of(pid):
    children = psutil.Process(pid).children() if psutil.pid_exists(pid) else []
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


# ---- what is to blame -------------------------------------------------------------------------------------


def test_a_killed_worker_is_named(model, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 10)

    def kill_one():
        deadline = time.monotonic() + 60
        while not (found := workers_of(os.getpid())) and time.monotonic() < deadline:
            time.sleep(0.01)
        found[0].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    done = run(model, "new.txt", workers=2)
    thread.join()
    assert "--workers = 2: one of these processes was killed" in refused(done)
    assert contents() == {}


def test_memory_that_cannot_be_shared_is_named(model):
    """A true one, in a mount namespace of its own."""
    script = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    command = [sys.executable, "-m", "megabus", "preprocess", "new.txt", "--tokenizer", str(model), "--out", "out/c"]
    enter = ["unshare", "--mount", "sh", "-c", script, "sh"]
    try:
        subprocess.run([*enter, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespace can be made here: {error}")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*enter, *command, "--workers", "2"], env=env, capture_output=True, text=True)
    assert "--workers = 2: processes that share memory cannot be started here" in refused(done)
    assert "/dev/shm" in done.stderr
    assert contents() == {}


def test_processes_that_cannot_be_started_are_named(model, monkeypatch):
    def submit(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")  # as fork fails

    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", submit)
    assert "--workers = 2: processes that share memory cannot be started" in refused(run(model, "new.txt", workers=2))


TOKENIZERS = {
    "nothing.model": "the file does not exist",
    "out": "holds no tokenizer.json and no tokenizer.model",
    "pipe": "is no regular file",  # and is not waited for
    "/dev/zero": "is no regular file",
    "/proc/self/mem": "cannot be read (Input/output error)",  # as from a broken disk
    "new.txt": "is no tokenizer that is known",
    "empty.model": "is no tokenizer that is known",
}


@pytest.mark.parametrize("path", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_named(path):
    Path("out").mkdir()
    Path("empty.model").touch()
    os.mkfifo("pipe")
    assert refused(run(path, "new.txt")).startswith(f"error: tokenizer = {path}: {TOKENIZERS[path]}")


def test_a_tokenizer_that_changes_on_the_way_is_named(model):
    encoder = encoding.Encoder(model, "of another", 0.0, [], [])
    with pytest.raises(UserError, match="has been changed while it was used"):
        next(encoding.encode_all(encoder, ["text"], workers=1))


def test_numbers_that_are_no_sizes_are_named(model):
    for value in ("0", "-1", "nan"):
        assert f"--tokenizer-sample-mb = {float(value)}" in refused(
            run(None, "new.txt", "--tokenizer-sample-mb", value)
        )


def test_an_output_that_cannot_be_written_is_named(model):
    assert "--out = old.txt/c: cannot be written" in refused(run(model, "new.txt", output="old.txt/c"))
    name = "x" * 250
    assert f"--out = out/{name}: cannot be written (" in refused(run(model, "new.txt", output=f"out/{name}"))


# ---- whole or none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["c-train.bin", "c-valid.idx", "c-valid.meta.json", "c-tokenizer.model"])
def test_a_target_that_is_a_folder_is_named_before_anything_is_read(target):
    assert run(None, "old.txt", *SPLIT).returncode == 0
    Path("out", target).unlink()
    Path("out", target).mkdir()
    before = contents()
    assert f"--out = out/{target}: is a folder" in refused(run(None, "nothing.txt", *SPLIT))
    assert contents() == before


@pytest.mark.parametrize("target", ["c-train.bin", "c-valid.idx", "c-valid.meta.json", "c-tokenizer.model"])
def test_all_stay_as_they_were_if_one_cannot_be_moved(monkeypatch, target):
    """A folder of its name appears while the run is under way."""
    assert run(None, "old.txt", *SPLIT).returncode == 0
    Path("out", target).unlink()
    before = contents()
    sides = preprocess.check_both_sides

    def check(*args):
        Path("out", target).mkdir()
        sides(*args)

    monkeypatch.setattr(preprocess, "check_both_sides", check)
    done = run(None, "new.txt", *SPLIT)
    assert done.returncode == 2
    problem = f"cannot be written ([Errno 21] Is a directory: 'out/{target}')"
    assert done.stderr.splitlines()[1:] == [f"error: --out = out/c: {problem}; choose another prefix"]
    assert contents() == before | {target: None}


def all_or_none(texts, prefix="out/c"):
    with staging.all_or_none(Path(prefix), [Path("out", name) for name in texts]) as stage:
        for name, text in texts.items():
            (stage / name).write_text(text)


OLD, NEW = ({f"c.{kind}": f"{age} {kind}" for kind in ("bin", "idx")} for age in ("old", "new"))


def texts():
    return {path.name: path.read_text() for path in Path("out").iterdir() if path.is_file()}


@pytest.mark.parametrize("whole", range(5))
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_what_cannot_be_moved_back_is_not_deleted_and_the_next_ends_the_move(monkeypatch, capfd, whole, error):
    """From some rename on, none succeeds, those that take back what was done included."""
    all_or_none(OLD)
    with monkeypatch.context() as broken:
        rename, left = Path.rename, iter(range(whole))

        def call(self, target):
            if next(left, None) is None:
                raise error
            return rename(self, target)

        broken.setattr(Path, "rename", call)
        with pytest.raises(type(error)):
            all_or_none(NEW)
    stage = Path("out/.c.preprocess")
    if whole < 2:  # the first rename is the stage's own
        assert (texts(), stage.exists()) == (OLD, False)
    else:
        files = [path.read_text() for path in Path("out").rglob("*") if path.is_file()]
        assert {*OLD.values(), *NEW.values()} <= {*files}
        assert "out/c is half replaced: what was there lies in out/.c.preprocess" in capfd.readouterr().err
        all_or_none({"d.bin": "another"}, "out/d")
        assert (texts(), stage.exists()) == (NEW | {"d.bin": "another"}, False)


def test_what_another_prefix_has_left_and_cannot_be_swept_is_told_and_left(capfd):
    """A folder has taken the name of one of its files. Its own prefix must be mended first."""
    left = Path("out/.b.preprocess")
    (left / staging.WHOLE).mkdir(parents=True)
    (left / staging.LOCK).touch()
    (left / staging.WHOLE / "b.bin").write_text("whole")
    Path("out/b.bin").mkdir()
    for _ in range(2):
        all_or_none(NEW)
        assert texts() == NEW
        told = "a killed preprocess has left out/.b.preprocess, which cannot be swept up ([Errno 21] Is a directory: "
        assert told in capfd.readouterr().err
    with pytest.raises(IsADirectoryError):
        all_or_none({"b.idx": "mine"}, "out/b")
    assert (left / staging.WHOLE / "b.bin").read_text() == "whole"
    Path("out/b.bin").rmdir()
    all_or_none({"b.idx": "mine"}, "out/b")
    assert texts() == NEW | {"b.bin": "whole", "b.idx": "mine"}


def test_what_is_no_stage_of_ours_is_not_used_or_waited_for(capfd):
    """A pipe for a lock, of this prefix or of another, and a link for its folder."""
    for name in ("b", "c"):
        Path(f"out/.{name}.preprocess").mkdir(parents=True)
        os.mkfifo(f"out/.{name}.preprocess/{staging.LOCK}")
    with pytest.raises(OSError, match="No such device or address"):
        all_or_none(NEW)
    assert "out/.b.preprocess, which cannot be swept up ([Errno 6] No such" in capfd.readouterr().err
    Path(f"out/.c.preprocess/{staging.LOCK}").unlink()
    Path("out/.c.preprocess").rename("elsewhere")
    Path("out/.c.preprocess").symlink_to("../elsewhere")
    with pytest.raises(FileExistsError):
        all_or_none(NEW)
    assert (texts(), list(Path("elsewhere").iterdir())) == ({}, [])
    Path("out/.c.preprocess").unlink()
    all_or_none(NEW)
    assert texts() == NEW


def mortal(n_renames):
    """`Path.rename` of a process that lives for so many calls of it."""
    rename, left = Path.rename, iter(range(n_renames))

    def call(self, target):
        if next(left, None) is None:
            os._exit(9)
        return rename(self, target)

    return call


def test_a_process_killed_at_any_rename_leaves_the_old_files_or_the_next_finishes_the_new(model, monkeypatch):
    """No reader finds halves of both; what is left is swept by a run that writes into the same folder."""
    assert run(model, "new.txt", *SPLIT).returncode == 0
    new, states = contents(), []
    for last in range(100):
        assert run(model, "old.txt", *SPLIT).returncode == 0
        old, pid = contents(), os.fork()
        if pid == 0:
            monkeypatch.setattr(Path, "rename", mortal(last))
            run(model, "new.txt", *SPLIT)
            os._exit(0)
        killed = wait_for(pid, 60) == 9
        for side in ("train", "valid"):
            before, after, now = (
                {name: files[name] for name in files if side in name} for files in (old, new, contents())
            )
            if now not in (before, after):
                with pytest.raises(UserError, match="does not exist"):
                    IndexedTokens(f"out/c-{side}")
        staging.sweep(Path("out"), Path("out/.c.preprocess"))
        assert contents() in (old, new)
        states.append(contents() == new)
        if not killed:
            break
    # Each of six files is written, is moved aside, and moved in; the stage is moved once.
    assert len(states) > 12
    assert states == sorted(states)
    assert states[0] is False


def test_what_a_killed_preprocess_leaves_is_swept_by_the_next_and_its_workers_end(model):
    Path("long.txt").write_text(SENTENCE * 200_000)
    command = [sys.executable, "-m", "megabus", "preprocess", "long.txt", "--tokenizer", str(model)]
    command += ["--out", "out/killed", "--workers", "2", "--split-documents", "line"]
    started = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 60
        while len(workers := workers_of(started.pid)) < 2:
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "another preprocess is writing there" in refused(run(model, "new.txt", output="out/killed"))
        assert Path("out/.killed.preprocess").is_dir()  # a living one's is left alone
    finally:
        started.kill()
    started.wait()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    done = run(model, "new.txt")
    assert done.returncode == 0
    assert done.stderr == "warning: swept up after a preprocess that was killed: out/.killed.preprocess\n"
    assert sorted(contents()) == [f"c.{kind}" for kind in KINDS]


# ---- progress ---------------------------------------------------------------------------------------------


def test_progress_says_how_much_is_left(model, monkeypatch):
    """Half of the files encoded in 60 s: 60 s are left. What is read, such as all of a small .gz, is not yet done."""
    monkeypatch.setattr(preprocess.Progress, "seconds", property(lambda self: 60.0))

    class Read:
        share, n_bytes = 0.5, 120_000_000

    progress = preprocess.Progress(Read())
    assert progress.line() == "0 MB of text, 0 tokens, 0.0 MB/s, 0 tokens/s"
    progress.add(120_000_000, 30_000_000)
    told = "120 MB of text, 30000000 tokens, 2.0 MB/s, 500000 tokens/s"
    for Read.share, Read.n_bytes in ((0.5, 120_000_000), (1.0, 240_000_000)):
        assert progress.line() == f"{told}, 50% done, 1:00 left"
    Read.share = 0.0  # a data set of the hub
    assert progress.line() == told


def test_read_text_is_counted(model):
    """What is yielded, as UTF-8; anew with each iteration."""
    Path("three.jsonl").write_text('{"text": "é"}\n{"text": " "}\n{"text": "\\ud800x"}\n')
    texts = preprocess.Documents(parse_arguments(["three.jsonl", "--tokenizer", str(model), "--out", "x"]))
    for _ in range(2):
        assert [*texts] == ["é", "\ufffdx"]
        assert (texts.n_bytes, texts.n_mended, texts.share) == (6, 1, 1.0)


# ---- what is told ------------------------------------------------------------------------------------------


def test_the_shares_are_told_and_a_share_unlike_the_one_asked_for_is_warned_of(model):
    done = run(model, "new.txt", *SPLIT)
    told = re.search(r"(\d+) tokens \(train (\d+), valid (\d+): (\S+)%\)", done.stdout)
    total, train, valid = map(int, told.groups()[:3])
    assert total == train + valid
    assert float(told[4]) == round(100 * valid / total, 1)
    args = parse_arguments(["new.txt", "--tokenizer", str(model), "--out", "x", "--valid-fraction", "0.05"])
    for share, warned in ((0.05, 0), (0.03, 0), (0.09, 0), (0.02, 1), (0.11, 1), (0.73, 1)):
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            preprocess.warn_of_shares(args, [1, 1], share)
        assert told.getvalue().count("(1 of 2 documents, which stay whole); make documents smaller") == warned


def test_ctrl_c_is_told_in_a_line(model, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    assert run(model, "old.txt").returncode == 0
    before = contents()
    monkeypatch.setattr(preprocess, "encode_all", interrupted)
    done = run(model, "new.txt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped: nothing was written\n")
    assert contents() == before


def test_a_tokenizer_that_training_refuses_is_told(model):
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE] * 9), model_writer=words, model_type="word", vocab_size=12, minloglevel=2
    )
    Path("words.model").write_bytes(words.getvalue())
    done = run("words.model", "new.txt")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: words.model is a SentencePiece model of words or characters, of which an")
    assert "training refuses it as data.tokenizer, and takes its data without one\n" in done.stderr
