"""Exports in the real transformers: the same logits, the same text with and without a cache; and any Llama comes in."""

from __future__ import annotations

import json
import math
import os
import re
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import megabus
from megabus.convert.convert import convert, open_source
from megabus.convert.hf_rest import copy_rest
from megabus.convert.hugging_face import context_of, model_of
from megabus.convert.load import longest_context
from megabus.convert.source import OpenFiles
from megabus.convert.verify import verify
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.errors import UserError
from tests.support.sources import MemorySource, model_config

TOKENS = torch.randint(67, (3, 20), generator=torch.Generator().manual_seed(0))


def exported(tmp_path, source, **options):
    convert(source, tmp_path / "run", "checkpoint")
    convert(source, tmp_path / "hf", "hf", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float32
    )
    return megabus.load(tmp_path / "run"), model.eval()


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one file", "many files"])
@torch.no_grad()
def test_logits_are_equal(tmp_path, kind, limit):
    ours, theirs = exported(tmp_path, MemorySource(model_config(kind, s_z_init=1.5)), max_shard_bytes=limit)
    assert type(theirs).__name__ == {"ngpt": "NGPTForCausalLM", "gpt": "LlamaForCausalLM"}[kind]
    assert (tmp_path / "hf/model.safetensors").exists() == (limit == 10**9)
    assert (theirs(TOKENS).logits - ours(TOKENS)).abs().max() <= 1e-5
    ours.get_parameter("layers.1.attn.out")[0, 0].add_(0.05)
    assert (theirs(TOKENS).logits - ours(TOKENS)).abs().max() > 1e-4  # control


@torch.no_grad()
def test_generation_with_a_cache_equals_without(tmp_path):
    _, model = exported(tmp_path, MemorySource(model_config("ngpt")))
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        with_cache, without = (
            model.generate(TOKENS, use_cache=cached, **settings, **options) for cached in (True, False)
        )
        assert with_cache.equal(without)
    cached = model(TOKENS[:, :15], use_cache=True)
    parts = [model(TOKENS[:, i : i + 1], past_key_values=cached.past_key_values).logits for i in range(15, 20)]
    whole = model(TOKENS).logits
    assert (torch.cat(parts, 1) - whole[:, 15:]).abs().max() <= 1e-5
    late = model(TOKENS[:, 15:], past_key_values=model(TOKENS[:, :15], use_cache=True).past_key_values).logits
    assert (late - whole[:, 15:]).abs().max() <= 1e-5  # several tokens after the cache


@torch.no_grad()
def test_left_padding_changes_nothing(tmp_path):
    _, model = exported(tmp_path, MemorySource(model_config("ngpt")))
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(TOKENS, attention_mask=mask, position_ids=places).logits
    assert (padded[0, 5:] - model(TOKENS[:1, 5:]).logits[0]).abs().max() <= 1e-5
    assert model(TOKENS, attention_mask=mask).logits.equal(padded)  # positions follow from the mask
    begun = model(TOKENS[:, :12], attention_mask=mask[:, :12])
    later = model(TOKENS[:, 12:], attention_mask=mask, past_key_values=begun.past_key_values).logits
    assert (later - padded[:, 12:]).abs().max() <= 1e-5
    assert (padded[1:] - model(TOKENS[1:]).logits).abs().max() <= 1e-5


def test_the_loss_is_the_models(tmp_path):
    ours, theirs = exported(tmp_path, MemorySource(model_config("ngpt")))
    logits = ours(TOKENS)[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())
    found = theirs(TOKENS, labels=TOKENS, output_hidden_states=True)
    assert abs(float(found.loss - wanted)) <= 1e-5
    assert len(found.hidden_states) == 4
    assert theirs(TOKENS, return_dict=False)[0].equal(found.logits)


def llama(tmp_path, **changes):
    """A stock model of random weights, as its owners save it."""
    sizes = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 62, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.08}
    config = transformers.LlamaConfig(**sizes | heads | changes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama", max_shard_size="100KB")
    return model


PLENTY = (99, 10**9)  # tensors, and bytes of them
ROPE = {
    "plain": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
@torch.no_grad()
def test_any_llama_comes_in_grows_and_goes_out(tmp_path, rope):
    stock = llama(tmp_path, rope_parameters=rope)
    with OpenFiles() as files:
        source = open_source(tmp_path / "llama", files)
        convert(source, tmp_path / "run", "checkpoint", (2, 1, 1))
        convert(open_source(tmp_path / "run", files), tmp_path / "out", "hf")
        assert verify(source, open_source(tmp_path / "out", files)) > 0
    model, logits = megabus.load(tmp_path / "run"), stock(TOKENS).logits
    assert (model(TOKENS) - logits).abs().max() <= 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (again(TOKENS).logits - logits).abs().max() <= 1e-6

    twice = model.config.grown(d_model=96, n_heads=8, n_kv_heads=4, d_ff=124)  # HyperCloning
    fraction = model.config.grown(d_model=60, n_heads=6, n_kv_heads=3, d_ff=90, n_layers=5)  # BUS
    for larger in (twice, fraction):
        grown = megabus.build_model(larger)
        grown.load_state_dict(megabus.grow_state(model.state_dict(), model.config, larger, seed=0))
        assert (grown(TOKENS) - logits).abs().max() <= 1e-5


def test_what_is_no_llama_is_refused(tmp_path):
    llama(tmp_path)
    good = json.loads((tmp_path / "llama/config.json").read_text())
    for change, told in (
        ({"model_type": "phi"}, "model_type = 'phi': is none that megabus computes"),
        ({"attention_bias": True}, "attention_bias = True: is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu: is not supported; only silu is"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic': is not supported"),
    ):
        with pytest.raises(UserError, match=told):
            model_of(good | change, tmp_path, *PLENTY)
    (tmp_path / "llama/config.json").write_text(json.dumps(good | {"intermediate_size": 64}))
    with OpenFiles() as files, pytest.raises(UserError, match=r"has shape .* config\.json says"):
        open_source(tmp_path / "llama", files)
    (tmp_path / "llama/config.json").write_text(json.dumps(good | {"num_hidden_layers": 4}))
    with OpenFiles() as files, pytest.raises(UserError, match=r"lacks model\.layers\.3\."):
        open_source(tmp_path / "llama", files)


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
CHANGED = {
    "ngpt": [
        ({"alpha_init": 0.1}, "alpha_init = 0.1, and 0.05 in its"),
        ({"s_z_init": 2.0}, "s_z_init"),
        ({"rope_frequencies": [1.0, 0.5, 0.2]}, "rope_frequencies"),
        ({"rope_theta": 500.0}, "rope_theta = 500.0, and 10000.0 in its"),
        ({"rope_scaling": LINEAR}, "rope_scaling"),
        ({"rope_parameters": PLAIN | {"rope_theta": 7.0}}, "rope_parameters"),
        ({"num_attention_heads": 2}, "num_attention_heads = 2, and 4 in its"),
        ({"model_type": "llama"}, "model_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
    "gpt": [
        ({"rope_parameters": PLAIN | {"rope_theta": 500.0}}, "rope_parameters"),
        ({"rope_scaling": LINEAR}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}, "rope_scaling"),
        ({"rope_theta": 500.0}, "rope_theta = 500.0, and 10000.0 in its"),
        ({"rope_theta": 500.0, "rope_parameters": ...}, "rope_theta = 500.0, and 10000.0 in its"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps = 0.001, and "),
        ({"rms_norm_eps": ...}, "norm_eps = "),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4, and 2 in its"),
        ({"num_key_value_heads": ...}, "n_kv_heads = 4, and 2 in its"),
        ({"head_dim": ...}, "head_dim = 9, and 6 in its"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True, and False in its"),
        ({"model_type": "mistral"}, "model_type = 'mistral', and 'llama' in its"),
        ({"hidden_size": 72}, "hidden_size"),
    ],
}


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_an_edited_export_is_not_read_as_if_it_were_not(tmp_path, kind):
    """transformers keeps our own section of config.json when it saves a model that was changed."""
    exported(tmp_path, MemorySource(model_config(kind)))
    path = tmp_path / "hf/config.json"
    good = json.loads(path.read_text())
    assert model_of(good | {"max_position_embeddings": 7, "bos_token_id": 3}, path, *PLENTY).kind == kind
    for change, told in CHANGED[kind]:
        edited = {key: value for key, value in (good | change).items() if value is not ...}
        with pytest.raises(UserError, match=f"^config.json = {path}: has {re.escape(told)}.*; set it back"):
            model_of(edited, path, *PLENTY)
    for section, told in (([1], "megabus = [1]: "), (good["megabus"] | {"d_ff": "x"}, "megabus.d_ff = 'x': ")):
        with pytest.raises(UserError, match=rf"config.json = .*: has {re.escape(told)}"):
            model_of(good | {"megabus": section}, path, *PLENTY)
    ours = good | {"megabus": good["megabus"] | {"rope_theta": 500.0}}  # it may be that section that was changed
    with pytest.raises(UserError, match="rope"):
        model_of(ours, path, *PLENTY)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_sections_of_an_exports_rope_count(tmp_path, key):
    """transformers 4 reads one of them, and 5 the other."""
    convert(MemorySource(model_config("gpt", rope_scaling=YARN)), tmp_path / "hf", "hf")
    path = tmp_path / "hf/config.json"
    tree = json.loads(path.read_text())
    assert model_of(tree, path, *PLENTY).rope_scaling.factor == 4.0
    tree[key] |= {"factor": 8.0}
    with pytest.raises(UserError, match=f"has {key} = .*; set it back, or delete that section"):
        model_of(tree, path, *PLENTY)


def test_an_edited_export_without_our_section_is_read_as_transformers_reads_it(tmp_path):
    exported(tmp_path, MemorySource(model_config("gpt")))
    path = tmp_path / "hf/config.json"
    edited = json.loads(path.read_text()) | {"rope_parameters": PLAIN | {"rope_theta": 500.0}, "rms_norm_eps": 1e-3}
    del edited["megabus"]
    model = model_of(edited, path, *PLENTY)
    assert (model.rope_theta, model.norm_eps) == (500.0, pytest.approx(1e-3 * 36))


PARTS = [("ngpt", {}), ("gpt", {"rope_scaling": YARN, "qk_norm": True}), ("gpt", {"nope_interval": 2, "d_model": 37})]
PARTS += [("gpt", {"nope_interval": 7})]  # of which three layers show nothing yet


@pytest.mark.parametrize(("kind", "parts"), PARTS)
def test_what_transformers_saved_anew_comes_back(tmp_path, kind, parts):
    """It drops keys of older versions, and what is a class's default; and an older export says less."""
    _, theirs = exported(tmp_path, MemorySource(model_config(kind, **parts)))
    theirs.save_pretrained(tmp_path / "again")
    with OpenFiles() as files:
        model = open_source(tmp_path / "hf", files).state.model
        assert open_source(tmp_path / "again", files).state.model == model
    tree = json.loads((tmp_path / "again/config.json").read_text())
    tree.pop("s_z_init", None)
    assert model_of(tree, tmp_path, *PLENTY) == model


@torch.no_grad()
def test_bf16_rounds_where_megabus_does(tmp_path):
    ours, theirs = exported(tmp_path, MemorySource(model_config("ngpt")))
    assert theirs.bfloat16()(TOKENS).logits.equal(ours.bfloat16()(TOKENS))


def test_what_lies_beside_the_weights(tmp_path):
    """No other form keeps a stock model's tokenizer, special tokens and context; --like takes them up again."""
    ids = {"max_position_embeddings": 777, "bos_token_id": 3, "eos_token_id": [4, 5]}
    llama(tmp_path, **ids)
    (tmp_path / "llama/tokenizer.json").write_text("{}")
    (tmp_path / "llama/tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3's, which SentencePiece cannot read
    with OpenFiles() as files:
        source = open_source(tmp_path / "llama", files)
        assert source.tokenizer is None
        assert {"tokenizer.json", "tokenizer.model", "bos_token_id", "eos_token_id"} <= set(source.left)
        convert(source, tmp_path / "run", "checkpoint")
        back = open_source(tmp_path / "run", files)
        convert(back, tmp_path / "bare", "hf")
        convert(back, tmp_path / "out", "hf", like=tmp_path / "llama")
        other = MemorySource(model_config("gpt", vocab_size=66))
        with pytest.raises(UserError, match=r"--like = .* has vocab_size 67, the model 66"):
            convert(other, tmp_path / "no", "hf", like=tmp_path / "llama")
        llama(tmp_path, bos_token_id=3, eos_token_id=[4, 50256])
        with pytest.raises(UserError, match=r"--like = .* has eos_token_id = 50256, and the model ids below 67"):
            convert(back, tmp_path / "no", "hf", like=tmp_path / "llama")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert {key: getattr(config, key) for key in ids} == ids
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    bare = transformers.AutoConfig.from_pretrained(tmp_path / "bare")
    assert (bare.bos_token_id, bare.eos_token_id, bare.max_position_embeddings) == (None, None, 2048)


def test_the_longest_context_is_what_was_trained_where_that_is_more(tmp_path, capsys):
    """Not what a --like directory says; and what of the two counts is what a run or a generation is warned by."""
    llama(tmp_path, max_position_embeddings=128)
    for trained, written, told in (
        (None, 128, ""),
        (64, 128, ""),
        (256, 256, "is 256, the longest sequence of the run"),
    ):
        source = MemorySource(model_config("gpt"))
        if trained is not None:
            source.state.config = {"train": {"seq_len": trained}, "growth": {"stages": []}}
        convert(source, tmp_path / f"out-{trained}", "hf", like=tmp_path / "llama")
        assert json.loads((tmp_path / f"out-{trained}/config.json").read_text())["max_position_embeddings"] == written
        err = capsys.readouterr().err
        assert told in err
        assert err.count("max_position_embeddings") == bool(told)
        assert context_of(tmp_path / f"out-{trained}", source.state) == longest_context(tmp_path / f"out-{trained}")
        assert context_of(tmp_path / "a run", source.state) == trained
    assert longest_context(tmp_path / "llama") == 128


def test_a_directory_without_weights_says_what_it_lacks(tmp_path):
    llama(tmp_path)
    folder = tmp_path / "llama"
    for path in folder.glob("model*"):
        path.unlink()

    def told():
        with OpenFiles() as files, pytest.raises(UserError) as caught:
            open_source(folder, files)
        return str(caught.value)

    lacks = (
        "holds a config.json and neither model.safetensors nor model.safetensors.index.json; give the whole directory"
    )
    assert told().startswith(f"weights = {folder}: {lacks}")
    (folder / "adapter_model.safetensors").write_text("")
    assert told().startswith(f"weights = {folder}: are an adapter and no whole model; merge it into its model first")


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"rope_theta": "10000", "rope_parameters": None}, "write a number, without quotation marks"),
        ({"hidden_size": "48"}, "write a whole number, without quotation marks"),
        ({"tie_word_embeddings": "false"}, "write true or false, without quotation marks"),
        ({"hidden_size": -1}, "restore it from another copy"),
    ],
)
def test_a_value_of_another_type_is_told_how_to_write(tmp_path, change, remedy):
    config = transformers.LlamaConfig(vocab_size=67, hidden_size=48, num_attention_heads=4).to_dict() | change
    with pytest.raises(UserError) as caught:
        model_of(config, tmp_path, *PLENTY)
    assert str(caught.value).endswith(f"; {remedy}")
    assert next(iter(change)) in str(caught.value)


LINKED = ["config.json", "model.safetensors.index.json", "model-00001-of-*.safetensors", "tokenizer_config.json"]


@pytest.mark.parametrize("name", [*LINKED, "tokenizer.model"])
def test_links_lead_to_the_directory_or_to_the_hubs_blobs(tmp_path, name):
    """Anything else a stranger's directory could have read, and copied into what is then published."""
    llama(tmp_path, vocab_size=267)
    model = tmp_path / "models--a--b"
    folder, blob = model / "snapshots/1234", model / "blobs/abcd"
    for path in (folder.parent, blob.parent):
        path.mkdir(parents=True)
    (tmp_path / "llama").rename(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    if name == "tokenizer.model":
        train_tokenizer(["the cat"] * 9, 267, folder / "tokenizer", model_type="bpe")
    (path,) = folder.glob(name)

    def both_ways(out):
        with OpenFiles() as files:
            source = open_source(folder, files)
            convert(source, tmp_path / out, "hf", like=folder)

    for number, place in enumerate((blob, folder / "other")):
        path.rename(place)
        path.symlink_to(os.path.relpath(place, folder))
        both_ways(f"out-{number}")  # the control
        path.unlink()
        place.rename(path)
    path.rename(tmp_path / "outside")
    for target in ("../../../outside", tmp_path / "outside", "../../refs"):
        (model / "refs").unlink(missing_ok=True)
        (model / "refs").symlink_to(tmp_path / "outside")
        path.symlink_to(target)
        told = f"Hugging Face directory = {path}: is a link to {tmp_path}/outside, outside of the directory; copy there"
        with pytest.raises(UserError, match=f"^{re.escape(told)}"):
            both_ways("no")
        path.unlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link to nothing"])
def test_what_has_the_name_of_a_file_and_is_none_is_told_as_what_it_is(tmp_path, name, what):
    llama(tmp_path)
    path = tmp_path / "llama" / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir() if what == "folder" else path.symlink_to("nothing")
    told = "No such file" if what == "link to nothing" else "is no regular file"
    with OpenFiles() as files:
        if "token" in name or "generation" in name:  # weights go on without what lies beside them
            call = partial(copy_rest, path.parent, tmp_path, 67, open_source(path.parent, files).tokenizer)
        else:
            call = partial(open_source, path.parent, files)
        with pytest.raises(UserError, match=f"= {path.parent}/.*{told}"):
            call()


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "an infinity")])
def test_weights_that_are_not_finite_are_refused_as_they_are_read(tmp_path, value, what):
    llama(tmp_path)
    folder, key = tmp_path / "llama", "model.layers.1.mlp.down_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
    tensors = load_file(shard)
    tensors[key][1, 2] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    told = rf"^weights = {shard}: holds {what} in {key}; restore it from another copy$"
    for form in ("checkpoint", "hf", "shards"):
        with OpenFiles() as files, pytest.raises(UserError, match=told):
            convert(open_source(tmp_path / "llama", files), tmp_path / "out", form)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=told):
        megabus.load(tmp_path / "llama")


def test_config_has_the_tokenizers_ids_and_the_runs_length(tmp_path):
    path = train_tokenizer(["the cat sees the dog " * 50], 290, tmp_path / "tok", "bpe")
    source = MemorySource(model_config("ngpt", vocab_size=290))
    source.tokenizer = path
    source.state.config = {"train": {"seq_len": 64}, "growth": {"stages": [{"seq_len": 96}, {"seq_len": None}]}}
    convert(source, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    tokenizer = Tokenizer(path)
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (tokenizer.eod, 96)


@torch.no_grad()
def test_a_width_that_llama_cannot_have_goes_out_as_what_computes_the_same(tmp_path):
    ours, theirs = exported(tmp_path, MemorySource(model_config("gpt", d_model=37)))
    assert type(theirs).__name__ == "MistralForCausalLM"
    assert (theirs(TOKENS).logits - ours(TOKENS)).abs().max() <= 1e-5
    with OpenFiles() as files:
        assert open_source(tmp_path / "hf", files).state.model == ours.config


def test_a_model_that_is_to_be_a_llama_keeps_to_what_a_llama_can_have(tmp_path):
    told = "model.d_model = 37: is not divisible by n_heads = 4, as transformers' llama asks"
    with pytest.raises(UserError, match=told):
        convert(MemorySource(model_config("gpt", d_model=37, export_as="llama")), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_the_tokenizer_gives_the_same_ids(tmp_path, model_type, normalization):
    words = ["cat", "dog", "sees", "hears", "the", "a", "naïve", "café", "runs", "and", "then", "ﬁne"]
    draw = torch.Generator().manual_seed(0)
    text = " ".join(words[int(i)] for i in torch.randint(len(words), (4000,), generator=draw))
    path = train_tokenizer([text], 280, tmp_path / "tok", model_type, normalization)
    source = MemorySource(model_config("ngpt", vocab_size=280))
    source.tokenizer = path
    convert(source, tmp_path / "hf", "hf")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True), Tokenizer(path)
    for sample in (
        text[:500],
        "  two  spaces\nand a\ttab ",
        "",
        " ",
        "\n\n",
        "北京 “quotes” ﬁ e\u0301",
        "dogcat, cats!",
        "a <0x41> b<0x0A> <unk",
    ):
        ids = ours.encode(sample)
        assert theirs(sample)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eod
    assert len(theirs) == 280
