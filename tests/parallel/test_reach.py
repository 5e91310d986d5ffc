"""Which machines cannot connect to which, and what is said of it. Two hosts for real: tests/train/test_two_hosts.py."""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from megabus.errors import UserError
from megabus.parallel import hosts, reach
from megabus.parallel.reach import DEVICE, Door, _judge, _unreached, check_reach, network_device, network_speed
from megabus.testing.ranks import free_port
from tests.support.forked import Begun

DOORS = [Door(host, f"10.0.0.{ord(host) - 96}", 1, host) for host in "aabbc"]


def test_a_door_that_is_closed_is_not_reached():
    with socket.socket() as listening, socket.socket() as closed:
        for door in (listening, closed):
            door.bind(("127.0.0.1", 0))
        listening.listen()
        doors = {rank: Door("b", *door.getsockname(), "b") for rank, door in ((1, listening), (2, closed))}
        assert _unreached(doors, "lo", 1.0) == [(2, "Connection refused")]


def test_machines_that_do_not_reach_each_other_are_named_once():
    silent = "no answer in 5 s"
    _judge(DOORS, {0: [], 2: [], 4: []})
    with pytest.raises(UserError) as told:
        _judge(DOORS, {0: [(4, silent)], 2: [], 4: [(0, silent), (2, "Connection refused")]})
    assert str(told.value).startswith(
        "link = a (ranks 0-1) - c (rank 4); b (ranks 2-3) - c (rank 4): carries nothing: "
        "a cannot connect to 10.0.0.3 (no answer in 5 s); look at the network and the firewall between them"
    )


def test_an_address_of_the_machine_itself_is_named():
    doors = [*DOORS[:4], Door("c", "127.0.1.1", 1, "c")]
    with pytest.raises(UserError, match=r"leaves c \(rank 4\) to be reached at 127.0.1.1, where no other machine can"):
        _judge(doors, {0: [], 2: [], 4: []})


def test_the_device_that_is_named_is_the_one(monkeypatch):
    monkeypatch.setenv(DEVICE, "lo")
    assert network_device() == ("lo", "127.0.0.1")
    assert network_speed() == 0.0  # of the loopback the system says nothing
    monkeypatch.setenv(DEVICE, "eth77")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME = eth77: is no network device with an address here"):
        network_device()


def devices(monkeypatch, *addresses):
    """The machine has one device, `eth`."""
    kinds = [
        SimpleNamespace(family=socket.AF_INET6 if ":" in each else socket.AF_INET, address=each) for each in addresses
    ]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth": kinds})
    monkeypatch.setenv(DEVICE, "eth")


def test_an_address_that_leads_further_is_preferred(monkeypatch):
    link, wide = "fe80::1%eth", "fd00::2"
    for addresses, taken in (((link, wide), wide), ((link, wide, "10.0.0.1"), "10.0.0.1"), ((link,), link)):
        devices(monkeypatch, *addresses)
        assert network_device() == ("eth", taken)


def met(rank, world, port, change, patience):
    """What `check_reach` says on one of `world` ranks, and the seconds that it takes."""
    os.environ.pop(DEVICE, None)
    change(rank)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timedelta(seconds=10))
    begun = time.monotonic()
    try:
        check_reach(store, rank, world, timedelta(seconds=patience))
    except UserError as error:
        return str(error), time.monotonic() - begun
    store.set(f"content/{rank}", "")
    if rank == 0:  # the store ends with it
        store.wait([f"content/{each}" for each in range(world)])
    return None, time.monotonic() - begun


def all_met(world, change, patience=20.0, left_out=()):
    port = free_port()
    begun = [Begun(partial(met, rank, world, port, change, patience)) for rank in range(world)]
    told, seconds = zip(*(job.wait(30) for rank, job in enumerate(begun) if rank not in left_out), strict=True)
    for job in begun:
        job.kill()
    return told, max(seconds)


def test_what_one_rank_alone_refuses_all_do_at_once():
    def wrong(rank):
        if rank == 1:
            os.environ[DEVICE] = "eth77"

    def no_place(rank):
        if rank == 2:
            devices(pytest.MonkeyPatch(), "10.255.255.254")

    for change, line in (
        (wrong, "GLOO_SOCKET_IFNAME = eth77: is no network device with an address here; one of "),
        (no_place, "GLOO_SOCKET_IFNAME = eth: has the address 10.255.255.254, where nothing can listen ("),
    ):
        told, seconds = all_met(3, change)
        assert told[0].startswith(line)
        assert set(told) == {told[0]}
        assert seconds < 10  # of 20


def test_machines_of_one_name_are_two(tmp_path):
    def booted(rank):
        hosts.BOOT = tmp_path / str(rank)
        hosts.BOOT.write_text(str(rank // 2))
        os.environ[DEVICE] = "lo"

    told, _ = all_met(4, booted)
    name = re.escape(socket.gethostname())
    line = rf"GLOO_SOCKET_IFNAME = lo: leaves {name} \[[0-9a-f]{{8}}\] \(ranks 0-1\) to be reached at 127.0.0.1, "
    assert re.match(line, told[0])
    assert set(told) == {told[0]}

    def one_machine(rank):
        os.environ[DEVICE] = "lo"

    assert all_met(3, one_machine)[0] == (None,) * 3


def test_a_rank_that_ends_while_they_try_is_named(tmp_path):
    def dying(rank):
        hosts.BOOT = tmp_path / str(rank)
        hosts.BOOT.write_text(str(rank))
        reach._judge = lambda doors, tried: None
        if rank == 1:
            reach._try = lambda *_: os.kill(os.getpid(), 9)

    told, seconds = all_met(3, dying, patience=2.0, left_out=[1])
    name = rf"{re.escape(socket.gethostname())} \[[0-9a-f]{{8}}\]"
    problem = rf"rank 1 \({name}\) said nothing in 1.6 s after all had met, or ended"
    assert len({*told}) == 1
    assert re.fullmatch(f"ranks = 3: {problem}; look at their logs and machines", told[0])
    assert seconds < 4.0  # twice that: the rest is load
