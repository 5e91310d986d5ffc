"""A run that begins with given weights: a stock model is trained and grown; strangers are refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import time

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from megabus.checkpoint.load import checkpoint_at, saved_tokenizer
from megabus.config import resolve_stages
from megabus.convert import begin
from megabus.convert.begin import origin_of, read_description, unread_tokenizer
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.data.batches import TokenSource
from megabus.data.indexed import IndexedTokens, meta_path
from megabus.data.sources import open_sources
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from megabus.train.resume import check_begins, check_taken_over, check_tokenizer
from tests.support.launching import tree
from tests.support.small_runs import VOCAB, refusal, rows_of, run_config, start, write_corpus

MODEL = {"d_model": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12, "d_ff": 62}
LAYOUTS = [{"tp": 2}, {"pp": 2}]
GROWTH = [{"d_model": 60, "n_heads": 6, "n_kv_heads": 3, "d_ff": 90, "n_layers": 4}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A stock model with biases and a tied head, its directory, and the checkpoint that it became."""
    folder = tmp_path_factory.mktemp("qwen")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": True}
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 62, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
    model.save_pretrained(folder / "hf")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(
        str(folder / "hf/tokenizer.json")
    )
    with OpenFiles() as files:
        convert(open_source(folder / "hf", files), folder / "run", "checkpoint")
    return model, folder / "hf", folder / "run"


def config_of(corpus, run_dir, origin, **changes):
    model = {"kind": "gpt", "vocab_size": VOCAB, "norm_eps": 48e-6, "qkv_bias": True, "tie_embeddings": True} | MODEL
    growth = {"moments": "reset", "max_tokens": 512, "stages": [GROWTH[0] | {"layout": LAYOUTS[1]}]}
    growth["trigger"] = {"predictor": "constant", "constant": 0.0}
    options = {"model": model, "growth": growth, "train__max_tokens": 1024} | changes
    return run_config(corpus, run_dir, [LAYOUTS[0]] * 3, init_from=str(origin), **options)


def test_a_stock_model_is_trained_and_grown(corpus, qwen, tmp_path):
    """The run's first loss is transformers', the loss at growth stays, the run goes on without its origin and with its
    tokenizer, and its export is of the class that came and has the run's last loss."""
    model, origin, _ = qwen
    config = config_of(corpus, tmp_path / "run", origin)
    start(config, 2)
    tokens, targets = TokenSource([(str(corpus / "valid"), 1.0)], 16, 0, VOCAB).batch(0, 16, range(16))
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
    first, *_ = rows_of(config, "eval")
    assert first["loss"] == pytest.approx(float(wanted), abs=1e-5)
    (growth,) = rows_of(config, "growth")
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-5)
    last = rows_of(config, "eval")[-1]["loss"]
    assert last < first["loss"] - 0.3
    with OpenFiles() as files:
        convert(open_source(tmp_path / "run", files), tmp_path / "out", "hf")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (type(out), out.config.tie_word_embeddings, out.config.hidden_size) == (type(model), True, 60)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(out(tokens).logits.flatten(0, 1), targets.flatten())
    assert last == pytest.approx(float(wanted), abs=1e-5)
    more = config_of(corpus, tmp_path / "run", origin.parent / "gone", train__max_tokens=1280)
    start(more, 2)
    assert rows_of(more, "resume")[0]["step"] == 8
    carried = saved_tokenizer(checkpoint_at(tmp_path / "run"))
    assert Tokenizer(carried).sha256 == Tokenizer(origin).sha256
    strict = config_of(corpus, tmp_path / "run", "elsewhere", resume="strict", train__max_tokens=1280)
    assert "init_from = elsewhere: was" in refusal(strict, 2)


def test_an_ngpt_begins_with_what_its_gains_acted_as(corpus, tmp_path, capfd):
    """Whatever multiples they are stored in: here alpha's and s_z's follow another size."""
    small = {"growth": {}, "train__max_tokens": 512}
    first = run_config(corpus, tmp_path / "first", [{}] * 3, **small)
    start(first, 1)
    tuned = {"d_model": 24, "n_layers": 6, "steps": 4}
    second = run_config(
        corpus, tmp_path / "second", [{}] * 3, **small, init_from=str(tmp_path / "first"), optimizer__transfer=tuned
    )
    (before,), (after,) = (resolve_stages(config, 1) for config in (first, second))
    assert after.model.alpha_init == pytest.approx(2 * before.model.alpha_init)
    assert after.model.s_z_init == pytest.approx(1.5**0.5 * before.model.s_z_init)
    start(second, 1)
    ended, begun = rows_of(first, "eval")[-1], rows_of(second, "eval")[0]
    assert ended["step"] == 4
    assert begun["loss"] == pytest.approx(ended["loss"], abs=1e-6)
    capfd.readouterr()
    for dtype in ("float32", "bfloat16"):  # of which the second has rounded the rows: that is told
        with OpenFiles() as files:
            convert(open_source(tmp_path / "first", files), tmp_path / dtype, "hf", dtype=dtype)
        origin = {"init_from": str(tmp_path / dtype), "train__max_tokens": 128}
        start(run_config(corpus, tmp_path / f"of {dtype}", [{}] * 3, **small | origin), 1)
        told = "init_from: rows are not unit vectors, by up to 0.00"
        assert (told in capfd.readouterr().err) == (dtype == "bfloat16")


def test_another_model_is_refused(corpus, qwen, tmp_path):
    before = tree(tmp_path)
    for origin, change in ((qwen[1], {"model__d_ff": 64}), (qwen[2], {"model__tie_embeddings": False})):
        config = config_of(corpus, tmp_path / "runs/run", origin, **change)
        told = "model.d_ff = 64: is 62 in" if "model__d_ff" in change else "model.tie_embeddings = False: is True in"
        assert told in refusal(config, 2)
        assert tree(tmp_path) == before
    (tmp_path / "run").mkdir()
    assert "checkpoint = " in refusal(config_of(corpus, tmp_path / "run", tmp_path / "nothing"), 2)
    assert tree(tmp_path).keys() == before.keys() | {"run"}  # it was there


def test_data_of_another_tokenizer_is_refused(corpus, qwen, tmp_path):
    """Whether the weights are a checkpoint's or lie in a Hugging Face directory. That one's own data goes."""
    folder = shutil.copytree(qwen[1], tmp_path / "hf")
    own = folder / "tokenizer.json"
    for name in ("train", "valid"):
        for ending in ("bin", "idx"):
            shutil.copy(corpus / f"{name}.{ending}", tmp_path)
    with OpenFiles() as files:
        convert(open_source(folder, files), tmp_path / "with", "checkpoint")

    def problem(origin, sha256):
        for name in ("train", "valid"):
            meta = {"vocab_size": VOCAB, "n_tokens": IndexedTokens(tmp_path / name).n_tokens}
            meta |= {"tokenizer_sha256": sha256, "tokenizer": "mine.json"}
            meta_path(tmp_path / name).write_text(json.dumps(meta))
        config = config_of(tmp_path, tmp_path / "run", origin)
        sources = open_sources(config, resolve_stages(config, 2))
        try:
            check_tokenizer(read_description(origin), sources)
        except UserError as error:
            return str(error)
        return None

    other = "0" * 64
    for origin, where in ((folder, folder), (tmp_path / "with", tmp_path / "with/checkpoints")):
        assert problem(origin, Tokenizer(own).sha256) is None
        told = problem(origin, other)
        whose = (
            f"data = {tmp_path}/train (made with mine.json): belongs to another tokenizer than the weights of {where}"
        )
        assert told.startswith(whose)
        assert told in refusal(config_of(tmp_path, tmp_path / "run", origin), 2)
        assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_no_export_could_carry_is_refused_before_training(corpus, qwen, tmp_path):
    """It lies with the weights and no key names it: it would go into every checkpoint."""
    folder = shutil.copytree(qwen[1], tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    config = config_of(corpus, tmp_path / "run", folder)
    stage = resolve_stages(config, 2)[0]

    def problem():
        with pytest.raises(UserError) as caught:
            check_taken_over(read_description(folder), config, stage)
        return str(caught.value)

    remedy = "begin from a copy of the weights without it, or name another as data.tokenizer"
    train_tokenizer(["the cat sees the dog " * 50], 270, folder / "tokenizer", "bpe")
    rows = f"model.vocab_size: 270, extend_vocabulary: true, data.tokenizer: {folder}"
    more = f"holds a tokenizer that has 270 pieces, model.vocab_size is {VOCAB}; give its pieces rows: {rows}; or begin"
    more += " from a copy of the weights without it"
    assert problem() == f"init_from = {folder}: {more}"
    words = io.BytesIO()
    texts = iter(["the cat sees the dog"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=words, model_type="word", vocab_size=7, minloglevel=2, num_threads=1
    )
    (folder / "tokenizer.model").write_bytes(words.getvalue())
    assert problem().startswith(f"init_from = {folder}: holds a tokenizer that is a SentencePiece model of words")
    assert problem().endswith(remedy)
    assert problem() == refusal(config, 2)
    assert not (tmp_path / "run").exists()
    named = config_of(corpus, tmp_path / "run", folder, data__tokenizer=str(qwen[1]))
    check_taken_over(read_description(folder), named, stage)
    check_taken_over(read_description(qwen[1]), config, stage)


def test_data_of_more_ids_than_the_weights_is_told_what_to_do(corpus, qwen, tmp_path):
    """The model's vocabulary is not the run's to set: its tokenizer is to be used, or the vocabulary extended."""
    for path in corpus.glob("train.*"):
        shutil.copy(path, tmp_path)
    meta = json.loads(meta_path(tmp_path / "train").read_text()) if meta_path(tmp_path / "train").exists() else {}
    meta |= {"vocab_size": 100, "n_tokens": IndexedTokens(tmp_path / "train").n_tokens}
    meta_path(tmp_path / "train").write_text(json.dumps(meta))
    for changes, told in (
        ({}, f"make it with the tokenizer of {qwen[1]}; or, if its tokenizer has all pieces of that one and more, set"),
        ({"extend_vocabulary": True, "data__tokenizer": "given"}, "set the model's vocab_size to the data's or more"),
    ):
        config = config_of(corpus, tmp_path / "run", qwen[1], data__train=str(tmp_path / "train"), **changes)
        with pytest.raises(UserError, match=f"was made with vocab_size 100, the model has {VOCAB}; {re.escape(told)}"):
            open_sources(config, resolve_stages(config, 2))


def test_weights_are_no_run(corpus, qwen):
    _, _, origin = qwen
    config = config_of(corpus, origin, origin)
    problem = "holds step-00000000, weights without a run; give it as init_from, with another run_dir"
    assert problem in refusal(config, 2)


def test_of_a_model_of_the_hub_the_description_alone_is_looked_at(corpus, qwen, tmp_path, monkeypatch):
    def snapshot(name, allow_patterns):
        assert allow_patterns == ["config.json"]
        (tmp_path / "hub").mkdir(exist_ok=True)
        shutil.copy(qwen[1] / "config.json", tmp_path / "hub")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    stage = resolve_stages(config_of(corpus, tmp_path / "run", "owner/model"), 2)[0]
    said = read_description("owner/model")
    assert said.state.model == read_description(qwen[1]).state.model
    check_begins(said, stage)
    narrower = config_of(corpus, tmp_path / "run", "owner/model", model=said.state.model.model_dump() | {"d_ff": 60})
    with pytest.raises(UserError, match=r"model.d_ff = 60: is 62 in .*hub"):
        check_begins(said, resolve_stages(narrower, 2)[0])


def test_a_tokenizer_that_cannot_be_read_is_refused(corpus, qwen, tmp_path):
    folder = shutil.copytree(qwen[1], tmp_path / "hf")
    assert unread_tokenizer(read_description(folder)) == ""
    (folder / "tokenizer.json").write_text("{}")
    assert unread_tokenizer(read_description(folder)).startswith(
        "is JSON, and no tokenizer.json: it has no model; give its"
    )
    config = config_of(corpus, tmp_path / "run", folder)
    told = refusal(config, 2)
    assert f"init_from = {folder}: its tokenizer is JSON, and no tokenizer.json: it has no model; give its" in told
    assert "or leave it behind: begin from what megabus convert --to checkpoint --without-tokenizer makes" in told
    assert not (tmp_path / "run").exists()
    (folder / "tokenizer.json").unlink()
    assert unread_tokenizer(read_description(folder)) == unread_tokenizer(read_description(qwen[2])) == ""


def test_all_ranks_show_life_while_one_downloads(qwen):
    def fetch(error):
        beats = []

        def slow(path):
            time.sleep(0.5)
            if error:
                raise UserError("model", path, "is gone", "find it")
            return qwen[1]

        begin.BEAT, begin.model_at = 0.05, slow
        try:
            return origin_of("owner/model", lambda: beats.append(0)).folder, len(beats)
        except UserError as told:
            return str(told), len(beats)

    for error, answer in ((False, qwen[1]), (True, "model = owner/model: is gone; find it")):
        for told, beats in run_ranks(2, fetch, error):
            assert told == answer
            assert beats >= 4
