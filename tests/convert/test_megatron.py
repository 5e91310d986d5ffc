"""Token files in the real megatron-core: it reads ours, we read its."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megabus.data.batches import TokenSource
from megabus.data.indexed import IndexedTokens, IndexedWriter


@pytest.fixture(scope="module")
def indexed_dataset():
    """Imported by the one worker that runs these tests: it takes seconds."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture
def documents():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 60_000, draw.integers(1, 50)) for _ in range(37)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours(tmp_path, documents, dtype, indexed_dataset):
    with IndexedWriter(str(tmp_path / "ours"), np.dtype(dtype)) as writer:
        for document in documents:
            writer.append(document)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(documents)
    assert all((theirs[i] == document).all() for i, document in enumerate(documents))
    assert theirs.document_indices.tolist() == list(range(38))
    assert theirs.sequence_lengths.tolist() == [len(document) for document in documents]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(tmp_path, documents, dtype, indexed_dataset):
    """Documents of several sequences, too."""
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        cut = len(document) // 2
        builder.add_document(torch.from_numpy(document), [cut, len(document) - cut] if cut else [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedTokens(tmp_path / "theirs")
    stream = np.concatenate(documents)
    assert (ours.tokens(0, ours.n_tokens) == stream).all()
    assert ours.n_documents == len(documents)
    source = TokenSource([(str(tmp_path / "theirs"), 1.0)], 8, 0, 60_000)
    inputs, targets = source.batch(0, 8, range(4))
    assert inputs[:, 1:].equal(targets[:, :-1])
    assert all("".join(f"{t}," for t in row) in "".join(f"{t}," for t in stream) for row in inputs.tolist())
