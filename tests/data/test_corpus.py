"""Corpora of many files are one stream."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megabus.config import resolve_stages
from megabus.data.batches import TokenSource
from megabus.data.corpus import Corpus, open_corpus
from megabus.data.indexed import IndexedWriter, meta_path
from megabus.data.sources import open_sources
from megabus.errors import UserError
from megabus.train.resume import data_order
from tests.support.small_runs import run_config

DOCUMENTS = ([3, 1, 8], [5, 5, 13], [1], [40, 2])  # lengths of each file's documents


def write(prefix, lengths, first, dtype=np.uint16):
    with IndexedWriter(str(prefix), dtype) as writer:
        for length in lengths:
            writer.append(np.arange(first, first + length))
            first += length
    return str(prefix)


@pytest.fixture
def files(tmp_path):
    """Four files, of two types of token; and one that holds the same."""
    first, prefixes = 0, []
    for number, lengths in enumerate(DOCUMENTS):
        prefixes.append(write(tmp_path / f"part-{number}", lengths, first, np.uint16 if number % 2 else np.int32))
        first += sum(lengths)
    return prefixes, write(tmp_path / "whole", [n for lengths in DOCUMENTS for n in lengths], 0)


def test_many_files_are_read_as_one(files):
    prefixes, whole = files
    many, one = Corpus(prefixes), Corpus([whole])
    assert (many.n_tokens, many.n_documents) == (one.n_tokens, one.n_documents) == (78, 9)
    for start in range(0, 78, 3):
        for stop in range(start + 1, 79):
            assert many.tokens(start, stop).tolist() == list(range(start, stop))
            assert many.document_lengths(start, stop) == one.document_lengths(start, stop)
    assert many.place_of(12) == (prefixes[1], 0)
    assert many.place_of(35) == (prefixes[2], 0)
    with pytest.raises(IndexError):
        many.tokens(70, 79)


def test_samples_of_many_files_are_those_of_one(files):
    prefixes, whole = files
    many, one = (TokenSource([(each, 1.0)], 4, 3, 200) for each in (prefixes, whole))
    for position in range(0, 400, 12):
        ours, theirs = many.batch(position, 4, range(3)), one.batch(position, 4, range(3))
        assert all((x == y).all() for x, y in zip(ours, theirs, strict=True))


def test_a_pattern_stands_for_prefixes_in_the_order_of_their_names(files, tmp_path):
    prefixes, _ = files
    assert open_corpus([f"{tmp_path}/part-*"]).prefixes == prefixes
    assert open_corpus([f"{tmp_path}/part-[13]", prefixes[0]]).prefixes == [prefixes[1], prefixes[3], prefixes[0]]
    odd = write(tmp_path / "odd[1]", [5], 0)  # a file's own name
    assert open_corpus([odd]).prefixes == [odd]
    with pytest.raises(UserError, match=r"none-\*: matches no .idx file"):
        open_corpus([f"{tmp_path}/none-*"])
    with pytest.raises(UserError, match="part-2: comes twice"):
        open_corpus([f"{tmp_path}/part-*", prefixes[2]])


def test_what_is_wrong_with_one_file_names_it(files, tmp_path):
    prefixes, _ = files
    told = rf"{prefixes[3]}: token 0 has id 36, outside \[0, 36\)"
    with pytest.raises(UserError, match=told):
        TokenSource([(prefixes, 1.0)], 35, 3, 36).batch(35, 35, [0, 1])  # two chunks, the second from token 35 on
    meta_path(prefixes[1]).write_text(json.dumps({"vocab_size": 200, "n_tokens": 22}))
    with pytest.raises(UserError, match=rf"{prefixes[1]}: its .meta.json speaks of 22 tokens, its .idx of 23"):
        TokenSource([(prefixes, 1.0)], 4, 3, 200)
    with pytest.raises(UserError, match="has 78 tokens, one sample takes 79"):
        TokenSource([([prefixes[0], *prefixes[1:]], 1.0)], 78, 3, 200)


def test_a_run_knows_its_files_again(files, tmp_path):
    """By their sizes: other files are other data, be they as large in all."""
    prefixes, whole = files
    for number in (0, 1):
        write(tmp_path / f"held-{number}", DOCUMENTS[number], 0)

    def order(train, **changes):
        config = run_config(
            tmp_path,
            tmp_path / "run",
            [{}] * 3,
            growth={},
            train__seq_len=4,
            eval__tokens=8,
            model__vocab_size=200,
            data={"train": train, "valid": f"{tmp_path}/held-[01]"},
            **changes,
        )
        return data_order(open_sources(config, resolve_stages(config, 1)))

    one, many = order(whole), order([{"path": f"{tmp_path}/part-*"}])
    assert "files" not in one["train"]
    assert many["train"]["files"] == [[12, 23, 1, 42]]
    assert many["valid"]["files"] == [[12, 23]]
    assert order([{"path": prefixes[::-1]}])["train"]["files"] == [[42, 1, 23, 12]]
    assert order([{"path": prefixes}]) == many
    blend, rare = [{"path": prefixes}, {"path": whole}], {"share": 0.5, "weights": [1, 1e-6]}
    with pytest.raises(
        UserError, match=r"train\.phases\.0\.weights = 1e-06: less than one in 1024 of the weights' sum"
    ):
        order(blend, train__phases=[rare])
    with pytest.raises(UserError, match=r"^data\.train = .*-\?: matches .*/held-0, which data\.valid measures on; "):
        order([{"path": f"{tmp_path}/*-?"}])
    order([{"path": [*prefixes, f"{tmp_path}/held-0"]}])  # named in full
