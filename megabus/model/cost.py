"""What a model costs: parameters and training FLOPs."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from megabus.config import ModelConfig
from megabus.config.pair import whole_sizes
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec, global_shape


@lru_cache(maxsize=64)
def totals(model: ModelConfig) -> tuple[int, int]:
    """How many parameters there are, and how many entries they have together, of sizes that may be any: nothing is made
    by them."""
    outside, layer = _declared(model)
    entries = [sum(prod(global_shape(spec, model)) for spec in specs) for specs in (outside, layer)]
    return len(outside) + model.n_layers * len(layer), entries[0] + model.n_layers * entries[1]


def count_parameters(model: ModelConfig) -> int:
    """Entries of all parameters, embedding and head included."""
    return totals(model)[1]


def counted_sizes(model: ModelConfig) -> dict[str, int]:
    """What growth changes of a model, and its parameters, as rows of metrics and checkpoints tell a growth."""
    return whole_sizes(model) | {"n_params": count_parameters(model)}


@lru_cache(maxsize=64)
def flops_per_token(model: ModelConfig, seq_len: float) -> float:
    """Training FLOPs of a token, forward and backward, nothing recomputed.

    6 for every matrix entry that multiplies (the head does, the embedding only looks up; Kaplan et al. 2020), and
    for attention 6 * layers * heads * head_dim * seq_len: a token sees half of the sequence on average, and its
    scores and its weighted sum take 2 FLOPs each an entry, three times over (forward, and twice backward).
    """
    outside, layer = (
        sum(prod(global_shape(spec, model)) for spec in specs if spec.is_matrix and (spec.tied or not spec.lookup))
        for specs in _declared(model)
    )
    dense = outside + model.n_layers * layer
    return 6.0 * dense + 6.0 * model.n_layers * model.n_heads * model.head_dim * seq_len


def _declared(model: ModelConfig) -> tuple[list[ParamSpec], list[ParamSpec]]:
    """The declarations outside of layers, and those of a layer: all have the same."""
    tiny = {"vocab_size": 2, "d_model": 2, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2, "d_ff": 2}
    specs = param_specs(model.grown(**tiny)).values()
    return [spec for spec in specs if spec.layer is None], [spec for spec in specs if spec.layer is not None]
