"""Digests of a checkpoint's files: BLAKE3, and SHA-256 in what an older megabus has written."""

from __future__ import annotations

import hashlib
import json

import pytest

import megabus
from megabus.checkpoint import digests
from megabus.checkpoint.digests import Digest, kind_of
from megabus.checkpoint.manifest import DamagedError
from megabus.checkpoint.state import STATE
from tests.support import altered

# Of the empty message, by the standards' own test vectors (BLAKE3's test_vectors.json; FIPS 180-4's examples).
EMPTY = {
    "blake3": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_digest_is_its_kind_s(kind):
    assert Digest(f"{kind}:").text == f"{kind}:{EMPTY[kind]}"
    whole, parts = Digest(kind), Digest(kind)
    whole.update(b"0123456789" * 1000)
    for start in range(0, 10_000, 777):
        parts.update(memoryview(b"0123456789" * 1000)[start : start + 777])
    assert whole.text == parts.text != Digest(kind).text


def in_format_2(folder):
    """As an older megabus wrote it: nothing but the two formats' numbers and the kind of hash was another."""
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(state | {"format": 2}))
    files = [
        {"name": entry["name"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rank": entry["rank"]}
        for entry in altered.read_manifest_tree(folder)["files"]
        for data in [(folder / entry["name"]).read_bytes()]
    ]
    altered.seal(folder, {"format": 2, "files": files})


def test_an_older_checkpoint_is_read(tmp_path):
    new = altered.write_run(tmp_path / "new")
    old = altered.write_run(tmp_path / "old")
    in_format_2(old)
    ours, theirs = megabus.load(new).state_dict(), megabus.load(old).state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(("older", "told"), [(False, "BLAKE3"), (True, "SHA-256")])
def test_damage_is_told_by_the_kind_that_found_it(tmp_path, older, told):
    folder = altered.write_run(tmp_path / "run")
    if older:
        in_format_2(folder)
    victim = min(folder.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{victim.name}: is damaged \(its {told} is not the manifest's\)"):
        megabus.load(folder)


def test_kinds_have_names():
    assert {kind_of(f"{kind}:x") for kind in digests.KINDS} == {"BLAKE3", "SHA-256"}
