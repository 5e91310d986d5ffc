"""Ranks set a checkpoint aside whose hashes are right and whose contents are not, as one with a flipped bit."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch.distributed as dist

import megabus
from megabus.checkpoint.contents import look
from megabus.checkpoint.manifest import MANIFEST, DamagedError
from megabus.checkpoint.restore import find_checkpoint
from megabus.checkpoint.state import STATE, read_state
from megabus.checkpoint.store import complete
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.data.tokenizer import Tokenizer
from megabus.testing.ranks import run_ranks
from tests.support import altered
from tests.support import checkpoints as ck
from tests.support.altered import LAST, SHARD, change_entry, drop, link_outside, pipe, relabelled, rename, set_value
from tests.support.small_tokenizer import make_tokenizer


def texts_of(folder):
    """One of each kind, as what is done to a checkpoint."""
    state, manifest = json.loads((folder / STATE).read_text()), altered.read_manifest_tree(folder)

    def value(key, value):
        return lambda: set_value(folder, key, value)

    def sealed(change):
        def alter():
            tree = json.loads(json.dumps(manifest))
            change(tree)
            altered.seal(folder, tree)

        return alter

    def header():
        found, rest = altered.header_of(folder / LAST)
        relabelled("I32")(found)
        altered.put_header(folder / LAST, found, rest)
        altered.attest(folder, LAST)

    assert state["stage"] == 1
    return {
        "negative stage": value("stage", -1),
        "negative tokens": value("progress.tokens", -1),
        "growths none": value("progress.growths", "none"),
        "wide": value("model.d_model", 10**9),
        "deep": value("model.n_layers", 10**8),
        "position": value("progress.position", 2**40),
        "optimizer step": value("optimizer_step", 5),
        "no configuration": value("config", {}),
        "many ranks": value("layout.dp", 10**9),
        "NaN": value("progress.flops", math.nan),
        "nested": lambda: altered.put_state(folder, b'{"format": 2, "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "outside": sealed(rename("../../../outside.safetensors")),
        "unlisted state": sealed(drop(STATE)),
        "device": sealed(change_entry(STATE, name="/dev/zero")),
        "pipe": lambda: pipe(folder, SHARD),
        "pipe for a manifest": lambda: pipe(folder, MANIFEST),
        "link": lambda: link_outside(folder, LAST),
        "relabelled": header,
        "behind itself": lambda: (shutil.rmtree(folder), folder.symlink_to(folder)),
        "junk tokenizer": lambda: altered.put_file(folder, "tokenizer.model", b"junk"),
    }


def find_each(root, names):
    told, folder = [], complete(root)[0]
    for name in names:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(root, root.parent / "good")
            texts_of(folder)[name]()
        dist.barrier()
        error, stderr, found = ck.outcome(find_checkpoint, root, False)
        told.append((error, stderr, found and found.state.progress.step, sorted(path.name for path in root.iterdir())))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(root)
            (root.parent / "good").rename(root)
            (root.parents[1] / "outside").unlink(missing_ok=True)
    return told


def test_ranks_set_them_aside_and_take_the_one_before(folder, capfd):
    names = list(texts_of(folder))
    first, second = run_ranks(2, find_each, folder.parent, names)
    older, newer = (f"step-{step:08d}" for step in altered.STEPS)
    for name, (error, stderr, step, there), other in zip(names, first, second, strict=True):
        assert (error, step) == (None, altered.STEPS[0]), name
        assert there == ["latest", older, f"{newer}.damaged"], name
        lines = stderr.splitlines()
        assert lines[-1] == f"warning: {folder} is set aside as {newer}.damaged; {older} is used instead", name
        assert any(line.startswith(f"warning: checkpoint = {folder}/") for line in lines[:-1]), (name, lines)
        assert all(line.startswith("warning: ") for line in lines), (name, lines)
        assert other == (None, "", step, there), name
    assert "Traceback" not in capfd.readouterr().err


# ---- the tokenizer that was saved with the weights


JUNK = {
    "text": ("tokenizer.model", b"junk", "is damaged (it is no tokenizer that is known)"),
    "nothing": ("tokenizer.model", b"", "is damaged (it is no tokenizer that is known)"),
    "ranks": ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is damaged (it is damaged: the byte 0 is none of its tokens)"),
    "no JSON": ("tokenizer.json", b"{", "is damaged (it "),
    "no model": ("tokenizer.json", b"{}", "is damaged (it is JSON, and no tokenizer.json: it has no model)"),
    "no vocabulary": ("tokenizer.json", b'{"model": {"type": "BPE"}}', "is damaged (it cannot be read by the library"),
}


@pytest.mark.parametrize(("name", "raw", "told"), JUNK.values(), ids=JUNK)
def test_a_tokenizer_that_is_none_is_found_when_a_checkpoint_is_opened(folder, tmp_path, name, raw, told):
    good = {path: path.read_bytes() for path in folder.iterdir()}
    altered.put_file(folder, name, raw)
    assert told in altered.refused(folder, name)
    with pytest.raises(DamagedError, match=f"checkpoint = {folder / name}: is damaged"), OpenFiles() as files:
        convert(open_source(folder, files), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    for path, data in good.items():
        path.write_bytes(data)
    (folder / name).unlink()
    with OpenFiles() as files:
        convert(open_source(folder, files), tmp_path / "shards", "shards")
    altered.put_file(tmp_path / "shards", name, raw)
    with pytest.raises(DamagedError, match=f"checkpoint = .*{name}: is damaged"), OpenFiles() as files:
        open_source(tmp_path / "shards", files)


def test_a_tokenizer_is_the_one_of_the_runs_data(folder, tmp_path):
    path = make_tokenizer(tmp_path)
    altered.put_file(folder, "tokenizer.model", path.read_bytes())
    for place in ("train", "valid"):
        altered.set_value(folder, f"data.{place}.tokenizers", [Tokenizer(path).sha256])
        megabus.load(folder)
    for place in ("train", "valid"):
        altered.set_value(folder, f"data.{place}.tokenizers", ["0" * 64])
    told = "is damaged (it is not the one that the data in state.json was made with)"
    assert told in altered.refused(folder, "tokenizer.model")


def test_what_goes_with_a_tokenizer_is_not_there_without_one(folder):
    altered.put_file(folder, "tokenizer_config.json", b"{}")
    assert "(files: tokenizer_config.json is listed, and no tokenizer that" in altered.refused(folder, MANIFEST)


# ---- what may be read by others


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_umasks_mode(tmp_path, umask, mode):
    run_ranks(2, save_with, umask, tmp_path / "checkpoints")
    (folder,) = complete(tmp_path / "checkpoints")
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*folder.iterdir(), folder.parent / "latest"]}
    assert len(modes) == 9
    assert set(modes.values()) == {mode}


def save_with(umask, root):
    os.umask(umask)
    ck.saved_steps(root, ck.run_config({"tp": 2}), 1)


def test_a_state_is_as_it_was_written(folder):
    """The control of them all."""
    found = look(folder)
    assert found.state == read_state(folder)
    assert len(found.entries) == 7
