"""A pickle may run any code. None is read from a file, whatever is loaded, resumed or converted: an audit hook sees."""

from __future__ import annotations

import collections
import pickle
import sys
from pathlib import Path

import pytest
import torch

import megabus
from megabus.testing.ranks import run_ranks
from megabus.train import loop
from tests.support.command import run_command
from tests.support.small_runs import run_config, stop_after, write_corpus

BETWEEN_RANKS = "_tensor_to_object"  # torch's reading of what another rank of this run has sent
STAGES = [{"d_model": 52, "n_heads": 4, "d_ff": 90}]


def watched(act, *args):
    """On a rank: (names that pickles asked for during `act`, less what ranks send each other; files opened)."""
    asked, files = [], set()

    def hook(event, details):
        if event == "pickle.find_class" and not between_ranks(sys._getframe()):
            asked.append(".".join(details))
        elif event == "open" and isinstance(details[0], str):
            files.add(details[0])

    sys.addaudithook(hook)  # it stays as long as the process does, which is a fork
    act(*args)
    return asked, files


def between_ranks(frame):
    while frame is not None:
        if frame.f_code.co_name == BETWEEN_RANKS:
            return True
        frame = frame.f_back
    return False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped after its growth."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    config = run_config(folder, folder / "run", [{"tp": 1}] * 3, growth__stages=STAGES, eval__every=20)
    assert run_ranks(1, train, config, 10) == [True]
    return config


def train(config, last):
    stop_after(last)()
    return loop.train(config).stopped


def resume(config):
    assert train(config, 12)


def load(config):
    megabus.load(config.run_dir)


def convert(config, out):
    steps = [(config.run_dir, "shards"), (out / "shards", "hf"), (out / "hf", "checkpoint"), (out / "checkpoint", "hf")]
    for number, (source, form) in enumerate(steps):
        target = out / (form if number < 3 else "again")
        done = run_command("convert", source, target, "--to", form, "--verify")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["load", "resume", "convert"])
def test_nothing_unpickles(run, tmp_path, what):
    act, args = {"load": (load, ()), "resume": (resume, ()), "convert": (convert, (tmp_path,))}[what]
    ((asked, files),) = run_ranks(1, watched, act, run, *args)
    assert asked == []
    opened = {Path(file).name for file in files}
    assert "manifest.json" in opened  # the control: the hook sees what is read
    assert not any(name.endswith((".pt", ".pth", ".pkl", ".pickle", ".ckpt")) for name in opened)


def unpickle(_, path):
    torch.load(path, weights_only=False)


def test_the_hook_sees_a_pickle(run, tmp_path):
    """The control: of torch's files, and of Python's own."""
    torch.save({"a": collections.OrderedDict()}, tmp_path / "a.pt")
    ((asked, files),) = run_ranks(1, watched, unpickle, run, tmp_path / "a.pt")
    assert "collections.OrderedDict" in asked
    assert str(tmp_path / "a.pt") in files
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(print))
    ((asked, _),) = run_ranks(1, watched, lambda _, path: pickle.loads(path.read_bytes()), run, tmp_path / "a.pkl")
    assert asked == ["builtins.print"]
