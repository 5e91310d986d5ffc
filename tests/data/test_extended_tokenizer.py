"""Tokenizers that have more pieces than others: how those spell them, how they are made, and which are no such."""

from __future__ import annotations

import base64
import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megabus.convert.hf_tokenizer import write_tokenizer
from megabus.data.tokenizer import Tokenizer, spellings, train_tokenizer
from megabus.data.tokenizer.extend import extend_tokenizer
from megabus.data.tokenizer.odd_text import odd_lines
from megabus.data.tokenizer.spelling import Written
from megabus.data.tokenizer.tiktoken import ENCODINGS, Encoding
from megabus.errors import UserError
from tests.support.command import run_command

TEXT = "the quick brown fox jumps over the lazy dog, and sixty wizards' quills make black jam.\n"
NEW = [" Straße", "naïve é", "the fox", "日本"]
KINDS = ["byte-bpe", "unigram", "bpe"]


@pytest.fixture(scope="module", params=KINDS)
def old(request, tmp_path_factory):
    size = {"byte-bpe": 280, "unigram": 290, "bpe": 300}[request.param]
    return train_tokenizer([TEXT] * 3, size, tmp_path_factory.mktemp("t") / "t", request.param)


def test_added_tokens_are_found_in_text_and_nothing_else_changes(tmp_path, old):
    special = ["<|user|>"] if old.suffix == ".json" else []
    spelled = extend_tokenizer(old, NEW, special, tmp_path / "new")
    was, now = Tokenizer(old), Tokenizer(tmp_path / "new")
    assert list(spelled) == list(range(was.vocab_size, was.vocab_size + len(NEW) + len(special)))
    assert now.vocab_size == was.vocab_size + len(spelled)
    for number, text in zip(spelled, NEW + special, strict=True):
        assert now.encode(f"so{text}so") == [*was.encode("so"), number, *was.encode("so")]
        assert spelled[number] == was.encode(text)
        assert was.decode(spelled[number]) == text
    assert now.decode([*spelled]) == "".join(NEW)
    assert (was.bos, was.eos, was.prefix, was.suffix) == (now.bos, now.eos, now.prefix, now.suffix)
    for line in odd_lines(was.codec.symbols):
        assert now.encode(line) == was.encode(line)
    assert spellings(was, was) == {}
    again = extend_tokenizer(tmp_path / "new", ["more"], [], tmp_path / "third")
    assert list(again) == [now.vocab_size]


def test_a_longer_training_is_an_extension(tmp_path):
    """Its new pieces come from merges; they are spelled as their letters for bytes say, wherever text is cut."""
    old, new = (Tokenizer(train_tokenizer([TEXT] * 3, size, tmp_path / str(size))) for size in (270, 290))
    spelled = spellings(old, new)
    assert list(spelled) == list(range(270, 290))
    for number, ids in spelled.items():
        assert len(ids) > 1
        assert old.decode(ids) == new.decode([number])
    with pytest.raises(UserError, match=r"tokenizer = .*270.json: .* \(270\) of .*290.json is no piece of it;"):
        spellings(new, old)


def words(vocab, folder, **options):
    """A tokenizer of the Llama kind: ▁ for spaces, one before the text, merges by pairs of the vocabulary."""
    pairs = [(a, b) for piece in vocab for a in vocab for b in vocab if a + b == piece]
    backend = tokenizers.Tokenizer(models.BPE({piece: n for n, piece in enumerate(vocab)}, pairs, **options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_pieces_are_spelled_without_what_stands_before_a_text(tmp_path):
    letters = ["<unk>", "▁", "a", "b", "▁a", "ab"]
    old, new = words(letters, tmp_path / "old"), words([*letters, "ba", "▁ab", "bab"], tmp_path / "new")
    assert old.encode("ba") == [1, 3, 2]
    assert spellings(old, new) == {6: [3, 2], 7: [4, 3], 8: [3, 5]}


def test_text_is_spelled_as_it_is_normalised(tmp_path):
    """Where two characters become one, none has been left out."""
    codec = words(["<unk>", "▁", "a", "é"], tmp_path / "old").codec
    codec.backend.normalizer = normalizers.NFC()
    assert codec.spelled(Written("ae\u0301", is_text=True)) == [2, 3]
    assert codec.spelled(Written("ab", is_text=True)) is None


@pytest.mark.parametrize("options", [{}, {"unk_token": "<unk>"}])
def test_what_cannot_be_spelled_is_refused(tmp_path, options):
    """Letters that the old vocabulary lacks, whether it has a piece for such or leaves them out."""
    letters = ["<unk>", "▁", "a", "b"]
    old, new = words(letters, tmp_path / "old", **options), words([*letters, "é", "aé"], tmp_path / "new", **options)
    told = rf"new: has the piece é \(4\), which {old.name} cannot spell; leave that piece out"
    with pytest.raises(UserError, match=told):
        spellings(old, new)
    with pytest.raises(UserError, match=r"--add = aé: cannot be spelled by .*; leave it out"):
        extend_tokenizer(old.name, ["aé"], [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_prefix(folder):
    """A SentencePiece model that puts a space before a text, as Llama's does, and its tokenizer.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3), model_writer=model, model_type="bpe", vocab_size=330, minloglevel=2,
        byte_fallback=True, character_coverage=1.0, num_threads=1,
    )  # fmt: skip
    for name in ("sp", "tree"):
        (folder / name).mkdir()
    (folder / "sp/tokenizer.model").write_bytes(model.getvalue())
    write_tokenizer(folder / "sp/tokenizer.model", folder / "tree")
    (folder / "tree/tokenizer.model").unlink()
    return [folder / "sp", folder / "tree", words(["<unk>", *"▁<|user>\nthoxq"], folder / "metaspace").path]


def test_added_tokens_are_spelled_as_they_stand_within_a_text(tmp_path):
    """Where a tokenizer puts a space before each text, that is no part of one that stands elsewhere."""
    for place, folder in enumerate(with_prefix(tmp_path)):
        old = Tokenizer(folder)
        assert old.encode("h") != old.codec.spelled(Written("h", is_text=True))
        wanted = [old.codec.id_of(letter) for letter in "qx"]
        assert None not in wanted
        spelled = extend_tokenizer(folder, ["qx", " qx"], [], tmp_path / f"new{place}")
        assert [*spelled.values()] == [wanted, [old.codec.id_of("▁"), *wanted]]
        if place < 2:
            known = old.id_of("▁the")
            with pytest.raises(UserError, match=rf"--add =  ?the: is a piece of .* already \({known}\)"):
                extend_tokenizer(folder, [" the"], [], tmp_path / "out")
    with pytest.raises(UserError, match="--add = q▁x: is given twice"):
        extend_tokenizer(tmp_path / "sp", ["q x", "q▁x"], [], tmp_path / "out")


def test_pieces_for_bytes_are_spelled_as_what_they_are(tmp_path):
    letters = ["<unk>", "▁", "a", "\n", *"<0x>A"]
    old = words(letters, tmp_path / "old")
    new = words([*letters, "<0x0A>", "<0x20>", "<0x61>"], tmp_path / "new", byte_fallback=True)
    assert spellings(old, new) == {9: [3], 10: [1], 11: [2]}
    new = words([*letters, "<0x8A>"], tmp_path / "half", byte_fallback=True)
    with pytest.raises(UserError, match=r"has the piece <0x8A> \(9\), which .* cannot spell"):
        spellings(old, new)
    plain = words([*letters, "<0x0A>"], tmp_path / "plain")  # one that reads such a piece as its letters
    assert spellings(old, plain) == {9: [4, 5, 6, 5, 8, 7]}
    proto = Tokenizer(train_tokenizer([TEXT], 300, tmp_path / "t", "bpe")).codec
    assert proto.written(proto.id_of("<0x0A>")) == Written("\n", is_text=True)
    assert proto.written(proto.id_of("<0xC3>")) == Written("", is_text=True)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_lie_beside_a_model_are_not_passed_over(tmp_path, file):
    """Their ids would go to other tokens. Those that the model has itself may be listed."""
    path = train_tokenizer([TEXT], 300, tmp_path / "tokenizer", "bpe")

    def beside(tokens):
        listed = {str(number): {"content": token} for token, number in tokens.items()}
        tree = tokens if file == "added_tokens.json" else {"added_tokens_decoder": listed}
        (tmp_path / file).write_text(json.dumps(tree))

    beside({"<unk>": 0, "</s>": 1})
    assert Tokenizer(path).vocab_size == 300
    for tokens, told in (({"<|im_start|>": 300}, "'<|im_start|>'.* as '?300"), ({"</s>": 7}, "'</s>'.* as '?7")):
        beside(tokens)
        for name in (path, tmp_path):
            with pytest.raises(UserError, match=f"tokenizer = .*: has not {told.replace('|', '[|]')}"):
                extend_tokenizer(name, ["<|user|>"], [], tmp_path / "out")


def test_moved_and_lost_pieces_are_named(tmp_path):
    old = words(["<unk>", "▁", "a", "b"], tmp_path / "old")
    for name, vocab, told in (
        ("moved", ["<unk>", "▁", "b", "a", "ab"], r"a \(2\) of {} has the id 3 in it"),
        ("smaller", ["<unk>", "▁", "a"], r"b \(3\) of {} is no piece of it"),
    ):
        new = words(vocab, tmp_path / name)
        with pytest.raises(UserError, match=f"tokenizer = {new.name}: {told.format(old.name)}; extend that one"):
            spellings(old, new)


def test_a_rank_file_becomes_a_tokenizer_json(tmp_path, monkeypatch):
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    encoding = Encoding("small", ENCODINGS[100256].pattern, {"<|eos|>": 258}, "<|eos|>")
    monkeypatch.setitem(ENCODINGS, 258, encoding)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(ranks)))
    assert extend_tokenizer(file, ["the fox"], [], tmp_path / "new") == {259: Tokenizer(file).encode("the fox")}
    new = Tokenizer(tmp_path / "new")
    assert (new.kind, new.eos, new.encode("so the fox")[-1]) == ("tokenizers", 258, 259)


def test_the_command_shows_what_it_adds_and_refuses_what_is_there(tmp_path, old):
    (tmp_path / "words.txt").write_text("\ufeff日本\n Str\u2028aße\n", encoding="utf-8")
    out = tmp_path / "new"
    code, told, errors = run_command(
        "extend-tokenizer", old, out, "--add", "the fox", "--add-file", tmp_path / "words.txt"
    )
    assert (code, errors) == (0, "")
    lines = told.splitlines()
    assert lines[0].split() == ["id", "token", "spelled", "before"]
    assert lines[-1] == f"{out}: {Tokenizer(old).vocab_size + 3} ids, 3 more than before"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refused(*words):
        code, told, errors = run_command("extend-tokenizer", old, *words)
        assert (code, told) == (2, "")
        return errors

    other = tmp_path / "other"
    assert "--add = (missing): there is nothing to add" in refused(other)
    assert f"out = {out}: exists" in refused(out, "--add", "more")
    assert "--add = x y: is given twice" in refused(other, "--add", "x y", "x y")
    assert "is no UTF-8; give it" in refused(other, "--add", "\udcff")
    assert "is a piece of" in refused(other, "--add", "a")
    assert "--add-file = " in refused(other, "--add-file", tmp_path / "none")
    (tmp_path / "none").write_text("\n")
    assert f"--add-file = {tmp_path / 'none'}: holds no token" in refused(other, "--add-file", tmp_path / "none")
    for lines, words, told in (
        ("x y\nx z\nx y\n", [], "--add-file = x y: is given twice"),
        ("x y\n", ["--add", "x y"], "--add-file = x y: is given twice"),
        ("a\n", ["--add", "x y"], "--add-file = a: is a piece of"),
    ):
        (tmp_path / "some").write_text(lines)
        assert told in refused(other, "--add-file", tmp_path / "some", *words)
    if old.suffix == ".model":
        assert "--special = <|x|>: would never be found in text" in refused(other, "--special", "<|x|>")
    else:
        assert "--special = x y: is given twice" in refused(other, "--add", "x y", "--special", "x y")
    assert not other.exists()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
