"""How fast messages go between neighbours in every tp, pp and dp group, over the backend that training uses.

All pairs of a round are disjoint and exchange at the same time: three rounds a dimension measure a world of any size.
A link is slow beside the others of its kind, those within a machine or those between machines; nothing else is known of
what it should do, unless the configuration says so.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megabus.command import peer_is_gone
from megabus.config.stages import Layout
from megabus.errors import UserError
from megabus.parallel.topology import rank_of, ranks_text
from megabus.preflight.findings import Finding, refused, warned
from megabus.preflight.slow import Pair, blame, usual

# Bytes by kind of device; the last is left out where the one before took CLIMB seconds or more.
SIZES = {"cpu": (8, 64 * 2**10, 4 * 2**20), "cuda": (8, 64 * 2**10, 64 * 2**20)}
CLIMB = 0.02
# Exchanges of a size: so many, fewer once they took ENOUGH seconds, but LEAST unless they took TOO_LONG.
TRIES, ENOUGH, LEAST, TOO_LONG = 20, 0.04, 6, 0.5
WITHIN, BETWEEN = "within machines", "between machines"
SHOWN = 5  # links, or pairs of machines
SLOW = 4.0  # times below the usual bandwidth, or above the usual latency
FAR = 25.0  # times below a rank's share of what a network device is said to carry, which no protocol explains
LATENCY_SLACK = {"cpu": 10e-3, "cuda": 1e-3}  # seconds above the usual latency that mean nothing: a busy machine's


@dataclass(frozen=True)
class MeasuredLink:
    """One pair: seconds of an exchange of 8 bytes, and bytes per second each way while both send."""

    pair: Pair
    latency: float
    bandwidth: float


def neighbours(layouts: Sequence[Layout]) -> list[list[Pair]]:
    """Rounds of disjoint pairs that hold every two neighbours of any tp or dp ring or pipeline of the layouts once."""
    seen: set[Pair] = set()
    rounds: list[list[Pair]] = []
    for layout in dict.fromkeys(layouts):
        for groups, closed in _groups(layout):
            colours: list[list[Pair]] = [[], [], []]
            for ranks in groups:
                for colour, pair in _ring(ranks, closed):
                    if pair not in seen:
                        seen.add(pair)
                        colours[colour].append(pair)
            rounds += [pairs for pairs in colours if pairs]
    return rounds


def _groups(layout: Layout) -> Iterator[tuple[list[list[int]], bool]]:
    """The groups of each dimension, and whether the last rank of one talks to its first."""
    tp, pp, dp = range(layout.tp), range(layout.pp), range(layout.dp)
    yield [[rank_of(layout, p, d, t) for t in tp] for p in pp for d in dp], True
    yield [[rank_of(layout, p, d, t) for p in pp] for d in dp for t in tp], False
    yield [[rank_of(layout, p, d, t) for d in dp] for p in pp for t in tp], True


def _ring(ranks: list[int], closed: bool) -> Iterator[tuple[int, Pair]]:
    """(colour, pair): pairs of one colour are disjoint."""
    size = len(ranks)
    for i in range(size if closed and size > 2 else size - 1):
        a, b = ranks[i], ranks[(i + 1) % size]
        yield (2 if size % 2 and i == size - 1 else i % 2), (min(a, b), max(a, b))


def measure(
    rounds: Sequence[Sequence[Pair]], device: torch.device, group: dist.ProcessGroup, silence: timedelta
) -> tuple[list[MeasuredLink], int | None]:
    """The links whose lower rank this is, and the first neighbour that has not answered for `silence`, after which
    nothing more is measured. Every rank goes through the rounds in order. group: unfit for use after a silence."""
    rank, links = dist.get_rank(), list[MeasuredLink]()
    for pairs in rounds:
        pair = next((pair for pair in pairs if rank in pair), None)
        if pair is not None:
            try:
                link = _measure_pair(pair, rank, device, Wire(group, silence))
            except SilentError as error:
                return links, error.peer
            if rank == pair[0]:
                links.append(link)
    return links, None


def silence_of(silent: Sequence[int | None], patience: float, hosts: Sequence[str]) -> UserError | None:
    """silent: by rank, the neighbour that it found silent; hosts: the machine of each rank. Whoever has found one
    measures no more, and is silent to its next: so the blame goes to one that has found none, and to the one that most
    have found."""
    pairs = [(rank, peer) for rank, peer in enumerate(silent) if peer is not None]
    if not pairs:
        return None
    times = Counter(peer for _, peer in pairs)
    peer = max(times, key=lambda rank: (silent[rank] is None, times[rank]))
    rank = next(rank for rank, other in pairs if other == peer)
    pair = (min(rank, peer), max(rank, peer))
    ends = [hosts[rank] for rank in pair]
    where = f" ({ends[0]} - {ends[1]})" if ends[0] != ends[1] else ""
    problem = f"carries nothing: rank {peer} has not answered for {patience:.2g} s"
    return UserError("link", f"{_name(pair)}{where}", problem, "look at that machine and its network")


class SilentError(Exception):
    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


@dataclass(frozen=True)
class Wire:
    """What messages go over, and how long one may take."""

    group: dist.ProcessGroup
    silence: timedelta


def _measure_pair(pair: Pair, rank: int, device: torch.device, wire: Wire) -> MeasuredLink:
    """The lower rank decides how long each size is exchanged, and says so in the first byte of its messages."""
    leads = rank == pair[0]
    peer = pair[1] if leads else pair[0]
    flag, sizes = _bytes(1, device), SIZES[device.type]
    exchange(peer, flag, torch.empty_like(flag), wire)  # connects
    times = [_repeat(peer, leads, _bytes(size, device), wire) for size in sizes[:2]]
    answer = torch.empty_like(flag)
    flag.fill_(times[-1] < CLIMB)
    exchange(peer, flag, answer, wire)
    if (flag if leads else answer).item():
        times.append(_repeat(peer, leads, _bytes(sizes[2], device), wire))
    return MeasuredLink(pair, times[0], sizes[len(times) - 1] / times[-1])


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _repeat(peer: int, leads: bool, out: Tensor, wire: Wire) -> float:
    """Seconds of the fastest exchange: what else the machine does only makes others slower."""
    into, best, spent = torch.empty_like(out), float("inf"), 0.0
    for number in range(1, TRIES + 1):
        limit = ENOUGH if number >= LEAST else TOO_LONG
        out[0] = number < TRIES and spent < limit  # whether another one follows
        get_accelerator().synchronize()
        begun = time.perf_counter()
        exchange(peer, out, into, wire)
        elapsed = time.perf_counter() - begun
        best, spent = min(best, elapsed), spent + elapsed
        if not (out if leads else into)[0].item():
            break
    return best


def exchange(peer: int, out: Tensor, into: Tensor, wire: Wire) -> None:
    """Send `out` to a rank and receive `into` from it. Raises `SilentError` if it does not answer."""
    jobs = [dist.P2POp(job, data, peer, wire.group) for job, data in ((dist.isend, out), (dist.irecv, into))]
    works = dist.batch_isend_irecv(jobs)
    if out.device.type == "cuda":  # NCCL's wait with a time-out sleeps for 1 ms at a time: longer than a message takes
        deadline = time.monotonic() + wire.silence.total_seconds()
        while not all(work.is_completed() for work in works):
            if time.monotonic() > deadline:
                raise SilentError(peer)
        return
    try:
        for work in works:
            work.wait(wire.silence)
    except RuntimeError as error:
        # A neighbour that has given up on another has closed what it had of this group.
        if "timed out" not in str(error).lower() and not peer_is_gone(error):
            raise
        raise SilentError(peer) from error


def best_of(before: Sequence[MeasuredLink], again: Sequence[MeasuredLink]) -> list[MeasuredLink]:
    """Of two measurements of the same links the better figures."""
    later = {link.pair: link for link in again}
    return [
        replace(
            link,
            latency=min(link.latency, later[link.pair].latency),
            bandwidth=max(link.bandwidth, later[link.pair].bandwidth),
        )
        for link in before
    ]


def slow_links(links: Sequence[MeasuredLink], slack: float) -> dict[Pair, MeasuredLink]:
    """Of links of one kind those far below the others."""
    if not links:
        return {}
    bandwidth = usual([link.bandwidth for link in links])
    latency = 1 / usual([1 / link.latency for link in links])
    return {
        link.pair: link
        for link in links
        if link.bandwidth * SLOW < bandwidth or link.latency > max(SLOW * latency, latency + slack)
    }


def below_floor(links: Sequence[MeasuredLink], floor: float | None) -> set[Pair]:
    return {link.pair for link in links if floor is not None and link.bandwidth < floor * 1e9}


def below_device(links: Sequence[MeasuredLink], hosts: Sequence[str], said: Sequence[float]) -> set[Pair]:
    """Links between machines that carry hardly anything of what the network devices of their ends are said to, if all
    ranks of a machine share them. Where two machines are all there is, nothing else shows a slow network.

    said: bytes a second of each rank's device, 0 where nothing is known.
    """
    share = max(Counter(hosts).values())
    return {link.pair for link in links if link.bandwidth * FAR < min(said[rank] for rank in link.pair) / share}


@dataclass(frozen=True)
class Yardstick:
    """What links are held against. hosts: the machine of each rank; slack: seconds of latency that mean nothing; floor:
    GB/s that each must carry; said: bytes a second that each rank's network device is said to carry, 0 if unknown.
    """

    hosts: Sequence[str]
    slack: float
    floor: float | None
    said: Sequence[float]

    def slow(self, kind: str, links: Sequence[MeasuredLink]) -> dict[Pair, MeasuredLink]:
        below = below_device(links, self.hosts, self.said) if kind == BETWEEN else set()
        return slow_links(links, self.slack) | {link.pair: link for link in links if link.pair in below}

    def doubts(self, links: Sequence[MeasuredLink]) -> bool:
        """Whether anything is slow."""
        kinds = by_kind(links, self.hosts)
        return any(self.slow(kind, found) or below_floor(found, self.floor) for kind, found in kinds.items())


def by_kind(links: Sequence[MeasuredLink], hosts: Sequence[str]) -> dict[str, list[MeasuredLink]]:
    kinds: dict[str, list[MeasuredLink]] = {WITHIN: [], BETWEEN: []}
    for link in links:
        same = hosts[link.pair[0]] == hosts[link.pair[1]]
        kinds[WITHIN if same else BETWEEN].append(link)
    return {kind: found for kind, found in kinds.items() if found}


def links_rows(links: Sequence[MeasuredLink], yardstick: Yardstick) -> list[Finding]:
    if not links:
        return [Finding("links", "one rank has no neighbour")]
    rows, hosts, floor = [], yardstick.hosts, yardstick.floor
    for kind, found in by_kind(links, hosts).items():
        check, slowest = f"links {kind}", min(found, key=lambda link: link.bandwidth)
        below = below_floor(found, floor)
        if below:
            problem = f"is more than the {slowest.bandwidth / 1e9:.2g} GB/s of link {_name(slowest.pair)}"
            who = _culprits(below, found, hosts)
            remedy = f"look at {who}, or lower it"
            rows.append(refused(check, UserError("preflight.min_bandwidth", floor, problem, remedy)))
            continue
        slow = yardstick.slow(kind, found)
        text = f"{len(found)}: {_figures(found)}"
        if slow:
            who = _culprits(set(slow), found, hosts)
            if kind == BETWEEN and below_device(found, hosts, yardstick.said):
                text += f"; the network devices are said to carry {min(filter(None, yardstick.said)) / 1e9:.2g} GB/s"
            rows.append(warned(check, f"{who} slow, {_figures(list(slow.values()))}; of all {text}"))
        else:
            rows.append(Finding(check, text))
    return rows


def _culprits(slow: set[Pair], found: Sequence[MeasuredLink], hosts: Sequence[str]) -> str:
    """Machines all of whose links to others are slow while each of those has a good one, pairs of machines all of whose
    links are slow, and of what these do not explain ranks and links in the same way."""
    between: dict[Pair, set[Pair]] = defaultdict(set)  # by the first ranks of two machines
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    for link in found:
        a, b = sorted(first[hosts[rank]] for rank in link.pair)
        if a != b:
            between[a, b].add(link.pair)
    spoilt = {pair for pair, links in between.items() if links <= slow}
    machines, lines = blame(spoilt, between)

    def named(rank: int) -> str:
        return f"{hosts[rank]} ({ranks_text([other for other, host in enumerate(hosts) if host == hosts[rank]])})"

    parts = [*(named(rank) for rank in machines)]
    parts += [f"the network between {named(a)} and {named(b)}" for a, b in lines[:SHOWN]]
    parts += [f"{len(lines) - SHOWN} other pairs of machines"] if lines[SHOWN:] else []
    left = slow - {pair for each in spoilt for pair in between[each]}
    ranks, rest = blame(left, [link.pair for link in found])
    parts += [f"{ranks_text(ranks)} ({', '.join(sorted({hosts[rank] for rank in ranks}))})"] if ranks else []
    if rest:
        more = f" and {len(rest) - SHOWN} others" if rest[SHOWN:] else ""
        parts.append("link " + ", ".join(_name(pair) for pair in rest[:SHOWN]) + more)
    return " and ".join(parts)


def _name(pair: Pair) -> str:
    return f"{pair[0]}-{pair[1]}"


def _figures(links: Sequence[MeasuredLink]) -> str:
    bandwidths = sorted(link.bandwidth / 1e9 for link in links)
    latencies = sorted(link.latency * 1e6 for link in links)
    if len(links) == 1:
        return f"{bandwidths[0]:.2g} GB/s, {latencies[0]:.0f} µs"
    return f"{bandwidths[0]:.2g} to {bandwidths[-1]:.2g} GB/s, {latencies[0]:.0f} to {latencies[-1]:.0f} µs"
