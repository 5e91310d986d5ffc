"""Small models, far from linear and with gains far from their initial values; data for them."""

from __future__ import annotations

import torch

import megabus
from megabus.config import ModelConfig
from megabus.model.decoder import Decoder, param_specs

BASE = {"vocab_size": 66, "d_model": 36, "n_layers": 3, "n_heads": 2, "head_dim": 10, "d_ff": 62}
GQA = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6}
KINDS = ["ngpt", "gpt"]
PARTS = [  # of a gpt, as stock classes have them
    {"qkv_bias": True, "tie_embeddings": True},
    {"qk_norm": True, "tie_embeddings": True},
    {"nope_interval": 2},
]
PART_IDS = ["bias, tied", "norm, tied", "nope"]


def config(kind="ngpt", *changes, **more):
    merged = dict(BASE)
    for change in (*changes, more):
        merged |= change
    return ModelConfig(kind=kind, **merged)


def lively_state(model_config, seed=3, larger=5):
    """Initial matrices with random gains, of both signs for alpha.

    The baseline's matrices are `larger`: std 0.02 is nearly linear at this size.
    """
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, x in megabus.build_model(model_config, seed=seed).state_dict().items():
        spec = param_specs(model_config)[name]
        if not spec.is_matrix:
            low = -1.0 if spec.gate else 0.5
            x = (spec.init or 0.3) * (low + (2 - low) * torch.rand(x.shape, generator=draw))
        state[name] = x if spec.unit or not spec.is_matrix else larger * x
    return state


def model_of(model_config, state, dtype=torch.float64):
    model = Decoder(model_config).to(dtype)
    model.load_state_dict(state)
    return model


def batch(B=2, T=11, seed=5):
    tokens = torch.randint(BASE["vocab_size"], (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model):
    tokens, targets = batch()
    return model.loss(model.hidden(tokens), targets)[0]
