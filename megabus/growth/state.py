"""Growth of whole tensors in one process: the reference that growth of shards equals bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megabus.config.schema import GrowthConfig, ModelConfig
from megabus.errors import UserError
from megabus.growth.rules import Growth, grow_rows
from megabus.model.decoder import param_specs
from megabus.model.params import axis_sizes, global_shape
from megabus.parallel.fragments import Kind


def grow_state(
    state: Mapping[str, Tensor],
    old_config: ModelConfig,
    new_config: ModelConfig,
    seed: int,
    growth: GrowthConfig | None = None,
    kind: Kind = "weight",
) -> dict[str, Tensor]:
    """Grow full tensors under canonical names from `old_config`'s model to `new_config`'s.

    state: name -> tensor of the global shape. growth: the manner (default: tilt, even channels, identity depth).
    kind: `weight`, or the Adam moment that the tensors are. Returns tensors of the state's dtype and device.
    Raises `UserError` if a size shrinks, a tensor is missing or of another shape.
    """
    _check_pair(old_config, new_config)
    for name, spec in param_specs(old_config).items():
        shape = global_shape(spec, old_config)
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "(missing)"
            raise UserError(f"state[{name!r}]", found, f"the old config wants {shape}", "pass the matching config")
    job = Growth(old_config, new_config, growth or GrowthConfig(), seed)
    grown = {}
    for name, spec in param_specs(new_config).items():
        old = state[job.old_spec(spec).name]
        rows = axis_sizes(new_config)[spec.rows]
        grown[name] = grow_rows(job, name, kind, 0, rows, old.__getitem__)
    return grown


def _check_pair(old: ModelConfig, new: ModelConfig) -> None:
    for name in ("kind", "vocab_size", "head_dim", "rope_theta", "alpha_init", "norm_eps"):
        if getattr(old, name) != getattr(new, name):
            problem = f"changes from {getattr(old, name)}, and growth keeps it"
            raise UserError(f"new_config.{name}", getattr(new, name), problem, "keep the old value")
    for name in ("d_model", "n_layers", "n_heads", "kv_heads", "d_ff"):
        if getattr(new, name) < getattr(old, name):
            problem = f"shrinks from {getattr(old, name)}"
            raise UserError(f"new_config.{name}", getattr(new, name), problem, "give at least that")
    group = old.n_heads // old.kv_heads
    if new.n_heads % new.kv_heads or new.n_heads // new.kv_heads < group:
        problem = f"does not keep {group} query heads with each key/value head"
        raise UserError("new_config.n_kv_heads", new.kv_heads, problem, "grow it together with n_heads")
