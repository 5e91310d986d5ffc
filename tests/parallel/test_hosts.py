"""Machines are told apart by what they are, and not by what they are called."""

from __future__ import annotations

import os
import socket

import pytest

from megabus.parallel import hosts
from megabus.parallel.hosts import Host, host_names, this_host
from megabus.testing.ranks import run_ranks


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([("a", "1"), ("a", "1"), ("b", "2")], ["a", "a", "b"]),
        ([("a", "1"), ("a", "2"), ("b", "3"), ("a", "1")], ["a [1]", "a [2]", "b", "a [1]"]),  # two with one name
        ([("a", "1"), ("b", "1"), ("c", "2")], ["a", "a", "c"]),  # one with two
        ([("a", "1"), ("b", "2"), ("b", "1")], ["a", "b", "a"]),  # a second name of one is another's
        ([], []),
    ],
)
def test_each_machine_has_one_name_of_its_own(found, names):
    assert host_names([Host(*one) for one in found]) == names


def test_a_machine_is_a_boot_and_a_network(tmp_path, monkeypatch):
    here = this_host()
    assert here.name == socket.gethostname()
    assert run_ranks(2, this_host) == [here, here]
    monkeypatch.setattr(socket, "gethostname", lambda: "another name")
    assert this_host() == Host("another name", here.id)
    network = tmp_path / "net"
    network.symlink_to("net:[1]")
    monkeypatch.setattr(hosts, "NETWORK", network)
    container = this_host()
    boot = tmp_path / "boot"
    boot.write_text("1234\n")
    monkeypatch.setattr(hosts, "BOOT", boot)
    assert len({here.id, container.id, this_host().id}) == 3
    os.unlink(boot)
    assert this_host().id not in (here.id, container.id)
    nowhere = this_host()
    monkeypatch.setattr(socket, "gethostname", lambda: "a third")
    assert this_host().id != nowhere.id
