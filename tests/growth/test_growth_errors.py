"""Sizes and states that cannot grow are refused."""

from __future__ import annotations

import pytest
import torch

import megabus
from megabus.errors import UserError
from tests.support.growing import WIDTH
from tests.support.small_models import GQA, config, lively_state

torch.set_num_threads(1)


def broken(change):
    state = lively_state(config())
    change(state)
    return state


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"d_model": 35}, "new_config.d_model"),
        ({"n_layers": 2}, "new_config.n_layers"),
        ({"n_heads": 3, "n_kv_heads": 1}, "new_config.n_kv_heads"),
        ({"n_heads": 1}, "new_config.n_heads"),
        ({"d_ff": 61}, "new_config.d_ff"),
        ({"head_dim": 12}, "new_config.head_dim"),
        ({"vocab_size": 67}, "new_config.vocab_size"),
        ({"kind": "gpt"}, "new_config.kind"),
        ({"rope_theta": 5e5}, "new_config.rope_theta"),
        ({"n_heads": 5, "n_kv_heads": 2}, "new_config.n_heads"),
    ],
)
def test_unfit_sizes_are_refused(changes, key):
    old = config()
    with pytest.raises(UserError) as caught:
        megabus.grow_state(lively_state(old), old, old.model_copy(update=changes), 1)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_groups_may_not_lose_query_heads():
    old = config("ngpt", GQA)
    new = config("ngpt", GQA, {"n_heads": 6, "n_kv_heads": 6})
    with pytest.raises(UserError, match="2 or more query heads"):
        megabus.grow_state(lively_state(old), old, new, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("output.s_z"),
        lambda state: state.update({"output.s_z": torch.ones(67)}),
        lambda state: state.update({"layers.1.attn.q": torch.ones(36, 20)}),
    ],
    ids=["missing", "length", "transposed"],
)
def test_unfit_tensors_are_refused(change):
    old = config()
    with pytest.raises(UserError, match=r"^state\['") as caught:
        megabus.grow_state(broken(change), old, config("ngpt", WIDTH), 1)
    assert "\n" not in str(caught.value)
