"""A save that cannot be written is one message on all ranks; the checkpoint before it stays, and the next one works."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from megabus.checkpoint.manifest import check_file, read_manifest
from megabus.checkpoint.store import complete, folder_of, latest_of, step_of
from megabus.testing.ranks import run_ranks
from tests.support import checkpoints as ck
from tests.support.disk_faults import Disk, refuse

CONFIG = ck.run_config({"dp": 2})


@contextmanager
def full_disk(_):
    """No file of this process may grow beyond 4 KiB: state.json and the manifest can be written, no shard can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() says EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def locked(root):
    """Nothing may be made in or removed from `root`. What may do all, as these tests' root, becomes nobody."""
    user = os.geteuid()
    root.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        root.chmod(0o755)


@contextmanager
def elsewhere(root):
    """`root` is there for rank 0 only, as on machines that share no file system."""
    yield


def save_thrice(root, victim, accident, asynchronous):
    """A good save; one during an accident of rank `victim`; the same again. What became of the second one, and what
    was there before and after it."""
    rank = dist.get_rank()
    if accident is elsewhere and rank == victim:
        root = root.with_name("elsewhere")
    engine = ck.trained(CONFIG)
    saver = ck.make_saver(root, asynchronous=asynchronous)
    assert accident is elsewhere or ck.save(saver, engine, CONFIG, 1).error is None
    before = ck.tree_of(root)
    dist.barrier()
    if rank == victim:
        with accident(root):
            failed = ck.save(saver, engine, CONFIG, 2)
    else:
        failed = ck.save(saver, engine, CONFIG, 2)
    dist.barrier()
    after = ck.tree_of(root)
    dist.barrier()
    retried = None if accident is elsewhere else ck.save(saver, engine, CONFIG, 2)
    told = [(type(save.error).__name__, str(save.error)) for save in (failed, retried) if save is not None]
    return told, failed.folder, before, after


@pytest.fixture
def open_path():
    """A directory that nobody may look into, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("accident", "victim", "why"),
    [(full_disk, 0, errno.EFBIG), (full_disk, 1, errno.EFBIG), (locked, 0, errno.EACCES)],
    ids=["rank 0's disk is full", "rank 1's disk is full", "read-only"],
)
def test_a_save_fails_whole_and_the_next_works(open_path, accident, victim, why, asynchronous):
    root = open_path / "checkpoints"
    ranks = run_ranks(2, save_thrice, root, victim, accident, asynchronous)
    told, folder, before, after = ranks[0]
    (kind, text), retried = told
    assert kind == "UserError"
    assert text.startswith(f"checkpoint = {folder_of(root, 2)}: cannot be written (")
    assert os.strerror(why) in text
    assert text.endswith("; make room or choose another run_dir")
    assert "\n" not in text
    assert retried == ("NoneType", "None")
    assert folder is None
    assert ranks[1][0] == told
    assert before == after
    assert "step-00000001/manifest.json" in before
    assert [step_of(folder) for folder in complete(root)] == [2, 1]
    for folder in complete(root):
        for entry in read_manifest(folder):
            check_file(folder, entry)
    assert latest_of(root) == folder_of(root, 2)
    assert not list(root.glob("*.partial"))


def test_without_a_shared_file_system_no_checkpoint_appears(tmp_path):
    root = tmp_path / "checkpoints"
    ranks = run_ranks(2, save_thrice, root, 1, elsewhere, False)
    for told, _, _, after in ranks:
        ((kind, text),) = told
        assert kind == "UserError"
        assert "cannot be written" in text
        assert "shard-00002" in text
        assert not any(name.endswith("manifest.json") for name in after)
    assert list(root.iterdir()) == []


def test_a_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("a file")
    for kind, text in run_ranks(2, save_once, tmp_path / "run" / "checkpoints"):
        assert kind == "UserError"
        assert "cannot be written ([Errno 20] Not a directory" in text


def save_once(root):
    error = ck.save(ck.make_saver(root), ck.trained(CONFIG, steps=0), CONFIG, 1).error
    return type(error).__name__, str(error)


# ---- any one operation


def refuse_each(root, victim):
    """Save again and again while one operation of rank `victim` after the other is refused; after each refusal that
    mattered, the same save again. What happened: (operation, error, names below root then, error of the second try)."""
    engine, saver = ck.trained(CONFIG, steps=0), ck.make_saver(root, keep_last=1)
    assert ck.save(saver, engine, CONFIG, 1).error is None
    disk, rank, told = Disk(root, refuse), dist.get_rank(), []
    for at in range(1000):
        step, first = at + 2, len(disk.log)
        disk.at = first + at if rank == victim else None
        failed, again = ck.save(saver, engine, CONFIG, step).error, None
        operation = [disk.log[first + at] if rank == victim and disk.at is None else None]
        disk.at = None
        dist.broadcast_object_list(operation, src=victim)
        if operation[0] is None:
            return told
        names = sorted(path.name for path in root.iterdir())
        dist.barrier()
        if failed is not None:
            again = ck.save(saver, engine, CONFIG, step).error
        told.append((operation[0], failed and str(failed), names, again and str(again)))
    raise AssertionError("no end")


@pytest.fixture(scope="module", params=[0, 1])
def refused(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")
    return request.param, root, run_ranks(2, refuse_each, root, request.param)


def test_whatever_operation_fails_there_is_one_message_and_a_whole_checkpoint(refused):
    victim, root, ranks = refused
    assert ranks[0] == ranks[1]
    operations = [line.split()[0] for line, *_ in ranks[0]]
    if victim == 0:
        assert len(operations) >= 20
        assert set(operations) == {"mkdir", "rename", "write", "fsync", "remove", "rmdir"}
    else:
        assert operations.count("fsync") == 1
    for number, (line, failed, names, _) in enumerate(ranks[0]):
        old, new = (folder_of(root, number + back).name for back in (1, 2))
        if failed is None:  # what torch does once more, and need not; and what deletes an older one
            deletes = ".deleted" in line or re.fullmatch(r"rename step-\d+", line)
            assert line == f"mkdir {new}.partial" or deletes
        else:
            assert failed.startswith(f"checkpoint = {root / new}: "), line
            assert "No space left on device" in failed
        assert old in names or new in names, line
        assert f"{new}.partial" not in names, line


def test_whatever_operation_fails_the_same_save_can_be_made_again(refused):
    _, _, ranks = refused
    assert [(line, again) for line, _, _, again in ranks[0] if again is not None] == []
