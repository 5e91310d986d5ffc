"""What becomes of the data order when weights, lengths and batches change, and when a corpus has no end."""

from __future__ import annotations

import numpy as np
import pytest

from megabus.data.batches import TokenSource
from megabus.data.indexed import DTYPES, HEADER, MAGIC, VERSION, IndexedTokens, IndexedWriter, pair_paths
from megabus.data.order import (
    BLEND_PERIOD,
    FEISTEL_ROUNDS,
    Blend,
    ChunkOrder,
    Deal,
    Deals,
    align_up,
    mix64,
    permute,
    slots,
)
from megabus.splitmix import MASK_64

CHUNK = 16
SIZES = (1700, 530, 260)  # chunks of the corpora: none a power of two
# Weights from a chunk on. Corpora rest, come back, and a change falls within a period.
CHANGES = ((0, (3, 1, 0)), (1000, (0, 1, 1)), (1001, (1, 1, 1)), (2500, (5, 0, 1)), (4100, (3, 1, 0)))


def deals_of(changes):
    return [Deal(start, slots(weights)) for start, weights in changes]


def test_a_blend_that_never_changes_is_dealt_as_ever():
    blend, deals = Blend((3, 1), 5), Deals(deals_of([(0, (3, 1))]), 5)
    assert all(blend.locate(number) == deals.locate(number) for number in range(3 * BLEND_PERIOD))


def test_a_change_of_weights_deals_every_corpus_on():
    """Each corpus is numbered through, in the proportions of the blend that holds."""
    deals, numbers = Deals(deals_of(CHANGES), 5), [[], [], []]
    for number in range(6000):
        k, own = deals.locate(number)
        numbers[k].append(own)
    assert all(own == list(range(len(own))) for own in numbers)
    kept = [deals.locate(number)[0] for number in range(4100, 4100 + BLEND_PERIOD)]
    assert [kept.count(k) for k in range(3)] == [768, 256, 0]
    # Control: dealt as if a blend had been there from the beginning, chunks of before come once more.
    last = Blend((1, 3, 0), 5)
    naive = [deals.locate(number) for number in range(4100)] + [last.locate(number) for number in range(4100, 5000)]
    assert len(set(naive)) < len(naive)


def test_every_epoch_of_a_small_corpus_holds_each_chunk_once():
    """Through changes of odd weights, which fall within its epochs: it is used up many times."""
    changes = ((0, (7, 3)), (37, (1, 0)), (90, (2, 11)), (91, (7, 3)), (1100, (0, 1)), (1500, (5, 1)))
    deals, read = Deals(deals_of(changes), 5), [[], []]
    orders = [ChunkOrder(n * CHUNK + 1, CHUNK, n) for n in (13, 7)]
    for number in range(3000):
        k, own = deals.locate(number)
        read[k].append(orders[k].sample_span(own * CHUNK, CHUNK)[0] // CHUNK)
    for chunks, order in zip(read, orders, strict=True):
        n = order.n_chunks
        epochs = [chunks[first : first + n] for first in range(0, len(chunks) - n, n)]
        assert len(epochs) > 80
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2  # each in an order of its own


def write(prefix, n_tokens, first=0):
    with IndexedWriter(str(prefix), np.int32) as writer:
        writer.append(np.arange(first, first + n_tokens))
    return str(prefix)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Each token is its own number, so samples tell where they are from."""
    folder, starts = tmp_path_factory.mktemp("corpora"), [0, 100_000, 200_000]
    named = zip("abc", SIZES, starts, strict=True)
    prefixes = [(write(folder / name, n * CHUNK + 1, first), 1.0) for name, n, first in named]
    return TokenSource(prefixes, CHUNK, 11, 300_000)


# (steps, seq_len, batch, weights), one phase after the other: each length divides CHUNK.
PHASES = (
    (9, 4, 7, (3, 1, 0)),
    (20, 8, 5, (1, 1, 1)),
    (11, 8, 9, (1, 1, 1)),
    (30, 16, 3, (0, 2, 1)),
    (40, 2, 50, (5, 1, 1)),
    (25, 16, 9, (1, 0, 0)),
)


def walked(source, again=False):
    """Inputs of all samples of the phases, as a run would read them. again: the order forgets what was dealt."""
    position, deals, seen = 0, [], []
    for steps, seq_len, batch, weights in PHASES:
        position, counts = align_up(position, seq_len), slots(weights)
        if not deals or deals[-1].counts != counts:
            position = align_up(position, CHUNK) if deals else 0
            deals.append(Deal(position // CHUNK, counts))
        dealt = source.dealt([Deal(0, counts)] if again else deals)
        for _ in range(steps):
            seen += dealt.batch(position, seq_len, range(batch))[0].tolist()
            position += batch * seq_len
    return seen


def repeated(seen):
    """How many tokens came once more. None of the corpora is read to its end, so none may."""
    tokens = np.concatenate(seen)
    return len(tokens) - len(np.unique(tokens))


def test_no_sample_comes_twice_in_an_epoch(source):
    """Through changes of weights, length and batch at once."""
    seen = walked(source)
    assert sum(map(len, seen)) == sum(steps * seq_len * batch for steps, seq_len, batch, _ in PHASES) > 10_000
    assert repeated(seen) == 0
    assert repeated(walked(source, again=True)) > 100  # control


def test_a_batch_is_the_same_whatever_was_read_before(source):
    """And whichever ranks read which of its rows."""
    deals = deals_of([(0, (3, 1, 0)), (20, (1, 1, 1))])
    whole = source.dealt(deals).batch(640, 8, range(12))[0]
    other = source.dealt(deals)
    other.batch(64, 16, range(5))
    assert all((other.batch(640, 8, [row])[0] == whole[row]).all() for row in (11, 0, 5))


# ---- more than 2^31 samples -------------------------------------------------------------------------------

MANY = 2**33 + 5


def unpermuted(image, n, seed, epoch):
    """The inverse of `permute`: the rounds of its network backwards, and around the same cycle."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half_mask, key = (1 << half_bits) - 1, mix64(mix64(seed & MASK_64) ^ (epoch & MASK_64))
    while True:
        left, right = image >> half_bits, image & half_mask
        for step in reversed(range(FEISTEL_ROUNDS)):
            left, right = right ^ (mix64(key ^ mix64((step << 56) ^ left)) & half_mask), left
        image = left << half_bits | right
        if image < n:
            return image


def test_more_chunks_than_32_bits_count_are_permuted():
    numbers = [*range(300), *range(2**32 - 150, 2**32 + 150), *range(MANY - 300, MANY)]
    images = [permute(number, MANY, 7, 3) for number in numbers]
    assert [unpermuted(image, MANY, 7, 3) for image in images] == numbers
    assert min(images) < 2**31 < 2**32 < max(images)
    order = ChunkOrder(MANY * CHUNK + 1, CHUNK, 7)
    assert order.n_chunks == MANY
    start, stop = order.sample_span((3 * MANY + numbers[-1]) * CHUNK + 8, 4)
    assert (start, stop) == (images[-1] * CHUNK + 8, images[-1] * CHUNK + 13)


def test_a_file_of_more_than_2_to_31_samples_is_read(tmp_path):
    """Of holes, which take no disk, but for the tokens that are looked at."""
    lengths = np.array([2**31 - 1, 2**31 - 1, 50], dtype="<i4")
    ends = np.cumsum(lengths, dtype=np.int64)
    bin_path, idx_path = pair_paths(tmp_path / "large")
    code = next(code for code, kind in DTYPES.items() if kind is np.uint8)
    with idx_path.open("wb") as idx:
        idx.write(HEADER.pack(MAGIC, VERSION, code, 3, 4) + lengths.tobytes())
        idx.write((ends - lengths).astype("<i8").tobytes() + np.arange(4, dtype="<i8").tobytes())
    places = [0, 2**31 - 3, 2**31 + 5, 2**32 - 4, int(ends[-1]) - 2]
    with bin_path.open("wb") as tokens:
        tokens.truncate(int(ends[-1]))
        for number, place in enumerate(places):
            tokens.seek(place)
            tokens.write(bytes([2 * number + 1, 2 * number + 2]))
    file = IndexedTokens(tmp_path / "large")
    assert [file.tokens(place, place + 2).tolist() for place in places] == [[2 * n + 1, 2 * n + 2] for n in range(5)]
    assert file.document_lengths(2**31 - 3, 2**32 + 8) == [2, 2**31 - 1, 10]
    whole = TokenSource([(str(tmp_path / "large"), 1.0)], 1, 3, 300)
    assert whole.orders[0].n_chunks == int(ends[-1]) - 1 > 2**31
    number = next(n for n in range(3 * 10**9, 3 * 10**9 + 100) if whole.sample_span(n, 1)[1] > 2**31)
    k, start, stop = whole.sample_span(number, 1)
    inputs, targets = whole.batch(number, 1, [0])
    assert (k, stop) == (0, start + 2)
    assert [int(inputs), int(targets)] == file.tokens(start, stop).tolist()
