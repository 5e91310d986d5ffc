"""Checkpoints that are not damaged, and yet cannot be used: refused on all ranks, and left as they are."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pathlib
import shutil

import pytest
import torch.distributed as dist

import megabus
from megabus.checkpoint import contents, manifest
from megabus.checkpoint.manifest import DamagedError
from megabus.checkpoint.restore import find_checkpoint, restore
from megabus.checkpoint.state import FORMAT
from megabus.checkpoint.store import checkpoints_of, folder_of
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from tests.support import checkpoints as ck

SHARD = "shard-0000{}-model-0000{}-of-00003.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run's directory with checkpoints of steps 1 and 2, by two ranks."""
    run = tmp_path_factory.mktemp("run")
    run_ranks(2, ck.saved_steps, checkpoints_of(run), ck.run_config({"dp": 2}), 2)
    return run


@pytest.fixture
def root(pristine, tmp_path):
    return checkpoints_of(shutil.copytree(pristine, tmp_path / "run"))


def answers(root, spoil=None, modes=(True, False)):
    """On every rank, strictly and not: what `find_checkpoint` says; and whether the directory is as it was."""
    before, told = ck.tree_of(root), []
    if spoil is not None:
        spoil()
    for strict in modes:
        error, _, found = ck.outcome(find_checkpoint, root, strict)
        told.append(error or found.folder.name)
        dist.barrier()
    return told, ck.tree_of(root) == before


def check_refused(ranks, path, problem):
    """All ranks alike, strictly and not, with one `UserError` about `path`; nothing was set aside."""
    for told, untouched in ranks:
        assert told == ranks[0][0]
        assert untouched
        for kind, text in told:
            assert kind == "UserError"
            assert text.startswith(f"checkpoint = {path}: {problem}")
            assert "\n" not in text


def check_load_refuses(root, path, problem):
    with pytest.raises(UserError) as caught:
        megabus.load(root.parent)
    assert type(caught.value) is UserError
    assert str(caught.value).startswith(f"checkpoint = {path}: {problem}")


# ---- what cannot be read may be read tomorrow


def failing_to_open(path, times=(True,)):
    """Opening a file fails, of the times that it is opened at those that are true."""

    def spoil():
        real, now = os.open, itertools.cycle(times)

        def failing(name, *args, **options):
            if str(name) == str(path) and next(now):
                raise OSError(errno.EIO, "Input/output error")
            return real(name, *args, **options)

        os.open = failing

    return spoil


@pytest.mark.parametrize("file", ["manifest.json", "state.json", SHARD.format(2, 3)])
def test_what_cannot_be_opened_is_refused(root, file):
    path = folder_of(root, 2) / file
    modes = (False,) if file == "manifest.json" else (True, False)  # strictly, `latest` is refused before it
    spoil = failing_to_open(path)
    check_refused(run_ranks(2, answers, root, spoil, modes), path, "cannot be read (Input/output error)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", os.open)  # to be set back
        spoil()
        check_load_refuses(root, path, "cannot be read (Input/output error)")
    path.unlink()  # the control: where it is not there, that is damage, and step 1 is used
    assert {told[-1] for told, _ in run_ranks(2, answers, root)} == {folder_of(root, 1).name}


def failing_disk_of(rank):
    def spoil():
        def failing(*_):
            raise OSError(errno.EIO, "Input/output error")

        if dist.get_rank() == rank:
            manifest._digest = contents.scan = failing

    return spoil


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_rank_cannot_read_is_refused(root, rank):
    # The first of the files that this rank checks; rank 0 looks at the state before it.
    path = folder_of(root, 2) / (SHARD.format(1, rank + 1) if rank else "state.json")
    check_refused(run_ranks(3, answers, root, failing_disk_of(rank)), path, "cannot be read (Input/output error)")


def test_a_state_that_cannot_be_read_is_refused(root):
    """At every second opening: each time after it was hashed."""
    path = folder_of(root, 2) / "state.json"
    spoil = failing_to_open(path, (False, True))
    check_refused(run_ranks(2, answers, root, spoil), path, "cannot be read (")


def unreadable_root():
    def failing(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    pathlib.Path.iterdir = failing


def test_a_directory_that_cannot_be_listed_is_refused(root):
    check_refused(run_ranks(2, answers, root, unreadable_root), root, "cannot be read (")


# ---- what another megabus wrote, or what does not fit together


def test_a_later_format_is_refused_and_not_taken_for_damage(root):
    path = folder_of(root, 2) / "state.json"
    path.write_text(json.dumps({"format": FORMAT + 1, "state": "of another kind"}))
    ck.attest(path.parent)
    problem = f"has format {FORMAT + 1}, this megabus reads 2 and {FORMAT}; use the megabus that wrote it"
    check_refused(run_ranks(2, answers, root), path, problem)
    check_load_refuses(root, path, problem)
    path.write_text(json.dumps({"format": FORMAT, "state": "of another kind"}))
    ck.attest(path.parent)  # the control: what no megabus of this format wrote is damage, whatever its hash
    assert {told[-1] for told, _ in run_ranks(2, answers, root, None, (False,))} == {folder_of(root, 1).name}


def restoring(root, spoil):
    """On every rank: what `restore` says where files have changed since the checkpoint was found."""
    found, engine = find_checkpoint(root, strict=True), ck.fresh(ck.run_config({"tp": 2}))
    dist.barrier()
    if dist.get_rank() == 0:
        spoil(found.folder)
    dist.barrier()
    return ck.outcome(restore, found, engine)[0]


def swap(folder):
    one, two = folder / SHARD.format(1, 1), folder / SHARD.format(1, 2)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def other_rank(folder):
    shutil.copyfile(folder / SHARD.format(1, 1), folder / SHARD.format(2, 1))


def lose(folder):
    (folder / SHARD.format(2, 3)).unlink()


def spare(folder):
    """The control."""


@pytest.mark.parametrize("spoil", [swap, other_rank, lose])
def test_shards_that_do_not_fit_the_placement_are_refused(root, spoil, capfd):
    folder = folder_of(root, 2)
    assert run_ranks(2, restoring, root, spare) == [None, None]
    first, second = run_ranks(2, restoring, root, spoil)
    assert first == second
    kind, text = first
    assert kind == "UserError"
    assert "Traceback" not in capfd.readouterr().err  # torch's, before that line
    assert text.startswith(f"checkpoint = {folder}: cannot be read (")
    assert text.endswith("; restore it from another copy")
    if spoil is not lose:
        ck.attest(folder)  # each file is what the manifest says, but not what a checkpoint has there
        with pytest.raises(DamagedError, match=r"-of-00003.safetensors: (lacks a tensor|holds a tensor|is damaged)"):
            megabus.load(root.parent)
