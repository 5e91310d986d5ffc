"""Tokenizers of every kind go with the weights into every form, and come out as transformers reads them."""

import base64
import contextlib
import io
import json

import pytest
import sentencepiece
import tokenizers
import transformers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from megabus.checkpoint.load import checkpoint_at, saved_tokenizer
from megabus.config import resolve_stages
from megabus.convert import hf_tokenizer
from megabus.convert.convert import convert, open_source
from megabus.convert.hf_tokenizer import write_tokenizer
from megabus.convert.source import OpenFiles
from megabus.data.sources import open_sources
from megabus.data.tokenizer import Tokenizer, read_tokenizer_files, tiktoken, train_tokenizer
from megabus.data.tokenizer.byte_bpe import byte_letters, byte_pieces
from megabus.data.tokenizer.extend import extend_tokenizer
from megabus.data.tokenizer.odd_text import BASES, differences, odd_lines
from megabus.errors import UserError
from tests.support import checkpoints
from tests.support.command import run_command
from tests.support.small_runs import run_config, write_corpus
from tests.support.sources import MemorySource, model_config

TEXT = [f"{base} and {base}, {base.upper()}; the theory of the other there\n" for base in BASES] * 3
N, PADDED = 640, 704


def hugging_face(folder):
    """As a model's makers leave it, code of their own included."""
    path = train_tokenizer(TEXT, N - 2, folder / "own")
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<bos>", "<pad>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", bos)])
    names = {"bos_token": "<bos>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    theirs.chat_template = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
    theirs.save_pretrained(folder / "hf")
    config = json.loads((folder / "hf/tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "no-one/nothing--evil.Evil"]}
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))
    return folder / "hf"


def rank_file(folder):
    """Of as many ranks as Llama 3's has here: the test says so."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = Tokenizer(train_tokenizer(TEXT, N - 256 + 1, folder / "own")).codec.backend.get_vocab()
    tokens = [bytes(byte_of[letter] for letter in letters) for letters in vocab if letters[:2] != "<|"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(sorted(tokens, key=len))]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines))
    return folder / "tokenizer.model"


def sentence_piece(folder):
    return train_tokenizer(TEXT, N, folder / "own", "bpe", "nfkc")


@pytest.fixture
def small_llama_3(monkeypatch):
    special = {token: N - 256 + place for place, token in enumerate(tiktoken.LLAMA3)}
    names = ("<|end_of_text|>", "<|begin_of_text|>")
    monkeypatch.setitem(tiktoken.ENCODINGS, N - 256, tiktoken.Encoding("small", tiktoken.CL100K, special, *names))


@pytest.mark.usefixtures("small_llama_3")
@pytest.mark.parametrize("make", [hugging_face, rank_file, sentence_piece])
def test_a_tokenizer_goes_with_the_weights_everywhere(tmp_path, make, capsys):
    source = MemorySource(model_config("gpt", vocab_size=PADDED))
    source.tokenizer = make(tmp_path)
    first = Tokenizer(source.tokenizer)
    assert first.vocab_size == N
    with OpenFiles() as files:
        convert(source, tmp_path / "run", "checkpoint")
        convert(open_source(tmp_path / "run", files), tmp_path / "shards", "shards", (2, 1, 1))
        convert(open_source(tmp_path / "shards", files), tmp_path / "out", "hf")
        back = open_source(tmp_path / "out", files)
        assert back.left == []
        convert(back, tmp_path / "again", "checkpoint")
    saved = read_tokenizer_files(saved_tokenizer(checkpoint_at(tmp_path / "run")))
    assert saved.contents == first.files.contents  # to the byte
    assert capsys.readouterr().err == ""  # no ids are others
    again = read_tokenizer_files(saved_tokenizer(checkpoint_at(tmp_path / "again")))
    assert first.sha256 in again.known_as
    lines = [line for line in odd_lines() if make is not sentence_piece or "<" not in line]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(lines, add_special_tokens=False)["input_ids"] == first.encode_batch(lines)
    assert theirs("a")["input_ids"] == [*first.prefix, *first.encode("a")]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (first.bos, first.eos)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (first.bos, first.eos)
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()
    with OpenFiles() as files:
        run = open_source(tmp_path / "run", files)
        convert(run, tmp_path / "alike", "hf", like=tmp_path / "out")
        assert read_tokenizer_files(tmp_path / "alike").contents == read_tokenizer_files(tmp_path / "out").contents
        train_tokenizer(TEXT, N - 1, tmp_path / "out/tokenizer", "byte-bpe")
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "out/tokenizer.model").unlink()
        with pytest.raises(UserError, match="has another tokenizer than the one that was saved with the weights"):
            convert(run, tmp_path / "no", "hf", like=tmp_path / "out")
        (tmp_path / "out/tokenizer.json").unlink()
        with pytest.raises(UserError, match="has no tokenizer, and one was saved with the weights; leave --like out"):
            convert(run, tmp_path / "no", "hf", like=tmp_path / "out")
    if make is hugging_face:
        assert config["pad_token_id"] == theirs.pad_token_id == first.id_of("<pad>")
        assert theirs.apply_chat_template([{"content": "x"}], tokenize=False) == "<bos>x"


def test_a_tokenizer_that_cannot_be_read_is_refused_or_left_behind(tmp_path):
    source = MemorySource(model_config("gpt", vocab_size=PADDED))
    convert(source, tmp_path / "hf", "hf")
    (tmp_path / "hf/tokenizer.json").write_text('{"config": {}, "vocab": []}')
    with OpenFiles() as files:
        found = open_source(tmp_path / "hf", files)
        assert found.tokenizer is None
        assert found.without_tokenizer.startswith("is a tekken file of mistral-common, which is not read; give")
    words = ["convert", tmp_path / "hf", tmp_path / "run", "--to", "checkpoint"]
    code, _, told = run_command(*words)
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith(
        f"error: tokenizer = {tmp_path / 'hf'}: is a tekken file of mistral-common, which is not read"
    )
    assert told.endswith("; or leave it behind: --without-tokenizer\n")
    assert not (tmp_path / "run").exists()
    assert run_command(*words, "--without-tokenizer").returncode == 0
    train_tokenizer(TEXT, N, tmp_path / "hf/tokenizer", "bpe")  # control: one that can be read comes along
    (tmp_path / "hf/tokenizer.json").unlink()
    for name, option in (("with", []), ("without", ["--without-tokenizer"])):
        done = run_command(*words[:2], tmp_path / name, *words[3:], *option)
        assert done.returncode == 0
        assert ("left behind: tokenizer.model" in done.stdout) == (name == "without")
        assert (saved_tokenizer(checkpoint_at(tmp_path / name)) is None) == (name == "without")


def test_damaged_tokenizers_of_all_forms_can_be_left_behind(tmp_path):
    """Of a checkpoint and of shard files the manifest has the bytes, and no tokenizer is in them."""
    source = MemorySource(model_config("gpt", vocab_size=PADDED))
    source.tokenizer = hugging_face(tmp_path)
    for form in ("checkpoint", "shards"):
        convert(source, tmp_path / form, form)
        folder = checkpoint_at(tmp_path / form) if form == "checkpoint" else tmp_path / form
        (folder / "tokenizer.json").write_text("{}")
        checkpoints.attest(folder)
        with OpenFiles() as files:
            with pytest.raises(UserError, match=r"tokenizer.json: is damaged"):
                open_source(tmp_path / form, files)
            found = open_source(tmp_path / form, files, with_tokenizer=False)
            assert found.tokenizer is None
            convert(found, tmp_path / f"{form} in", "hf")


def test_an_extended_tokenizer_goes_out_beside_what_the_original_has(tmp_path, capsys):
    """--like names the model as it was before its vocabulary grew; also where a padded row took the new piece."""
    source = MemorySource(model_config("gpt", vocab_size=PADDED))
    source.tokenizer = hugging_face(tmp_path)
    extend_tokenizer(source.tokenizer, [" Straße"], ["<|user|>"], tmp_path / "new")
    convert(source, tmp_path / "like", "hf")
    config = json.loads((tmp_path / "like/config.json").read_text())
    own = {"eos_token_id": [config["eos_token_id"], 7], "max_position_embeddings": 777}
    (tmp_path / "like/config.json").write_text(json.dumps(config | own))
    (tmp_path / "like/generation_config.json").write_text('{"top_k": 3}')
    for size in (PADDED, PADDED + 2):
        larger = MemorySource(model_config("gpt", vocab_size=size))
        larger.tokenizer = tmp_path / "new"
        convert(larger, tmp_path / f"{size}", "hf", like=tmp_path / "like")
        said = json.loads((tmp_path / f"{size}/config.json").read_text())
        assert {key: said[key] for key in own} == own
        assert (said["vocab_size"], said["bos_token_id"]) == (size, config["bos_token_id"])
        assert (tmp_path / f"{size}/generation_config.json").read_text() == '{"top_k": 3}'
        assert Tokenizer(tmp_path / f"{size}").sha256 == Tokenizer(tmp_path / "new").sha256
        theirs, lines = (
            transformers.AutoTokenizer.from_pretrained(tmp_path / f"{size}"),
            [*odd_lines(), " Straße<|user|>"],
        )
        assert theirs(lines, add_special_tokens=False)["input_ids"] == Tokenizer(tmp_path / "new").encode_batch(lines)
    assert capsys.readouterr().err == ""
    larger.tokenizer = train_tokenizer(TEXT, N, tmp_path / "other", "byte-bpe")
    with pytest.raises(
        UserError, match=r"the model 706; give .*, or leave --like out, and the tokenizer of the weights"
    ):
        convert(larger, tmp_path / "no", "hf", like=tmp_path / "like")
    larger.tokenizer = tmp_path / "new"
    (tmp_path / "like/generation_config.json").write_text('{"eos_token_id": 5000}')
    with pytest.raises(UserError, match=r"generation_config.json: has eos_token_id = 5000, and the model ids below"):
        convert(larger, tmp_path / "no", "hf", like=tmp_path / "like")


def exported_config(folder, **settings):
    """A stock directory's tokenizer that keeps each digit alone, with these settings beside it, in and out again."""
    backend = tokenizers.Tokenizer.from_file(str(train_tokenizer(TEXT, N, folder / "own")))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    spelled = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, spelled])
    (folder / "in").mkdir()
    backend.save(str(folder / "in/tokenizer.json"))
    (folder / "in/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | settings))
    return folder / "in"


@pytest.mark.parametrize(
    ("kind", "changes", "name", "told"),
    [
        ("gpt", {"qkv_bias": True}, "PreTrainedTokenizerFast", "Qwen2Tokenizer"),  # the model's kind alone decides
        ("gpt", {}, "GPT2Tokenizer", "GPT2Tokenizer"),
        ("gpt", {}, "Qwen2Tokenizer", "Qwen2Tokenizer"),
        ("ngpt", {}, "GPT2Tokenizer", "GPT2Tokenizer"),
        ("ngpt", {}, "PreTrainedTokenizerFast", None),
        ("gpt", {}, "PreTrainedTokenizerFast", None),
    ],
)
def test_ids_that_transformers_makes_by_its_class_are_told(tmp_path, capsys, kind, changes, name, told):
    """AutoTokenizer cuts text as a class does that the model or tokenizer_config.json names, not as tokenizer.json."""
    source = MemorySource(model_config(kind, vocab_size=PADDED, **changes))
    source.tokenizer = exported_config(tmp_path, tokenizer_class=name)
    convert(source, tmp_path / "out", "hf")
    said, lines = capsys.readouterr().err, odd_lines(["<|endoftext|>"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    found = differences(lines, Tokenizer(source.tokenizer), lambda t: theirs(t, add_special_tokens=False)["input_ids"])
    assert bool(found) == bool(told)
    if told is None:
        assert said == ""
        return
    who = "transformers' AutoTokenizer gives other ids than the export's tokenizer.json"
    assert said.startswith(f"warning: {who} for {len(found)} of {len(lines)} odd texts, such as ")
    assert said.count("\n") == 1
    assert f". It follows its class {told}: read the tokenizer with PreTrainedTokenizerFast." in said
    if changes:  # and before anything is trained, by whoever asks for a comparison
        done = run_command("convert", tmp_path / "out", tmp_path / "run", "--to", "checkpoint", "--verify")
        assert done.returncode == 0
        assert done.stderr.startswith(said.replace("the export's", "the model's"))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert theirs(lines, add_special_tokens=False)["input_ids"] == Tokenizer(source.tokenizer).encode_batch(lines)


def test_a_qwen2_whose_text_is_cut_as_its_class_cuts_it_goes_out_silently(tmp_path, capsys):
    source = MemorySource(model_config("gpt", vocab_size=PADDED, qkv_bias=True))
    source.tokenizer = train_tokenizer(TEXT, N, tmp_path / "own")
    backend = tokenizers.Tokenizer.from_file(str(source.tokenizer))
    backend.normalizer, backend.pre_tokenizer = tokenizers.normalizers.NFC(), byte_pieces(PRETOKENIZE_REGEX)
    backend.save(str(source.tokenizer))
    convert(source, tmp_path / "out", "hf")
    assert capsys.readouterr().err == ""


def test_an_export_whose_tokenizer_transformers_cannot_read_is_written_and_told(tmp_path, capsys):
    source = MemorySource(model_config("gpt", vocab_size=PADDED))
    source.tokenizer = exported_config(tmp_path, extra_special_tokens=3)
    convert(source, tmp_path / "out", "hf")
    said = capsys.readouterr().err
    assert said.startswith("warning: the ids of tokenizer.json are not compared with those of transformers' AutoTokeni")
    assert said.count("\n") == 1
    assert (tmp_path / "out/config.json").exists()


def test_a_special_token_that_is_no_text_is_refused_where_it_is_read(tmp_path):
    folder = exported_config(tmp_path, eos_token=5)
    with pytest.raises(UserError, match=r"tokenizer_config\.json beside it says eos_token = 5, which is no token; "):
        Tokenizer(folder)


# ---- SentencePiece as a tokenizer.json --------------------------------------------------------------------

OURS = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "add_dummy_prefix": False}
OPTIONS = {
    "ours, nfkc": OURS | {"normalization_rule_name": "nfkc", "user_defined_symbols": ["\n"]},
    "ours, nmt_nfkc_cf": OURS | {"normalization_rule_name": "nmt_nfkc_cf", "user_defined_symbols": ["\n"]},
    "its defaults": {},
    "own symbols": {"user_defined_symbols": ["<b>", "<fim>", "the", "##"], "control_symbols": ["<ctl>"]},
    "own symbols, nfkc": {"user_defined_symbols": ["<i>", "<b>"], "normalization_rule_name": "nfkc"},
    "suffix whitespace": {"treat_whitespace_as_suffix": True},
    "Llama 2": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
}


def trained(folder, model_type="bpe", **options):
    model = io.BytesIO()
    settings = {"vocab_size": 640, "character_coverage": 1.0, "byte_fallback": True, "minloglevel": 2} | options
    lines = [line for text in TEXT for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=model_type, num_threads=1, **settings
    )
    (folder / "own.model").write_bytes(model.getvalue())
    (folder / "out").mkdir()
    return folder / "own.model"


@pytest.mark.parametrize("name", OPTIONS)
def test_sentence_piece_gives_the_same_ids_of_odd_text(tmp_path, name, capsys):
    path = trained(tmp_path, **OPTIONS[name])
    write_tokenizer(path, tmp_path / "out")
    assert capsys.readouterr().err == ""
    ours, theirs = Tokenizer(path), Tokenizer(tmp_path / "out")
    assert len(odd_lines(ours.codec.symbols)) > 280
    for base in BASES:
        ids = ours.encode(base)
        assert theirs.decode(ids) == ours.decode(ids)


def test_what_a_sentence_piece_models_files_say_of_a_text_goes_along(tmp_path, capsys):
    """What stands around a text, and which piece ends one, by tokenizer_config.json; which need not say all."""
    path = trained(tmp_path, user_defined_symbols=["<|im_end|>"])
    (tmp_path / "in").mkdir()
    path.rename(tmp_path / "in/tokenizer.model")
    for number, (settings, prefix, suffix, eos) in enumerate(
        (
            ({"chat_template": "x"}, [], [], "</s>"),
            ({"add_bos_token": True, "add_eos_token": False, "eos_token": None}, ["<s>"], [], "</s>"),
            (
                {"add_bos_token": True, "add_eos_token": True, "eos_token": "<|im_end|>"},
                ["<s>"],
                ["<|im_end|>"],
                "<|im_end|>",
            ),
        )
    ):
        (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(settings))
        ours, out = Tokenizer(tmp_path / "in"), tmp_path / f"out-{number}"
        around = [[ours.id_of(token) for token in tokens] for tokens in (prefix, suffix)]
        assert [ours.prefix, ours.suffix, ours.eos] == [*around, ours.id_of(eos)]
        origin = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
        out.mkdir()
        assert write_tokenizer(tmp_path / "in", out)["eos_token_id"] == ours.eos
        theirs, exported = transformers.AutoTokenizer.from_pretrained(out), Tokenizer(out)
        wanted = [*ours.prefix, *ours.encode("the other"), *ours.suffix]
        assert theirs("the other")["input_ids"] == wanted
        assert theirs("the other", "the other")["input_ids"] == wanted * 2
        assert (origin("a")["input_ids"][0] == ours.bos) == bool(prefix)
        assert (origin("a")["input_ids"][-1] == ours.eos) == bool(suffix)
        assert (theirs.bos_token, theirs.eos_token) == ("<s>", eos)
        assert (exported.prefix, exported.suffix, exported.eos) == (ours.prefix, ours.suffix, ours.eos)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_no_export_can_say_is_refused_before_training(tmp_path):
    """Leaving it out of the run is what the refusal says to do: then the weights go out without one."""
    corpus = write_corpus(tmp_path)
    path = trained(tmp_path, "char", vocab_size=200, byte_fallback=False)
    with pytest.raises(UserError, match="is neither unigram nor bpe; train one of these"):
        write_tokenizer(path, tmp_path / "out")

    def opened(tokenizer):
        changes = {"model__vocab_size": PADDED, "data__tokenizer": str(tokenizer) if tokenizer else None}
        config = run_config(corpus, tmp_path / "run", [{}] * 3, **changes)
        return open_sources(config, resolve_stages(config, 1)).tokenizer

    with pytest.raises(UserError, match=r"data.tokenizer = .*own.model: is a SentencePiece model of words or char"):
        opened(path)
    assert opened(None) is None
    (tmp_path / "bpe").mkdir()
    assert opened(sentence_piece(tmp_path / "bpe")).vocab_size == N


def test_other_ids_are_shown_with_what_to_do(tmp_path, monkeypatch, capsys):
    path = trained(tmp_path, normalization_rule_name="nfkc", **OURS)
    normalizers = hf_tokenizer._normalizers
    monkeypatch.setattr(hf_tokenizer, "_normalizers", lambda proto: normalizers(proto)[1:])  # as it was once
    write_tokenizer(path, tmp_path / "out")
    told = capsys.readouterr().err
    assert told.startswith("warning: the export's tokenizer.json gives other ids than ")
    assert told.count("\n") == 1
    assert told.endswith("encode them with the tokenizer.model beside it\n")
    ours, theirs = Tokenizer(path), Tokenizer(tmp_path / "out")
    theirs.codec.backend.encode_special_tokens = True
    lines = odd_lines()
    assert f"for {len(differences(lines, ours, theirs.encode_batch))} of {len(lines)} odd texts" in told
