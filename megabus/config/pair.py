"""What a larger model must have in common with the one it grows from."""

from __future__ import annotations

from megabus.config.depth import DEPTHS
from megabus.config.schema import Depth, ModelConfig
from megabus.errors import UserError

SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
KEPT = (
    "kind",
    "vocab_size",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "nope_interval",
    "qkv_bias",
    "qk_norm",
    "tie_embeddings",
    "norm_eps",
)


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """What growth changes of a model, by the names of a stage's keys; n_kv_heads where the model says it."""
    return {name: size for name in SIZES if (size := getattr(model, name)) is not None}


def whole_sizes(model: ModelConfig) -> dict[str, int]:
    """The same with `n_kv_heads` in any case."""
    return {name: model.kv_heads if name == "n_kv_heads" else getattr(model, name) for name in SIZES}


def check_pair(old: ModelConfig, new: ModelConfig, depth: Depth, key: str) -> None:
    """Raise `UserError` unless `old` can grow into `new`. depth: `growth.depth`; key: what the names of `new`'s keys
    begin with."""
    for name in KEPT:
        if getattr(old, name) != getattr(new, name):
            problem = f"changes from {getattr(old, name)}, and growth keeps it"
            raise UserError(key + name, getattr(new, name), problem, "keep the old value")
    before, after = whole_sizes(old), whole_sizes(new)
    for name in SIZES:
        if after[name] < before[name]:
            problem = f"shrinks from {before[name]}"
            raise UserError(key + name, after[name], problem, "stages only grow: give at least that")
    if old.n_layers == 0 < new.n_layers and DEPTHS[depth].copies:
        problem = f"cannot come from growth.depth = {depth}: there is no layer to copy"
        raise UserError(key + "n_layers", new.n_layers, problem, "set growth.depth to fresh")
    if old.nope_interval is not None and new.n_layers > old.n_layers and not DEPTHS[depth].on_top:
        problem = f"moves layers under growth.depth = {depth}, and every {old.nope_interval}th is without positions"
        raise UserError(key + "n_layers", new.n_layers, problem, "set growth.depth to append or fresh")
    divides(key + "n_heads", new.n_heads, "n_kv_heads", new.kv_heads)
    old_group, new_group = old.n_heads // old.kv_heads, new.n_heads // new.kv_heads
    if new_group < old_group:
        problem = f"does not keep {old_group} or more query heads with each key/value head"
        raise UserError(key + "n_kv_heads", new.kv_heads, problem, "grow n_heads and n_kv_heads together")
    # Most copies of a write row: of a query head those of its key head times those within its group.
    heads = -(-new.kv_heads // old.kv_heads) * -(-new_group // old_group)
    for name, copies in (("n_heads", heads), ("d_ff", -(-new.d_ff // old.d_ff))):
        if copies > new.d_model:
            problem = f"makes {copies} copies of a vector, more than fit in d_model = {new.d_model}"
            raise UserError(key + name, getattr(new, name), problem, "grow in smaller steps")


def divides(key: str, value: int, by_key: str, by: int, remedy: str | None = None) -> None:
    """Raise `UserError` unless `by` divides `value`."""
    if value % by:
        raise UserError(key, value, f"is not divisible by {by_key} = {by}", remedy or f"choose a multiple of {by}")
