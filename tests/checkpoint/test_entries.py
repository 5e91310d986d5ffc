"""A shard is hashed and its entries are looked at in one pass: wherever one lies that cannot be, it is found."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from megabus.checkpoint import entries
from megabus.checkpoint.entries import longest_header, odd_by_name, scan
from megabus.checkpoint.manifest import idle
from tests.support.altered import digest_of, header_of, put_header

BLAKE3 = "blake3:"

KINDS = {"weight/a": ("weight", 5), "exp_avg_sq/b": ("exp_avg_sq", 1), "weight/c": ("weight", 11)}
ODD = [(math.nan, "NaN"), (-math.inf, "an infinity"), (-1.0, "-1, and a mean of squares is 0 or more")]


@pytest.fixture(params=[4, 16, 1 << 20], ids=str)
def block(request, monkeypatch):
    monkeypatch.setattr(entries, "BLOCK", request.param)


def written(path, spoil=None, value=0.0):
    tensors = {key: torch.arange(1.0, numel + 1) for key, (_, numel) in KINDS.items()}
    if spoil is not None:
        key, place = spoil
        tensors[key][place] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return digest_of(path.read_bytes())


@pytest.mark.parametrize(("value", "what"), ODD, ids=[what for _, what in ODD])
@pytest.mark.usefixtures("block")
def test_an_odd_entry_is_found_wherever_it_lies(tmp_path, value, what):
    path = tmp_path / "shard"
    for key, (kind, numel) in KINDS.items():
        for place in range(numel):
            digest = written(path, (key, place), value)
            odd = (key, what) if kind == "exp_avg_sq" or value != -1 else None
            assert scan(path, KINDS, idle, digest) == (digest, odd, True)
            assert odd_by_name(path, KINDS) == odd


@pytest.mark.usefixtures("block")
def test_a_good_shard_and_its_hash(tmp_path):
    digest = written(tmp_path / "shard")
    assert scan(tmp_path / "shard", KINDS, idle, digest) == (digest, None, True)


HEADERS = {
    "empty": b"",
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "no tensors": b"{}",
    "no offsets": json.dumps({key: {} for key in KINDS}).encode(),
    "no numbers": json.dumps({key: {"data_offsets": "ab"} for key in KINDS}).encode(),
    "broken numbers": json.dumps({key: {"data_offsets": [0.0, 4.0 * n]} for key, (_, n) in KINDS.items()}).encode(),
    "below zero": json.dumps({key: {"data_offsets": [-4 * n, 0]} for key, (_, n) in KINDS.items()}).encode(),
    "between entries": json.dumps({key: {"data_offsets": [1, 1 + 4 * n]} for key, (_, n) in KINDS.items()}).encode(),
    "too long": json.dumps({key: {"data_offsets": [0, 4 * n + 4]} for key, (_, n) in KINDS.items()}).encode(),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_says_no_places_leaves_the_hash(tmp_path, header):
    """It is compared first; what then reads the header tells what is wrong with it."""
    path = tmp_path / "shard"
    written(path, ("weight/a", 0), math.nan)
    put_header(path, header, header_of(path)[1])
    assert scan(path, KINDS, idle, BLAKE3) == (digest_of(path.read_bytes()), None, False)


def test_a_header_longer_than_any_is_not_read(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes((2**62).to_bytes(8, "little") + b"x" * 99)
    assert scan(path, KINDS, idle, BLAKE3) == (digest_of(path.read_bytes()), None, False)
    written(path)
    header, rest = header_of(path)
    for more, read in ((0, True), (longest_header(len(KINDS)), False)):
        put_header(path, header | {"__metadata__": {"x": " " * more}}, rest)
        assert scan(path, KINDS, idle, BLAKE3).covered == read
