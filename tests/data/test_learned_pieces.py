"""Pieces learnt from text, beside a slow reference of byte-pair encoding: of its training, and of its merges."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import regex
import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from megabus.data import preprocess
from megabus.data.tokenizer import Tokenizer, learn, spellings, train_tokenizer
from megabus.data.tokenizer.byte_bpe import byte_pieces
from megabus.data.tokenizer.extend import extend_tokenizer, with_vocab
from megabus.data.tokenizer.fast import Fast
from megabus.data.tokenizer.learn import Lesson
from megabus.data.tokenizer.odd_text import odd_lines
from megabus.data.tokenizer.tiktoken import ENCODINGS, Encoding
from tests.support.command import run_command

OLD = "the quick brown fox jumps over the lazy dog, and sixty wizards' quills make black jam. 3 of 12, 1\n"
NEW = [
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; Victor jagt zwölf Boxkämpfer.\n",
    "日本語の文章、日本語の言葉。日本 と 日本語語語。  Die Straßen, die Straße,\n\tdie 123 Straßen: aaaa aaaaa!\n",
    "the quick brown 1234 1234 and <|user|> zwölf <|user|> Straßen, naïve, naïve,\r\n",
]
LEARNT, MORE = 60, 10_000


def byte_level(folder, pattern=None, **options):
    """As GPT-2 or, with a pattern, as Qwen2 cut text; two of its added tokens are in the model's own vocabulary only if
    the library says so."""
    backend = tokenizers.Tokenizer.from_file(str(train_tokenizer([OLD] * 3, 290, folder / "old")))
    for key, value in options.items():
        setattr(backend.model, key, value)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = gpt2 if pattern is None else byte_pieces(pattern)
    backend.normalizer = None if pattern is None else normalizers.NFC()
    backend.add_special_tokens(["<bos>", AddedToken("<|user|>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 290)])
    folder.joinpath("old.json").write_text(backend.to_str())
    return folder / "old.json"


def with_ranks(folder, monkeypatch):
    """A rank file, with special tokens that leave ids free, as those of cl100k_base do."""
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"qu", b"ck"]
    special = {"<|eos|>": 261, "<|user|>": 290}
    monkeypatch.setitem(ENCODINGS, 261, Encoding("small", ENCODINGS[100256].pattern, special, "<|eos|>"))
    (folder / "old.model").write_bytes(b"".join(base64.b64encode(one) + b" %d\n" % n for n, one in enumerate(ranks)))
    return folder / "old.model"


def like_llama_2(folder, cut):
    """▁ for spaces, one before the text, bytes for characters that are no pieces; nothing, or words, cut before."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([OLD] * 3), model_writer=model, model_type="bpe", vocab_size=330, minloglevel=2,
        byte_fallback=True, character_coverage=1.0, num_threads=1, split_digits=True,
    )  # fmt: skip
    proto = sentencepiece.sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    splits = {
        word: [(word[:at], word[at:]) for at in range(1, len(word)) if {word[:at], word[at:]} <= vocab.keys()]
        for word in vocab
    }
    merges = [pair for word in sorted(vocab, key=vocab.get) if word[:3] != "<0x" for pair in splits[word]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if cut:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>"])
    (folder / "old.json").write_text(backend.to_str())
    return folder / "old.json"


KINDS = {
    "GPT-2": lambda folder, _: byte_level(folder),
    "Qwen2": lambda folder, _: byte_level(folder, PRETOKENIZE_REGEX),
    "Llama 3": lambda folder, _: byte_level(folder, ENCODINGS[100256].pattern, ignore_merges=True),
    "ranks": with_ranks,
    "Llama 2": lambda folder, _: like_llama_2(folder, cut=False),
    "metaspace": lambda folder, _: like_llama_2(folder, cut=True),
}


@pytest.fixture(params=KINDS)
def learnt(request, tmp_path, monkeypatch):
    old = KINDS[request.param](tmp_path, monkeypatch)
    lesson = Lesson(LEARNT, NEW, "text")
    spelled = extend_tokenizer(old, [], [], tmp_path / "new", lesson=lesson)
    return SimpleNamespace(
        kind=request.param, old=Tokenizer(old), new=Tokenizer(tmp_path / "new"), lesson=lesson, spelled=spelled
    )


# ---- the slow reference -------------------------------------------------------------------------------------


def cuts(backend, text):
    """What the model is given of a text, added tokens apart."""
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [cut for cut, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def merged(model, word):
    """Of all neighbours the pair whose merge comes first becomes one, the leftmost first, until no pair has a merge."""
    if model["ignore_merges"] and word in model["vocab"]:
        return [word]
    ranks, parts = model["ranks"], [*word]
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, MORE), at) for at, pair in enumerate(itertools.pairwise(parts)))
        if rank == MORE:
            break
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts


def model_of(tokenizer):
    model = json.loads(tokenizer.codec.backend.to_str())["model"]
    return model | {"ranks": {tuple(pair): rank for rank, pair in reversed([*enumerate(model["merges"])])}}


def slowly_encoded(tokenizer, text):
    model, ids = model_of(tokenizer), []
    for part in merged_parts(tokenizer, model, text):
        of_bytes = [model["vocab"][f"<0x{byte:02X}>"] for byte in part.encode()] if part not in model["vocab"] else []
        ids += of_bytes or [model["vocab"][part]]
    return ids


def merged_parts(tokenizer, model, text):
    return [part for word in cuts(tokenizer.codec.backend, text) for part in merged(model, word)]


def slowly_learnt(tokenizer, texts, n):
    """Counts all pairs anew for each piece. Where nothing cuts words, SentencePiece's rule of what may be one."""
    model = model_of(tokenizer)
    known = tokenizer.codec.backend.get_vocab(with_added_tokens=True)
    pieces_of_one = r"▁?(?:[\p{L}\p{M}]+|[^\p{L}\p{M}\p{N}▁]+)|▁|\p{N}" if "▁" in known else "(?s).+"
    words = Counter()
    for text in texts:
        for part in regex.split("abcabc|<[|]user[|]>", text):
            for cut in cuts(tokenizer.codec.backend, part) if part else []:
                words.update(regex.findall(pieces_of_one, cut))
    parts, number = {word: merged(model, word) for word in words}, dict(known)
    characters = [one for word in parts.values() for one in word if one not in number]
    characters = [one for one in dict.fromkeys(characters) if ord(one) > 127]
    for one in characters:
        number[one] = tokenizer.vocab_size + len(number)
    found, dead = [], set()
    while len(found) < n:
        counts = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(parts[word]):
                if not {*pair} & {*characters} and {*pair} <= number.keys():
                    counts[pair] += count
            for one in parts[word]:
                if one in characters:
                    counts[one, ""] += count
        counts = {pair: count for pair, count in counts.items() if count > 1 and pair not in dead}
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], number[pair[0]], number.get(pair[1], -1)))
        text = "".join(best)
        if text in known or text in found:
            dead.add(best)
            continue
        found.append(text)
        if best[1]:
            number[text] = tokenizer.vocab_size + len(number)
        else:
            characters.remove(best[0])
        for word, there in parts.items():
            while best[1] and best in (pairs := [*itertools.pairwise(there)]):
                at = pairs.index(best)
                there[at : at + 2] = [text]
            if model["ignore_merges"] and word == text:
                there[:] = [text]
    return found


# ---- tests --------------------------------------------------------------------------------------------------


def test_pieces_are_those_of_a_slow_reference_and_text_shrinks_as_told(learnt):
    old, new, lesson = learnt.old, learnt.new, learnt.lesson
    assert [piece.text for piece in lesson.pieces] == slowly_learnt(old, NEW, LEARNT)
    assert [new.codec.token_of(number) for number in learnt.spelled] == [piece.text for piece in lesson.pieces]
    assert [*learnt.spelled] == [*range(old.vocab_size, old.vocab_size + len(lesson.pieces))]
    assert lesson.n_bytes == sum(len(text.encode()) for text in NEW)
    before, after = (sum(map(len, tokenizer.encode_batch(NEW))) for tokenizer in (old, new))
    assert (lesson.n_tokens, lesson.n_tokens - lesson.fewer) == (before, after)
    assert after < 0.8 * before


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_few_letters_are_those_of_the_reference_too(seed):
    """Words of three letters, in which the same piece is come by in several ways, with merges in any order."""
    draw, vocab, merges = random.Random(seed), dict(zip("abc", range(3), strict=True)), []
    while len(merges) < 8:
        pair = tuple(draw.choices([*vocab], k=2))
        if pair not in merges and len("".join(pair)) < 5:
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    texts = [" ".join("".join(draw.choices("abc", k=draw.randint(1, 7))) for _ in range(60)) for _ in range(3)]
    for keeps_whole in (False, True):
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=keeps_whole))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_tokens(["abcabc"])  # is in no piece, and none is called so
        codec, lesson = Fast(backend), Lesson(25, texts, "texts")
        lesson.learn(codec)
        old = SimpleNamespace(codec=codec, vocab_size=codec.n_ids)
        found = [piece.text for piece in lesson.pieces]
        assert found == slowly_learnt(old, texts, 25)
        assert not {*found} & {*vocab, "abcabc"}
        more = with_vocab(codec, found, [[*piece.merged] for piece in lesson.pieces])
        ids = more.encode_batch(texts)
        assert lesson.n_tokens - lesson.fewer == sum(len(one.ids) for one in ids)
        for text in texts:
            merged_ids = slowly_encoded(SimpleNamespace(codec=Fast(more)), text)
            assert more.encode(text).ids == merged_ids or "abcabc" in text


def test_a_long_text_is_encoded_in_parts_and_none_of_it_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "PART", 9)
    monkeypatch.setattr(learn, "BATCH", 20)
    batches = [*learn._batches(["zwölf\nelf\n\nneun\n", "a" * 20, ""])]
    assert batches == [["zwölf\n", "elf\n\n", "neun\n", "a" * 9], ["a" * 9, "aa", ""]]
    lesson = Lesson(3, ["\n".join(NEW * 9)], "text")
    lesson.learn(Tokenizer(byte_level(tmp_path)).codec)
    assert (len(lesson.pieces), lesson.n_bytes) == (3, len("\n".join(NEW * 9).encode()))


def test_the_library_merges_as_the_reference_does_and_old_text_keeps_its_ids(learnt):
    old, new = learnt.old, learnt.new
    kept = 0
    for line in [*odd_lines(old.codec.symbols), *NEW]:
        ids = new.encode(line)
        if not any(symbol in line for symbol in new.codec.symbols):
            assert ids == slowly_encoded(new, line)
        assert new.decode(ids) == old.decode(old.encode(line))
        if not learnt.spelled.keys() & {*ids}:
            assert ids == old.encode(line)
            kept += 1
    assert kept > 100
    assert (new.bos, new.eos, new.prefix, new.suffix) == (old.bos, old.eos, old.prefix, old.suffix)
    assert learnt.spelled == spellings(old, new)
    for number, ids in learnt.spelled.items():
        assert len(ids) > 1
        assert old.decode(ids).strip() == new.decode([number]).strip()


def test_what_transformers_reads_is_the_same_tokenizer(tmp_path):
    """Special tokens that its own vocabulary lacks, as Qwen2's are, keep their ids in every class."""
    for name, pattern in (("PreTrainedTokenizerFast", None), ("Qwen2Tokenizer", PRETOKENIZE_REGEX)):
        (tmp_path / name).mkdir()
        old = byte_level(tmp_path / name, pattern)
        assert "<bos>" not in json.loads(old.read_text())["model"]["vocab"]
        own = old.rename(old.with_name("tokenizer.json")).parent
        settings = {"tokenizer_class": name, "bos_token": "<bos>", "eos_token": "<|endoftext|>"}
        (own / "tokenizer_config.json").write_text(json.dumps(settings))
        spelled = extend_tokenizer(own, [" Sylter Deich"], ["<|new|>"], own / "new", lesson=Lesson(LEARNT, NEW, "text"))
        was, now = Tokenizer(own), Tokenizer(own / "new")
        tokens = ["<|endoftext|>", "<bos>", "<|user|>", " Sylter Deich", "<|new|>"]
        assert [now.id_of(token) for token in tokens] == [*map(was.id_of, tokens[:3]), 292, 293]
        assert [*spelled] == [*range(292, now.vocab_size)]
        theirs = transformers.AutoTokenizer.from_pretrained(own / "new")
        lines = [*odd_lines(was.codec.symbols), *NEW, "am Sylter Deich<|new|>, zwölf"]
        assert theirs(lines, add_special_tokens=False)["input_ids"] == now.encode_batch(lines)
        assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (was.bos, was.eos, now.vocab_size)


def test_a_tokenizer_that_has_learnt_takes_more(tmp_path, monkeypatch):
    """Tokens and pieces, also where ids of a rank file's special tokens have left some free."""
    old = with_ranks(tmp_path, monkeypatch)
    first = extend_tokenizer(old, ["Deich"], [], tmp_path / "first", lesson=Lesson(8, NEW, "text"))
    second = extend_tokenizer(tmp_path / "first", ["Chat"], ["<|new|>"], tmp_path / "second")
    third = extend_tokenizer(tmp_path / "second", [], [], tmp_path / "third", lesson=Lesson(4, NEW, "text"))
    assert [*first, *second, *third] == [*range(291, 291 + 9 + 2 + 4)]
    tokenizer = Tokenizer(tmp_path / "third")
    assert tokenizer.encode("Deich Chat<|new|>") == [291, tokenizer.id_of("Ġ"), 300, 301]
    longer = Lesson(12, NEW, "text")
    extend_tokenizer(old, ["Deich"], [], tmp_path / "at once", lesson=longer)
    assert [tokenizer.codec.token_of(number) for number in [*first, *third] if number != 291] == [
        piece.text for piece in longer.pieces
    ]


def test_the_command_says_what_it_has_learnt_and_refuses_what_it_cannot(tmp_path, monkeypatch):
    old = byte_level(tmp_path)
    (tmp_path / "a.txt").write_text(NEW[0] * 2, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"content": NEW[1]}) + "\n")
    text = ["--text", tmp_path / "a.txt", tmp_path / "b.jsonl", "--text-key", "content"]
    monkeypatch.setattr(preprocess, "PROGRESS_SECONDS", 1e-4)
    code, told, errors = run_command("extend-tokenizer", old, tmp_path / "new", "--learn", 30, *text)
    assert code == 0
    assert re.search(r"\d+ MB of text in pieces, \d+% of the files read, 0:0\d|\d+ of 30 pieces, 0:0\d", errors)
    was, now = Tokenizer(old), Tokenizer(tmp_path / "new")
    documents = [NEW[0].strip() + "\n" + NEW[0].strip(), NEW[1]]
    before, after = (sum(map(len, tokenizer.encode_batch(documents))) for tokenizer in (was, now))
    n_bytes = sum(len(document.encode()) for document in documents)
    line = f"{n_bytes} bytes of text: {before} tokens before, {after} now, {1 - after / before:.1%} fewer"
    assert told.splitlines()[-2:] == [line, f"{tmp_path / 'new'}: {now.vocab_size} ids, 30 more than before"]

    def refused(*words, tokenizer=old):
        code, told, errors = run_command("extend-tokenizer", tokenizer, tmp_path / "no", *words)
        assert (code, told) == (2, "")
        assert not (tmp_path / "no").exists()
        return [line for line in errors.splitlines() if " pieces, 0:" not in line and " files read, 0:" not in line]

    for words, wanted in (
        (["--learn", 9], "--text = (missing): --learn has nothing to learn from; give files of text"),
        (["--learn", 0, *text], "--learn = 0: is no number of pieces; give some hundred or thousand"),
        (["--text", "x.txt"], "--text = x.txt: is what --learn learns from, which is missing; give --learn N"),
        (["--learn", 9, "--text", "x.txt"], "--text = x.txt: does not exist; check the path or quote the glob"),
        (["--learn", 9, "--text", tmp_path / "b.jsonl"], "line 1 has no text under 'text', its keys are content"),
    ):
        (line,) = refused(*words)
        assert wanted in line
    for name, raw, wanted in (
        ("latin.txt", b"Stra\xdfe\n", "line 1 is not UTF-8"),
        ("blank.txt", b" \n\n", "holds no text to learn from; give files that do"),
        ("short.txt", b"zw", "has no two pieces that stand together twice and may become one; give more text"),
    ):
        (tmp_path / name).write_bytes(raw)
        (line,) = refused("--learn", 9, "--text", tmp_path / name)
        assert line.startswith(f"error: --text = {tmp_path / name}: {wanted}")
    for kind, wanted in (
        ("unigram", "is a SentencePiece model, which learns no new pieces; give words to --add or --add-file"),
        ("bpe", "is a SentencePiece model, which learns no new pieces; give its tokenizer.json, which transformers"),
    ):
        (line,) = refused("--learn", 9, *text, tokenizer=train_tokenizer([OLD] * 3, 295, tmp_path / kind, kind))
        assert line.startswith("error: --learn = 9: ")
        assert wanted in line
    tree = json.loads(old.read_text())
    vocab = tree["model"]["vocab"]
    piece = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    for model, wanted in (
        (piece | {"vocab": vocab}, "is of the kind WordPiece, and only one of byte-pair encoding"),
        ({"type": "Unigram", "unk_id": 0, "vocab": [[one, -1.0] for one in vocab]}, "is of the kind Unigram"),
        (tree["model"] | {"end_of_word_suffix": "</w>", "merges": []}, "marks the pieces that go on with a word or"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(tree | {"model": model}))
        (line,) = refused("--learn", 9, *text, tokenizer=tmp_path / "other.json")
        assert wanted in line
    code, told, errors = run_command("extend-tokenizer", old, tmp_path / "more", "--learn", MORE, *text)
    assert code == 0
    n = Tokenizer(tmp_path / "more").vocab_size - was.vocab_size
    assert f"warning: the text gives {n} pieces of the {MORE}: no other pair occurs twice in it" in errors
