"""Which machines cannot connect to which, and what is said of it. Two hosts for real: tests/train/test_two_hosts.py."""

from __future__ import annotations

import socket

import pytest

from megabus.errors import UserError
from megabus.parallel.reach import DEVICE, Door, _judge, _unreached, network_device, network_speed

DOORS = [Door(host, f"10.0.0.{ord(host) - 96}", 1) for host in "aabbc"]


def test_a_door_that_is_closed_is_not_reached():
    with socket.socket() as listening, socket.socket() as closed:
        for door in (listening, closed):
            door.bind(("127.0.0.1", 0))
        listening.listen()
        doors = {rank: Door("b", *door.getsockname()) for rank, door in ((1, listening), (2, closed))}
        assert _unreached(doors, 1.0) == [(2, "Connection refused")]


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
    doors = [*DOORS[:4], Door("c", "127.0.1.1", 1)]
    with pytest.raises(UserError, match=r"leaves c \(rank 4\) to be reached at 127.0.1.1, where no other machine can"):
        _judge(doors, {0: [], 2: [], 4: []})


def test_the_device_that_is_named_is_the_one(monkeypatch):
    monkeypatch.setenv(DEVICE, "lo")
    assert network_device() == ("lo", "127.0.0.1")
    assert network_speed() == 0.0  # of the loopback the system says nothing
    monkeypatch.setenv(DEVICE, "eth77")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME = eth77: is no network device with an address here"):
        network_device()
