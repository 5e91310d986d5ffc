"""Growth of small models: sizes, the change of their function, and explicit dense matrices."""

from __future__ import annotations

import numpy as np
import torch

import megabus
from megabus.config import GrowthConfig
from tests.support.small_models import GQA, batch, config, lively_state, loss_of, model_of

FRACTION = {"d_model": 52, "n_heads": 3, "d_ff": 90, "n_layers": 5}
MANY = {"d_model": 131, "n_heads": 11, "d_ff": 233}
WIDTH = {"d_model": 52, "n_heads": 3, "d_ff": 90}
WIDTHS = [
    ({}, WIDTH),
    ({}, MANY),
    (GQA, {"n_heads": 6, "n_kv_heads": 3, "d_model": 52, "d_ff": 90}),
    (GQA, {"n_heads": 6, "d_model": 52}),
    (GQA, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52, "d_ff": 90}),
]
WIDTH_IDS = ["2-3", "2-11", "4:2-6:3", "4:2-6:2", "4:2-9:3"]
CHANNELS = ["even", "uneven"]
READS = ["clone", "tilt"]


def how(**changes):
    """A manner in which all is E and its like, unless `read: tilt` is asked for (see test_growth_reads)."""
    return GrowthConfig(**{"read": "clone"} | changes)


@torch.no_grad()
def logits_of(model_config, state):
    return model_of(model_config, state)(batch()[0])


def change_of(old, new, state, grown):
    """Largest change of a logit, in fp64 arithmetic."""
    return float((logits_of(new, grown) - logits_of(old, state)).abs().max())


def grow_and_compare(old, new, **manner):
    state = lively_state(old)
    return change_of(old, new, state, megabus.grow_state(state, old, new, 1, how(**manner)))


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def gradients(model_config, state):
    model = model_of(model_config, state)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def mapped_and_true(kind, before, after, power=1, **manner):
    """Moments mapped from the old model's gradient, and the gradient that the grown model really has."""
    old, new = config(kind, before), config(kind, before, after)
    state, manner = lively_state(old), how(moments="grow", **manner)
    moments = {name: (g**power).float() for name, g in gradients(old, state).items()}
    mapped = megabus.grow_state(moments, old, new, 1, manner, ("exp_avg", "exp_avg_sq")[power - 1])
    grown = megabus.grow_state(state, old, new, 1, manner)
    true = {name: g**power for name, g in gradients(new, grown).items()}
    return old, new, mapped, true


def gap(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def mean_squares(model_config, state, batches=12):
    """Over batches: (shape) of each parameter, fp32."""
    found = {}
    for seed in range(batches):
        model = model_of(model_config, state)
        tokens, targets = batch(4, 31, seed)
        model.loss(model.hidden(tokens), targets)[0].backward()
        for name, p in model.named_parameters():
            found[name] = found.get(name, 0) + p.grad.square().float() / batches
    return found


# ---- growth as explicit dense matrices


def copy_matrix(old, new):
    """(new, old): a one where new index i' copies old index floor(i' old / new)."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        matrix[i, i * old // new] = 1
    return matrix


def isometry(old, new, channels):
    """E of h' = E h: a channel's copies, of which the squares sum to 1; uneven copies fall by 3/4 each."""
    E = copy_matrix(old, new)
    if channels == "uneven":
        for column in E.T:
            copies = column.nonzero()[:, 0]
            column[copies] = 0.75 ** torch.arange(len(copies), dtype=torch.float64)
    return E / E.square().sum(0).sqrt()


def head_matrix(old, new):
    """Rows of query heads: a new key head copies an old one, and its queries copy that one's."""
    C, matrix = old.head_dim, torch.zeros(new.n_heads * new.head_dim, old.n_heads * old.head_dim)
    old_group, new_group = old.n_heads // old.kv_heads, new.n_heads // new.kv_heads
    for head in range(new.n_heads):
        kv = (head // new_group) * old.kv_heads // new.kv_heads
        parent = kv * old_group + (head % new_group) * old_group // new_group
        matrix[head * C : (head + 1) * C, parent * C : (parent + 1) * C] = torch.eye(C)
    return matrix.double()


def row_matrices(old, new):
    eye = torch.eye(old.head_dim, dtype=torch.float64)
    return {
        "vocab": torch.eye(old.vocab_size, dtype=torch.float64),
        "ffn": copy_matrix(old.d_ff, new.d_ff),
        "kv_heads": torch.kron(copy_matrix(old.kv_heads, new.kv_heads), eye),
        "heads": head_matrix(old, new),
        "embed": copy_matrix(old.d_model, new.d_model),
    }


# ---- wrong rules, to see that tests notice


def one_sided_simplex(copies):
    vertices = torch.zeros(copies, copies - 1, dtype=torch.float64)
    vertices[:, 0] = 1
    return vertices


def flat_scale(embed, channels):
    return np.ones(len(embed))
