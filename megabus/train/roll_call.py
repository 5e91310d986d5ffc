"""Which ranks are still there, on which machines, and what each was doing: asked when a run hangs or loses a peer.

Every rank's watchdog signs in now and then at the store where the ranks have met, over a connection of its own and from
a thread of its own, so a rank that hangs still signs in. A rank that no longer does is dead, or cannot be reached.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megabus.parallel.hosts import Host, host_names, this_host
from megabus.parallel.topology import ranks_text

PERIOD = 0.5  # seconds between two signatures of a rank; longer where there are many, to spare the store
RANKS_A_SECOND = 500.0
SILENCE = timedelta(seconds=2)  # of the store: it answers at once or not at all
LEFT = -1  # the last number of a rank that has asked, and signs no more because it ends


@dataclass(frozen=True)
class Signature:
    """What a rank leaves: its machine, what it is doing, and how often it has signed before, or `LEFT`."""

    host: Host
    doing: str
    number: int

    @classmethod
    def read(cls, text: bytes) -> Signature:
        name, machine, doing, number = json.loads(text)
        return cls(Host(name, machine), doing, number)


class RollCall:
    """This rank's place in it. One thread at a time may use it."""

    def __init__(self) -> None:
        self.rank, self.world, self.host = dist.get_rank(), dist.get_world_size(), this_host()
        self.period = max(PERIOD, self.world / RANKS_A_SECOND)
        self.number, self.due = 0, 0.0
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.store = dist.distributed_c10d.PrefixStore("megabus/roll", store)
        self.store.set_timeout(SILENCE)

    def sign(self, doing: str) -> None:
        """Sign in, if it is time."""
        if time.monotonic() < self.due:
            return
        try:
            self.store.set(str(self.rank), json.dumps([*self.host, doing, self.number]))
            self.number += 1
            self.due = time.monotonic() + self.period
        except RuntimeError:  # the store is gone: whoever still hears says so
            self.due = time.monotonic() + 10 * self.period

    def _read(self) -> dict[int, Signature]:
        """All ranks' last signatures. Raises RuntimeError where the store does not answer."""
        keys = [str(rank) for rank in range(self.world)]
        if not self.store.check(keys):  # one has never signed
            keys = [key for key in keys if self.store.check([key])]
        return {int(key): Signature.read(text) for key, text in zip(keys, self.store.multi_get(keys), strict=True)}

    def report(self, doing: str, patience: float) -> str:
        """One line on who no longer signs in and what they did when they last had. Takes `patience` seconds at most: a
        store behind a link that is down does not say so."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._ask(doing)), daemon=True)
        asking.start()
        asking.join(patience)
        line = found[0] if found else "the store where ranks met does not answer"
        return f"rank {self.rank} on {self.host.name}, in {doing}: {line}"

    def _ask(self, doing: str) -> str:
        try:
            before = self._read()
            end = time.monotonic() + 2.5 * self.period
            while time.monotonic() < end:
                self.sign(doing)
                time.sleep(0.1)
            after = self._read()
            self.store.set(str(self.rank), json.dumps([*self.host, doing, LEFT]))  # else who asks later would miss it
        except (RuntimeError, OSError):
            return "the store where ranks met does not answer"
        gone, there = defaultdict(list), defaultdict(list)
        unknown = Signature(Host("an unknown machine", ""), "its start", 0)
        last_ones = [after.get(rank, unknown) for rank in range(self.world)]
        names = host_names([last.host for last in last_ones])
        for rank, (last, host) in enumerate(zip(last_ones, names, strict=True)):
            silent = rank not in before or before[rank].number == last.number
            if rank != self.rank and silent and last.number != LEFT:
                gone[host].append((rank, last.doing))
            else:
                there[host, last.doing].append(rank)
        if gone:
            parts = (
                f"{host} ({ranks_text([r for r, _ in some])}), last heard of in {some[0][1]}"
                for host, some in gone.items()
            )
            return f"no answer from {'; '.join(parts)}"
        parts = (f"{ranks_text(some)} on {host} in {what}" for (host, what), some in there.items())
        return f"all ranks answer: {'; '.join(parts)}"
