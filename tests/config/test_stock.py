"""Which keys of a gpt go together, and what an export would refuse is refused before training."""

from __future__ import annotations

import pytest

from megabus.config import ModelConfig, parse_config, resolve_stages
from megabus.config.stock import stock_class
from megabus.errors import UserError
from tests.support.tiny_config import tiny_config


def stages(growth=None, optimizer=None, **model):
    base = tiny_config()
    tree = base | {"model": base["model"] | {"kind": "gpt"} | model, "optimizer": {"lr": 0.01} | (optimizer or {})}
    tree["growth"] = {} if growth is None else {"stages": [growth], "max_tokens": 64, "trigger": {"constant": 1.0}}
    return resolve_stages(parse_config(tree), 1)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"kind": "ngpt", "qkv_bias": True}, "model.qkv_bias = True: is not for ngpt; leave it out, or set model.kind"),
        ({"kind": "ngpt", "tie_embeddings": True}, "model.tie_embeddings = True: is not for ngpt"),
        ({"kind": "ngpt", "export_as": "llama"}, "model.export_as = llama: is not for ngpt"),
        (
            {"kind": "ngpt", "rope_scaling": {"kind": "yarn", "factor": 2}},
            "model.rope_scaling.kind = yarn: makes rotated",
        ),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 2}, "rope_theta": 1.0},
            "model.rope_theta = 1.0: turns all pairs alike",
        ),
        ({"qkv_bias": True, "qk_norm": True}, "model.qk_norm = True: goes with no qkv_bias: no class of transformers"),
        ({"qk_norm": True, "nope_interval": 4}, "model.nope_interval = 4: goes with no qk_norm"),
        ({"tie_embeddings": True, "head_init_std": 0.1}, "model.head_init_std = 0.1: is of a head of its own"),
        (
            {"export_as": "llama", "qkv_bias": True},
            "qkv_bias = True: is not what transformers' llama computes, and model.",
        ),
        (
            {"export_as": "qwen3"},
            "model.qk_norm = False: is not what transformers' qwen3 computes, and model.export_as is",
        ),
        (
            {"export_as": "llama", "d_model": 37},
            "model.d_model = 37: is not divisible by n_heads = 4, as transformers'",
        ),
        (
            {"export_as": "llama", "growth": {"d_model": 50}},
            "growth.stages.0.d_model = 50: is not divisible by n_heads = 4, as transformers' llama asks",
        ),
        (
            {"export_as": "llama", "n_layers": 0},
            "model.n_layers = 0: is no model that transformers knows, and model.export_as is llama; grow it to a layer",
        ),
        (
            {"tie_embeddings": True, "optimizer": {"transfer": {"d_model": 18}}},
            "optimizer.transfer = {d_model: 18, n_layers: null, steps: null}: has one rate for an embedding",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(model, told):
    with pytest.raises(UserError) as caught:
        stages(**model)
    assert told in str(caught.value)


def test_what_goes_together_goes():
    stages(export_as="llama", growth={"d_model": 48})
    stages(export_as="mistral", growth={"d_model": 50})
    stages(growth={"d_model": 50})
    stages(qkv_bias=True, tie_embeddings=True, export_as="qwen2", growth={"d_model": 50})


def test_the_class_is_the_first_that_computes_the_model():
    base = ModelConfig.model_validate(tiny_config()["model"] | {"kind": "gpt"})
    for change, name in (
        ({}, "llama"),
        ({"d_model": 37}, "mistral"),
        ({"export_as": "mistral"}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"nope_interval": 4}, "smollm3"),
    ):
        assert stock_class(base.model_copy(update=change)) == name
