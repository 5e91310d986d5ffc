"""`megabus evaluate`: token files and tasks of a trained model, in one process."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import megabus
from megabus.cli import evaluate, layers
from megabus.cli.evaluate import end_with, main
from megabus.convert import hugging_face
from megabus.convert.convert import convert, open_source
from megabus.convert.load import tokenizer_of_model
from megabus.convert.source import OpenFiles
from megabus.data.batches import TokenSource
from megabus.data.indexed import meta_path
from megabus.data.sources import VALID_SEED
from megabus.errors import UserError
from tests.support.forked import run_python
from tests.support.later import Later
from tests.support.nli_data import rows_of, write_run
from tests.support.small_runs import write_tokens

tasks = Later("lm_eval.tasks")
LINES = Path(__file__).parents[2] / "configs/eval/lines"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--data, --tasks = (missing): there is nothing to measure; give one of them"),
        (["--data", "a/x", "b/x"], "--data = a/x b/x: names one twice; give each a NAME= of its own"),
        (["--tasks", "t", "--metadata", "[1]"], "--metadata = [1]: is no JSON object; give names and values"),
        (["--tasks", "t", "--metadata", "{"], "--metadata = {: is no JSON (Expecting"),
        (["--tasks", "t", "--metadata", "[" * 10**5], "--metadata = [[["),
        (["--tasks", "t", "--json", ""], "--json = .: is a directory; name a file in it"),
        (["--tasks", "t", "--json", "/nowhere/x"], "--json = /nowhere/x: its directory does not exist; choose"),
        (["--tasks", "t", "--json", f"{__file__}/x"], f"--json = {__file__}/x: its directory is a file; choose"),
        (
            ["--tasks", "t", "--device", "gpu"],
            "command line = run --tasks t --device gpu: argument --device: ",
        ),
        (["--tasks", "t", "--limit", "0"], "--limit = 0: is no number of documents; give 1 or more"),
        (["--tasks", "t", "--device", "cuda"], "--device = cuda: is not there; use cpu"),
    ],
)
def test_wrong_options_are_told(monkeypatch, words, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        main(["run", *words])
    assert str(caught.value).startswith(told)


def test_a_full_disk_leaves_no_part_of_the_numbers(tmp_path, monkeypatch):
    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        evaluate._write(tmp_path / "found.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_are_those_of_plain_pytorch(tmp_path):
    run = write_run(tmp_path)
    write_tokens(tmp_path / "other", [(number * number) % 101 for number in range(130)])
    lines = [f"{row['sentence1']} {row['sentence2']}\n" for row in rows_of(60)]
    (tmp_path / "book.txt").write_text("".join(lines))
    metadata = {"text": str(tmp_path / "book.txt"), "questions": 9}
    words = ["--data", f"sevens={tmp_path / 'other'}", "--seq-len", "16", "--json", tmp_path / "found.json"]
    words += ["--tasks", "megabus_next_line", "--task-path", LINES, "--metadata", json.dumps(metadata), "--limit", "7"]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_python(["-m", "megabus", "evaluate", run, *words], env=os.environ | quiet, timeout=300)
    assert done.returncode == 0, done.stderr
    found, model = json.loads((tmp_path / "found.json").read_text()), megabus.load(run)

    source = TokenSource([(str(tmp_path / "other"), 1.0)], 16, VALID_SEED, 340)
    inputs, targets = source.batch(0, 16, range(8))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    told = {"bits_per_byte": None, "tokens": 128, "seq_len": 16}
    assert found["data"] == {"sevens": {"loss": pytest.approx(loss, abs=1e-5)} | told}
    assert f"sevens  {loss:.4f}" in done.stdout

    meta = {"vocab_size": 101, "n_tokens": 130, "tokenizer_sha256": "0" * 64}
    meta_path(tmp_path / "other").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"^data = .*other: belongs to another tokenizer than .*/run/checkpoints/"):
        main([str(run), "--data", str(tmp_path / "other"), "--seq-len", "16"])

    known = tasks.TaskManager(include_path=str(LINES), include_defaults=False, metadata=metadata)
    (task,) = known.load("megabus_next_line")["tasks"].values()
    tokenizer, right = tokenizer_of_model(run, None, 340), []
    for doc in list(task.test_docs())[:7]:
        before = len(tokenizer.encode(doc["before"]))
        scores = [said(model, tokenizer.encode(f"{doc['before']}\n{choice}"), before) for choice in doc["choices"]]
        right.append(scores.index(max(scores)) == doc["label"])
    assert found["tasks"]["megabus_next_line/acc"] == pytest.approx(sum(right) / 7)
    assert set(found["tasks"]) == {"megabus_next_line/acc", "megabus_next_line/acc_norm"}


def test_an_export_is_measured_at_the_length_that_it_says(tmp_path, capsys):
    """Which is its run's longest: the same numbers as of the run."""
    run, found = write_run(tmp_path), []
    with OpenFiles() as files:
        source = open_source(run, files)
        source.state.config = {"train": {"seq_len": 16}, "growth": {"stages": []}}
        convert(source, tmp_path / "hf", "hf")
    write_tokens(tmp_path / "other", [(number * number) % 101 for number in range(130)])
    for model, length in ((run, ["--seq-len", "16"]), (tmp_path / "hf", [])):
        words = ["--data", str(tmp_path / "other"), "--json", str(tmp_path / "found.json")]
        assert main([str(model), *words, *length]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["data"]["other"])
    assert found[0] == found[1]
    assert found[1]["seq_len"] == 16
    assert capsys.readouterr().out.count("bits/byte  tokens  seq_len") == 2


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"megabus": {}, "max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 131072}, 2048),
        ({"max_position_embeddings": None}, 2048),
        ({}, 2048),
        ({"megabus": {}, "max_position_embeddings": "64"}, 2048),
    ],
)
def test_the_longest_sequence_of_a_hugging_face_model(config, longest):
    assert hugging_face._longest(config) == longest


def test_token_files_of_another_tokenizer_are_refused(tmp_path, capsys):
    """Of a checkpoint and of its export; what does not say what made it is taken."""
    run = write_run(tmp_path)
    with OpenFiles() as files:
        convert(open_source(run, files), tmp_path / "hf", "hf")
    prefix, sha256 = tmp_path / "other", tokenizer_of_model(run, None, 340).sha256
    write_tokens(prefix, [(number * number) % 101 for number in range(130)])
    for model in (run, tmp_path / "hf"):
        words = [str(model), "--seq-len", "16", "--tokens", "128"]
        for made_with, is_refused in ((None, False), (sha256, False), ("0" * 64, True)):
            meta = {"vocab_size": 340, "n_tokens": 130} | ({"tokenizer_sha256": made_with} if made_with else {})
            meta_path(prefix).write_text(json.dumps(meta))
            for command, data in ((main, "--data"), (layers.main, "--valid")):
                call = partial(command, [*words, data, str(prefix)])
                if not is_refused:
                    assert call() == 0
                    continue
                told = f"^data = {prefix}: belongs to another tokenizer than the weights of .*, whose ids mean other"
                with pytest.raises(UserError, match=told):
                    call()
    assert capsys.readouterr().out.count("whole model") == 4


def test_it_ends_with_the_process_that_has_started_it():
    """Which is killed, and so can end nothing."""
    ours, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            end_with(os.getppid())
            os.write(theirs, b"begun")
            time.sleep(30)
            os._exit(0)
        time.sleep(30)
        os._exit(0)
    os.close(theirs)
    assert os.read(ours, 5) == b"begun"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([ours], [], [], 15.0)[0]
    assert os.read(ours, 1) == b""  # nobody holds the other end
    os.close(ours)


@torch.no_grad()
def said(model, ids, before):
    """Log-likelihood of what comes after so many tokens."""
    logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(before, len(ids)))
