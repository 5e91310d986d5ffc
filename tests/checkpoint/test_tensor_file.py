"""The streaming writer's files are what the format's own library reads and would write, hashed and on the disk."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import load_file

from megabus.checkpoint import tensor_file
from megabus.checkpoint.tensor_file import TensorFileWriter
from tests.support.altered import digest_of

VALUES = torch.randn(50, generator=torch.Generator().manual_seed(0))


def test_a_written_file_is_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 5), "b/c": torch.randn(7), "empty": torch.randn(0, 2)}
    with TensorFileWriter(path, {k: tuple(v.shape) for k, v in tensors.items()}, "float32") as file:
        file.write("a", tensors["a"].T.contiguous().T)
        file.write("b/c", tensors["b/c"][:4])  # in parts
        with pytest.raises(ValueError, match="b/c from entry 5 on is not what comes next"):
            file.write("b/c", tensors["b/c"][5:], start=5)
        file.write("b/c", tensors["b/c"][4:], start=4)
    assert file.digest == digest_of(path.read_bytes())
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[key].view(torch.int32).equal(tensors[key].view(torch.int32)) for key in tensors)


@pytest.fixture
def in_small_slices(monkeypatch):
    """So that every thread has more to do than it may put off."""
    monkeypatch.setattr(tensor_file, "SLICE", 7)
    monkeypatch.setattr(tensor_file, "UNSYNCED", 10)


def test_threads_hash_and_sync_what_is_written(tmp_path, monkeypatch, in_small_slices):
    synced, beats, fdatasync = [], [], tensor_file.os.fdatasync
    monkeypatch.setattr(tensor_file.os, "fdatasync", lambda number: synced.append(number) or fdatasync(number))
    with TensorFileWriter(tmp_path / "x", {"a": (50,)}, "bfloat16", heartbeat=lambda: beats.append(0)) as file:
        for start in range(0, 50, 9):
            file.write("a", VALUES[start : start + 9], start)
    assert file.digest == digest_of((tmp_path / "x").read_bytes())
    assert load_file(tmp_path / "x")["a"].equal(VALUES.bfloat16())
    assert synced
    assert len(beats) == 5 * 3 + 2  # 18 bytes five times, and 10


def test_a_file_that_lacks_entries_is_told_of(tmp_path):
    with (
        pytest.raises(ValueError, match="has 36 of its 200 bytes"),
        TensorFileWriter(tmp_path / "x", {"a": (50,)}, "float32") as file,
    ):
        file.write("a", VALUES[:9])


def test_a_disk_that_is_full_when_it_is_synced_is_told_of(tmp_path, monkeypatch, in_small_slices):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.os, "fdatasync", full)
    for entries in (50, 3):  # while there is more to write, and at the end
        with (
            pytest.raises(OSError, match="No space left"),
            TensorFileWriter(tmp_path / "x", {"a": (entries,)}, "float32") as file,
        ):
            file.write("a", VALUES[:entries])


def test_what_went_wrong_while_it_was_written_is_not_hidden(tmp_path):
    with (
        pytest.raises(KeyError, match="nobody"),
        TensorFileWriter(tmp_path / "x", {"a": (50,)}, "float32") as file,
    ):
        file.write("nobody", VALUES)
