"""Reading ahead: a batch is what it would be without, and what nobody asks for does nothing."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megabus.data.batches import TokenSource
from megabus.data.order import Deal
from megabus.data.sources import Sources
from megabus.errors import UserError
from megabus.train import corpora as room
from megabus.train.corpora import Corpora
from tests.support.small_runs import write_tokens

MICRO = 3


def engine(seq_len=8, grad_accum=2, needs_data=True):
    """One rank, as far as batches are concerned."""
    stage = SimpleNamespace(seq_len=seq_len, grad_accum=grad_accum, tokens_per_step=seq_len * grad_accum * MICRO)
    rows = [range(micro * MICRO, (micro + 1) * MICRO) for micro in range(grad_accum)]
    return SimpleNamespace(stage=stage, needs_data=needs_data, device=torch.device("cpu"), micro_rows=rows.__getitem__)


def alone(error, device):
    if error is not None:
        raise error


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """(corpora, their source, where each batch was read)."""
    prefixes = [str(write_tokens(tmp_path / name, np.arange(n) + first)) for name, n, first in
                (("a", 1601, 0), ("b", 801, 2000))]  # fmt: skip
    source = TokenSource([(prefix, 1.0) for prefix in prefixes], 16, 3, 3000)
    monkeypatch.setattr(room, "raise_together", alone)
    true_batch, read = TokenSource.batch, []

    def batch(self, position, seq_len, rows):
        read.append((position, threading.current_thread() is threading.main_thread()))
        return true_batch(self, position, seq_len, rows)

    monkeypatch.setattr(TokenSource, "batch", batch)
    made = Corpora(Sources(source, source, 16))
    yield made, source, read
    made.close()


def test_a_batch_that_was_read_ahead_is_the_one_that_is_asked_for(opened):
    corpora, source, read = opened
    long, deals = engine(16, 1), [Deal(0, (512, 512)), Deal(40, (0, 1024))]
    asked = [(engine(), 0), (engine(), 48), (engine(), 96), (engine(), 48), (long, 144), (long, 192), (engine(), 240)]
    for one, position in asked:
        corpora.train_batches(one, position)
    corpora._ahead[1].result()
    main = [position for position, at_once in read if at_once]
    assert main == [0, 0, 48, 48, 144, 240, 240]  # after a jump, and where the length is another
    corpora.deal(deals)  # the same place, dealt out otherwise: what was read for it holds no more
    for one, position in (*asked, (engine(), 16 * 40), (engine(), 16 * 40 + 48)):
        dealt, ours = source.dealt(deals), corpora.train_batches(one, position)
        for micro, (inputs, targets) in enumerate(ours):
            expected = dealt.batch(position, one.stage.seq_len, one.micro_rows(micro))
            assert (inputs == expected[0]).all()
            assert (targets == expected[1]).all()


def test_bad_tokens_ahead_are_told_when_their_step_comes(opened):
    corpora, source, _ = opened
    highest = {
        position: int(max(x.max() for x in source.batch(position, 8, range(6)))) for position in range(0, 960, 48)
    }
    bad = max(highest, key=highest.get)  # the only step that the vocabulary is too small for
    source.vocab_size = highest[bad]
    assert sorted(highest.values())[-2] < source.vocab_size
    corpora.train_batches(engine(), bad - 48)
    corpora.train_batches(engine(), bad + 96)
    corpora.train_batches(engine(), bad - 48)
    with pytest.raises(UserError, match=r"token \d+ has id \d+, outside"):
        corpora.train_batches(engine(), bad)


def test_a_rank_that_needs_none_reads_none(opened):
    corpora, _, read = opened
    assert corpora.train_batches(engine(needs_data=False), 0) == []
    corpora.close()
    assert read == []
