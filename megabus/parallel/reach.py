"""Whether every machine reaches every other one, asked before ranks connect to each other: gloo would go on trying for
five time-outs, and name no one.

Every rank leaves its machine's name and an address at the store where all have met. Rank 0 reads these and hands the
first rank of each machine a list of the others, to which that one connects where gloo would. Rank 0 judges for all.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from megabus.errors import UserError
from megabus.parallel.hosts import Host, host_names, this_host
from megabus.parallel.topology import ranks_text

CONNECT = 5.0  # seconds that a connection may take, if a fifth of the time that ranks wait is enough for all of them
THREADS = 64  # of a machine, each with a connection
DEVICE = "GLOO_SOCKET_IFNAME"
SHOWN = 3  # pairs of machines
ROOM = "megabus/reach"  # at the store
_hosts: list[str] = []  # of all ranks, on rank 0, as they were when ranks met: the store may not answer later


@dataclass(frozen=True)
class Door:
    """Where a rank can be reached: its machine's name, what it listens at, and the machine's `Host.id`."""

    host: str
    address: str
    port: int
    machine: str


def network_device() -> tuple[str, str]:
    """(name, address) of the network device that gloo uses in this process, as torch chooses it: the first that
    `DEVICE` names, else that of the host's name, else the loopback.

    An address that holds on one link only (IPv6's fe80::) ends in the device, and is taken where there is no other.
    """
    named = os.environ.get(DEVICE, "").split(",")[0]
    devices = psutil.net_if_addrs()
    if named:
        addresses = [
            each.address for each in devices.get(named, []) if each.family in (socket.AF_INET, socket.AF_INET6)
        ]
        if not addresses:
            raise UserError(DEVICE, named, "is no network device with an address here", f"one of {', '.join(devices)}")
        return named, _on(named, min(addresses, key=lambda address: (_of_one_link(address), ":" in address)))
    with contextlib.suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(place)
                address = _bare(str(place[0]))
                found = (name for name, each in devices.items() if address in [_bare(one.address) for one in each])
                name = next(found, "lo")
                return name, _on(name, address)
    return "lo", "127.0.0.1"


def _bare(address: str) -> str:
    return address.partition("%")[0]


def _of_one_link(address: str) -> bool:
    return ":" in address and ipaddress.ip_address(_bare(address)).is_link_local


def _on(device: str, address: str) -> str:
    """The address as this machine has to call it: that of a link with its own device on that link."""
    return f"{_bare(address)}%{device}" if _of_one_link(address) else _bare(address)


def check_reach(store: Any, rank: int, world: int, patience: timedelta) -> None:
    """Raise `UserError`, the same on all ranks, if two machines cannot talk to each other. Collective.

    store: where the ranks have met. patience: how long all of it may take. Rank 0 gives up a little before that and
    names who has not come so far; should it be rank 0 itself, the others get torch's `DistStoreError`.
    """
    seconds = patience.total_seconds()
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        device = ""
        try:
            device, address = network_device()
            mine = _listen(stack, device, address, world)
            store.set(_door(rank), json.dumps(astuple(mine)))
        except UserError as error:
            store.set(_door(rank), _as_json(error))
        if rank == 0:
            verdict = _ask_all(store, world, device, end - 0.2 * seconds, seconds)
            store.set(f"{ROOM}/verdict", _as_json(verdict) if verdict else "")
            if verdict and world > 1:
                with contextlib.suppress(dist.DistStoreError):  # who has gone does not read it
                    store.wait([f"{ROOM}/read"], timedelta(seconds=min(5.0, 0.1 * seconds)))
        else:
            if _awaited(store, [_others(rank)], end)[0]:
                _try(store, rank, device, seconds)
            verdict = _refusal(_awaited(store, [f"{ROOM}/verdict"], end)[0])
            if verdict and store.add(f"{ROOM}/readers", 1) == world - 1:
                store.set(f"{ROOM}/read", "")  # rank 0, and the store with it, may end
    if verdict:
        raise verdict


def _ask_all(store: Any, world: int, device: str, end: float, seconds: float) -> UserError | None:
    """Rank 0's part; what is wrong."""
    doors: list[Door] = []
    firsts: list[int] = []
    verdict = None
    try:
        texts = _awaited(store, [_door(rank) for rank in range(world)], end)
        verdict = next((error for error in map(_refusal, texts) if error), None)
        if verdict is None:
            doors = [Door(*json.loads(text)) for text in texts]
            _hosts[:] = host_names([Host(door.host, door.machine) for door in doors])
            doors = [replace(door, host=name) for door, name in zip(doors, _hosts, strict=True)]
            firsts = sorted({door.machine: rank for rank, door in reversed(list(enumerate(doors)))}.values())
    except dist.DistStoreError:
        verdict = _absent(store, {rank: _door(rank) for rank in range(world)}, [], seconds)
    asked = firsts if len(firsts) > 1 else []
    table = json.dumps({first: astuple(doors[first]) for first in asked})
    store.set(f"{ROOM}/table", table)
    for rank in range(1, world):
        store.set(_others(rank), "some" if rank in asked else "")
    if not asked:
        return verdict
    _try(store, 0, device, seconds)
    try:
        tried = _awaited(store, [_tried(first) for first in asked], end)
    except dist.DistStoreError:
        return _absent(store, {first: _tried(first) for first in asked}, _hosts, seconds)
    try:
        _judge(doors, {first: json.loads(text) for first, text in zip(asked, tried, strict=True)})
    except UserError as error:
        return error
    return None


def _try(store: Any, rank: int, device: str, seconds: float) -> None:
    """Connect to the other machines, and leave word of those that do not answer."""
    others = {int(first): Door(*door) for first, door in json.loads(store.get(f"{ROOM}/table")).items()}
    del others[rank]
    rounds = -(-len(others) // THREADS)
    store.set(_tried(rank), json.dumps(_unreached(others, device, min(CONNECT, seconds / 5 / rounds))))


def _absent(store: Any, keys: Mapping[int, str], hosts: Sequence[str], seconds: float) -> UserError:
    """Of the ranks that have not left these keys."""
    ranks = [rank for rank, key in keys.items() if not store.check([key])]
    where = f" ({', '.join(sorted({hosts[rank] for rank in ranks}))})" if hosts else ""
    problem = f"{ranks_text(ranks)}{where} said nothing in {0.8 * seconds:g} s after all had met, or ended"
    return UserError("ranks", len(keys), problem, "look at their logs and machines")


def _listen(stack: contextlib.ExitStack, device: str, address: str, world: int) -> Door:
    """Open a door until the stack is closed."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        listening = stack.enter_context(socket.socket(family, kind))
        listening.bind(place)
        listening.listen(world)
    except OSError as error:
        problem = f"has the address {address}, where nothing can listen ({error.strerror or error})"
        raise UserError(DEVICE, device, problem, "name the network device that leads to the other machines") from error
    here = this_host()
    return Door(here.name, _bare(address), listening.getsockname()[1], here.id)


def _door(rank: int) -> str:
    return f"{ROOM}/{rank}"


def _others(rank: int) -> str:
    return f"{ROOM}/{rank}/others"


def _tried(rank: int) -> str:
    return f"{ROOM}/{rank}/tried"


def _as_json(error: UserError) -> str:
    return json.dumps({"refused": [error.key, str(error.value), error.problem, error.remedy]})


def _refusal(text: bytes) -> UserError | None:
    answer = json.loads(text) if text else None
    return UserError(*answer["refused"]) if isinstance(answer, dict) else None


def _awaited(store: Any, keys: Sequence[str], end: float) -> list[bytes]:
    """What stands at the store, or will before `end`; then `DistStoreError`."""
    store.wait(list(keys), timedelta(seconds=max(0.001, end - time.monotonic())))
    found: list[bytes] = store.multi_get(list(keys))
    return found


def _unreached(doors: Mapping[int, Door], device: str, seconds: float) -> list[tuple[int, str]]:
    """Of these ranks those that cannot be connected to, and why. device: that leads to them."""

    def why(door: Door) -> str:
        try:
            socket.create_connection((_on(device, door.address), door.port), timeout=seconds).close()
        except TimeoutError:
            return f"no answer in {seconds:g} s"
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(min(THREADS, len(doors))) as threads:
        reasons = dict(zip(doors, threads.map(why, doors.values()), strict=True))
    return [(rank, reason) for rank, reason in reasons.items() if reason]


def host_of(rank: int) -> str:
    """On rank 0, the machine of a rank that may be gone."""
    return _hosts[rank] if rank < len(_hosts) else "an unknown machine"


def network_speed() -> float:
    """Bytes a second that the system says this process's network device carries; 0 where it does not know, as in most
    virtual machines."""
    said = psutil.net_if_stats().get(network_device()[0])
    return said.speed * 125_000.0 if said is not None and said.speed > 0 else 0.0


def _judge(doors: Sequence[Door], tried: Mapping[int, Sequence[tuple[int, str]]]) -> None:
    """tried: by the first rank of a machine, those of others that it has not reached."""

    def named(first: int) -> str:
        ranks = [rank for rank, door in enumerate(doors) if door.machine == doors[first].machine]
        return f"{doors[first].host} ({ranks_text(ranks)})"

    remedy = f"look at the network and the firewall between them, or name the right device in {DEVICE}"
    for first in tried:
        if doors[first].address.startswith("127.") or doors[first].address == "::1":
            problem = f"leaves {named(first)} to be reached at {doors[first].address}, where no other machine can"
            value = os.environ.get(DEVICE, "not set")
            raise UserError(DEVICE, value, problem, "name the network device that leads to the other machines")
    pairs: dict[tuple[int, int], str] = {}
    for first, unreached in tried.items():
        for other, reason in unreached:
            words = f"{doors[first].host} cannot connect to {doors[other].address} ({reason})"
            pairs.setdefault((min(first, other), max(first, other)), words)
    if pairs:
        names = [f"{named(a)} - {named(b)}" for a, b in pairs]
        more = f" and {len(names) - SHOWN} other pairs" if len(names) > SHOWN else ""
        raise UserError(
            "link", "; ".join(names[:SHOWN]) + more, f"carries nothing: {next(iter(pairs.values()))}", remedy
        )
