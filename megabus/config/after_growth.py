"""What a YAML file may say of the steps after a growth: `growth.boost`, `growth.rewarm` and `growth.settle`."""

from __future__ import annotations

from pydantic import Field

from megabus.config.section import Angle, Count, Positive, Section, Share


class BoostConfig(Section):
    """A larger learning rate for the rows and layers that a growth has added, until they have caught up."""

    factor: Positive = Field(2.0, description="multiple of the learning rate that they begin with")
    tokens: Count = Field(1_000_000, description="tokens after the growth over which it falls linearly to 1")


class RewarmConfig(Section):
    """A lower learning rate for the whole model after every growth, until it has settled."""

    share: Share = Field(0.0, description="share of the scheduled rate that the first step after a growth begins at")
    tokens: Count = Field(description="tokens after the growth over which it rises linearly to the scheduled rate")


class SettleConfig(Section):
    """ngpt: a tight cap on the angle that rows turn by in a step, which is loosened after every growth."""

    max_angle: Angle = Field(description="radians a step that the cap begins at; the embedding's rows are free")
    tokens: Count = Field(
        description="tokens after the growth over which the cap rises to optimizer.max_angle, or beyond all bounds: "
        "its inverse falls linearly"
    )


AFTER_GROWTH = ("boost", "rewarm", "settle")  # keys of `growth` that say how the steps after a growth differ
