"""What a model costs: parameters and training FLOPs."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from megabus.config import ModelConfig
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape


@lru_cache(maxsize=64)
def count_parameters(model: ModelConfig) -> int:
    """All parameters, embedding and head included."""
    return sum(prod(global_shape(spec, model)) for spec in param_specs(model).values())


@lru_cache(maxsize=64)
def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of a token, forward and backward, nothing recomputed.

    6 for every matrix entry that multiplies (the head does, the embedding only looks up; Kaplan et al. 2020), and
    for attention 6 * layers * heads * head_dim * seq_len: a token sees half of the sequence on average, and its
    scores and its weighted sum take 2 FLOPs each an entry, three times over (forward, and twice backward).
    """
    matrices = [spec for spec in param_specs(model).values() if spec.is_matrix and (spec.tied or not spec.lookup)]
    dense = sum(prod(global_shape(spec, model)) for spec in matrices)
    return 6.0 * dense + 6.0 * model.n_layers * model.n_heads * model.head_dim * seq_len
