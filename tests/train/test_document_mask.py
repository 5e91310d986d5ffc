"""Runs that keep documents apart: what they validate on, how they grow and go on, and what they refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from megabus.config import resolve_stages
from megabus.data.indexed import IndexedTokens, IndexedWriter
from megabus.data.sources import open_sources
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from megabus.train.corpora import Corpora
from megabus.train.resume import data_order
from tests.support.command import run_command
from tests.support.small_runs import VOCAB, read_tokens, rows_of, run_config, start, stop_after, write_corpus

TOKENS = 112  # 7 sequences of 16: no whole batches of any layout below


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Short documents, of which nearly every sequence has several."""
    folder = write_corpus(tmp_path_factory.mktemp("data"))
    for name in ("train", "valid"):
        write_documents(folder / name, read_tokens(folder / name))
    write_documents(folder / "all", read_tokens(folder / "valid")[: TOKENS + 6])  # a validation reads all of it
    return folder


def write_documents(prefix, tokens):
    cuts = np.random.default_rng(5).choice(len(tokens), len(tokens) // 6, replace=False)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in np.split(tokens, np.sort(cuts)):
            writer.append(document)


def config_of(corpus, run_dir, layout=None, **changes):
    changes = {"data__document_mask": True, "eval__tokens": TOKENS} | changes
    return run_config(corpus, run_dir, [layout or {}] * 3, **changes)


def validation_loss(config, world):
    """On a rank."""
    stages = resolve_stages(config, world)
    engine = Engine(config.train, config.optimizer, stages[0])
    engine.write_initial(config.train.seed)
    return Corpora(open_sources(config, stages)).validation_loss(engine, 16)


def loss_of_documents(config):
    """In one process, each document of each sequence as a sequence of its own."""
    stage, corpus = resolve_stages(config, 1)[0], IndexedTokens(config.data.valid)
    engine = Engine(config.train, config.optimizer, stage)
    engine.write_initial(config.train.seed)
    tokens, total = torch.from_numpy(read_tokens(config.data.valid)).long(), 0.0
    decoder = engine.decoder.eval()
    for start_of_row in range(0, TOKENS, 16):
        first = start_of_row
        for length in corpus.document_lengths(start_of_row, start_of_row + 16):
            part = tokens[None, first : first + length + 1]
            with torch.no_grad():
                total += float(decoder.loss(decoder.hidden(part[:, :-1]), part[:, 1:], torch.sum)[0])
            first += length
    return total / TOKENS


def test_validation_is_of_documents_alone(corpus):
    """Also where a pipeline rank between the first and the last reads their bounds, and rows are padding."""
    short = {"growth__stages": [], "growth__max_tokens": None, "data__valid": str(corpus / "all")}
    (right,) = run_ranks(1, loss_of_documents, config_of(corpus, "unused", **short))
    for layout, world in (({}, 1), ({"pp": 3}, 3)):
        for found in run_ranks(world, validation_loss, config_of(corpus, "unused", layout, **short), world):
            assert found == pytest.approx(right, abs=1e-5)
    (across,) = run_ranks(1, validation_loss, config_of(corpus, "unused", **short, data__document_mask=False), 1)
    assert abs(across - right) > 1e-4  # control


def test_a_run_grows_and_goes_on_to_the_bit(corpus, tmp_path):
    """Through two growths, the second to longer sequences; the loss is measured alike before and after the first."""
    stages = [
        {"d_model": 52, "n_heads": 3, "d_ff": 90, "max_tokens": 256},
        {"n_layers": 5, "seq_len": 32, "micro_batch_size": 2},
    ]
    short = {"train__max_tokens": 1024, "growth__max_tokens": 256, "growth__stages": stages}
    whole = config_of(corpus, tmp_path / "whole", **short)
    (undisturbed,) = start(whole, 1)
    first, _ = rows_of(whole, "growth")
    assert first["loss_after"] == pytest.approx(first["loss_before"], abs=1e-5)
    config = config_of(corpus, tmp_path / "run", **short)
    start(config, 1, stop_after(3))
    (resumed,) = start(config, 1)
    assert [(step.step, step.digest) for step in resumed.steps] == [
        (step.step, step.digest) for step in undisturbed.steps[3:]
    ]
    done = run_command("layers", config.run_dir, "--tokens", "128")
    (loss,) = re.findall(r"whole model (\S+), over 128 tokens", done.stdout)
    assert float(loss) == pytest.approx(rows_of(config, "eval")[-1]["loss"], abs=6e-5)
    strict = config_of(corpus, tmp_path / "run", **short, data__document_mask=False, resume="strict")
    (refused,) = run_ranks(1, _refused, strict)
    assert refused.startswith("data.document_mask = false: was true in ")


def _refused(config):
    from megabus.train.loop import train

    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_with_false_checkpoints_say_what_they_said(corpus):
    config = config_of(corpus, "unused", data__document_mask=False)
    assert "document_mask" not in data_order(open_sources(config, resolve_stages(config, 1)))


@pytest.mark.parametrize("key", ["train", "valid"])
def test_files_that_know_of_no_documents_are_refused(corpus, tmp_path, key):
    with IndexedWriter(tmp_path / "one", np.dtype(np.uint16)) as writer:
        writer.append(np.arange(500) % VOCAB)
    config = config_of(corpus, "unused", **{f"data__{key}": str(tmp_path / "one")})
    with pytest.raises(UserError) as refused:
        open_sources(config, resolve_stages(config, 1))
    told = str(refused.value)
    assert told.startswith(f"data.{key} = {tmp_path / 'one'}: its .idx has 1 document of all 500 tokens")
    assert told.endswith("; run megabus preprocess again, or leave out data.document_mask")
    open_sources(
        config_of(corpus, "unused", **{f"data__{key}": str(tmp_path / "one")}, data__document_mask=False),
        resolve_stages(config, 1),
    )  # control
