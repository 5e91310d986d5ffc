"""Which machine a process is on. Its name does not say: several machines, or containers, may have one, and one machine
two. What counts is whether processes share a kernel and its network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one on each machine, and at each boot
NETWORK = Path("/proc/self/ns/net")  # another one in each container that has a network of its own
SHORT = 8  # letters of an identifier that tell apart what has one name


class Host(NamedTuple):
    """name: what it calls itself; id: 12 letters that are the same for all processes there, and nowhere else."""

    name: str
    id: str


def this_host() -> Host:
    """Where this process is. Without Linux's /proc its name alone tells."""
    name, found = socket.gethostname(), []
    with contextlib.suppress(OSError):
        found = [BOOT.read_text().strip(), os.readlink(NETWORK)]
    return Host(name, hashlib.sha256(" ".join(found or [name]).encode()).hexdigest()[:12])


def host_names(hosts: Sequence[Host]) -> list[str]:
    """What to call the hosts of all ranks: each has one name, and no two have the same one."""
    first: dict[str, str] = {}
    for host in hosts:
        first.setdefault(host.id, host.name)
    having = defaultdict(list)
    for number, name in first.items():
        having[name].append(number)
    facts = {
        number: name if len(numbers) == 1 else f"{name} [{number[:SHORT]}]"
        for name, numbers in having.items()
        for number in numbers
    }
    return [facts[host.id] for host in hosts]
