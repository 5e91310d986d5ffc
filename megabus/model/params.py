"""The declaration that every parameter carries: its named axes and its role. All else is derived from it.

Tensor-parallel shards, unit norm, growth, moments, checkpoints and counts read this and nothing else; no
parameter's name is written in a second place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from megabus.config.schema import ModelConfig
from megabus.kernels.form import Kernels
from megabus.model.tensor_parallel import TensorParallel

Axis = Literal["embed", "heads", "kv_heads", "head_dim", "ffn", "vocab"]
Role = Literal["read", "write", "gain", "bias"]

UNIT_ERROR = 1e-6  # by which lengths of unit rows may be off


@dataclass(frozen=True)
class ParamSpec:
    """One parameter's declaration.

    axes: (rows, "embed") for a matrix, stored as a list of d_model-vectors; (rows,) for a vector of gains or biases.
    role: `read` rows take inner products with h, `write` rows are summed into h, gains multiply, biases are added.
    unit: rows are unit vectors, kept so after every optimizer step.
    init: a gain's raw initial value, or the standard deviation of a matrix's entries (before normalisation).
    multiplier: a gain acts as raw * multiplier (nGPT's init/scale), or a matrix whose product is normalised next does
        as far as that norm's eps goes; growth preserves that product.
    branch: 1 or 2, the branch of its layer that it is part of: attention or MLP; 0 outside of layers.
    gate: silences its branch when 0 (zero gates make the layer the identity).
    lookup: rows are picked, not multiplied with h, and so cost no FLOPs; `tied`: they are the head's too.
    compensates_read_tilt: this gain makes up for read rows that tilted away from the old channels (`read: tilt`).
    llama: its name in transformers' Llama and its kin, within its layer or the whole model; there write matrices are
        transposed.
    compensates_clones: this gain makes up for cloned write rows under `write: clone` (HyperCloning's 1/c).
    name, layer: canonical name such as `layers.7.attn.out`, the same under every layout, and its layer's number.
    """

    axes: tuple[Axis, ...]
    role: Role
    unit: bool = False
    init: float = 1.0
    multiplier: float = 1.0
    branch: int = 0
    gate: bool = False
    lookup: bool = False
    tied: bool = False
    compensates_clones: bool = False
    compensates_read_tilt: bool = False
    llama: str = ""
    name: str = ""
    layer: int | None = None

    @property
    def rows(self) -> Axis:
        return self.axes[0]

    @property
    def is_matrix(self) -> bool:
        return len(self.axes) == 2

    @property
    def sharded(self) -> bool:
        """Tensor parallelism cuts the rows, never a vector; `embed` and `head_dim` are never cut."""
        return self.rows not in ("embed", "head_dim")

    @property
    def namesake(self) -> str:
        """Its name within whatever layer it is in (`attn.out`), or in the whole model."""
        return self.name if self.layer is None else self.name.split(f".{self.layer}.", 1)[1]

    def in_layer(self, layer: int) -> str:
        """The canonical name of this parameter's namesake in another layer."""
        return self.name if self.layer is None else self.name.replace(f".{self.layer}.", f".{layer}.", 1)


def axis_sizes(model: ModelConfig) -> dict[Axis, int]:
    """Global length of every named axis."""
    return {
        "embed": model.d_model,
        "heads": model.n_heads * model.head_dim,
        "kv_heads": model.kv_heads * model.head_dim,
        "head_dim": model.head_dim,
        "ffn": model.d_ff,
        "vocab": model.vocab_size,
    }


def global_shape(spec: ParamSpec, model: ModelConfig) -> tuple[int, ...]:
    sizes = axis_sizes(model)
    return tuple(sizes[axis] for axis in spec.axes)


def shard_rows(spec: ParamSpec, model: ModelConfig, tp: int, rank: int) -> tuple[int, int]:
    """Global rows [start, stop) that tensor-parallel rank `rank` of `tp` holds.

    Vocabularies need not divide: shards then differ by a row, and no padding exists anywhere.
    """
    n = axis_sizes(model)[spec.rows]
    if not spec.sharded:
        return 0, n
    return rank * n // tp, (rank + 1) * n // tp


class Declare:
    """Makes parameters for one model on one tensor-parallel rank: local shape, declaration attached.

    Values are left at zero: a state (initial, grown or loaded) is written into them afterwards.
    """

    def __init__(self, model: ModelConfig, tp: TensorParallel, kernels: Kernels) -> None:
        self.model, self.tp, self.kernels = model, tp, kernels

    def __call__(self, *axes: Axis, role: Role, **facts: float | bool | str) -> nn.Parameter:
        spec = ParamSpec(axes, role, **facts)  # type: ignore[arg-type]
        start, stop = shard_rows(spec, self.model, self.tp.size, self.tp.rank)
        parameter = nn.Parameter(torch.zeros(stop - start, *global_shape(spec, self.model)[1:]))
        parameter.spec = spec  # type: ignore[attr-defined]
        return parameter


def spec_of(parameter: nn.Parameter) -> ParamSpec:
    return parameter.spec  # type: ignore[attr-defined]


def name_parameters(module: nn.Module, layer_of: Callable[[str], int | None]) -> None:
    """Write each parameter's place in the module tree into its declaration."""
    for name, parameter in module.named_parameters():
        parameter.spec = replace(spec_of(parameter), name=name, layer=layer_of(name))  # type: ignore[attr-defined]
