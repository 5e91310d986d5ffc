"""This rank's part of the fp32 masters and Adam moments, read from and written into DeepSpeed's partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megabus.engine.adam import read_step, write_state
from megabus.model.init import initial_rows
from megabus.model.params import ParamSpec, spec_of
from megabus.parallel.fragments import KINDS, MOMENTS, Fragments, Kind
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's; its parameters are the flat fp32 partitions."""
    return engine.optimizer.optimizer


def flat_partitions(engine: Any) -> list[Tensor]:
    """The rank's flat fp32 master of every parameter group, in order."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


class Place(NamedTuple):
    """Where a piece that this rank owns lies: in which group's flat partition, and where in it."""

    spec: ParamSpec
    piece: Piece
    width: int  # entries of a row
    group: int
    part: slice


def own_parameters(module: nn.Module, placement: Placement, rank: int) -> list[nn.Parameter]:
    """Those of a rank's parameters that are stepped on its pipeline rank: all but rows of a tied head, which the first
    one owns."""
    at = coordinate(placement.layout, rank)
    return [p for p in module.parameters() if placement.pp_rank(spec_of(p).name) == at.pp]


def places(module: nn.Module, placement: Placement, rank: int) -> Iterator[Place]:
    """All that this rank owns, in canonical order.

    Raises RuntimeError where DeepSpeed's partitions are not what `Placement` computes: growth and checkpoints
    rest on that arithmetic, so a changed DeepSpeed must stop here.
    """
    owned = {piece.name: piece for piece in placement.owned(rank)}
    for parameter in own_parameters(module, placement, rank):
        spec, mapping = spec_of(parameter), parameter._hp_mapping  # type: ignore[attr-defined]
        piece, found = owned.pop(spec.name, None), None
        if mapping is not None:
            start = placement.shard(spec.name, rank).start + mapping.lp_fragment_address.start
            found = Piece(spec.name, start, start + mapping.lp_fragment_address.numel)
        if found != piece:
            raise RuntimeError(f"DeepSpeed gives this rank {found}, megabus expected {piece}")
        if piece is not None:
            offset = mapping.hp_fragment_address.start
            yield Place(
                spec, piece, placement.width(spec.name), mapping.param_group_index, slice(offset, offset + len(piece))
            )
    if owned:
        raise RuntimeError(f"DeepSpeed holds no part of {sorted(owned)}")


def read_fragments(engine: Any, own: Iterable[Place]) -> Fragments:
    """Views of what this rank owns, in canonical order; moments only once there are some."""
    flats, inner = flat_partitions(engine), inner_optimizer(engine)
    fragments: Fragments = {}
    for _, piece, _, group, part in own:
        fragments[piece] = {"weight": flats[group].detach()[part]}
        state = inner.state.get(flats[group])
        if state:
            fragments[piece] |= {kind: state[kind][part] for kind in MOMENTS if kind in state}
    return fragments


def initial_fragments(placement: Placement, rank: int, seed: int, device: torch.device) -> Fragments:
    """A rank's part of the initial weights, in canonical order, drawn without drawing any other."""
    fragments: Fragments = {}
    for piece in placement.owned(rank):
        width = placement.width(piece.name)
        first, last = piece.start // width, -(-piece.stop // width)
        rows = initial_rows(placement.model, piece.name, seed, first, last, device).reshape(-1)
        offset = piece.start - first * width
        fragments[piece] = {"weight": rows[offset : offset + len(piece)]}
    return fragments


def optimizer_step_count(engine: Any) -> int:
    """Steps that Adam's bias correction has counted."""
    return read_step(inner_optimizer(engine), flat_partitions(engine)[0])


@torch.no_grad()
def write_fragments(engine: Any, own: Iterable[Place], new: Fragments, step: int) -> None:
    """Set masters (and moments, which `new` has if `step` is not 0) and refresh the model's weights. Takes the tensors
    out of `new`, one kind after the other, so that never more than one kind lies in memory twice."""
    kinds: tuple[Kind, ...] = KINDS if step else ("weight",)
    for kind in kinds:
        if kind != "weight":
            for flat in flat_partitions(engine):
                write_state(inner_optimizer(engine), flat, {kind: torch.zeros_like(flat)}, step)
        for piece, tensors in read_fragments(engine, own).items():
            tensors[kind].copy_(new[piece].pop(kind))
    engine.optimizer.update_lp_params()
