"""Growth of what stock classes have beside Llama: biases, norms of q and k by head, tied heads, layers without RoPE."""

from __future__ import annotations

import pytest
import torch

import megabus
from megabus.config.pair import check_pair
from megabus.errors import UserError
from megabus.growth import param_growth
from megabus.model import gpt
from megabus.model.decoder import param_specs
from tests.support.growing import CHANNELS, FRACTION, change_of, gap, how, logits_of, mapped_and_true
from tests.support.small_models import GQA, PART_IDS, PARTS, config, lively_state

torch.set_num_threads(1)
AFTER = FRACTION | {"n_heads": 9, "n_kv_heads": 3}
CLONE = {"write": "clone", "channels": "uneven"}


def grown(parts, dtype=torch.float32, **manner):
    """(old model, new model, old state, grown state)."""
    old, new = config("gpt", GQA, parts), config("gpt", GQA, parts, AFTER)
    state = {name: x.to(dtype) for name, x in lively_state(old).items()}
    return old, new, state, megabus.grow_state(state, old, new, 1, how(**manner))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
def test_growth_keeps_the_function(parts, channels, monkeypatch):
    """Heads by a half and one more each, a third more channels, two more layers; and in fp64 all through."""
    old, _, state, _ = found = grown(parts, read="tilt", channels=channels)
    assert logits_of(old, state).std() > 0.1
    assert change_of(*found) <= 1e-6
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert change_of(*grown(parts, torch.float64, read="tilt", channels=channels)) <= 5e-14


def test_every_part_counts_for_something():
    """Negative control: without it, or with another one, the logits are others."""
    for parts in PARTS:
        model = config("gpt", GQA, parts)
        state = lively_state(model)
        for name in param_specs(model).keys() - param_specs(config("gpt", GQA)).keys() | {"embed.weight"}:
            assert change_of(model, model, state, state | {name: state[name] * 1.1}) > 1e-4, name
    state = lively_state(config("gpt", GQA))
    assert change_of(config("gpt", GQA), config("gpt", GQA, PARTS[2]), state, state) > 1e-2


def test_a_norms_eps_that_does_not_follow_would_show(monkeypatch):
    """Stock classes have one eps for all norms, which falls as h gets channels: rows of q and k fall with it."""
    old, new, state, after = grown(PARTS[1] | {"norm_eps": 0.5}, read="tilt")
    assert change_of(old, new, state, after) <= 1e-6
    monkeypatch.setattr(gpt.HeadNorm, "forward", lambda self, x: self.rms_norm(x, self.gain * self.root_c, 0.5))
    assert change_of(old, new, state, after) > 1e-3


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
def test_moments_are_the_gradients_of_the_grown_model(parts, power):
    """Entry by entry, wherever clones keep the function, with more channels too."""
    _, _, mapped, true = mapped_and_true(
        "gpt", GQA | parts, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52}, power, **CLONE
    )
    assert max(gap(mapped[name], true[name]) for name in true) < 1e-5


def test_a_share_that_a_bias_has_not_would_show(monkeypatch):
    share = param_growth._row_share
    monkeypatch.setattr(
        param_growth, "_row_share", lambda g, spec, *rest: share(g, spec, *rest) ** (spec.role != "bias")
    )
    _, _, mapped, true = mapped_and_true("gpt", GQA | PARTS[0], {"n_heads": 9, "n_kv_heads": 3}, **CLONE)
    assert gap(mapped["layers.0.attn.v_bias"], true["layers.0.attn.v_bias"]) > 0.1


def test_layers_without_positions_keep_their_numbers():
    old, new = config("gpt", GQA, PARTS[2]), config("gpt", GQA, PARTS[2], n_layers=5)
    for depth in ("append", "stack", "fresh"):
        check_pair(old, new, depth, "")
    for depth in ("identity", "split", "taper", "interleave"):
        with pytest.raises(UserError, match=f"n_layers = 5: moves layers under growth.depth = {depth}, and every 2th"):
            check_pair(old, new, depth, "")
        check_pair(old, config("gpt", GQA, PARTS[2], d_model=52), depth, "")
