"""`growth: auto` becomes plain stages that end with the given size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megabus.config import load_config, parse_config, resolve_stages
from megabus.config.auto import AUTO, HOW, SIZES_OF_AUTO
from megabus.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FINAL = {"vocab_size": 66, "d_model": 96, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "head_dim": 12, "d_ff": 250}


def tree(**changes):
    base = {
        "run_dir": "unused",
        "model": FINAL,
        "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 4, "max_tokens": 100_000},
        "optimizer": {"lr": 1e-2},
        "growth": AUTO,
        "data": {"train": "unused", "valid": "unused"},
    }
    return base | changes


def sizes(model):
    return (model.d_model, model.n_layers, model.n_heads, model.n_kv_heads, model.d_ff)


def test_it_ends_with_the_given_size():
    config = parse_config(tree())
    stages = resolve_stages(config, 1)
    assert [sizes(stage.model) for stage in stages] == [
        (48, 2, 4, 2, 128),
        (72, 3, 6, 3, 184),
        (96, 4, 8, 4, 250),
    ]
    assert [stage.max_tokens for stage in stages] == [int(t * 100_000) for _, _, t in SIZES_OF_AUTO] + [None]
    assert {key: getattr(config.growth, key) for key in HOW} == HOW


def test_what_auto_is():
    """Written out once more: docs/growth_log.md has the measurements that these came from."""
    growth = parse_config(tree(train=tree()["train"] | {"max_tokens": None, "max_flops": 1e9})).growth
    assert (growth.trigger.kappa, growth.trigger.predictor) == (0.95, "fit")
    assert (growth.write, growth.read, growth.channels, growth.depth, growth.moments) == (
        "tilt",
        "tilt",
        "even",
        "append",
        "grow",
    )
    assert [growth.max_flops, *(stage.max_flops for stage in growth.stages)] == [5e7, 1.5e8, None]


def test_caps_are_in_the_budgets_unit():
    train = tree()["train"]
    by_flops = parse_config(tree(train=train | {"max_tokens": None, "max_flops": 1e9}))
    assert by_flops.growth.max_flops == SIZES_OF_AUTO[0][1] * 1e9
    assert [stage.max_flops for stage in by_flops.growth.stages] == [
        share * 1e9 for _, share, _ in SIZES_OF_AUTO[1:]
    ] + [None]
    assert by_flops.growth.max_tokens is None
    both = parse_config(tree(train=train | {"max_flops": 1e30})).growth  # whichever binds
    assert (both.max_flops, both.max_tokens) == (SIZES_OF_AUTO[0][1] * 1e30, int(SIZES_OF_AUTO[0][2] * 100_000))
    by_steps = parse_config(tree(train=train | {"max_tokens": None, "max_steps": 1000}))
    assert by_steps.growth.max_tokens == int(SIZES_OF_AUTO[0][2] * 64_000)


def test_of_two_equal_sizes_the_later_one_s_cap_counts():
    """With 2 heads to shard, half and three quarters of 3 layers and 24 channels come out the same."""
    small = FINAL | {"d_model": 24, "n_heads": 2, "n_kv_heads": 2, "d_ff": 2, "n_layers": 3}
    train = tree()["train"] | {"max_tokens": None, "max_flops": 1e9}
    config = parse_config(tree(layout={"tp": 2, "pp": 2}, model=small, train=train))
    stages = resolve_stages(config, 4)
    assert [sizes(stage.model) for stage in stages] == [(16, 2, 2, 2, 2), (24, 3, 2, 2, 2)]
    assert [stage.max_flops for stage in stages[:-1]] == [share * 1e9 for _, share, _ in SIZES_OF_AUTO[1:]]


def test_the_layout_is_kept_in_mind():
    config = parse_config(tree(layout={"tp": 4, "pp": 3}, model=FINAL | {"d_ff": 252}))
    stages = resolve_stages(config, 12)  # every stage fits the layout, or this refuses
    assert all(stage.model.n_layers >= 3 and stage.model.kv_heads % 4 == 0 for stage in stages)
    assert stages[-1].model.d_model == 96


def test_what_cannot_shrink_does_not_grow():
    config = parse_config(tree(model=FINAL | {"d_model": 1, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_ff": 1}))
    assert config.growth.stages == []
    assert config.growth.max_tokens is None
    assert config.model.d_model == 1


def test_what_is_saved_is_plain(tmp_path):
    """A run's own config.yaml, read again, is the same run: it says no `auto` that another version might read anew."""
    config = parse_config(tree())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    text = re.sub("(resume|kernels|measure): auto", "", path.read_text())
    assert AUTO not in text
    assert load_config(path) == config
    with pytest.raises(UserError, match=r"growth = auto: would end with the file's first size"):
        load_config(path, ["growth=auto"])


def test_errors_name_the_key():
    with pytest.raises(UserError, match=r"growth = often"):
        parse_config(tree(growth="often"))
    with pytest.raises(UserError, match=r"model\.d_modle"):
        parse_config(tree(model=FINAL | {"d_modle": 3}))
    with pytest.raises(UserError, match=r"growth\.write"):
        load_config(ROOT / "configs/gpt_64m.yaml", ["growth=auto", "growth.write=clone"])
    assert len(load_config(ROOT / "configs/gpt_64m.yaml", ["growth=auto"]).growth.stages) == 2
