"""Token files, data order, batches and tokenizers."""

import json
import math
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from megabus.data.batches import TokenSource
from megabus.data.indexed import IndexedTokens, IndexedWriter, dtype_for_vocab, meta_path
from megabus.data.order import BLEND_PERIOD, Blend, ChunkOrder, align_up, nth_visited, permute
from megabus.data.sources import Sources, bits_per_byte
from megabus.data.tokenizer import MODEL_TYPES, Tokenizer, train_tokenizer
from megabus.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.append(document)
    return prefix


def write_counting(prefix, n_tokens, first=0):
    """A corpus whose token at place i is first + i: what is read says where it was read."""
    return str(write(prefix, [np.arange(first, first + n_tokens)], np.int32))


# ---- .bin and .idx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_bytes_are_megatrons(tmp_path, dtype, code, letter):
    write(tmp_path / "c", DOCUMENTS, dtype)
    width = struct.calcsize(letter)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    expected += struct.pack("<3i", 3, 1, 4) + struct.pack("<3q", 0, 3 * width, 4 * width)
    expected += struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "c.idx").read_bytes() == expected
    assert (tmp_path / "c.bin").read_bytes() == struct.pack(f"<8{letter}", *range(5, 13))


def test_round_trip(tmp_path):
    corpus = IndexedTokens(write(tmp_path / "v1.5", DOCUMENTS))  # a dot in the prefix is no suffix
    assert (corpus.n_tokens, corpus.n_documents, corpus.n_sequences) == (8, 3, 3)
    assert corpus.dtype == np.uint16
    assert [corpus.sequence(i).tolist() for i in range(3)] == DOCUMENTS
    assert corpus.tokens(2, 5).tolist() == [7, 8, 9]
    with pytest.raises(IndexError):
        corpus.tokens(0, 9)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens(0, 1)[0] = 1


def test_reads_documents_of_several_sequences(tmp_path):
    (tmp_path / "c.bin").write_bytes(struct.pack("<6H", *range(6)))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    body = struct.pack("<3i", 1, 2, 3) + struct.pack("<3q", 0, 2, 6) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "c.idx").write_bytes(header + body)
    corpus = IndexedTokens(tmp_path / "c")
    assert (corpus.n_sequences, corpus.n_documents) == (3, 2)
    assert corpus.sequence(2).tolist() == [3, 4, 5]


def test_dtype_for_vocab():
    assert dtype_for_vocab(65499) == np.uint16
    assert dtype_for_vocab(65500) == np.int32


def patch(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


DAMAGES = {
    "idx empty": ("idx", lambda path: path.write_bytes(b"")),
    "idx cut in its header": ("idx", lambda path: path.write_bytes(path.read_bytes()[:20])),
    "idx cut after its header": ("idx", lambda path: path.write_bytes(path.read_bytes()[:34])),
    "idx cut in its lengths": ("idx", lambda path: path.write_bytes(path.read_bytes()[:41])),
    "idx lacks one byte": ("idx", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "idx has one byte too many": ("idx", lambda path: path.write_bytes(path.read_bytes() + b"x")),
    "idx has another magic": ("idx", lambda path: patch(path, 0, b"X")),
    "idx has another version": ("idx", lambda path: patch(path, 9, b"\x02")),
    "idx has an unknown dtype": ("idx", lambda path: patch(path, 17, b"\x63")),
    "idx has a wrong pointer": ("idx", lambda path: patch(path, 34 + 12 + 16, b"\x63")),
    "idx has a wrong boundary": ("idx", lambda path: patch(path, 34 + 12 + 24 + 24, b"\x63")),
    "idx is gone": ("idx", lambda path: path.unlink()),
    "bin empty": ("bin", lambda path: path.write_bytes(b"")),
    "bin lacks one byte": ("bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "bin has one token too many": ("bin", lambda path: path.write_bytes(path.read_bytes() + b"xx")),
    "bin is gone": ("bin", lambda path: path.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported(tmp_path, damage):
    suffix, harm = DAMAGES[damage]
    prefix = write(tmp_path / "c", DOCUMENTS)
    IndexedTokens(prefix)  # control: it opens before
    harm(tmp_path / f"c.{suffix}")
    with pytest.raises(UserError) as caught:
        IndexedTokens(prefix)
    assert f"c.{suffix}" in str(caught.value)
    assert "run megabus preprocess again" in caught.value.remedy


def test_size_error_names_both_sizes(tmp_path):
    prefix = write(tmp_path / "c", DOCUMENTS)
    (tmp_path / "c.bin").write_bytes(b"x" * 11)
    with pytest.raises(UserError, match=r"holds 11 bytes where c\.idx says 16"):
        IndexedTokens(prefix)


def test_failed_write_leaves_the_old_pair(tmp_path):
    prefix = write(tmp_path / "c", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail_midway():
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.append([1, 2])
            assert len(list(tmp_path.iterdir())) == 3  # the temporary is there
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(prefix, [[1, 2]])  # control: a write that succeeds does replace it
    assert IndexedTokens(prefix).tokens(0, 2).tolist() == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("token", [-1, 65536])
def test_writer_refuses_ids_that_would_wrap(tmp_path, token):
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "c", [[1, token]])
    assert not list(tmp_path.iterdir())


# ---- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_permute_is_a_permutation(n):
    for epoch in range(3):
        assert sorted(permute(i, n, 7, epoch) for i in range(n)) == list(range(n))


def test_permutations_differ_by_seed_and_epoch_and_look_random():
    n = 2000
    orders = [[permute(i, n, seed, epoch) for i in range(n)] for seed in (1, 2) for epoch in (0, 1)]
    for a in orders:
        # Of random orders: 1 fixed point, 2 neighbours that stay neighbours, correlation 0 +- 0.022.
        assert sum(x == i for i, x in enumerate(a)) < 10
        assert sum(abs(x - y) == 1 for x, y in pairwise(a)) < 20
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.1
        # Two orders share 1 place in the mean.
        assert sum(a is not b and sum(x == y for x, y in zip(a, b, strict=True)) > 10 for b in orders) == 0


def test_permute_at_corpus_scale_and_negative_seeds():
    n = 10**12
    assert len({permute(i, n, -3, 0) for i in range(500)}) == 500
    with pytest.raises(ValueError, match="outside"):
        permute(n, n, 0, 0)


def test_each_epoch_visits_everything_once_in_an_order_of_its_own():
    visits = [nth_visited(number, 10, 3) for number in range(20)]
    assert sorted(visits[:10]) == sorted(visits[10:]) == list(range(10))
    assert visits[:10] != visits[10:]
    assert visits != [nth_visited(number, 10, 4) for number in range(20)]


def inputs_of_epoch(order, seq_len, epoch=0):
    """How often each token of the stream is an input in one epoch."""
    length = order.n_chunks * order.chunk_len
    visits = Counter()
    for position in range(epoch * length, (epoch + 1) * length, seq_len):
        start, stop = order.sample_span(position, seq_len)
        assert stop - start == seq_len + 1
        assert 0 <= start < stop <= order.n_tokens
        visits.update(range(start, stop - 1))
    return visits


@pytest.mark.parametrize("seq_len", [4, 8, 24])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_visits_every_token_once(seq_len, epoch):
    order = ChunkOrder(n_tokens=24 * 30 + 1, chunk_len=24, seed=5)
    visits = inputs_of_epoch(order, seq_len, epoch)
    assert visits == Counter(range(24 * 30))


def test_a_target_past_the_last_chunk_is_never_missing():
    assert ChunkOrder(n_tokens=48, chunk_len=24, seed=0).n_chunks == 1  # the second chunk's last target lacks
    assert ChunkOrder(n_tokens=49, chunk_len=24, seed=0).n_chunks == 2


def test_span_refuses_wrong_lengths_and_positions():
    order = ChunkOrder(n_tokens=1000, chunk_len=24, seed=0)
    with pytest.raises(UserError, match="does not divide 24"):
        order.sample_span(0, 7)
    with pytest.raises(ValueError, match="align_up"):
        order.sample_span(4, 8)


def test_align_up():
    assert [align_up(position, 8) for position in (0, 1, 8, 9)] == [0, 8, 8, 16]


# ---- blends -----------------------------------------------------------------------------------------------


def test_blend_is_exact_in_every_period_and_numbers_each_corpus_through():
    blend = Blend([0.7, 0.2, 0.1], seed=3)
    numbers = [[], [], []]
    for period in range(3):
        slots = range(period * BLEND_PERIOD, (period + 1) * BLEND_PERIOD)
        for k, number in map(blend.locate, slots):
            numbers[k].append(number)
        assert [len(own) for own in numbers] == [(period + 1) * count for count in (717, 205, 102)]
    for own in numbers:
        assert own == list(range(len(own)))


def test_blend_spreads_its_corpora():
    blend = Blend([1, 1], seed=3)
    first = [blend.locate(i)[0] for i in range(BLEND_PERIOD)]
    assert 200 < sum(first[:512]) < 312  # control: dealt but not shuffled, this is 0
    other = Blend([1, 1], seed=4)
    assert first != [other.locate(i)[0] for i in range(BLEND_PERIOD)]


@pytest.mark.parametrize("weights", [[1, -1], [1, float("nan")], [1, 1e-6]])
def test_blend_refuses_weights(weights):
    with pytest.raises(UserError, match="data weight 1"):
        Blend(weights, seed=0)


def test_a_weight_of_0_gives_nothing_and_not_all_may_be_0():
    assert {Blend([0, 1, 0], seed=3).locate(number)[0] for number in range(BLEND_PERIOD)} == {1}
    with pytest.raises(UserError, match="sum to nothing"):
        Blend([0, 0], seed=0)


def test_only_the_ratio_of_weights_counts():
    """Also where their sum is an infinity."""
    assert Blend([1e308, 1e308, 1e308 / 2], seed=0).counts == Blend([2, 2, 1], seed=0).counts


# ---- batches ----------------------------------------------------------------------------------------------


def source(tmp_path, seed=11, vocab_size=10_000, chunk_len=64):
    tmp_path.mkdir(exist_ok=True)
    a = write_counting(tmp_path / "a", 1500)
    b = write_counting(tmp_path / "b", 700, first=5000)
    return TokenSource([(a, 3.0), (b, 1.0)], chunk_len, seed, vocab_size)


def test_batch_shapes_and_shift(tmp_path):
    tokens = source(tmp_path)
    inputs, targets = tokens.batch(128, 32, range(4))
    assert inputs.shape == targets.shape == (4, 32)
    assert inputs.dtype == targets.dtype == torch.int64
    assert (targets == inputs + 1).all()  # in a counting corpus the next token is the next number
    assert tokens.n_tokens == 2200


@pytest.mark.parametrize("seq_len", [8, 16, 32])
def test_the_stream_does_not_depend_on_seq_len(tmp_path, seq_len):
    tokens = source(tmp_path)
    total = 64 * 64  # several epochs of both corpora
    long = tokens.batch(0, 64, range(64))[0].flatten()
    assert (tokens.batch(0, seq_len, range(total // seq_len))[0].flatten() == long).all()
    assert (source(tmp_path, seed=12).batch(0, 64, range(64))[0].flatten() != long).any()  # control


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_stream_does_not_depend_on_dp_or_micro_batch(tmp_path, dp, micro_batch):
    tokens = source(tmp_path)
    whole = tokens.batch(640, 32, range(16))[0]
    for step in range(16 // (dp * micro_batch)):
        for rank in range(dp):
            first = (step * dp + rank) * micro_batch
            part = tokens.batch(640, 32, range(first, first + micro_batch))[0]
            assert (part == whole[first : first + micro_batch]).all()
    assert (tokens.batch(672, 32, range(16))[0] != whole).any()  # control: another position


def test_resume_and_growing_sequences_read_on_where_the_run_stopped(tmp_path):
    whole = source(tmp_path).batch(0, 64, range(32))[0].flatten()
    read = [source(tmp_path).batch(0, 16, range(7))[0].flatten()]  # 112 tokens, not a multiple of 64
    position = align_up(112, 32)
    read.append(source(tmp_path).batch(position, 32, range(8))[0].flatten())
    assert (read[0] == whole[:112]).all()
    assert (read[1] == whole[position : position + 256]).all()


def test_epochs_differ_but_hold_the_same_tokens(tmp_path):
    tokens = TokenSource([(write_counting(tmp_path / "a", 32 * 50 + 1), 1.0)], 32, 0, 5000)
    first, second = (tokens.batch(epoch * 1600, 32, range(50))[0].flatten() for epoch in (0, 1))
    assert (first != second).any()
    assert (first.sort().values == second.sort().values).all()


def test_too_short_a_corpus(tmp_path):
    prefix = write_counting(tmp_path / "a", 64)
    with pytest.raises(UserError, match="has 64 tokens, one sample takes 65"):
        TokenSource([(prefix, 1.0)], 64, 0, 5000)
    TokenSource([(prefix, 1.0)], 63, 0, 5000)  # control


@pytest.mark.parametrize("first", [-1, 4937])
def test_ids_outside_the_vocabulary(tmp_path, first):
    tokens = TokenSource([(write_counting(tmp_path / "a", 65, first), 1.0)], 64, 0, 5000)
    with pytest.raises(UserError, match=rf"has id {-1 if first < 0 else 5000}, outside \[0, 5000\)"):
        tokens.batch(0, 64, range(1))


def write_meta(prefix, **changes):
    meta = {"vocab_size": 5000, "tokenizer_sha256": "ab", "n_tokens": 100} | changes
    meta_path(prefix).write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": 5001}, "vocab_size 5001, the model has 5000"),
        ({"n_tokens": 99}, "99 tokens, its .idx"),
    ],
)
def test_sidecar_is_believed(tmp_path, changes, problem):
    prefix = write_counting(tmp_path / "a", 100)
    write_meta(prefix)
    TokenSource([(prefix, 1.0)], 32, 0, 5000)  # control
    write_meta(prefix, vocab_size=4999)  # of a model whose vocabulary is padded
    TokenSource([(prefix, 1.0)], 32, 0, 5000)
    write_meta(prefix, **changes)
    with pytest.raises(UserError, match=problem):
        TokenSource([(prefix, 1.0)], 32, 0, 5000)


def test_damaged_sidecar(tmp_path):
    prefix = write_counting(tmp_path / "a", 100)
    for content, problem in (("{", "not JSON"), ("{}", "lacks n_tokens")):
        meta_path(prefix).write_text(content)
        with pytest.raises(UserError, match=problem):
            TokenSource([(prefix, 1.0)], 32, 0, 5000)


def test_corpora_of_different_tokenizers_do_not_blend(tmp_path):
    prefixes = [write_counting(tmp_path / name, 100) for name in "ab"]
    for prefix, sha256 in zip(prefixes, ("ab", "cd"), strict=True):
        write_meta(prefix, tokenizer_sha256=sha256)
    with pytest.raises(UserError, match="the same tokenizer"):
        TokenSource([(prefix, 1.0) for prefix in prefixes], 32, 0, 5000)


# ---- tokenizers -------------------------------------------------------------------------------------------

TEXT = """To be, or not to be,
  that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,

And by opposing end them? To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
"""
HARD = "  Zürich\n\n\t漢字 🙂 e\u0301 ﬁ\u00a0</s>\r\nno end  \n"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokenizer_loses_nothing(tmp_path, model_type):
    tokenizer = Tokenizer(train_tokenizer([TEXT], 300, tmp_path / "t", model_type))
    assert tokenizer.vocab_size == 300
    for text in (TEXT, HARD, "\n", " ", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids  # a document cannot end itself
    if model_type == "byte-bpe":
        return
    assert len(tokenizer.encode("\n\n")) == 2
    lossy = Tokenizer(train_tokenizer([TEXT], 300, tmp_path / "n", model_type, "nmt_nfkc"))
    assert lossy.decode(lossy.encode(HARD)) != HARD  # control: normalisation does lose something
    assert lossy.decode(lossy.encode("a\nb")) == "a\nb"  # which nmt_nfkc would make a space


@pytest.mark.parametrize(("model_type", "ending"), [("byte-bpe", "json"), ("unigram", "model")])
def test_tokenizer_training_is_deterministic_and_atomic(tmp_path, model_type, ending):
    first, second = (train_tokenizer([TEXT], 300, tmp_path / name, model_type) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    other = train_tokenizer([TEXT], 299, tmp_path / "c", model_type)
    assert Tokenizer(first).sha256 != Tokenizer(other).sha256  # control
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.{ending}" for name in "abc"]


def test_tokenizer_errors(tmp_path):
    with pytest.raises(
        UserError, match="5000: is more than the 396 pieces that this text gives; set it to 396 or give"
    ):
        train_tokenizer([TEXT], 5000, tmp_path / "t")
    with pytest.raises(UserError, match="256: is less than 257, for 256 bytes and the end of a text"):
        train_tokenizer([TEXT], 256, tmp_path / "t")
    with pytest.raises(UserError, match="--normalization = nfkc: is SentencePiece's"):
        train_tokenizer([TEXT], 300, tmp_path / "t", normalization="nfkc")
    with pytest.raises(UserError, match="Vocabulary size too high"):
        train_tokenizer([TEXT], 5000, tmp_path / "t", "unigram")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "\n"], 300, tmp_path / "t", "unigram")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is no tokenizer that is known"):
        Tokenizer(tmp_path / "t.model")


# ---- bits per byte ----------------------------------------------------------------------------------------


def test_bits_per_byte_are_of_the_whole_validation_text(tmp_path):
    """64 tokens made of 256 bytes at 2 ln 2 nats a token are half a bit a byte; unknown where a sidecar is silent."""
    valid = write_counting(tmp_path / "v", 64)

    def sources():
        source = TokenSource([(valid, 1.0)], 16, 0, 5000)
        return Sources(source, source, 16)

    assert bits_per_byte(sources().valid, 2 * math.log(2)) is None
    meta = {"vocab_size": 5000, "n_tokens": 64}
    meta_path(valid).write_text(json.dumps(meta))
    assert bits_per_byte(sources().valid, 2 * math.log(2)) is None  # made before bytes were counted
    meta_path(valid).write_text(json.dumps(meta | {"n_bytes": 256}))
    assert bits_per_byte(sources().valid, 2 * math.log(2)) == pytest.approx(0.5, rel=1e-12)
    meta_path(valid).write_text(json.dumps(meta | {"n_bytes": 0}))
    with pytest.raises(UserError, match="speaks of 0 bytes of text"):
        sources()
