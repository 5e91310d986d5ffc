"""`growth: auto` becomes plain stages that end with the given size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megabus.config import load_config, parse_config, resolve_stages
from megabus.config.auto import AUTO, depths
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


def layers(config, world=1):
    return [stage.model.n_layers for stage in resolve_stages(config, world)]


def test_it_ends_with_the_given_size():
    config = parse_config(tree(model=FINAL | {"n_layers": 8}))
    stages = resolve_stages(config, 1)
    assert [stage.model.n_layers for stage in stages] == [1, 2, 4, 8]
    assert {stage.model.model_copy(update={"n_layers": 8}) for stage in stages} == {stages[-1].model}


@pytest.mark.parametrize(
    ("n_layers", "found"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (7, [1, 2, 4, 7]), (30, [4, 8, 15, 30])],
)
def test_depth_is_doubled_three_times_at_most(n_layers, found):
    assert depths(n_layers) == found
    assert layers(parse_config(tree(model=FINAL | {"n_layers": n_layers}))) == found


def test_what_auto_is():
    """Written out once more: docs/growth_log.md has the measurements that these came from."""
    train = tree()["train"] | {"max_tokens": None, "max_flops": 1e9}
    growth = parse_config(tree(train=train, model=FINAL | {"n_layers": 8})).growth
    assert (growth.trigger.kappa, growth.trigger.predictor) == (1.0, "fit")
    manner = (growth.write, growth.read, growth.channels, growth.depth, growth.moments)
    assert manner == ("tilt", "tilt", "even", "stack", "grow")
    caps = [growth.max_flops, *(stage.max_flops for stage in growth.stages)]
    assert caps == [pytest.approx(1e8), pytest.approx(1.5e8), pytest.approx(1.5e8), None]
    shallow = parse_config(tree(train=train, model=FINAL | {"n_layers": 2})).growth
    assert shallow.max_flops == pytest.approx(4e8)


def test_caps_are_in_the_budgets_unit():
    """8 layers: of 2.3 parts of the tokens 0.1/1 go to one layer's share of the FLOPs, 0.15/2 to two layers' ..."""
    model, train = FINAL | {"n_layers": 8}, tree()["train"]
    parts = [0.1 / 1, 0.15 / 2, 0.15 / 4, 0.6 / 8]
    tokens = [int(part / sum(parts) * 100_000) for part in parts[:3]]
    growth = parse_config(tree(model=model)).growth
    assert [growth.max_tokens, *(stage.max_tokens for stage in growth.stages)] == [*tokens, None]
    assert growth.max_flops is None
    both = parse_config(tree(model=model, train=train | {"max_flops": 1e30})).growth  # whichever binds
    assert (both.max_flops, both.max_tokens) == (pytest.approx(1e29), tokens[0])
    by_steps = parse_config(tree(model=model, train=train | {"max_tokens": None, "max_steps": 1000})).growth
    assert by_steps.max_tokens == int(parts[0] / sum(parts) * 64_000)


def test_the_layout_is_kept_in_mind():
    config = parse_config(tree(layout={"tp": 2, "pp": 3}, model=FINAL | {"n_layers": 8}))
    assert layers(config, 6) == [4, 8]  # two layers would leave a pipeline rank without one
    assert layers(parse_config(tree(layout={"pp": 4})), 4) == [4]


@pytest.mark.parametrize("n_layers", [0, 1])
def test_what_cannot_shrink_does_not_grow(n_layers):
    config = parse_config(tree(model=FINAL | {"n_layers": n_layers}))
    assert config.growth.stages == []
    assert config.growth.max_tokens is None
    assert config.model.n_layers == n_layers


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
    assert len(load_config(ROOT / "configs/gpt_64m.yaml", ["growth=auto"]).growth.stages) == 3
