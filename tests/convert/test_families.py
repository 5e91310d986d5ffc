"""Transformers' own decoders: in, grown by a fraction, out as the same class; and what is refused, by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.sources import MemorySource, model_config

import megabus
from megabus.cli import convert as convert_command
from megabus.convert import hub, verify_logits
from megabus.convert.begin import read_description
from megabus.convert.changed import unit_error
from megabus.convert.convert import convert, open_source
from megabus.convert.hugging_face import model_of
from megabus.convert.source import OpenFiles
from megabus.convert.verify import verify
from megabus.errors import UserError

torch.set_num_threads(1)
TOKENS = torch.randint(67, (3, 40), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "num_attention_heads": 6, "head_dim": 10}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (
        transformers.Qwen3Config,
        {"head_dim": 10, "tie_word_embeddings": True, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
}
PLENTY = (99, 10**9)  # tensors, and bytes of them


def stock(name, folder, **more):
    """A model of random weights, gains and biases, as its owners save it."""
    sizes = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 62, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")) | {"max_position_embeddings": 64}
    kind, own = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes | heads | ids | own | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def apart(logits, wanted):
    return float((logits - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_comes_in_grows_and_goes_out(tmp_path, name):
    model = stock(name, tmp_path / "hf")
    wanted = model(TOKENS).logits
    with OpenFiles() as files:
        source = open_source(tmp_path / "hf", files)
        convert(source, tmp_path / "run", "checkpoint", (2, 2, 1))
        convert(open_source(tmp_path / "run", files), tmp_path / "out", "hf", max_shard_bytes=60_000)
        assert verify(source, open_source(tmp_path / "out", files)) > 0
    ours = megabus.load(tmp_path / "hf")
    assert apart(ours(TOKENS), wanted) <= 1e-5
    old = megabus.load(tmp_path / "run").state_dict()
    assert all(old[key].equal(value) for key, value in ours.state_dict().items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(model)
    assert again(TOKENS).logits.equal(wanted)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    n_heads = ours.config.n_heads * 3 // 2
    larger = ours.config.grown(d_model=72, n_heads=n_heads, n_kv_heads=3, d_ff=90, n_layers=5)
    grown = MemorySource(larger)
    state = megabus.grow_state(ours.state_dict(), ours.config, larger, seed=0)
    grown.tensors |= {("weight", key): values for key, values in state.items()}
    convert(grown, tmp_path / "grown", "hf")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32).eval()
    assert type(out) is type(model)
    assert apart(out(TOKENS).logits, wanted) <= 1e-5
    for p in (p for n, p in out.named_parameters() if "layers.1.self_attn" in n and "o_proj" not in n):
        p.mul_(1.3)  # control: each family's own part among them
    assert apart(out(TOKENS).logits, wanted) > 1e-3


def test_what_is_not_computed_is_refused_by_name(tmp_path):
    for name, change, told in (
        ("mistral", {"sliding_window": 32}, "sliding_window = 32: is shorter than max_position_embeddings = 64, and"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True: is not supported; only False is"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types = 'sliding_attention': is not supported"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, r"no_rope_layers = \[0, 1, 1, 1\]: are no layers at equal"),
        (
            "llama",
            {"rope_parameters": {"full": {"rope_theta": 5.0}}},
            "config.json 'full' = .*: is a RoPE of some layers",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope': is not supported"),
        (
            "llama",
            {"model_type": "olmo2"},
            "model_type = 'olmo2': is none .* over all heads together.*; give one of llama",
        ),
        (
            "llama",
            {"model_type": "gpt_neox"},
            "= 'gpt_neox': is none that megabus computes; give one of llama, mistral",
        ),
    ):
        stock(name, tmp_path / name)
        good = json.loads((tmp_path / name / "config.json").read_text())
        model_of(good, tmp_path, *PLENTY)
        with pytest.raises(UserError, match=told):
            model_of(good | change, tmp_path, *PLENTY)


def test_of_two_ropes_the_one_counts_that_transformers_reads(tmp_path):
    """Whatever stands in rope_scaling, and then nothing of rope_parameters; a length beside them before their own."""
    stock("qwen2", tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    theta = {"rope_type": "default", "rope_theta": 7.0}
    for change in (
        {"rope_scaling": YARN, "rope_parameters": theta},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": theta, "rope_theta": 77.0},
        {"rope_scaling": {}, "rope_parameters": theta, "rope_theta": 77.0},
        {"rope_scaling": None, "rope_parameters": YARN, "original_max_position_embeddings": 8},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with torch.no_grad():
            wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(TOKENS).logits
            assert apart(megabus.load(tmp_path)(TOKENS), wanted) <= 1e-5, change


def test_a_tie_that_the_weights_contradict_is_told_and_a_copy_is_not(tmp_path):
    stock("qwen2", tmp_path, num_hidden_layers=1)
    (path,) = (p for p in tmp_path.glob("model*.safetensors") if "model.norm.weight" in load_file(p))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    embed = load_file(tmp_path / index["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    index["weight_map"]["lm_head.weight"] = path.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for head, told in ((embed, None), (embed + 0.01, "another lm_head.weight"), (embed[:50], "another lm_head.weight")):
        save_file(load_file(path) | {"lm_head.weight": head.clone()}, path, {"format": "pt"})
        with OpenFiles() as files:
            if told is None:
                assert open_source(tmp_path, files).state.model.tie_embeddings
                continue
            with pytest.raises(UserError, match=told):
                open_source(tmp_path, files)


@torch.no_grad()
def test_untying_is_an_option(tmp_path, capsys):
    model = stock("qwen2", tmp_path / "hf", num_hidden_layers=1)
    convert_command.main([str(tmp_path / "hf"), str(tmp_path / "run"), "--to", "checkpoint", "--untie", "--verify"])
    assert "of those of transformers' Qwen2ForCausalLM" in capsys.readouterr().out
    ours = megabus.load(tmp_path / "run")
    assert not ours.config.tie_embeddings
    assert apart(ours(TOKENS), model(TOKENS).logits) <= 1e-5
    with pytest.raises(UserError, match="--untie = True: the head is its own already"):
        convert_command.main([str(tmp_path / "run"), str(tmp_path / "no"), "--to", "checkpoint", "--untie"])


def test_verify_compares_logits(tmp_path, monkeypatch):
    stock("mistral", tmp_path / "hf", num_hidden_layers=1)
    with OpenFiles() as files:
        convert(open_source(tmp_path / "hf", files), tmp_path / "run", "checkpoint")
    assert "of the largest" in verify_logits.verify_logits(tmp_path / "hf", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed" in verify_logits.verify_logits(tmp_path / "hf", tmp_path / "run")
    monkeypatch.undo()
    spoilt = megabus.load(tmp_path / "run")
    spoilt.get_parameter("layers.0.attn.q").data *= 1.1
    monkeypatch.setattr(verify_logits, "load", lambda path: spoilt)
    with pytest.raises(UserError, match="logits: differ from those of transformers' MistralForCausalLM by"):
        verify_logits.verify_logits(tmp_path / "hf", tmp_path / "run")


def test_rows_that_are_no_unit_vectors_are_told_and_made_so(tmp_path, capsys):
    """As an export in bfloat16 has them."""
    convert(MemorySource(model_config("ngpt")), tmp_path / "hf", "hf", dtype="bfloat16")
    for out, words in (("told", []), ("made", ["--unit-rows", "--verify"])):
        convert_command.main([str(tmp_path / "hf"), str(tmp_path / out), "--to", "checkpoint", *words])
        assert ("rows are no unit vectors, by up to 0.00" in capsys.readouterr().out) == (out == "told")
        with OpenFiles() as files:
            error, _ = unit_error(open_source(tmp_path / out, files))
        assert (error > 1e-4) == (out == "told")
        assert error < 1e-6 or out == "told"
    stock("llama", tmp_path / "llama", num_hidden_layers=1)
    with pytest.raises(UserError, match="--unit-rows = True: the model has no unit rows"):
        convert_command.main([str(tmp_path / "llama"), str(tmp_path / "no"), "--to", "checkpoint", "--unit-rows"])


def test_a_path_that_is_too_long_is_one_line(tmp_path):
    """255 characters are what a file system allows of a part; of what is read, and of what is written."""
    long = tmp_path / ("x" * 256)
    for call in (lambda: hub.local_copy(long), lambda: megabus.load(long), lambda: read_description(str(long))):
        with pytest.raises(
            UserError, match=r"^model = .*xxx: cannot be looked for \(File name too long\); give another"
        ):
            call()
    with pytest.raises(UserError, match=r"^out = .*xxx: cannot be written \(.*File name too long"):
        convert(MemorySource(model_config("ngpt")), long, "checkpoint")


def test_a_name_of_the_hub_is_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name.startswith("gone/"):
            raise OSError("no such\nthing")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.local_copy("owner/model-1.5B") == tmp_path
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0][1])
    assert hub.local_copy(tmp_path) == tmp_path
    assert hub.local_copy("no/such/folder").parts == ("no", "such", "folder")
    with pytest.raises(
        UserError, match=r"model = gone/model: is no directory, and the hub does not give it \(no such th"
    ):
        megabus.load("gone/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is needed; install it"):
        hub.local_copy("owner/model")
