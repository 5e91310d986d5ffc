"""Samples while a run trains: what one plain process writes of the same weights, in every layout, and for nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import megabus
from megabus.config import resolve_stages
from megabus.config.schema import SamplesConfig
from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError
from megabus.generate import generate
from megabus.splitmix import mix64
from megabus.train import samples
from megabus.train.samples import check_prompts
from tests.support.small_runs import after_step, quick_config, refusal, rows_of, start, write_corpus
from tests.support.small_tokenizer import make_tokenizer

PROMPTS = ["the quick brown", "", "jam"]
LAYOUTS = [{"tp": 2, "pp": 2}, {"pp": 2, "dp": 2}, {"dp": 4}]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder), make_tokenizer(folder)


def configured(data, run_dir, samples, layouts=LAYOUTS, **changes):
    corpus, tokenizer = data
    keys = {"data__tokenizer": str(tokenizer), "model__vocab_size": 301}
    return quick_config(corpus, run_dir, layouts, log={"samples": samples}, **keys | changes)


def test_they_are_those_of_one_process_and_leave_training_alone(data, tmp_path, capfd):
    """Tensor, sequence, pipeline and data parallel ranks, through two growths; the training's bits do not change."""
    samples = {"every": 3, "prompts": PROMPTS, "max_tokens": 6}
    stages = [
        {"d_model": 52, "n_heads": 3, "d_ff": 90, "max_tokens": 512, "layout": LAYOUTS[1]},
        {"n_layers": 5, "seq_len": 32, "lr": 3e-3, "layout": LAYOUTS[2]},
    ]
    parallel = {"train__sequence_parallel": True, "growth__stages": stages, "growth__max_tokens": 512}
    parallel |= {"train__max_tokens": 1800, "eval__every": 8}
    config = configured(data, tmp_path / "run", samples, **parallel)
    ranks = start(config, 4)
    out = capfd.readouterr().out
    plain = start(configured(data, tmp_path / "plain", None, **parallel), 4)
    assert [rank.steps for rank in ranks] == [rank.steps for rank in plain]
    assert not rows_of(configured(data, tmp_path / "plain", None), "sample")
    rows, last = rows_of(config, "sample"), ranks[0].numbers[-1]
    assert [row["step"] for row in rows] == [*range(3, last, 3), last]
    assert {row["stage"] for row in rows} == {0, 1, 2}

    model, tokenizer = megabus.load(config.run_dir), Tokenizer(data[1])
    for number, (prompt, sample) in enumerate(zip(PROMPTS, rows[-1]["samples"], strict=True)):
        ids = tokenizer.encode(prompt) or [tokenizer.eod]
        options = {"temperature": 0.8, "stop": tokenizer.eos, "n_ids": tokenizer.vocab_size}
        seed = mix64(mix64(mix64(config.train.seed) ^ last) ^ number) >> 1
        told = list(generate(model, ids, 6, seed=seed, **options))
        assert sample["prompt"] == prompt
        assert tokenizer.decode(ids) + sample["text"] == tokenizer.decode(ids + told)
        assert told != list(generate(model, ids, 6, seed=seed + 1, **options))  # control: draws do depend on the seed
    texts = [(row["step"], text["prompt"] + text["text"]) for row in rows for text in row["samples"]]
    shown = [f"step {step:>5} | sample: {text}\n" for step, text in texts if text.isprintable()]
    assert shown
    assert [line for line in shown if line not in out] == []


def test_no_id_that_is_no_token_is_drawn(monkeypatch):
    """Neither one beyond the tokenizer's, whose vocabulary was padded, nor one in a gap of it."""
    parts = {"vocab_size": 5, "eos": None, "prefix": [], "encode": lambda text: [0], "decode": str}
    logits, drawn = torch.tensor([0.0, 1.0, 2.0, 50.0, 3.0, 99.0]), []
    monkeypatch.setattr(samples, "continuations", lambda *given: [[drawn.append(given[3](0, logits)) or 0]])
    doing = {"watchdog": SimpleNamespace(heartbeat=lambda *_: None), "tell": lambda *_: None, "engine": None}
    run = SimpleNamespace(progress=SimpleNamespace(step=3), **doing)
    for gaps in ([], [3]):
        known = SimpleNamespace(gaps=gaps, **parts)
        samples.Samples(SamplesConfig(every=1, prompts=["a"], temperature=0), known, 0)._write(run)
    assert drawn == [3, 4]


def test_a_model_that_has_diverged_writes_nothing(data, tmp_path):
    """Its run returns to a checkpoint as it would without."""

    def poison(run):
        next(run.engine.module.parameters()).data.fill_(torch.nan)

    keys = {"faults": {"max_skips": 0}, "checkpoint": {"every": 2}, "train__max_tokens": 128 * 6}
    config = configured(data, tmp_path / "run", {"every": 1, "prompts": PROMPTS, "max_tokens": 3}, [{}] * 3, **keys)
    (rank,) = start(config, 1, after_step(3, poison, times=1))
    assert rank.numbers == [1, 2, 3, 4, 3, 4, 5, 6]
    rows = rows_of(config, "sample")
    assert [row["step"] for row in rows] == rank.numbers
    texts = [{sample["text"] for sample in row["samples"]} for row in rows]
    assert texts.pop(3) == {""}
    assert {""} not in texts


def test_what_does_not_fit_is_refused_at_the_start(data, tmp_path):
    samples = {"every": 5, "prompts": ["jam", "the quick brown fox jumps over the lazy dog"], "max_tokens": 14}
    config = configured(data, tmp_path / "run", samples, [{}] * 3)
    n = len(Tokenizer(data[1]).encode(samples["prompts"][1]))
    told = f"{samples['prompts'][1][:40]}…: is {n} tokens, and with log.samples.max_tokens = 14 exceeds seq_len = 16; "
    assert refusal(config, 1).startswith(f"log.samples.prompts.1 = {told}")
    assert not (tmp_path / "run").exists()
    phases = {"train__phases": [{"share": 0.5, "seq_len": 8}], "growth": {}}
    config = configured(data, tmp_path / "run", samples | {"prompts": ["jam"], "max_tokens": 8}, [{}] * 3, **phases)
    with pytest.raises(UserError, match="exceeds seq_len = 8; shorten it"):
        check_prompts(config, resolve_stages(config, 1))
    config = configured(data, tmp_path / "run", samples | {"prompts": ["jam", "\ud83d"]}, [{}] * 3)
    with pytest.raises(UserError, match=r"^log\.samples\.prompts\.1 = '\\ud83d': has half a letter, "):
        check_prompts(config, resolve_stages(config, 1))
    told = "data.tokenizer = (missing): log.samples needs it; name what made the data"
    assert refusal(configured(data, tmp_path / "run", samples, [{}] * 3, data__tokenizer=None), 1) == told
    with pytest.raises(UserError, match=r"log\.samples\.prompts = \[\]"):
        configured(data, tmp_path / "run", samples | {"prompts": []})
