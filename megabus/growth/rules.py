"""How rows grow: one pure function from old rows to new rows, the same for whole tensors and for shards.

Every step is element-wise or a fixed-order sum within one row, in fp64, and randomness is keyed by global row
numbers. Growing a shard therefore gives the same bits as cutting a shard from the grown tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabus import counter
from megabus.config.schema import GrowthConfig, ModelConfig
from megabus.growth import writes
from megabus.growth.maps import AxisMap, LayerSource, axis_maps, channel_scale, layer_sources
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec
from megabus.parallel.fragments import Kind

BLOCK_ELEMENTS = 1 << 18  # rows are grown in blocks of about this many entries: fp64 temporaries stay small


@dataclass(frozen=True)
class Growth:
    """One growth: from a model to a larger one, in a given manner, with randomness from `seed`."""

    old: ModelConfig
    new: ModelConfig
    how: GrowthConfig
    seed: int

    def layer_source(self, spec: ParamSpec) -> LayerSource:
        """Origin of the layer that a parameter of the new model lives in (itself, outside the layers)."""
        if spec.layer is None:
            return LayerSource(0, 0, 1)
        return layer_sources(self.old.n_layers, self.new.n_layers, self.how.depth)[spec.layer]

    def old_spec(self, spec: ParamSpec) -> ParamSpec:
        """The old parameter that a new one grows from."""
        return param_specs(self.old)[spec.in_layer(self.layer_source(spec).parent)]

    def rows(self, spec: ParamSpec) -> AxisMap:
        return axis_maps(self.old, self.new)[spec.rows]


def grow_rows(
    growth: Growth, name: str, kind: Kind, start: int, stop: int, fetch: Callable[[np.ndarray], Tensor]
) -> Tensor:
    """Rows [start, stop) of a new parameter's weight or Adam moment: (stop - start, d_model), gains (stop - start,).

    `fetch` returns old rows of the same kind for an array of old row numbers. For gains a row is one entry. Computed
    in fp64, returned in the dtype of the old rows.
    """
    spec = param_specs(growth.new)[name]
    width = growth.new.d_model if spec.is_matrix else 1
    step = max(1, BLOCK_ELEMENTS // width)
    blocks = []
    for low in range(start, stop, step):
        rows = growth.rows(spec)
        part = slice(low, min(low + step, stop))
        block = AxisMap(rows.parent[part], rows.copy[part], rows.copies[part])
        fetched = fetch(block.parent)
        old = fetched.double()
        if kind == "weight":
            grown = _weight(growth, spec, old, block, low)
        else:
            grown = _moment(growth, spec, kind, old, block, low)
        blocks.append(grown.to(fetched.dtype))
    return torch.cat(blocks)


def _weight(growth: Growth, spec: ParamSpec, old: Tensor, rows: AxisMap, low: int) -> Tensor:
    gate = growth.layer_source(spec).gate(growth.how.depth) if spec.gate else 1.0
    if spec.is_matrix:
        grown = _embed(growth, old, power=1)
        if spec.role == "write" and rows.copies.max() > 1:
            grown = _write(growth, spec, grown, rows, low)
        return grown * gate
    # A gain acts as raw * multiplier: that product is what stays.
    grown = old * (growth.old_spec(spec).multiplier / spec.multiplier)
    if spec.divides and growth.how.write != "tilt":
        grown = grown / torch.from_numpy(rows.copies).to(old.device)
    return grown * gate


def _embed(growth: Growth, old: Tensor, power: int) -> Tensor:
    """Rows times E^T: new channel i' takes a[i'] times its parent's entry (a^2 for second moments)."""
    embed = axis_maps(growth.old, growth.new)["embed"]
    parent = torch.from_numpy(embed.parent).to(old.device)
    scale = torch.from_numpy(channel_scale(embed, growth.how.channels) ** power).to(old.device)
    return old[:, parent] * scale


def _write(growth: Growth, spec: ParamSpec, w_BD: Tensor, rows: AxisMap, low: int) -> Tensor:
    how = growth.how.write
    key = counter.key(growth.seed, spec.name, how, *w_BD.shape[1:], len(growth.rows(spec)))
    parent, copy, copies = (torch.from_numpy(x).to(w_BD.device) for x in (rows.parent, rows.copy, rows.copies))
    number = torch.arange(low, low + len(w_BD), device=w_BD.device)
    grown = w_BD.clone()
    for count in np.unique(rows.copies):
        if count == 1:
            continue
        n, at = int(count), (copies == int(count)).nonzero()[:, 0]
        if how == "tilt":
            grown[at] = writes.tilt(w_BD[at], parent[at], copy[at], n, key)
        elif how == "noise":
            grown[at] = writes.noise(w_BD[at], number[at], key, unit=spec.unit, copies=n)
        elif not spec.unit:  # plain clones of rows that may shrink; unit rows leave it to the gain (`divides`)
            grown[at] = w_BD[at] / n
    return grown


def _moment(growth: Growth, spec: ParamSpec, kind: Kind, old: Tensor, rows: AxisMap, low: int) -> Tensor:
    """Moments follow the gradient: m like g, v like g^2.

    A loss that is a function of E w has gradient a * g on the copies of an entry; copies of a read row (or of
    its gain) share their family's gradient, while each copy of a write row sees all of it. `carry` keeps only
    originals; `grow` maps everything; `reset` starts from zero.
    """
    power = 1 if kind == "exp_avg" else 2
    layer = growth.layer_source(spec)
    if growth.how.moments == "reset":
        share = np.zeros(len(rows))
    elif growth.how.moments == "carry":
        # On the embed axis there is no original to prefer: E spreads each channel over its copies.
        original = (rows.copy == 0) | (spec.rows == "embed")
        share = original.astype(np.float64) * (layer.copy == 0)
    else:
        shared = spec.role != "write" and spec.rows != "embed"
        share = 1.0 / rows.copies if shared else np.ones(len(rows))
    factor = torch.from_numpy(share**power).to(old.device)
    if spec.is_matrix:
        return _embed(growth, old, power) * factor[:, None]
    scale = (spec.multiplier / growth.old_spec(spec).multiplier) ** power
    if spec.rows == "embed":
        embed = axis_maps(growth.old, growth.new)["embed"]
        a = channel_scale(embed, growth.how.channels)[low : low + len(rows)]
        factor = factor * torch.from_numpy(a ** (2 * power)).to(old.device)
    return old * factor * scale
