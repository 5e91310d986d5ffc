"""Paths among the words of a command."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from megabus.pathname import path_of, path_text
from tests.support.command import run_command


def test_homes_and_variables_are_written_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "w")
    monkeypatch.delenv("NONE", raising=False)
    assert path_text("~/x") == "/home/me/x"
    assert path_of("a/$WORK/${WORK}.bin") == Path("a/w/w.bin")
    assert path_text(odd := os.fsdecode(b"\xff")) == odd  # as named
    for word in ("$NONE/x", "~no-one/x"):
        with pytest.raises(ArgumentTypeError, match=r"names the variable NONE|a home that is not known"):
            path_text(word)
    Path("$NONE").mkdir()
    Path("$NONE/x").touch()
    assert path_text("$NONE/x") == "$NONE/x"  # a file of this very name


LONG = "x" * 300
COMMANDS = {
    "preprocess": ["a.txt", "--train-tokenizer", 300, "--out", "{}"],
    "preprocess, its input": ["{}", "--train-tokenizer", 300, "--out", "out/c"],
    "preprocess, its tokenizer": ["a.txt", "--tokenizer", "{}", "--out", "out/c"],
    "plot": ["run", "--out", "{}"],
    "report": ["{}"],
    "generate": ["{}"],
    "convert": ["run", "{}", "--to", "hf"],
    "evaluate": ["run", "--data", "valid={}"],
    "estimate": ["--config", "{}"],
    "extend-tokenizer": ["a", "{}", "--add", "x"],
    "train": ["--config", "{}"],
    "submit": ["--config", "{}"],
}


@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.parametrize("word", ["$NONE/x", "~no-one/x", LONG], ids=["variable", "home", "long"])
def test_a_path_that_cannot_be_is_one_line(monkeypatch, tmp_path, case, word):
    """And nothing is made, such as a folder called ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NONE", raising=False)
    done = run_command(case.partition(",")[0], *(str(part).replace("{}", word) for part in COMMANDS[case]))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    told = {"$NONE/x": "the variable NONE", "~no-one/x": "a home that is not known", LONG: "longer than a file's name"}
    assert told[word] in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_configurations_that_are_no_files_are_refused(monkeypatch, tmp_path, what):
    """A pipe would be waited for, a device read without an end."""
    monkeypatch.chdir(tmp_path)
    if what == "fifo":
        os.mkfifo(what)
    monkeypatch.setattr(sys, "argv", ["megabus"])
    for command in (["train", "--config", what], ["estimate", "--world", "1", "--config", what]):
        done = run_command(*command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: --config = {what}: is no regular file; ")
    done = run_command("extend-tokenizer", "a", "out", "--add-file", what)
    assert done.stderr == f"error: --add-file = {what}: is no regular file; give a file of text\n"
