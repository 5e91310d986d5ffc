"""What users of transformers do with an exported nGPT beside running it: resize its vocabulary, train it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

import megabus
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from tests.support.sources import MemorySource, model_config

TOKENS = torch.randint(67, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path):
    convert(MemorySource(model_config("ngpt")), tmp_path / "hf", "hf")
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize(("options", "size"), [((70,), 70), ((70, 16), 80), ((50,), 50), ((67,), 67)])
@torch.no_grad()
def test_the_vocabulary_can_be_resized(tmp_path, model, mean_resizing, options, size):
    before, rows, kept = model(TOKENS % 50).logits, model.embed.weight.clone(), min(size, 67)
    gains = model.output.s_z.clone()
    embed = model.resize_token_embeddings(*options, mean_resizing=mean_resizing)
    assert embed is model.get_input_embeddings()
    assert model.config.vocab_size == size
    assert model.output.head.out_features == size
    assert model.output.s_z.shape == (size,)
    assert model.output.s_z.requires_grad
    logits = model(TOKENS % 50).logits
    assert (logits[..., :kept] - before[..., :kept]).abs().max() <= 1e-6
    assert embed.weight[:kept].equal(rows[:kept])
    assert model.output.s_z[:kept].equal(gains[:kept])
    for matrix in (embed.weight, model.output.head.weight):
        assert (matrix.norm(dim=-1) - 1).abs().max() <= 1e-6
    assert torch.isfinite(model(torch.full((1, 3), size - 1), labels=torch.full((1, 3), size - 1)).loss)
    if mean_resizing and size > 67:  # added tokens are as likely as the mean of the others
        mean = gains.mean() * model.output.scale * F.linear(states(model), model.output.head.weight[:67].mean(0))
        assert (logits[..., 67:] - mean[..., None]).abs().max() <= 1e-3
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again").eval()
    assert again(TOKENS % 50).logits.equal(logits)


def states(model):
    return model(TOKENS % 50, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def test_frozen_gains_stay_frozen(model):
    model.requires_grad_(False)
    model.resize_token_embeddings(70)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_embeddings_can_be_set(model):
    before = model(TOKENS).logits
    inputs, outputs = torch.nn.Embedding(67, 36), torch.nn.Linear(36, 67, bias=False)
    inputs.weight.copy_(F.normalize(inputs.weight, dim=-1))
    model.set_input_embeddings(inputs)
    assert model.get_input_embeddings() is model.embed is inputs
    assert not model(TOKENS).logits.equal(before)
    model.set_output_embeddings(outputs)
    assert model.get_output_embeddings() is model.output.head is outputs


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    """Each block is computed twice, and no cache is filled twice."""
    model.train()
    calls = []
    for block in model.layers:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        out = model(TOKENS, labels=TOKENS, use_cache=True)
        out.loss.backward()
        return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, len(calls)

    n_layers = len(model.layers)
    _, plain, once = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out, checkpointed, twice = gradients()
    assert (once, twice) == (n_layers, 2 * n_layers)
    assert all(plain[name].equal(checkpointed[name]) for name in plain)
    assert getattr(out, "cache", None) is None
    model.eval()  # generation has its cache again
    with torch.no_grad():
        options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
        assert model.generate(TOKENS, **options).equal(model.generate(TOKENS, use_cache=False, **options))
    model.train()
    model.gradient_checkpointing_disable()
    assert gradients()[2] == n_layers


@torch.no_grad()
def test_a_resized_export_comes_back(tmp_path, model):
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "again")
    convert(open_source(tmp_path / "again", OpenFiles()), tmp_path / "run", "checkpoint")
    assert (megabus.load(tmp_path / "run")(TOKENS) - model(TOKENS).logits).abs().max() <= 1e-5
