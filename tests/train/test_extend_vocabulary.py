"""A run that goes on from a model with a tokenizer of more pieces: trained, grown, resumed and exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import megabus
from megabus.checkpoint.load import checkpoint_at, saved_tokenizer
from megabus.config import resolve_stages
from megabus.convert.begin import read_description
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles, whole
from megabus.convert.vocabulary import LargerVocabulary
from megabus.data.batches import TokenSource
from megabus.data.indexed import IndexedTokens, meta_path
from megabus.data.tokenizer import Tokenizer, spellings, train_tokenizer
from megabus.data.tokenizer.extend import extend_tokenizer
from megabus.data.tokenizer.learn import Lesson
from megabus.data.tokenizer.odd_text import odd_lines
from megabus.errors import UserError
from megabus.model.decoder import Decoder
from megabus.train.resume import check_begins
from tests.support.small_runs import refusal, rows_of, run_config, start, write_tokens
from tests.support.sources import MemorySource, model_config

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sixty", "wizards", "make", "jam"]
SIZES = {"d_model": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12, "d_ff": 62, "norm_eps": 48e-6}
MODEL = {"kind": "gpt", "tie_embeddings": True} | SIZES
OLD, NEW = 267, 271  # rows: of 265 pieces, and of 268


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with its tokenizer, one with more (and a piece that is learnt), and text that has all new pieces."""
    folder = tmp_path_factory.mktemp("made")
    old = train_tokenizer([" ".join(WORDS)] * 9, 265, folder / "old")
    extend_tokenizer(old, [" Straße"], ["<|user|>"], folder / "new", lesson=Lesson(1, ["日本 日本"], "text"))
    source = MemorySource(model_config(vocab_size=OLD, **MODEL))
    source.tokenizer = old
    convert(source, folder / "run", "checkpoint", (2, 1, 1))
    tokenizer = Tokenizer(folder / "new")
    for name, seed in (("train", 1), ("valid", 2)):
        draw = np.random.default_rng(seed)
        text = " ".join(draw.choice([*WORDS, "Straße", "日本", "<|user|>"], 3000))
        write_tokens(folder / name, tokenizer.encode(text))
        meta = {"vocab_size": 268, "n_tokens": IndexedTokens(folder / name).n_tokens, "tokenizer": "new"}
        meta_path(folder / name).write_text(json.dumps(meta | {"tokenizer_sha256": tokenizer.sha256}))
    return folder


def config_of(made, run_dir, **changes):
    growth = {"moments": "reset", "max_tokens": 512, "trigger": {"predictor": "constant", "constant": 0.0}}
    growth["stages"] = [{"d_model": 60, "n_heads": 6, "n_kv_heads": 3, "d_ff": 90, "layout": {"pp": 2}}]
    options = {"model": MODEL | {"vocab_size": NEW}, "growth": growth, "train__max_tokens": 1024}
    options |= {"init_from": str(made / "run"), "extend_vocabulary": True, "data__tokenizer": str(made / "new")}
    return run_config(made, run_dir, [{"tp": 2}] * 3, **options | changes)


def test_a_model_goes_on_with_more_pieces(made, tmp_path):
    """The first loss is the reference model's; growth keeps its own; the run resumes without its origin; the export is
    a stock model with the extended tokenizer, as transformers reads both."""
    config = config_of(made, tmp_path / "run")
    ranks = start(config, 2)
    old, new = Tokenizer(made / "old.json"), Tokenizer(made / "new")
    with OpenFiles() as files:
        source = open_source(made / "run", files)
        larger = LargerVocabulary(source, NEW, spellings(old, new), 265, made / "new")
        reference = Decoder(larger.state.model)
        reference.load_state_dict({name: whole(larger, name) for name in larger.specs})
    tokens, targets = TokenSource([(str(made / "valid"), 1.0)], 16, 0, NEW).batch(0, 16, range(16))
    assert {265, 266, 267} <= {*tokens.unique().tolist()}
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(reference(tokens).flatten(0, 1), targets.flatten())
    first, *_, last = rows_of(config, "eval")
    assert first["loss"] == pytest.approx(float(wanted), abs=1e-5)
    assert last["loss"] < first["loss"] - 0.3
    (growth,) = rows_of(config, "growth")
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-5)
    more = config_of(made, tmp_path / "run", train__max_tokens=1152, init_from=str(tmp_path / "gone"))
    resumed = start(more, 2)
    assert [rank.begun for rank in resumed] == [rank.steps[-1].digest for rank in ranks]
    saved = checkpoint_at(tmp_path / "run")
    assert Tokenizer(saved_tokenizer(saved)).sha256 == new.sha256
    with OpenFiles() as files:
        convert(open_source(tmp_path / "run", files), tmp_path / "out", "hf")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (out.config.vocab_size, out.config.tie_word_embeddings) == (NEW, True)
    with torch.no_grad():
        assert (out(tokens).logits - megabus.load(saved)(tokens)).abs().max() <= 1e-5
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in [*odd_lines(["<|user|>"]), "so Straße 日本<|user|>"]:
        assert theirs(line, add_special_tokens=False)["input_ids"] == new.encode(line)


def test_what_does_not_fit_is_refused(made, tmp_path):
    """Before training, and by name: keys without what they are about, vocabularies, tokenizers."""
    for changes, told in (
        (
            {"init_from": None},
            "extend_vocabulary = True: is of weights that a run begins with, and init_from names none",
        ),
        ({"data__tokenizer": None}, "data.tokenizer = (missing): extend_vocabulary = true needs it"),
    ):
        with pytest.raises(UserError) as caught:
            resolve_stages(config_of(made, tmp_path / "run", **changes), 2)
        assert str(caught.value).startswith(told)
    stage = resolve_stages(config_of(made, tmp_path / "run"), 2)[0]
    origin = read_description(made / "run")
    check_begins(origin, stage, extend=True)
    with pytest.raises(
        UserError, match=r"model.vocab_size = 271: is 267 in .*; set it to 267, or give a tokenizer that"
    ):
        check_begins(origin, stage)
    fewer = resolve_stages(config_of(made, tmp_path / "run", model=MODEL | {"vocab_size": 266}), 2)[0]
    with pytest.raises(UserError, match=r"model.vocab_size = 266: is 267 in .*; set it to 267: no row goes"):
        check_begins(origin, fewer, extend=True)
    other = train_tokenizer([" ".join(reversed(WORDS))] * 9, 268, tmp_path / "other")
    meta = {"vocab_size": 268, "tokenizer": "other", "tokenizer_sha256": Tokenizer(other).sha256}
    for name in ("train", "valid"):
        tokens = IndexedTokens(made / name)
        write_tokens(tmp_path / name, np.array(tokens.tokens(0, tokens.n_tokens)))
        meta_path(tmp_path / name).write_text(json.dumps(meta | {"n_tokens": tokens.n_tokens}))
    data = {"train": str(tmp_path / "train"), "valid": str(tmp_path / "valid"), "tokenizer": str(other)}
    told = refusal(config_of(made, tmp_path / "run", data=data, data__tokenizer=str(other)), 2)
    assert told.startswith(f"data.tokenizer = {other}: ")
    assert "extend that one: a model is begun from only with" in told
    assert not (tmp_path / "run").exists()
