"""Token files at URLs: fetched whole into a cache, or not at all. Against a server on this machine."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megabus.data import remote
from megabus.data.batches import TokenSource
from megabus.data.corpus import open_corpus
from megabus.data.indexed import IndexedTokens, IndexedWriter, meta_path
from megabus.data.remote import local_prefix
from megabus.errors import UserError
from tests.support.object_store import object_store

TOKENS = 700


def write(prefix, first=0, sidecar=True):
    with IndexedWriter(str(prefix), np.uint16) as writer:
        writer.append(np.arange(first, first + TOKENS))
    if sidecar:
        meta = {"vocab_size": 2000, "n_tokens": TOKENS, "bin_sha256": writer.sha256}
        meta_path(prefix).write_text(json.dumps(meta))


@pytest.fixture
def store(tmp_path):
    """(its URL, its folder, its handler)."""
    folder = tmp_path / "store"
    folder.mkdir()
    with object_store(folder) as (url, handler):
        yield url, folder, handler


def test_a_pair_is_fetched_once_in_ranges_and_then_read_without_the_server(store, tmp_path, monkeypatch):
    url, folder, handler = store
    write(folder / "web")
    monkeypatch.setattr(remote, "BLOCK", 512)
    beats = []
    prefix = local_prefix(f"{url}/web", tmp_path / "cache", lambda: beats.append(1))
    assert IndexedTokens(prefix).tokens(0, TOKENS).tolist() == list(range(TOKENS))
    assert meta_path(prefix).read_bytes() == meta_path(folder / "web").read_bytes()
    ranges = [span for path, span in handler.asked if path == "/web.bin"]
    assert len(ranges) > 1  # of as many blocks as fsspec reads ahead
    assert len(beats) > 4
    handler.asked.clear()
    (folder / "web.bin").unlink()
    source = TokenSource([(f"{url}/web", 1.0)], 16, 0, 2000, tmp_path / "cache")
    assert source.n_tokens == TOKENS
    assert handler.asked == []
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the folder and its lock


def answered(status):
    """What aiohttp raises for an answer."""
    error = Exception(f"HTTP {status}")
    error.status = status
    return error


def spoil(store, what):
    """The server no longer gives what the sidecar speaks of."""
    _, folder, handler = store
    if what == "cut":
        handler.cut = 1000
    elif what == "changed":
        tokens = bytearray((folder / "web.bin").read_bytes())
        tokens[77] ^= 1
        (folder / "web.bin").write_bytes(tokens)
    elif what == "sidecar":
        meta_path(folder / "web").write_text("{")
    else:
        (folder / "web.bin").unlink()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("cut", r"/web\.bin: cannot be fetched \(.*\); check the network"),
        ("changed", r"/web\.bin: came with SHA-256 .*, its \.meta\.json says .*; put the files there again"),
        ("sidecar", r"web\.meta\.json: is not JSON"),
        ("absent", r"/web\.bin: is not there; check the URL"),
    ],
)
def test_a_broken_fetch_leaves_nothing_and_says_why(store, tmp_path, what, told):
    url, folder, handler = store
    write(folder / "web")
    spoil(store, what)
    with pytest.raises(UserError, match=told) as caught:
        local_prefix(f"{url}/web", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    handler.cut = None
    write(folder / "web")  # once it is whole again, it is fetched
    assert IndexedTokens(local_prefix(f"{url}/web", tmp_path / "cache")).n_tokens == TOKENS


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (None, "is not there; check the URL"),
        (FileNotFoundError("x"), "is not there; check the URL"),
        (answered(404), "is not there; check the URL"),
        (answered(503), r"cannot be fetched \(HTTP 503\); check the network"),
        (ConnectionRefusedError("refused"), r"cannot be fetched \(refused\); check the network"),
    ],
    ids=str,
)
def test_what_no_server_has_said_to_be_absent_may_be_there(cause, told):
    """fsspec raises the same for all of these."""
    with pytest.raises(UserError, match=f"^data = http://a/b: {told}"), remote._blaming("http://a/b"):
        raise FileNotFoundError("http://a/b") from cause


def test_what_a_killed_process_has_left_is_no_corpus(store, tmp_path):
    url, folder, _ = store
    write(folder / "web", sidecar=False)  # as Megatron's own tool makes it
    prefix = Path(local_prefix(f"{url}/web", tmp_path / "cache"))
    prefix.parent.rename(prefix.parent.with_name(prefix.parent.name + remote.NEW))
    (prefix.parent.with_name(prefix.parent.name + remote.NEW) / "web.bin").write_bytes(b"half")
    assert local_prefix(f"{url}/web", tmp_path / "cache") == str(prefix)
    assert IndexedTokens(prefix).n_tokens == TOKENS
    assert not list((tmp_path / "cache").glob("*.new"))


def test_of_several_processes_one_fetches(store, tmp_path, monkeypatch):
    url, folder, handler = store
    write(folder / "web")
    monkeypatch.setattr(remote, "AGAIN", 0.01)
    found = []
    ranks = [
        threading.Thread(target=lambda: found.append(local_prefix(f"{url}/web", tmp_path / "cache"))) for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 4
    assert len({*found}) == 1
    assert len([path for path, _ in handler.asked if path == "/web.bin"]) == 1


def test_other_schemes_and_patterns(tmp_path):
    """`memory://` stands for what lists its names, as s3:// does."""
    write(tmp_path / "a"), write(tmp_path / "b", TOKENS)
    files = fsspec.filesystem("memory")
    for path in sorted(tmp_path.iterdir()):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    corpus = open_corpus(["memory://bucket/*"], tmp_path / "cache")
    assert corpus.tokens(0, 2 * TOKENS).tolist() == list(range(2 * TOKENS))
    with pytest.raises(UserError, match=r"memory://bucket/x\*: matches no \.idx file"):
        open_corpus(["memory://bucket/x*"], tmp_path / "cache")
    with pytest.raises(UserError, match=r"nosuch://bucket/a.*Protocol not known"):
        open_corpus(["nosuch://bucket/a"], tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache = .*file: cannot hold a copy"):
        local_prefix("memory://bucket/a", tmp_path / "file")


def test_the_cache_is_where_the_desktop_rules_say(monkeypatch):
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", "/var/tmp/x")
    assert remote.default_cache() == Path("/var/tmp/x/megabus")
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", "")
    assert remote.default_cache() == Path.home() / ".cache/megabus"
