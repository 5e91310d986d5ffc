"""A checkpoint's files must be those that a save writes, whatever its manifest says of them: plain files of known names
and known sizes, with the tensors that the state asks for."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

import megabus
from megabus.checkpoint.manifest import MANIFEST, DamagedError, settle, write_manifest
from megabus.checkpoint.restore import find_checkpoint
from megabus.checkpoint.state import STATE
from megabus.checkpoint.store import latest_of, step_of
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from tests.support import altered
from tests.support.altered import LAST, SHARD, add, change_entry, drop, link_outside, pipe, refused, relabelled, rename
from tests.support.command import run_command
from tests.support.sources import MemorySource, model_config

# ---- manifest.json


WRONG_MANIFESTS = {
    "a file outside": rename("../../../outside.safetensors"),
    "an absolute path": rename("/dev/zero"),
    "a folder's file": rename("a/b.safetensors"),
    "this folder": rename("."),
    "no name": rename(""),
    "a NUL": rename("a\0b"),
    "a line": rename("a\nb"),
    "a hidden file": rename(".hidden"),
    "a number for a name": rename(5),
    "a device": change_entry(STATE, name="/dev/zero"),
    "an unlisted state": drop(STATE),
    "an unlisted shard": drop(SHARD),
    "a rank's shards unlisted": drop(*(SHARD.replace("-model-00001", f"-model-0000{n}") for n in (1, 2, 3))),
    "nothing listed": lambda tree: tree.update(files=[]),
    "a file twice": add(SHARD),
    "files out of order": lambda tree: tree["files"].reverse(),
    "no files": lambda tree: tree.pop("files"),
    "files of a wrong type": lambda tree: tree.update(files="none"),
    "files in an object": lambda tree: tree.update(files={}),
    "an entry of a wrong type": lambda tree: tree.update(files=[None]),
    "another key": lambda tree: tree.update(more=1),
    "a format of a wrong type": lambda tree: tree.update(format="2"),
    "true for a format": lambda tree: tree.update(format=True),
    "bytes below zero": change_entry(SHARD, bytes=-1),
    "a broken number of bytes": change_entry(SHARD, bytes=1.5),
    "huge bytes": change_entry(SHARD, bytes=2**63),
    "bytes as a text": change_entry(SHARD, bytes="5"),
    "a short hash": change_entry(SHARD, digest="blake3:ab"),
    "no hash": change_entry(SHARD, digest=...),
    "a hash of no kind": change_entry(SHARD, digest="a" * 64),
    "a hash of an unknown kind": change_entry(SHARD, digest="md5:" + "a" * 64),
    "a hash of two kinds": change_entry(SHARD, sha256="a" * 64),
    "another format's hash": lambda tree: tree.update(format=2),
    "a hash of a wrong type": change_entry(SHARD, digest=None),
    "a hash in capitals": change_entry(SHARD, digest="blake3:" + "A" * 64),
    "another rank": change_entry(SHARD, rank=1),
    "a rank below zero": change_entry(SHARD, rank=-1),
    "a huge rank": change_entry(SHARD, rank=10**12),
    "true for a rank": change_entry(SHARD, rank=False),
    "no rank": change_entry(SHARD, rank=...),
    "an unknown key": change_entry(SHARD, mode=0o644),
}


@pytest.mark.parametrize("change", WRONG_MANIFESTS.values(), ids=WRONG_MANIFESTS)
def test_a_wrong_manifest_is_refused(folder, change):
    tree = altered.read_manifest_tree(folder)
    change(tree)
    altered.seal(folder, tree)
    with pytest.raises(DamagedError) as caught:
        megabus.load(folder)
    # What too few shards lack is told as what the state asks for.
    files = (MANIFEST, STATE) if change in (WRONG_MANIFESTS[which] for which in TOO_FEW) else (MANIFEST,)
    assert str(caught.value).startswith(tuple(f"checkpoint = {folder / file}: is damaged (" for file in files))
    assert "\n" not in str(caught.value)


TOO_FEW = ("an unlisted shard", "a rank's shards unlisted")


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "shard-00003-model-00001-of-00003.safetensors",
        "shard-00000-model-00001-of-00003.safetensors",
        "shard-00001-model-00004-of-00003.safetensors",
        "shard-00001-model-00001-of-00002.safetensors",
        "shard-0000001-model-00001-of-00003.safetensors",
        "mp_rank_00_000.safetensors",
    ],
)
def test_a_file_that_no_save_writes_is_refused(folder, name):
    shutil.copy(folder / SHARD, folder / name)
    tree = altered.read_manifest_tree(folder)
    add(name)(tree)
    altered.seal(folder, tree)
    assert name in refused(folder, MANIFEST)


def test_what_is_not_listed_is_not_read(folder, tmp_path):
    """Neither refused, nor believed."""
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.model").write_bytes(b"of another vocabulary")
    megabus.load(folder)
    for command in (["generate", folder], ["convert", folder, tmp_path / "out", "--to", "hf"]):
        done = run_command(*command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: tokenizer = {folder / 'tokenizer.model'}: is not listed in {MANIFEST}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- files that are no plain files


def link_inside(folder, name):
    (folder / name).rename(folder / "there")
    (folder / name).symlink_to("there")


def link_to_itself(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)


def link_to_zeros(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")


def directory(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()


NO_FILES = [link_outside, link_inside, link_to_itself, link_to_zeros, pipe, directory]


@pytest.mark.parametrize("name", [MANIFEST, STATE, SHARD])
@pytest.mark.parametrize("alter", NO_FILES)
def test_only_regular_files_are_read(folder, alter, name):
    alter(folder, name)
    assert "is a symbolic link" in (text := refused(folder, name)) or "is no regular file" in text


@pytest.mark.parametrize("alter", NO_FILES)
def test_latest_is_read_only_if_it_is_a_regular_file(folder, alter):
    alter(folder.parent, "latest")
    if alter in (pipe, link_to_zeros):
        (found,) = run_ranks(1, step_found, folder.parent)
        assert found == step_of(folder)
        assert (folder.parent / "latest").is_file()
        assert not (folder.parent / "latest").is_symlink()
    else:
        with pytest.raises(DamagedError, match="latest"):
            latest_of(folder.parent)


def step_found(root):
    return find_checkpoint(root, strict=False).state.progress.step


# ---- headers of shards


def reshaped(shape):
    def change(header):
        facts = next(facts for key, facts in header.items() if key != "__metadata__")
        facts["shape"] = shape(facts["shape"])

    return change


def renamed(header):
    key = next(key for key in header if key != "__metadata__")
    header[f"{key}x"] = header.pop(key)


def exchanged(header):
    """Two tensors of the same size have each other's name."""
    names = [key for key in header if key != "__metadata__"]
    one, two = next((a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"])
    header[one], header[two] = header[two], header[one]


def moved(header):
    facts = next(facts for key, facts in header.items() if key != "__metadata__")
    facts["data_offsets"] = [offset + 4 for offset in facts["data_offsets"]]


HEADERS = {
    "I32": relabelled("I32"),
    "U32": relabelled("U32"),
    "BF16": relabelled("BF16"),
    "no dtype": relabelled("F31"),
    "two axes": reshaped(lambda shape: [*shape, 1]),
    "half": reshaped(lambda shape: [shape[0] // 2]),
    "huge": reshaped(lambda shape: [2**62]),
    "negative": reshaped(lambda shape: [-shape[0]]),
    "another name": renamed,
    "other offsets": moved,
    "none": dict.clear,
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("name", [SHARD, LAST])
def test_headers_must_say_what_the_state_says(folder, change, name):
    header, rest = altered.header_of(folder / name)
    change(header)
    altered.put_header(folder / name, header, rest)
    altered.attest(folder, name)
    refused(folder, name)


def test_a_header_is_no_longer_than_its_tensors_take(folder):
    """Parsing it takes time and memory that the sizes of a model do not tell."""
    for more, fits in ((1 << 14, True), (1 << 20, False)):
        header, rest = altered.header_of(folder / SHARD)
        header["__metadata__"]["more"] = "x" * more
        altered.put_header(folder / SHARD, header, rest)
        altered.attest(folder, SHARD)
        if fits:
            megabus.load(folder)
    assert f"(files: {SHARD} has " in refused(folder, MANIFEST)


# ---- entries


def put_entry(path, kind, value):
    """Make the last entry of a file's last tensor this; that tensor's name."""
    tensors = load_file(path)
    key = max(tensors)
    assert key.startswith(f"{kind}/")
    tensors[key][-1] = value
    header, _ = altered.header_of(path)
    save_file(tensors, path, header["__metadata__"])
    return key


@pytest.mark.parametrize(
    ("number", "kind", "value", "said"),
    [
        (1, "weight", float("nan"), "NaN"),
        (1, "weight", float("-inf"), "an infinity"),
        (2, "exp_avg", float("inf"), "an infinity"),
        (3, "exp_avg_sq", float("nan"), "NaN"),
        (3, "exp_avg_sq", float("inf"), "an infinity"),
        (3, "exp_avg_sq", -5.0, "-5, and a mean of squares is 0 or more"),
    ],
)
def test_entries_that_no_save_writes_are_damage(folder, tmp_path, number, kind, value, said):
    name = f"shard-00002-model-0000{number}-of-00003.safetensors"
    key = put_entry(folder / name, kind, 0.0)
    altered.attest(folder, name)
    megabus.load(folder)  # the control
    put_entry(folder / name, kind, value)
    altered.attest(folder, name)
    assert f": is damaged ({key} holds {said}); " in refused(folder, name)
    with pytest.raises(DamagedError, match="holds"), OpenFiles() as files:
        open_source(folder, files)
    (found,) = run_ranks(1, step_found, folder.parent)
    assert found == step_of(folder) - 1
    assert (folder.parent / f"{folder.name}.damaged").is_dir()


@pytest.mark.parametrize("form", ["shards", "hf"])
def test_such_entries_are_told_of_in_other_forms_too(tmp_path, form):
    source, out = MemorySource(model_config("ngpt")), tmp_path / "out"
    convert(source, out, form)
    megabus.load(out)
    (path,) = out.glob("*.safetensors")
    tensors = load_file(path)
    key = next(key for key in sorted(tensors, reverse=True) if not key.startswith("exp_"))
    tensors[key].view(-1)[-1] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    if form == "shards":
        write_manifest(out, [settle(file, 0) for file in sorted(out.iterdir()) if file.name != MANIFEST])
    with pytest.raises(UserError, match=rf"{path.name}: .*holds NaN") as caught:
        megabus.load(out)
    assert key in str(caught.value)


def test_names_that_are_exchanged_are_what_the_file_says(folder):
    """The control: only its own hash knows, and that was made anew."""
    header, rest = altered.header_of(folder / SHARD)
    exchanged(header)
    altered.put_header(folder / SHARD, header, rest)
    refused(folder, SHARD)
    altered.attest(folder, SHARD)
    megabus.load(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff" * 40, b"{" * 10_000, b'{"a": ' * 10_000, b"null"])
def test_what_is_no_header_is_refused(folder, text):
    _, rest = altered.header_of(folder / SHARD)
    altered.put_header(folder / SHARD, text, rest)
    altered.attest(folder, SHARD)
    refused(folder, SHARD)


def test_shards_of_two_ranks_or_kinds_are_not_mixed_up(folder):
    for other in (SHARD.replace("-model-00001", "-model-00002"), SHARD.replace("shard-00001", "shard-00002")):
        good = (folder / SHARD).read_bytes()
        shutil.copyfile(folder / other, folder / SHARD)
        altered.attest(folder, SHARD)
        with pytest.raises(DamagedError, match=r"files: shard-00001|lacks a tensor|holds a tensor|is damaged"):
            megabus.load(folder)
        (folder / SHARD).write_bytes(good)
        altered.attest(folder, SHARD)
    megabus.load(folder)
