"""Smaller models of a model's proportions, that can grow into it."""

from __future__ import annotations

from megabus.config.schema import ModelConfig

ROUND = 8  # channels and units: what matrix products like


def fraction_of(model: ModelConfig, fraction: float, tp: int = 1, pp: int = 1) -> ModelConfig:
    """`model` with about `fraction` of its width, heads, units and layers.

    Query heads to a key/value head and head_dim stay. Heads and units are multiples of tp, layers at least pp.
    """
    group = model.n_heads // model.kv_heads
    kv_heads = _part(model.kv_heads, fraction, tp)
    return model.grown(
        d_model=_part(model.d_model, fraction, ROUND if model.d_model >= 2 * ROUND else 1),
        n_layers=_part(model.n_layers, fraction, 1, least=pp),
        n_heads=kv_heads * group,
        d_ff=_part(model.d_ff, fraction, ROUND * tp if model.d_ff >= 2 * ROUND * tp else tp),
        **({} if model.n_kv_heads is None else {"n_kv_heads": kv_heads}),
    )


def _part(whole: int, fraction: float, unit: int, least: int = 1) -> int:
    """The multiple of `unit` nearest to a fraction of `whole`: one unit or more, and all of it at fraction 1."""
    rounded = whole if fraction >= 1 else round(whole * fraction / unit) * unit
    return min(whole, max(unit, least, rounded))
