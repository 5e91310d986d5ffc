"""All checks in their order, judged by rank 0, printed by it, and decided together.

Every rank sends rank 0 two small messages, 1 KB of what it is and some 100 bytes a token file of what it found, and one
of 40 bytes a link: at 1,024 ranks a few MB arrive there, and nowhere else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megabus.checkpoint.begun import growths_begun_with, stage_begun
from megabus.config import RunConfig, Stage, resolve_stages
from megabus.data.sources import Sources, open_sources
from megabus.errors import UserError, say
from megabus.parallel.agree import agreement, rank_0_tells
from megabus.parallel.hosts import host_names, this_host
from megabus.parallel.reach import host_of, network_speed
from megabus.parallel.topology import ranks_text
from megabus.preflight.files import (
    Print,
    check_sums,
    data_row,
    disk_row,
    fetch_together,
    fingerprints,
    readable,
)
from megabus.preflight.findings import Finding, refused, render
from megabus.preflight.identity import identity_rows, read_identity
from megabus.preflight.links import (
    LATENCY_SLACK,
    MeasuredLink,
    Yardstick,
    best_of,
    links_rows,
    measure,
    neighbours,
    silence_of,
)
from megabus.preflight.machine import (
    Machine,
    compute_row,
    expected_bytes,
    machine_rows,
    read_machine,
    slow_ranks,
    speed,
)
from megabus.preflight.software import check_kernels, check_software

T = TypeVar("T")
ABSENT = 60.0  # seconds that ranks which have met wait for one that does not come back, at most
PASSES = 5  # what looks slow is measured so often, and the best figure counts: a busy moment is no slow rank


@dataclass(frozen=True)
class Local:
    """What a rank found by itself: a `UserError` of each check that failed."""

    software: UserError | None
    data: UserError | None
    tokens: UserError | None
    reads: bool  # tokens: one rank of each machine does
    sums: UserError | None  # of whole files, which rank 0 alone reads
    prints: list[Print]
    machine: Machine | None


def preflight(
    config: RunConfig,
    judge: Callable[[list[Stage]], T],
    reserve: Callable[[], None],
    heartbeat: Callable[[], None],
    full: bool,
    measured: bool = False,
) -> tuple[list[Stage], Sources, T]:
    """The run's stages, its opened corpora and the judgement, if nothing speaks against training. Collective.

    judge: a collective that raises `UserError` on all ranks where the stages cannot be trained so.
    reserve: a collective that makes the run_dir this run's, or raises `UserError` on all ranks.
    full: compare everything, and let rank 0 print the table. Without it only what a start needs anyway is looked at,
    and whether all ranks run the same code with the same configuration.
    measured: in a full preflight, measure how fast ranks compute and messages go, whatever `preflight.measure` says.
    Raises the first fault on all ranks.
    """
    begun, rows = time.monotonic(), list[Finding]()
    with _talking() as group:
        try:
            ready = _checked(config, judge, reserve, heartbeat, full, measured, group, rows)
        except UserError as error:  # of what is no check by itself, such as a prompt, a task or a callback
            if rows:
                rows += [refused("run", error), Finding("all else", "not checked", skipped=True)]
            raise
        finally:
            if full and dist.get_rank() == 0 and rows:
                say(render(rows, time.monotonic() - begun))
    rank_0_tells(lambda: _raise_first(rows))
    assert ready is not None
    return ready


def _checked(
    config: RunConfig,
    judge: Callable[[list[Stage]], T],
    reserve: Callable[[], None],
    heartbeat: Callable[[], None],
    full: bool,
    measured: bool,
    group: dist.ProcessGroup,
    rows: list[Finding],
) -> tuple[list[Stage], Sources, T] | None:
    """Fill rank 0's rows. The answer is None where a row is a refusal."""
    # Some come late because they read the program from a slow file system: that is no fault.
    _meet(group, "to the preflight", _most_patience(config))
    of_rank_0 = rank_0_tells(lambda: config.model_dump(mode="json"))
    there = _to_rank_0(this_host(), group)
    hosts = rank_0_tells(lambda: host_names(there))
    host = hosts[dist.get_rank()]
    with agreement(group):
        identity = read_identity(config, host, of_rank_0)
    identities = _to_rank_0(identity, group)
    if not _judged(rows, lambda: identity_rows(identities)):
        rows.append(Finding("all else", "not checked: it assumes that all ranks agree", skipped=True))
        return None
    with agreement(group):
        stages = resolve_stages(
            config,
            dist.get_world_size(),
            begun_with=partial(growths_begun_with, config),
            begun_at=partial(stage_begun, config),
        )
    judgement = judge(stages)
    reserved = _fault(reserve)
    fetch_together(config, group, heartbeat)
    with agreement(group):
        sources, local = _look(config, stages, host, full, heartbeat)
    heartbeat()
    found = _to_rank_0(local, group)
    good = _judged(rows, lambda: _local_rows(config, stages, found, reserved, sources, full))
    if full and (measured or rank_0_tells(lambda: _asks_to_measure(config, hosts))):
        good = _measure(config, stages, group, rows, hosts, [local.machine for local in found], heartbeat)
    elif full:
        text = f"not measured: preflight.measure = {config.preflight.measure}; --preflight-only measures them"
        rows.append(Finding("compute, links", text, skipped=True))
    return (stages, sources, judgement) if good and sources is not None else None


def _look(
    config: RunConfig, stages: list[Stage], host: str, full: bool, heartbeat: Callable[[], None]
) -> tuple[Sources | None, Local]:
    """This rank alone."""
    opened: list[Sources] = []
    prints: list[Print] = []
    reads = full and os.environ["LOCAL_RANK"] == "0"  # the others of its machine would read the same

    def software() -> None:
        check_software(config)
        check_kernels(config, stages)

    def data() -> None:
        with readable():
            opened.append(open_sources(config, stages, heartbeat))

    def tokens() -> None:
        if reads and opened:
            with readable():
                prints.extend(fingerprints(opened[0]))

    def sums() -> None:
        if full and opened and dist.get_rank() == 0:
            with readable():
                check_sums(opened[0], heartbeat)

    faults = _fault(software), _fault(data), _fault(tokens)
    machine = read_machine(config, stages, dist.get_rank(), host) if full else None
    return (opened[0] if opened else None), Local(*faults, reads, _fault(sums), prints, machine)


def _local_rows(
    config: RunConfig,
    stages: list[Stage],
    found: Sequence[Local],
    reserved: UserError | None,
    sources: Sources | None,
    full: bool,
) -> Iterator[Finding]:
    yield _first("software", [local.software for local in found]) or Finding(
        "software", f"kernels {config.train.kernels} and optimizer {config.optimizer.implementation} run here"
    )
    readers = [rank for rank, local in enumerate(found) if local.reads]
    unread = _first("data", [local.data for local in found])
    unread = unread or _first("data", [local.tokens for local in found], readers)
    if unread is not None or sources is None or not full:
        yield unread or Finding("data", "opened")
    elif found[0].sums is not None:
        yield refused("data", found[0].sums)
    else:
        yield data_row([local.prints for local in found], sources.train.n_tokens + sources.valid.n_tokens)
    if reserved is not None:
        yield refused("run_dir", reserved)
    else:
        yield Finding("run_dir", f"{config.run_dir} is writable, and the same directory for all ranks")
        if full:
            yield disk_row(config, stages)
    if full:
        machines = [local.machine for local in found if local.machine is not None]
        yield from machine_rows(machines, expected_bytes(config, stages, machines[0].on_gpu))


def _first(check: str, faults: Sequence[UserError | None], looked: Sequence[int] | None = None) -> Finding | None:
    """The fault of the lowest rank that has one; it says which ranks do, if not all that `looked` (None: all)."""
    ranks = [rank for rank, fault in enumerate(faults) if fault is not None]
    if not ranks:
        return None
    fault = faults[ranks[0]]
    assert fault is not None
    if len(ranks) < len(faults if looked is None else looked):
        where = f"{fault.problem} (on {ranks_text(ranks)} only)"
        fault = UserError(fault.key, fault.value, where, fault.remedy)
    return refused(check, fault)


def _asks_to_measure(config: RunConfig, hosts: Sequence[str]) -> bool:
    """hosts: of every rank. Within one machine links are memory: nothing is measured there that nobody asked for."""
    wish = config.preflight
    if wish.measure == "auto":
        return len(set(hosts)) > 1 or wish.min_bandwidth is not None
    return wish.measure == "always"


def _measure(
    config: RunConfig,
    stages: Sequence[Stage],
    group: dist.ProcessGroup,
    rows: list[Finding],
    hosts: Sequence[str],
    machines: Sequence[Machine | None],
    heartbeat: Callable[[], None],
) -> bool:
    """How fast ranks compute and messages go. hosts, machines: on rank 0, of every rank."""
    device, floor = torch.device(get_accelerator().current_device_name()), config.preflight.min_bandwidth
    yardstick = Yardstick(hosts, LATENCY_SLACK[device.type], floor, _to_rank_0(network_speed(), group))
    rounds, known = neighbours([stage.layout for stage in stages]), [machine for machine in machines if machine]
    speeds, links = [0.0] * len(hosts), list[MeasuredLink]()

    def doubtful() -> bool:
        """Whether anything is slow in the best of all passes so far."""
        nonlocal speeds, links
        if error := silence_of([peer for *_, peer in measured], silence, hosts):
            raise error
        speeds = [max(before, now) for before, (now, *_) in zip(speeds, measured, strict=True)]
        now = [link for _, own, _ in measured for link in own]
        links = best_of(links, now) if links else now
        slow = slow_ranks(speeds, [machine.device for machine in known])
        return bool(slow) or yardstick.doubts(links)

    patience = _patience(config)
    silence = patience / 4  # with what they then wait for each other half of what the watchdog leaves ranks, or less
    with _wire() as wire:
        for _ in range(PASSES):
            heartbeat()
            _meet(group, "to the measurements", patience)
            heartbeat()
            with agreement(group):
                mine = speed(device)
            own = measure(rounds, device, wire, timedelta(seconds=silence))
            if own[1] is None:
                heartbeat()
            _meet(group, "through the measurement of links", patience if own[1] is None else patience / 2)
            measured = _to_rank_0((mine, *own), group)
            if not rank_0_tells(doubtful):
                break
    heartbeat()
    return _judged(rows, lambda: [compute_row(speeds, known), *links_rows(links, yardstick)])


# ---- what ranks say to each other


def _talking() -> AbstractContextManager[dist.ProcessGroup]:
    """A group of all ranks that talks over sockets: on GPUs one of its own, so that nothing waits for a device."""
    return _everyone(own=dist.get_backend() != "gloo")


def _wire() -> AbstractContextManager[dist.ProcessGroup]:
    """What links are measured over: the backend that training uses. On CPUs in a group of its own, since a silent
    neighbour spoils it, and the ranks have to tell each other of that."""
    return _everyone(own=dist.get_backend() == "gloo")


@contextmanager
def _everyone(own: bool) -> Iterator[dist.ProcessGroup]:
    """All ranks: the default group, or a gloo group for as long as the block takes."""
    if not own:
        yield dist.distributed_c10d._get_default_group()
        return
    group = dist.new_group(backend="gloo")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _meet(group: dist.ProcessGroup, when: str, patience: float) -> None:
    """Wait for all ranks. Rank 0 names those that do not come; should it be rank 0 itself, the others fail."""
    rank = dist.get_rank()
    # Rank 0 gives up first: the others then lose the connection to it, and need not guess why.
    limit = timedelta(seconds=patience if rank == 0 else 1.5 * patience)
    try:
        dist.monitored_barrier(group, limit, wait_all_ranks=rank == 0)
    except RuntimeError as error:
        absent = re.search(r"Ranks ([\d, ]+) failed", str(error))
        if rank != 0 or absent is None:
            raise
        ranks = [int(number) for number in absent[1].split(",")]
        hosts = ", ".join(sorted({host_of(rank) for rank in ranks}))
        problem = f"{ranks_text(ranks)} ({hosts}) did not come {when} within {patience:g} s, or ended before"
        raise UserError("ranks", dist.get_world_size(), problem, "look at their logs and machines") from error


def _patience(config: RunConfig) -> float:
    """Seconds to wait for a rank that has come already."""
    return min(ABSENT, _most_patience(config))


def _most_patience(config: RunConfig) -> float:
    """Seconds to wait for a rank: less than the watchdog does, which shows stacks and not who is missing."""
    return 0.6 * config.faults.hang_timeout


def _to_rank_0(mine: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's, on rank 0; nothing elsewhere."""
    everyone: list[T | None] = [None] * dist.get_world_size()
    root = dist.get_rank() == 0
    dist.gather_object(mine, everyone if root else None, group=group)
    return [each for each in everyone if each is not None] if root else []


def _judged(rows: list[Finding], judge: Callable[[], Iterator[Finding] | Sequence[Finding]]) -> bool:
    """Rank 0 adds rows; whether nothing is refused, on all ranks."""

    def add() -> bool:
        rows.extend(judge())
        return all(row.error is None for row in rows)

    return rank_0_tells(add)


def _raise_first(rows: Sequence[Finding]) -> None:
    for row in rows:
        if row.error is not None:
            raise row.error


def _fault(check: Callable[[], object]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None
