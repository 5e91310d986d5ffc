"""Transformers' own decoders: in, grown by a fraction, out as the same class; and what is refused, by name."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import megabus
from megabus import extras
from megabus.cli import convert as convert_command
from megabus.convert import verify_logits
from megabus.convert.begin import read_description
from megabus.convert.changed import unit_error
from megabus.convert.convert import convert, model_at, open_source
from megabus.convert.hugging_face import model_of
from megabus.convert.source import OpenFiles
from megabus.convert.verify import verify
from megabus.errors import UserError
from megabus.model.layers import rope_frequencies
from tests.support.families import (
    FAMILIES,
    LAYOUTS,
    LIMIT,
    TOKENS,
    YARN,
    apart,
    begun,
    compared,
    grown_source,
    larger,
    loaded,
    stock,
    trained,
)
from tests.support.small_runs import write_corpus
from tests.support.sources import MemorySource, model_config

torch.set_num_threads(1)
PLENTY = (99, 10**9)  # tensors, and bytes of them


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
    again = loaded(tmp_path / "out")
    assert type(again) is type(model)
    assert again(TOKENS).logits.equal(wanted)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    convert(grown_source(ours, larger(ours.config)), tmp_path / "grown", "hf")
    out = loaded(tmp_path / "grown")
    assert type(out) is type(model)
    assert apart(out(TOKENS).logits, wanted) <= 1e-5
    for p in (p for n, p in out.named_parameters() if "layers.1.self_attn" in n and "o_proj" not in n):
        p.mul_(1.3)  # control: each family's own part among them
    assert apart(out(TOKENS).logits, wanted) > 1e-3


@pytest.mark.parametrize("name", ["llama", "smollm3"])
def test_a_family_is_trained_and_grown_on_four_ranks(tmp_path, name):
    """A row of the table that `python -m tests.families` prints of all families and two layouts."""
    theirs, ours = begun(name, tmp_path)
    config = trained(tmp_path, write_corpus(tmp_path), LAYOUTS[1], ours.config)
    assert compared(theirs, ours, [config], tmp_path).is_well
    with torch.no_grad():
        theirs.model.layers[1].self_attn.k_proj.weight.mul_(1.3)
    spoilt = compared(theirs, ours, [config], tmp_path)  # control
    assert min(spoilt.imported, spoilt.grown) > 1e-3
    assert spoilt.ranks[0] > 3 * LIMIT


def test_what_is_not_computed_is_refused_by_name(tmp_path):
    for name, change, told in (
        ("mistral", {"sliding_window": 32}, "sliding_window = 32: is shorter than max_position_embeddings = 64, and"),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types = 'sliding_attention': is not supported"),
        ("llama", {"layer_types": ["chunked_attention"] * 4}, "layer_types = 'chunked_attention': is not supported"),
        (
            "llama",
            {"rope_parameters": YARN | {"attention_factor": 1.4e154}},
            r"attention_factor = 1\.4e\+154: Input should be less than",
        ),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1: is not supported; set it to 0: logits stay"),
        (
            "llama",
            {"attn_logit_softcapping": 50.0},
            r"softcapping = 50.0: is nothing that .* LlamaForCausalLM computes",
        ),
        ("qwen2", {"residual_multiplier": 0.22}, r"residual_multiplier = 0.22: is nothing that .* computes; set it to"),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "is not what a llama is: LlamaForCausalLM alone",
        ),
        (
            "llama",
            {"architectures": ["LlamaForCausalLM", "Other"]},
            r"architectures = \['LlamaForCausalLM', 'Other'\]: is",
        ),
        ("llama", {"architectures": ["MistralForCausalLM"]}, "is not what a llama is"),
        ("qwen3", {"architectures": []}, r"architectures = \[\]: is not what a qwen3 is: Qwen3ForCausalLM alone"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config = {'quant_method': 'fp8'}: is not",
        ),
        ("llama", {"eos_token_id": 67}, "has eos_token_id = 67, and the model ids below 67; set it to one of the"),
        ("llama", {"eos_token_id": [2, 99]}, "has eos_token_id = 99, and"),
        ("llama", {"bos_token_id": -1}, "has bos_token_id = -1, and"),
        ("llama", {"bos_token_id": "1"}, "has bos_token_id = '1', and"),
        ("smollm3", {"pad_token_id": 128004}, "has pad_token_id = 128004, and"),
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
        if not (tmp_path / name).exists():
            stock(name, tmp_path / name)
        good = json.loads((tmp_path / name / "config.json").read_text())
        wanted = model_of(good, tmp_path, *PLENTY)
        with pytest.raises(UserError, match=told):
            model_of(good | change, tmp_path, *PLENTY)
        said_and_nothing = {
            "attention_dropout": 0,
            "attn_logit_softcapping": None,
            "logit_scale": 1.0,
            "num_experts": 0,
            "quantization_config": None,
            "pad_token_id": -1,
            "eos_token_id": [0, 66],
            "bos_token_id": None,
        }
        assert model_of(good | said_and_nothing, tmp_path, *PLENTY) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_leaves_out_is_read_as_transformers_has_it(tmp_path, name):
    """Whatever key is missing, or null, of those that are optional."""
    tree = {"vocab_size": 67, "hidden_size": 384, "intermediate_size": 62, "num_hidden_layers": 4}
    tree |= {"num_attention_heads": 32, "model_type": name}
    tree |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    full = {"num_key_value_heads": 2, "head_dim": 20, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    full |= {"max_position_embeddings": 9000, "sliding_window": 5000, "rope_theta": 500.0}
    cases = [{}, full, *({k: v for k, v in full.items() if k != key} for key in full)]
    nulls = [{"sliding_window": None}, {"rope_parameters": None, "rope_scaling": None}, {"layer_types": None}]
    refused = 0
    for case in [case | more for case in cases + nulls for more in ({}, {"use_sliding_window": True})]:
        theirs = transformers.AutoConfig.for_model(**tree, **case)
        used = name == "mistral" or (name != "llama" and theirs.use_sliding_window)
        window = theirs.sliding_window if used else None
        if window is not None and window < theirs.max_position_embeddings:
            refused += 1
            with pytest.raises(UserError, match=f"sliding_window = {window}: is shorter than max_position_embeddings"):
                model_of(tree | case, tmp_path, *PLENTY)
            continue
        ours = model_of(tree | case, tmp_path, *PLENTY)
        head_dim = getattr(theirs, "head_dim", None) or 384 // 32
        assert (ours.head_dim, ours.kv_heads) == (head_dim, theirs.num_key_value_heads), case
        assert (ours.tie_embeddings, ours.norm_eps) == (theirs.tie_word_embeddings, 384 * theirs.rms_norm_eps), case
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"], case
    assert bool(refused) == (name != "llama")


def test_layers_without_positions_are_those_of_transformers(tmp_path):
    """Whatever of the two keys says it; and where none is, none comes by growing deeper."""
    tree = {"model_type": "smollm3", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 62}
    tree |= {"num_hidden_layers": 5, "num_attention_heads": 4}
    for said in (
        {},
        {"no_rope_layer_interval": 2},
        {"no_rope_layer_interval": 9},
        {"no_rope_layers": [1, 0] * 3, "no_rope_layer_interval": 4},
        {"no_rope_layers": [0] * 5},
        {"no_rope_layers": [1] * 5},
        {"no_rope_layers": [1] * 5, "no_rope_layer_interval": 6},
    ):
        theirs = transformers.AutoConfig.for_model(**tree, **said).no_rope_layers[:5]
        ours = model_of(tree | said, tmp_path, *PLENTY)
        layers = megabus.build_model(ours.grown(n_layers=12)).layers.values()
        turns = [any(layer.attn.frequencies) for layer in layers]
        assert turns[:5] == [bool(one) for one in theirs], said
        assert all(turns[5:]) == (said == {"no_rope_layers": [1] * 5}), said


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 4.0, "rope_theta": 1000.0}
ROPES = [
    YARN | {"attention_factor": 1.1, "beta_fast": 32.0, "beta_slow": 1.0},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    LLAMA3 | {"original_max_position_embeddings": 16},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=["yarn", "mscale", "llama3", "linear"])
def test_numbers_of_any_size_are_refused_or_computed_with(tmp_path, rope):
    """Whatever number config.json says is finite once it is multiplied, squared and put in a logarithm."""
    stock("llama", tmp_path, num_hidden_layers=1)
    good = json.loads((tmp_path / "config.json").read_text()) | {"rope_parameters": rope}
    model_of(good, tmp_path, *PLENTY)
    for size in (5e-324, 1e-154, 1e-8, 1e8, 1.4e154, 1.7e308):
        changes = [{"rope_parameters": rope | {key: size}} for key, value in rope.items() if isinstance(value, float)]
        for change in (*changes, {"rms_norm_eps": size}, {"initializer_range": size}):
            try:
                model = model_of(good | change, tmp_path, *PLENTY)
            except UserError:
                continue
            scale = 1.0 if model.rope_scaling is None else model.rope_scaling.length**2
            assert all(math.isfinite(one) for one in (*rope_frequencies(model), scale, model.norm_eps, model.init_std))


def test_an_export_of_ours_is_refused_for_the_same(tmp_path):
    convert(MemorySource(model_config("ngpt")), tmp_path / "hf", "hf")
    good = json.loads((tmp_path / "hf/config.json").read_text())
    for change, told in (
        ({"eos_token_id": 67}, "eos_token_id = 67"),
        ({"quantization_config": {"bits": 4}}, "not quant"),
    ):
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
    with (
        OpenFiles() as files,
        pytest.raises(UserError, match=r"lacks lm_head.weight in model-.*, where .* puts it"),
    ):
        open_source(tmp_path, files)
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
    assert "as transformers' Qwen2ForCausalLM computes them" in capsys.readouterr().out
    ours = megabus.load(tmp_path / "run")
    assert not ours.config.tie_embeddings
    assert apart(ours(TOKENS), model(TOKENS).logits) <= 1e-5
    with pytest.raises(UserError, match="--untie = True: the head is its own already"):
        convert_command.main([str(tmp_path / "run"), str(tmp_path / "no"), "--to", "checkpoint", "--untie"])


def test_verify_compares_logits(tmp_path, monkeypatch, capfd):
    stock("mistral", tmp_path / "hf", num_hidden_layers=1)
    with OpenFiles() as files:
        convert(open_source(tmp_path / "hf", files), tmp_path / "run", "checkpoint")
    capfd.readouterr()
    told = verify_logits.verify_logits(tmp_path / "hf", tmp_path / "run")
    assert re.fullmatch(r"logits: as transformers' \w+ computes them, within \S+ of the largest \(\S+\)", told)
    assert capfd.readouterr() == ("", "")  # no bars of loading weights
    assert transformers.utils.logging.is_progress_bar_enabled()
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "transformers" else find(name))
    words = ["--to", "checkpoint", "--verify"]
    told = r"--verify = True: needs transformers: pip install megabus\[hf\]; or leave it out"
    with pytest.raises(UserError, match=told):
        convert_command.main([str(tmp_path / "hf"), str(tmp_path / "no"), *words])
    assert not (tmp_path / "no").exists()
    convert_command.main([str(tmp_path / "run"), str(tmp_path / "again"), *words])  # has no logits to compare
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
    for call in (lambda: model_at(long), lambda: megabus.load(long), lambda: read_description(str(long))):
        with pytest.raises(
            UserError, match=r"^model = .*xxx: cannot be looked for \(File name too long\); give another"
        ):
            call()
    with pytest.raises(UserError, match=r"^out = .*xxx: cannot be written \(.*File name too long"):
        convert(MemorySource(model_config("ngpt")), long, "checkpoint")
