"""What the values of `growth.depth` mean for layers: one row each. Whoever asks what a manner does asks this table."""

from __future__ import annotations

from typing import Literal, NamedTuple

from megabus.config.schema import Depth


class DepthManner(NamedTuple):
    """copies: whether new layers copy old ones, or are drawn. on_top: whether they go on top, so that every old layer
    keeps its number; else each stands beside its original.
    gates: of layers that have copies. kept: as loud as before, copies too; silent: those of copies are zero; even and
    tapered: an original and its copies share one, in equal parts or by a geometric series."""

    copies: bool
    on_top: bool
    gates: Literal["kept", "silent", "even", "tapered"]

    @property
    def shares_gates(self) -> bool:
        return self.gates in ("even", "tapered")


DEPTHS: dict[Depth, DepthManner] = {
    "append": DepthManner(copies=True, on_top=True, gates="silent"),
    "identity": DepthManner(copies=True, on_top=False, gates="silent"),
    "split": DepthManner(copies=True, on_top=False, gates="even"),
    "taper": DepthManner(copies=True, on_top=False, gates="tapered"),
    "stack": DepthManner(copies=True, on_top=True, gates="kept"),
    "interleave": DepthManner(copies=True, on_top=False, gates="kept"),
    "fresh": DepthManner(copies=False, on_top=True, gates="kept"),
}
