"""Sampling: with cached keys and values it is what the model says without; seeds, top-k and top-p do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

import megabus
from megabus.checkpoint.load import checkpoint_at
from megabus.convert.convert import convert
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.errors import UserError
from megabus.generate import chosen, generate
from megabus.model.layers import KVCache
from tests.support.command import run_command
from tests.support.small_models import PART_IDS, PARTS
from tests.support.sources import MemorySource, model_config

ROOT = Path(__file__).parents[2]


def model(kind="ngpt", **changes):
    source = MemorySource(model_config(kind, **changes))
    built = megabus.build_model(source.state.model)
    built.load_state_dict(source.weights())
    return built.eval()


@pytest.mark.parametrize(
    ("kind", "parts"), [("ngpt", {}), ("gpt", {}), *(("gpt", parts) for parts in PARTS)], ids=["ngpt", "gpt", *PART_IDS]
)
@torch.no_grad()
def test_a_cache_changes_nothing(kind, parts):
    decoder, tokens = model(kind, **parts), torch.randint(67, (2, 30), generator=torch.Generator().manual_seed(0))
    whole, cache, start = decoder(tokens), KVCache(), 0
    for size in (1, 7, 1, 1, 13, 7):  # one token, and several, after others
        part = decoder(tokens[:, start : start + size], cache)
        assert (part - whole[:, start : start + size]).abs().max() <= 1e-5
        start += size
    assert cache.length == start == 30


def test_a_model_that_has_diverged_is_told():
    decoder = model()
    with torch.no_grad():
        next(decoder.parameters()).fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=r"^logits = nan: is no number: the model has diverged"):
            list(generate(decoder, [3, 1], 4, temperature=temperature))


def test_greedy_is_the_models_own_choice():
    decoder, ids = model(), [3, 1, 4]
    for token in generate(decoder, ids[:3], 20, temperature=0):
        with torch.no_grad():
            assert token == int(decoder(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 23


def test_the_seed_decides():
    decoder = model()
    a, b, c = (list(generate(decoder, [1, 2], 30, seed=seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_no_id_beyond_the_tokenizers_is_taken():
    """Where the vocabulary is padded, whatever its last rows say."""
    decoder = model("gpt", tie_embeddings=True)
    decoder.embed.weight.data[60:] *= 30
    options = {"temperature": 2.0, "top_p": 0.9}
    assert max(generate(decoder, [1], 40, **options)) >= 60
    for other in (options, {"temperature": 0}, {"temperature": 50.0, "top_k": 67}):
        assert max(generate(decoder, [1, 66], 40, n_ids=60, **other)) < 60
        assert max(generate(decoder, [1, 66], 40, never=[*range(60, 67)], **other)) < 60  # as ids that are no token
    for n_ids in (0, 68):
        with pytest.raises(UserError, match=f"n_ids = {n_ids}: is out of range"):
            generate(decoder, [1], 1, n_ids=n_ids)


def test_generation_ends_before_the_stop():
    decoder = model()
    tokens = list(generate(decoder, [1], 50, temperature=2.0, seed=3))
    stop = tokens[20]
    assert list(generate(decoder, [1], 50, temperature=2.0, seed=3, stop=stop)) == tokens[: tokens.index(stop)]


def test_samples_have_the_models_shares():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    shares, draw = logits.softmax(0), torch.Generator().manual_seed(0)

    def counts(**options):
        drawn = torch.tensor([chosen(logits, draw, 1.0, options.get("k"), options.get("p", 1.0)) for _ in range(4000)])
        return drawn.bincount(minlength=5) / 4000

    assert (counts() - shares).abs().max() < 0.03
    top2 = shares[:2] / shares[:2].sum()
    assert (counts(k=2)[:2] - top2).abs().max() < 0.03
    assert counts(k=2)[2:].sum() == 0
    assert counts(p=0.5)[0] == 1  # the first alone has 0.64
    assert counts(p=0.7)[2:].sum() == 0 < counts(p=0.7)[1]


def test_temperature_divides_the_logits():
    """The shares of first tokens at temperature 0.1, whatever the seed; and none too small to divide by."""
    decoder = model()
    with torch.no_grad():
        logits = decoder(torch.tensor([[5]]))[0, -1]
    drawn = [next(generate(decoder, [5], 1, temperature=0.1, seed=seed)) for seed in range(1000)]
    shares = torch.tensor(drawn).bincount(minlength=67) / 1000
    assert (shares - (logits / 0.1).softmax(0)).abs().max() < 0.04 < (shares - logits.softmax(0)).abs().max()
    assert next(generate(decoder, [5], 1, temperature=1e-42)) == int(logits.argmax())


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"prompt": []}])
def test_bad_arguments(bad):
    options = {"prompt": [1]} | bad
    with pytest.raises(UserError, match=next(iter(bad))):
        next(generate(model(), options.pop("prompt"), 1, **options))


def test_the_command_begins_as_the_post_processor_does(tmp_path):
    """With BOS, of which an empty prompt is made; what is printed is text alone."""
    path = train_tokenizer(["the cat sees the dog " * 50], 265, tmp_path / "tokenizer")
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 265)])
    backend.save(str(path))
    source = MemorySource(model_config("ngpt", vocab_size=290))
    source.tokenizer = path
    convert(source, tmp_path / "run", "checkpoint")
    decoder = megabus.load(tmp_path / "run")
    for prompt in ("the cat", ""):
        ids = [265, *Tokenizer(path).encode(prompt)]
        drawn = generate(decoder, ids, 5, temperature=0, stop=0, n_ids=266)
        ended = run_command("generate", tmp_path / "run", "--prompt", prompt, "--max-tokens", 5, "--temperature", 0)
        assert ended.stdout == Tokenizer(path).decode([*ids, *drawn]) + "\n", ended.stderr


@pytest.mark.parametrize(("model_type", "vocab_size"), [("bpe", 290), ("byte-bpe", 384)])
def test_the_command(tmp_path, model_type, vocab_size):
    text = "the cat sees the dog and the dog sees the cat " * 50
    path = train_tokenizer([text], 290 if model_type == "bpe" else 268, tmp_path / "tok", model_type)
    source = MemorySource(model_config("ngpt", vocab_size=vocab_size))
    source.tokenizer = path
    convert(source, tmp_path / "run", "checkpoint")
    convert(source, tmp_path / "hf", "hf")
    command = ["generate", tmp_path / "run", "--prompt", "the cat", "--max-tokens", "9"]
    ended = run_command(*command)
    assert ended.returncode == 0, ended.stderr
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("the cat")
    for argument, status in (("\udce9", 2), ("é", 0)):  # a byte of the command line that is no UTF-8
        ended_so = run_command("generate", tmp_path / "run", "--prompt", argument, "--max-tokens", "1")
        assert ended_so.returncode == status
    options = {"temperature": 0.8, "stop": tokenizer.eod, "n_ids": tokenizer.vocab_size}
    drawn = list(generate(megabus.load(tmp_path / "run"), ids, 9, **options))
    assert ended.stdout == tokenizer.decode(ids + drawn) + "\n"
    # The same ids; of bytes that are no UTF-8 its tokenizer.json makes another text than SentencePiece.
    exported = run_command("generate", tmp_path / "hf", *command[2:])
    assert exported.stdout == Tokenizer(tmp_path / "hf").decode(ids + drawn) + "\n"
    config, n = json.loads((tmp_path / "hf/config.json").read_text()), len(ids + drawn)
    for context in (n, n - 1):
        (tmp_path / "hf/config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
        again = run_command("generate", tmp_path / "hf", *command[2:])
        assert again.stdout == exported.stdout
        assert again.stderr.count(
            f"warning: {n} tokens with the prompt, and the model's longest context is {n - 1}: "
        ) == (context < n)
    bad = run_command(*command, "--tokenizer", tmp_path / "no.model")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: tokenizer = ")
    other = train_tokenizer([text], 289 if model_type == "bpe" else 267, tmp_path / "other", model_type)
    bad = run_command(*command, "--tokenizer", other)
    assert bad.returncode == 2
    folder = checkpoint_at(tmp_path / "run")
    assert bad.stderr.startswith(f"error: tokenizer = {other}: is another than the one saved in {folder}; leave it out")
    assert run_command(*command, "--tokenizer", path).stdout == ended.stdout
    command[1] = tmp_path / "hf"
    told = f"error: tokenizer = {other}: is another than the one saved in {command[1]}; leave it out"
    assert run_command(*command, "--tokenizer", other).stderr.startswith(told)
    assert run_command(*command, "--tokenizer", path).stdout == ended.stdout
