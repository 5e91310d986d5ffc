"""Which old index every new index copies, axis by axis and layer by layer; and by what copied channels are scaled.

On every axis copies stand beside their originals. That keeps the maps monotone, so a rank's new rows come from a
contiguous run of old rows and most of them are already on it. Layers do so unless new ones go on top (see
`config/depth.py`), for which the layers of a pipeline move.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megabus.config.depth import DEPTHS
from megabus.config.schema import Depth, ModelConfig
from megabus.model.params import Axis

UNEVEN_RATIO = 0.75  # a_k of successive copies: two copies get 0.8 and 0.6
TAPER_RATIO = 1 / 3  # of successive copies' shares of a gate: two copies get 3/4 and 1/4


@dataclass(frozen=True, eq=False)
class AxisMap:
    """For each new index: its parent's old index, its number among the parent's copies (0 is the original), and
    how many copies the parent has. int64 arrays of the new length."""

    parent: np.ndarray
    copy: np.ndarray
    copies: np.ndarray

    def __len__(self) -> int:
        return len(self.parent)

    def blocks(self, size: int) -> AxisMap:
        """The map of rows when each index stands for a block of `size` rows (a head's)."""
        rows = (self.parent[:, None] * size + np.arange(size)).reshape(-1)
        return AxisMap(rows, self.copy.repeat(size), self.copies.repeat(size))


def spread(old: int, new: int) -> AxisMap:
    """Copies as even in number as can be: parent[i'] = floor(i' * old / new)."""
    parent = np.arange(new) * old // new
    copies = np.bincount(parent, minlength=old)
    first = np.cumsum(copies) - copies
    return AxisMap(parent, np.arange(new) - first[parent], copies[parent])


def grouped(old_kv: int, new_kv: int, old_group: int, new_group: int) -> AxisMap:
    """Query heads under GQA: a new query head copies a query head of the key head that its own key head copies."""
    kv, group = spread(old_kv, new_kv), spread(old_group, new_group)
    return AxisMap(
        parent=(kv.parent[:, None] * old_group + group.parent).reshape(-1),
        copy=(kv.copy[:, None] * group.copies + group.copy).reshape(-1),
        copies=(kv.copies[:, None] * group.copies).reshape(-1),
    )


@lru_cache(maxsize=32)
def axis_maps(old: ModelConfig, new: ModelConfig) -> dict[Axis, AxisMap]:
    """The map of every named axis (rows of head axes are head * head_dim)."""
    kv = spread(old.kv_heads, new.kv_heads)
    heads = grouped(old.kv_heads, new.kv_heads, old.n_heads // old.kv_heads, new.n_heads // new.kv_heads)
    return {
        "embed": spread(old.d_model, new.d_model),
        "heads": heads.blocks(old.head_dim),
        "kv_heads": kv.blocks(old.head_dim),
        "head_dim": spread(old.head_dim, new.head_dim),
        "ffn": spread(old.d_ff, new.d_ff),
        "vocab": spread(old.vocab_size, new.vocab_size),
    }


def channel_scale(embed: AxisMap, channels: Literal["even", "uneven"]) -> np.ndarray:
    """a of the isometry E (h' = E h, E[i', parent[i']] = a[i']): squares sum to 1 over every family.

    even: 1/sqrt(copies). uneven: a geometric series, which also tells copies of a channel apart.
    """
    if channels == "even":
        return embed.copies**-0.5
    powers = UNEVEN_RATIO**embed.copy
    family = np.zeros(embed.parent.max() + 1)
    np.add.at(family, embed.parent, powers**2)
    return powers / np.sqrt(family[embed.parent])


@dataclass(frozen=True)
class LayerSource:
    """Where a layer of the grown model comes from; copy 0 is the original."""

    parent: int
    copy: int
    copies: int

    def gate(self, depth: Depth, branch: int) -> float:
        """Share of the original's that the gate of the first or second branch gets. Where a layer and its copies share
        one, the shares sum to 1.

        tapered: attention acts before the MLP and is to do so still, so it stays with the first copies and the MLP with
        the last, by a geometric series of `TAPER_RATIO`.
        """
        gates = DEPTHS[depth].gates
        if gates == "silent":
            return 1.0 if self.copy == 0 else 0.0
        if gates == "even":
            return 1.0 / self.copies
        if gates == "tapered":
            powers = TAPER_RATIO ** np.arange(self.copies)
            return float((powers if branch == 1 else powers[::-1])[self.copy] / powers.sum())
        return 1.0


@lru_cache(maxsize=32)
def layer_sources(old: int, new: int, depth: Depth) -> tuple[LayerSource | None, ...]:
    """None where a layer is drawn afresh. Else it copies one: the whole pile is repeated on top, or copies follow their
    originals."""
    manner = DEPTHS[depth]
    if not manner.copies:
        return tuple(LayerSource(i, 0, 1) if i < old else None for i in range(new))
    if manner.on_top:
        return tuple(LayerSource(i % old, i // old, len(range(i % old, new, old))) for i in range(new))
    rows = spread(old, new)
    triples = zip(rows.parent, rows.copy, rows.copies, strict=True)
    return tuple(LayerSource(int(p), int(k), int(c)) for p, k, c in triples)
