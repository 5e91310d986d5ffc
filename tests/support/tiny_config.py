"""The file of a tiny run, which tests start from: with two growths as text, without them as a tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

PLAIN = """
run_dir: runs/test
model: {vocab_size: 67, d_model: 36, n_layers: 3, n_heads: 4, head_dim: 6, d_ff: 62}
train: {seq_len: 16, micro_batch_size: 2, global_batch_size: 8, max_steps: 10}
optimizer: {lr: 1e-2}
data: {train: a, valid: b}
"""
BASE = f"""{PLAIN}
growth:
  max_tokens: 2e3
  stages:
    - {{d_model: 48, n_heads: 6, d_ff: 80, max_flops: 1.5e9}}
    - {{n_layers: 5}}
"""


def tiny_config(**changes: object) -> dict[str, Any]:
    """The run without growths, with `changes` as `changed` makes them."""
    return changed(yaml.safe_load(PLAIN), changes)


def changed(tree: Mapping[str, Any], changes: Mapping[str, object]) -> dict[str, Any]:
    """A copy of a file's tree in which `section__key=value` sets a key, and `key=value` a whole section."""
    found = dict(tree)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found[section] = found.get(section, {}) | {name: value} if name else value
    return found
