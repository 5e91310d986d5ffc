"""Keys that have no effect beside others."""

from __future__ import annotations

import pytest

from megabus.config import load_config, resolve_stages
from megabus.config.effects import keys_without_effect
from tests.support.tiny_config import BASE

SILENCED = [
    ("optimizer.schedule=log optimizer.decay_share=0.3", "optimizer.decay_share = 0.3", "optimizer.schedule = log"),
    ("optimizer.schedule=constant optimizer.min_lr_ratio=0.1", "optimizer.min_lr_ratio = 0.1", "a learning rate that "),
    ("optimizer.decay_share=0 optimizer.min_lr_ratio=0.1", "optimizer.min_lr_ratio = 0.1", "a learning rate that does"),
    ("growth.trigger.constant=2", "growth.trigger.constant = 2.0", "growth.trigger.predictor = fit"),
    ("model.norm_eps=0.1", "model.norm_eps = 0.1", "model.kind = ngpt"),
    ("model.alpha_init=0.1 model.kind=gpt", "model.alpha_init = 0.1", "model.kind = gpt"),
]


@pytest.mark.parametrize(("overrides", "key", "other"), SILENCED)
def test_a_key_that_another_silences_is_told(tmp_path, overrides, key, other):
    """And no more: files are tried with other values of the one that silences it."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    config = load_config(path, overrides.split())
    resolve_stages(config, 1)
    (told,) = keys_without_effect(config)
    assert told.startswith(f"{key}: has no effect with {other}")
    assert told.endswith("; leave it out")
    assert keys_without_effect(load_config(path)) == []
