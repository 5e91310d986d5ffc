"""The clock of `benchmarks/kernels.py`, on a device that is made up: there is no GPU here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels


class Device:
    """A host that takes 0.25 us to queue each call, and a device that works off its queue at 2 GHz."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0  # the host's clock; when the device has worked off its queue
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.queue(0)

            def query(self):
                return device.now >= self.at

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.wait())

    def queue(self, seconds, host=2.5e-7):
        self.now += host
        self.free = max(self.free, self.now) + seconds
        return self.free

    def wait(self):
        self.now = max(self.now, self.free)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.fixture
def clock():
    clock = kernels.Clock(torch.device("cpu"))
    clock.other = torch.empty(1)
    return clock


@pytest.mark.parametrize("host", [1e-5, 2e-3, 0.03])  # seconds for each of a job's kernels
def test_the_host_s_time_does_not_count(device, clock, host):
    for _ in range(20):
        took = clock(lambda: [device.queue(1e-4, host) for _ in range(8)])
        assert took == pytest.approx(8e-4)


def test_a_first_call_that_compiles_costs_one_repetition(device, clock):
    calls = []

    def job():
        device.queue(1e-4, host=1e-5 if calls else 20.0)
        calls.append(device.now)

    assert clock(job) == pytest.approx(1e-4)
    assert len(calls) == 2


def test_a_job_that_waits_for_the_device_is_told(device, clock):
    with pytest.raises(RuntimeError, match="does the job wait for the device"):
        clock(device.wait)
