"""Growth of whole tensors in one process: the reference that growth of shards equals bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megabus.config.pair import check_pair
from megabus.config.schema import GrowthConfig, ModelConfig
from megabus.errors import UserError
from megabus.growth.param_growth import Growth
from megabus.growth.rows import drawn_rows, grow_rows
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape
from megabus.parallel.fragments import MOMENTS, Kind


def grow_state(
    state: Mapping[str, Tensor],
    old_config: ModelConfig | Mapping[str, Any],
    new_config: ModelConfig | Mapping[str, Any],
    seed: int,
    growth: GrowthConfig | None = None,
    kind: Kind = "weight",
) -> dict[str, Tensor]:
    """Grow full tensors under canonical names from `old_config`'s model to `new_config`'s.

    state: name -> tensor of the global shape. growth: the manner (default: that of an empty `growth:` section).
    kind: `weight`, or the Adam moment or running mean of weights that the tensors are. Returns tensors of the state's
    dtype and device.
    Raises `UserError` if a size shrinks, a tensor is missing or of another shape.
    """
    old_config, new_config = _validated(old_config, "old_config."), _validated(new_config, "new_config.")
    growth = growth or GrowthConfig()
    check_pair(old_config, new_config, growth.depth, "new_config.")
    unknown = sorted(set(state) - set(param_specs(old_config)))
    if unknown:
        raise UserError("state", ", ".join(unknown), "the old config has no such tensors", "pass the matching config")
    for name, spec in param_specs(old_config).items():
        shape = global_shape(spec, old_config)
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "(missing)"
            raise UserError(f"state[{name!r}]", found, f"the old config wants {shape}", "pass the matching config")
    whole = Growth(old_config, new_config, growth, seed)
    return {name: _whole(whole, name, kind, state) for name in param_specs(new_config)}


def _whole(growth: Growth, name: str, kind: Kind, state: Mapping[str, Tensor]) -> Tensor:
    """One parameter of the grown state. Drawn ones are of the dtype and device of the state's first tensor."""
    if growth.source(name) is not None:
        param = growth.param(name)
        blocks = grow_rows(param, kind, 0, len(param.rows), state[param.source].__getitem__)
        return torch.cat([block for _, block in blocks])
    like, shape = next(iter(state.values())), global_shape(param_specs(growth.new)[name], growth.new)
    if kind in MOMENTS:
        return like.new_zeros(shape)
    blocks = drawn_rows(growth.new, name, growth.seed, 0, shape[0], like.device)
    return torch.cat([block for _, block in blocks]).to(like.dtype)


def _validated(config: ModelConfig | Mapping[str, Any], key: str) -> ModelConfig:
    """Also what pydantic's model_copy let through: unknown names, values of other types."""
    try:
        return ModelConfig.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(key + ".".join(map(str, first["loc"])), first["input"], first["msg"], "mend it") from None
