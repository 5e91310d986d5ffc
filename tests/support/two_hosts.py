"""Two machines, for real as far as the network goes: two network namespaces that a pair of veth devices joins."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path

from megabus.cli import train as train_command
from megabus.command import end_rank
from megabus.testing.ranks import free_port, preload
from tests.support.launching import environment

NET, UTS, MOUNT = 0x40000000, 0x04000000, 0x00020000  # of setns and unshare
_libc = ctypes.CDLL(None, use_errno=True)
_pairs = count()


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _program(name: str) -> str | None:
    """Where it lies: of two folders too that not every user's PATH has."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _run(program: str, *words: str) -> None:
    subprocess.run([_program(program) or program, *words], check=True, capture_output=True, text=True)


def _ip(*words: str) -> None:
    _run("ip", *words)


@dataclass(frozen=True)
class Host:
    """A namespace, its end of the link that ranks talk over, and the address where they meet."""

    name: str
    device: str
    address: str

    def enter(self) -> None:
        """Move this process, which must have one thread, onto the host."""
        with open(f"/run/netns/{self.name}") as file:
            _checked(_libc.setns(file.fileno(), NET))
        _checked(_libc.unshare(UTS))
        _checked(_libc.sethostname(self.name.encode(), len(self.name)))
        os.environ["GLOO_SOCKET_IFNAME"] = self.device

    def kill_all(self) -> None:
        """Every process on it that came by `ip netns exec`; torchrun gives ranks sessions of their own."""
        found = subprocess.run([_program("ip"), "netns", "pids", self.name], check=True, capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def unplug(self) -> None:
        _ip("-n", self.name, "link", "set", self.device, "down")

    def plug(self) -> None:
        _ip("-n", self.name, "link", "set", self.device, "up")

    def send_at_most(self, megabits: float) -> None:
        """A second; over the link."""
        limit = ("rate", f"{megabits}mbit", "burst", "32kbit", "latency", "400ms")
        _run("tc", "-n", self.name, "qdisc", "add", "dev", self.device, "root", "tbf", *limit)


@contextlib.contextmanager
def two_hosts(meet_elsewhere: bool = False) -> Iterator[tuple[Host, Host]]:
    """Raises OSError or CalledProcessError where there may be no namespaces. Every pair is a network of its own.

    meet_elsewhere: a second link, which stays up, joins the addresses where ranks meet.
    """
    tag = f"mb{os.getpid()}x{next(_pairs)}"
    hosts = tuple(Host(f"{tag}-{end}", f"{tag}{end}", f"10.77.0.{n}") for n, end in ((1, "a"), (2, "b")))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _join(hosts, [host.device for host in hosts], [host.address for host in hosts])
        if meet_elsewhere:
            hosts = tuple(replace(host, address=host.address.replace("77", "78")) for host in hosts)
            _join(hosts, [f"{host.device}m" for host in hosts], [host.address for host in hosts])
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run([_program("ip"), "netns", "del", host.name], check=False, capture_output=True)


def _join(hosts: Sequence[Host], devices: Sequence[str], addresses: Sequence[str]) -> None:
    ends = [("name", device, "netns", host.name) for host, device in zip(hosts, devices, strict=True)]
    _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
    for host, device, address in zip(hosts, devices, addresses, strict=True):
        _ip("-n", host.name, "addr", "add", f"{address}/24", "dev", device)
        _ip("-n", host.name, "link", "set", device, "up")


def why_no_namespaces() -> str | None:
    """Why two hosts cannot be made here; None where they can."""
    for name in ("ip", "tc"):
        if _program(name) is None:
            return f"the program `{name}` is not there"
    try:
        with two_hosts():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made: {getattr(error, 'stderr', '') or error}".strip()


@dataclass
class Rank:
    host: Host
    process: object
    log: Path

    @property
    def said(self) -> str:
        """Less torch's own warnings: how much it tells is settled when a process first imports it, before the fork."""
        return re.sub(r"(?m)^\[W\d+ .*\[c10d\].*\n", "", self.log.read_text(errors="replace"))


def launch(
    hosts: list[Host], world: int, folder: Path, argv: list[str], change: Callable[[], None] = lambda: None
) -> list[Rank]:
    """`megabus train ARGV` on forked ranks, one for each of `hosts`; they meet on the first one. change: of a rank's
    code, made in it."""
    preload()
    port, context, ranks = free_port(), get_context("fork"), []
    for number, host in enumerate(hosts):
        log = folder / f"{number}.log"

        def run(number: int = number, host: Host = host, log: Path = log) -> None:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            host.enter()
            os.environ.update(MASTER_ADDR=hosts[0].address, MASTER_PORT=str(port))
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number % 2), WORLD_SIZE=str(world))
            change()
            end_rank(lambda: train_command.main(argv))

        process = context.Process(target=run, daemon=True)
        process.start()
        ranks.append(Rank(host, process, log))
    return ranks


@contextlib.contextmanager
def torchruns(hosts: Sequence[Host], folder: Path, argv: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`torchrun -m megabus train ARGV` on every host, with one rank; they meet on the first one by torchrun's own
    rendezvous. What they say is in N.log. None outlives the block."""
    meeting = ["--nnodes", str(len(hosts)), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    meeting += ["--rdzv-endpoint", f"{hosts[0].address}:{free_port()}"]
    begun = []
    try:
        for number, host in enumerate(hosts):
            command = [
                _program("ip"),
                "netns",
                "exec",
                host.name,
                sys.executable,
                "-m",
                "torch.distributed.run",
                *meeting,
            ]
            command += [
                "--rdzv-conf",
                f"is_host={int(number == 0)}",
                "--local-addr",
                host.address,
                "-m",
                "megabus",
                "train",
                *argv,
            ]
            env = environment(GLOO_SOCKET_IFNAME=host.device)
            with (folder / f"{number}.log").open("wb") as log:
                begun.append(subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True))
        yield begun
    finally:
        for host in hosts:
            host.kill_all()
        for process in begun:
            process.wait()


def end(ranks: list[Rank], seconds: float) -> list[int | None]:
    """Exit codes, None for a rank that has not ended in so many seconds and is killed."""
    deadline = time.monotonic() + seconds
    codes = []
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        codes.append(rank.process.exitcode)
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
    return codes


def kill(ranks: list[Rank]) -> None:
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGKILL)
