"""Initial values that follow from optimizer.transfer, and what it refuses."""

from __future__ import annotations

from math import sqrt

import pytest

from megabus.config import load_config, resolve_stages
from megabus.errors import UserError
from tests.support.tiny_config import BASE

TUNED = "optimizer.transfer={d_model: 24, n_layers: 2, steps: 100}"  # the tiny run has 36, 48 channels and 3, 5 layers


def stages_of(tmp_path, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return resolve_stages(load_config(path, overrides), 1)


def test_every_stage_of_ngpt_follows_by_itself(tmp_path):
    models = [stage.model for stage in stages_of(tmp_path, TUNED, "model.alpha_init=0.1", "model.s_z_init=2")]
    assert [model.alpha_init for model in models] == pytest.approx([0.1 * 2 / 3, 0.1 * 2 / 3, 0.1 * 2 / 5])
    assert [model.s_z_init for model in models] == pytest.approx([2 * sqrt(1.5), 2 * sqrt(2), 2 * sqrt(2)])
    assert {model.init_std for model in models} == {0.02}


def test_gates_begin_alike_at_every_depth_where_no_depth_is_named(tmp_path):
    models = [stage.model for stage in stages_of(tmp_path, "optimizer.transfer={d_model: 24, steps: 100}")]
    assert {model.alpha_init for model in models} == {0.05}
    assert [model.s_z_init for model in models] == pytest.approx([sqrt(1.5), sqrt(2), sqrt(2)])


def test_every_width_of_gpt_follows_by_itself(tmp_path):
    """Each in a run of its own: a gpt that follows the width does not grow in it."""
    own = ("model.kind=gpt", "optimizer.transfer={d_model: 24}", "model.head_init_std=0.01", "growth={}")
    models = [stages_of(tmp_path, *own, f"model.d_model={width}")[0].model for width in (36, 48)]
    assert [model.init_std for model in models] == pytest.approx([0.02 / sqrt(1.5), 0.02 / sqrt(2)])
    assert [model.head_std for model in models] == pytest.approx([0.01 / 1.5, 0.01 / 2])
    assert {model.embed_std for model in models} == {0.02}
    assert {(model.alpha_init, model.s_z_init) for model in models} == {(0.05, 1.0)}


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.transfer={d_model: 36, n_layers: 3, steps: 100}", "growth={}"),
        ("model.kind=gpt", "optimizer.transfer={d_model: 36}", "growth={}"),
    ],
    ids=["ngpt", "gpt"],
)
def test_the_size_at_which_the_rate_was_tuned_stays_as_it_is(tmp_path, overrides):
    (plain,) = stages_of(tmp_path, *overrides, "optimizer.transfer=null")
    (same,) = stages_of(tmp_path, *overrides)
    stds = {"embed_init_std": None, "head_init_std": None}
    assert same.model.model_copy(update=stds) == plain.model
    assert (same.model.embed_std, same.model.head_std) == (plain.model.embed_std, plain.model.head_std)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer.transfer={}"], "optimizer.transfer.d_model = (missing): "),
        (["optimizer.transfer={d_model: 24}"], "optimizer.transfer.steps = (missing): ngpt's rates follow from it"),
        (["optimizer.transfer={d_model: 24, n_layers: 2}"], "optimizer.transfer.steps = (missing): "),
        ([TUNED, "optimizer.transfer.d_model=0"], "optimizer.transfer.d_model = 0: "),
        ([TUNED, "optimizer.transfer.n_layers=-1"], "optimizer.transfer.n_layers = -1: "),
        ([TUNED, "optimizer.transfer.steps=0.5"], "optimizer.transfer.steps = 0.5: "),
        ([TUNED, "optimizer.transfer.width=1"], "optimizer.transfer.width = 1: "),
        (["optimizer.transfer=24"], "optimizer.transfer = 24: "),
        (["model.kind=gpt", TUNED], "optimizer.transfer.n_layers = 2: has no rule for gpt"),
        (["model.kind=gpt", "optimizer.transfer={d_model: 24, steps: 9}"], "optimizer.transfer.steps = 9: has no rule"),
        ([TUNED, "optimizer.implementation=deepspeed"], "optimizer.implementation = deepspeed: "),
        ([TUNED, "optimizer.implementation=apex"], "optimizer.implementation = apex: "),
    ],
)
def test_wrong_references_are_told_in_one_line(tmp_path, overrides, told):
    with pytest.raises(UserError) as caught:
        stages_of(tmp_path, *overrides)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
