"""What a growth sends, and how long training stands still for it. Bytes are the plan's own; seconds are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megabus.config import RunConfig, Stage
from megabus.config.precision import FP32_BYTES
from megabus.estimate.devices import Device
from megabus.estimate.memory import states_at
from megabus.growth.plan import Plan, Wave, plan_between, schedule_of

ALL_RANKS = 16  # of larger worlds some ranks stand for all


@dataclass(frozen=True)
class GrowthEstimate:
    """sent, received: bytes of the rank that sends or gets most; looked_at: ranks that were looked at for it, of all.
    messages: the most that one sends or gets. memory: bytes at the worst moment, at most. move, grow, rebuild: seconds.
    """

    sent: int
    received: int
    messages: int
    looked_at: int
    memory: int
    move: float
    grow: float
    rebuild: float

    @property
    def stall(self) -> float:
        return self.move + self.grow + self.rebuild


def messages(schedule: Sequence[Wave], rank: int) -> tuple[list[int], list[int]]:
    """Bytes of each message that a rank sends to others, and gets from them."""
    transfers = [each for wave in schedule for *_, each in wave.transfers if each.src != each.dst]
    sent = [len(each.piece) * FP32_BYTES for each in transfers if each.src == rank]
    return sent, [len(each.piece) * FP32_BYTES for each in transfers if each.dst == rank]


def estimate_growth(config: RunConfig, old: Stage, new: Stage, device: Device, rebuild: float) -> GrowthEstimate:
    """Of the growth from one stage to the next. rebuild: seconds that new engines take, for which there is no model."""
    plan, world = plan_between(config, old, new), new.layout.world
    # Spread over pipeline ranks and data-parallel places.
    ranks = sorted({0, world - 1, *(i * world // ALL_RANKS for i in range(ALL_RANKS))})
    exchanged = [messages(schedule_of(config, plan, rank), rank) for rank in ranks]
    received = max(sum(got) for _, got in exchanged)
    sent, most = max(sum(gone) for gone, _ in exchanged), max(len(one) for both in exchanged for one in both)
    link = device.inter if world > device.nodes_of else device.intra
    grown = max(sum(map(len, plan.new.owned(rank))) for rank in ranks) * len(plan.growth.sent_kinds) * FP32_BYTES
    return GrowthEstimate(
        sent=sent,
        received=received,
        messages=most,
        looked_at=len(ranks),
        memory=growth_bytes(config, plan, new),
        move=link.seconds(max(sent, received), most),
        grow=8 * grown / device.memory_bandwidth,  # some passes in fp64 over what is made
        rebuild=rebuild,
    )


def growth_bytes(config: RunConfig, plan: Plan, new: Stage) -> int:
    """The most that a rank holds on its device between two engines: what it had and what it gets with the buffer, or
    what it got and the new engine, whose weights lie there twice while they are made flat."""
    kinds, means = len(plan.growth.sent_kinds), len(plan.growth.means)
    worst = 0
    for pp in range(new.layout.pp):
        at = states_at(config.train, new, plan.new, pp, new.layout.tp - 1)
        rebuilt = at.weights * 2 + at.masters + at.gradients + (at.moments if kinds > 1 + means else means * at.masters)
        worst = max(worst, kinds * at.masters + rebuilt, kinds * at.masters + config.growth.buffer_bytes)
    old_pp, old_tp = plan.old.layout.pp, plan.old.layout.tp
    had = FP32_BYTES * max(sum(g.partition for g in plan.old.groups(pp, old_tp - 1)) for pp in range(old_pp))
    ends = (states_at(config.train, new, plan.new, pp, 0) for pp in (0, new.layout.pp - 1))
    new_masters = max(at.masters for at in ends)
    return max(worst, kinds * (had + new_masters) + config.growth.buffer_bytes)
