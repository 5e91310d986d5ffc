"""Which documents a sample is packed of: by the index, beside what the tokens themselves say."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest

from megabus.data.batches import TokenSource
from megabus.data.indexed import HEADER, IndexedTokens, IndexedWriter, meta_path, pair_paths
from megabus.errors import UserError

CHUNK = 24


def write(prefix, lengths):
    """Documents whose tokens all are their number."""
    with IndexedWriter(prefix, np.dtype(np.int32)) as writer:
        for number, length in enumerate(lengths):
            writer.append([number] * length)
    return str(prefix)


def lengths_between(seed, count):
    """Of documents of which some are empty, the first and the last too, and some longer than a sample."""
    draw = np.random.default_rng(seed)
    return [0, *draw.choice([0, 1, 2, 7, 11, 40], count).tolist(), 5, 0, 0]


def runs_of(tokens):
    """Lengths of the runs of one number."""
    cuts = np.flatnonzero(np.diff(tokens)) + 1
    return np.diff([0, *cuts, len(tokens)]).tolist()


def test_lengths_are_those_of_the_tokens(tmp_path):
    corpus = IndexedTokens(write(tmp_path / "a", lengths_between(0, 60)))
    for start in range(0, corpus.n_tokens, 3):
        for stop in (start + 1, start + 8, start + 90, corpus.n_tokens):
            if stop <= corpus.n_tokens:
                found = corpus.document_lengths(start, stop)
                assert found == runs_of(corpus.tokens(start, stop))


def test_a_document_of_several_sequences_is_one(tmp_path):
    """As Megatron-LM writes texts that were split in sentences."""
    prefix = write(tmp_path / "a", [3, 4, 0, 5, 2])
    path = pair_paths(prefix)[1]
    raw = path.read_bytes()
    header = HEADER.unpack(raw[: HEADER.size])
    documents = np.array([0, 2, 2, 4, 5], dtype="<i8")
    body = raw[HEADER.size : HEADER.size + 12 * 5]
    path.write_bytes(HEADER.pack(*header[:-1], len(documents)) + body + documents.tobytes())
    assert IndexedTokens(prefix).document_lengths(0, 14) == [7, 5, 2]
    assert IndexedTokens(prefix).document_lengths(5, 13) == [2, 5, 1]


@pytest.mark.parametrize("seq_len", [8, CHUNK])
def test_a_blend_gives_the_documents_of_its_rows(tmp_path, seq_len):
    """Over several epochs of two corpora; documents that begin in one row and go on in the next are cut."""
    prefixes = [(write(tmp_path / "a", lengths_between(1, 40)), 3.0), (write(tmp_path / "b", [9, 9, 30, 2]), 1.0)]
    tokens = TokenSource(prefixes, CHUNK, 5, 100)
    for consumed in range(0, 40 * CHUNK, 4 * seq_len):
        rows = [0, 2, 3]
        inputs, _ = tokens.batch(consumed, seq_len, rows)
        assert tokens.document_lengths(consumed, seq_len, rows) == [*chain.from_iterable(map(runs_of, inputs.numpy()))]
    assert tokens.document_lengths(0, seq_len, []) == []


def test_the_index_is_not_read_through(tmp_path, monkeypatch):
    """Not even where it has millions of documents: a sample costs a look-up of logarithmic length."""
    corpus, looked_up = IndexedTokens(write(tmp_path / "a", [1] * 5000)), []
    true_start = IndexedTokens._document_start
    monkeypatch.setattr(IndexedTokens, "_document_start", lambda self, n: looked_up.append(n) or true_start(self, n))
    assert corpus.document_lengths(2500, 2510) == [1] * 10
    assert len(looked_up) < 50


def check(prefix):
    TokenSource([(prefix, 1.0)], CHUNK, 0, 100).check_documents()


def test_an_index_that_keeps_nothing_apart_is_refused(tmp_path):
    check(write(tmp_path / "two", [30, 30]))
    with pytest.raises(UserError) as refused:
        check(write(tmp_path / "one", [60]))
    told = "its .idx has 1 document of all 60 tokens: nothing is kept apart; run megabus preprocess again, or leave"
    assert told in str(refused.value)


def test_an_index_of_other_documents_than_the_sidecar_counts_is_refused(tmp_path):
    prefix = write(tmp_path / "two", [30, 30])
    meta = {"vocab_size": 100, "tokenizer_sha256": "x", "n_tokens": 60}
    meta_path(prefix).write_text(json.dumps(meta))
    check(prefix)
    meta_path(prefix).write_text(json.dumps(meta | {"n_documents": 2}))
    check(prefix)
    meta_path(prefix).write_text(json.dumps(meta | {"n_documents": 3}))
    with pytest.raises(UserError, match=r"its \.meta\.json speaks of 3 documents, its \.idx of 2; run megabus pre"):
        check(prefix)
