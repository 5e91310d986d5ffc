"""Whether every machine reaches every other one, asked before the process group is formed: gloo would go on trying for
five time-outs, and name no one.

Every rank leaves its machine's name and an address at the store where the ranks meet. The first rank of each machine
then connects to that of each other one, where gloo would.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from megabus.errors import UserError
from megabus.parallel.topology import ranks_text

CONNECT = 5.0  # seconds that a connection may take, or a fifth of the time that ranks wait for each other
DEVICE = "GLOO_SOCKET_IFNAME"
SHOWN = 3  # pairs of machines


@dataclass(frozen=True)
class Door:
    """Where a rank can be reached: its machine's name, and what it listens at."""

    host: str
    address: str
    port: int


def network_device() -> tuple[str, str]:
    """(name, address) of the network device that gloo uses in this process, as torch chooses it: the first that
    `DEVICE` names, else that of the host's name, else the loopback."""
    named = os.environ.get(DEVICE, "").split(",")[0]
    devices = psutil.net_if_addrs()
    if named:
        addresses = [
            each.address for each in devices.get(named, []) if each.family in (socket.AF_INET, socket.AF_INET6)
        ]
        if not addresses:
            raise UserError(DEVICE, named, "is no network device with an address here", f"one of {', '.join(devices)}")
        return named, addresses[0].partition("%")[0]
    with contextlib.suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind((place[0], 0))
                address = str(place[0])
                found = (name for name, each in devices.items() if address in [one.address for one in each])
                return next(found, "lo"), address
    return "lo", "127.0.0.1"


def check_reach(store: Any, rank: int, world: int, patience: timedelta) -> None:
    """Raise `UserError`, the same on all ranks, if two machines cannot talk to each other. Collective.

    store: where the ranks meet. patience: how long a rank may be late; then torch's `DistStoreError`.
    """
    try:
        address = network_device()[1]
    except UserError as error:
        store.set(_door(rank), json.dumps({"refused": [error.key, error.value, error.problem, error.remedy]}))
        raise
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        listening.bind((address, 0))
        listening.listen(world)
        mine = Door(socket.gethostname(), address, listening.getsockname()[1])
        store.set(_door(rank), json.dumps([mine.host, mine.address, mine.port]))
        doors = [_read_door(text) for text in _all(store, [_door(each) for each in range(world)], patience)]
        firsts = sorted({door.host: rank for rank, door in reversed(list(enumerate(doors)))}.values())
        if len(firsts) == 1:
            return
        if rank in firsts:
            others = {other: doors[other] for other in firsts if other != rank}
            store.set(_tried(rank), json.dumps(_unreached(others, min(CONNECT, patience.total_seconds() / 5))))
        tried = _all(store, [_tried(first) for first in firsts], patience)
    _judge(doors, {first: json.loads(text) for first, text in zip(firsts, tried, strict=True)})


def _door(rank: int) -> str:
    return f"megabus/reach/{rank}"


def _read_door(text: bytes) -> Door:
    told = json.loads(text)
    if isinstance(told, dict):
        raise UserError(*told["refused"])
    return Door(*told)


def _tried(rank: int) -> str:
    return f"megabus/reach/{rank}/tried"


def _all(store: Any, keys: Sequence[str], patience: timedelta) -> list[bytes]:
    store.wait(list(keys), patience)
    found: list[bytes] = store.multi_get(list(keys))
    return found


def _unreached(doors: Mapping[int, Door], seconds: float) -> list[tuple[int, str]]:
    """Of these ranks those that cannot be connected to, and why."""

    def why(door: Door) -> str:
        try:
            socket.create_connection((door.address, door.port), timeout=seconds).close()
        except TimeoutError:
            return f"no answer in {seconds:g} s"
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(len(doors)) as threads:
        reasons = dict(zip(doors, threads.map(why, doors.values()), strict=True))
    return [(rank, reason) for rank, reason in reasons.items() if reason]


def leave_host() -> None:
    """Let every rank know this one's machine, once the process group is there."""
    _default_store().set(f"megabus/host/{dist.get_rank()}", socket.gethostname())


def host_of(rank: int) -> str:
    """The machine of a rank that may be gone."""
    key = f"megabus/host/{rank}"
    return str(_default_store().get(key).decode()) if _default_store().check([key]) else "an unknown machine"


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def network_speed() -> float:
    """Bytes a second that the system says this process's network device carries; 0 where it does not know, as in most
    virtual machines."""
    said = psutil.net_if_stats().get(network_device()[0])
    return said.speed * 125_000.0 if said is not None and said.speed > 0 else 0.0


def _judge(doors: Sequence[Door], tried: Mapping[int, Sequence[tuple[int, str]]]) -> None:
    """tried: by the first rank of a machine, those of others that it has not reached."""

    def named(first: int) -> str:
        host = doors[first].host
        return f"{host} ({ranks_text([rank for rank, door in enumerate(doors) if door.host == host])})"

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
