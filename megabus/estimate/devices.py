"""Devices and the links between them, as vendors' data sheets have them, and what is assumed where those are silent."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megabus.errors import UserError
from megabus.model.peak import PEAK_TFLOPS, chip_of


@dataclass(frozen=True)
class Interconnect:
    """Carries a message of n bytes in latency + n / bandwidth seconds (Hockney 1994); bandwidth: bytes/s, one way."""

    latency: float
    bandwidth: float

    def seconds(self, n_bytes: float, messages: float = 1) -> float:
        return messages * self.latency + n_bytes / self.bandwidth


@dataclass(frozen=True)
class Device:
    """One device in its node.

    chip: its name in `megabus.model.peak`, if it is a GPU. memory: bytes. reserve: of these, what drivers and
    communication libraries take, and fragments. bf16, fp32: peak FLOP/s of dense matrix products. efficiency,
    attention: shares of it that a layer's products and its attention reach. memory_bandwidth: bytes a second. intra,
    inter: between two devices of a node, and of two nodes (a device's share of its node's network).
    """

    name: str
    memory: float
    reserve: float
    bf16: float
    fp32: float
    efficiency: float
    attention: float
    memory_bandwidth: float
    intra: Interconnect
    inter: Interconnect
    nodes_of: int
    source: str
    chip: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.chip is not None

    def peak(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


# Assumed, for no data sheet says them: latencies of a collective's step, the share of the peak, and the reserve.
# NVLink's data-sheet figure is the sum of both ways; half of it is one way's. A link rarely gives more than 4/5 of it.
NVLINK, NETWORK = 5e-6, 10e-6
EFFICIENCY, RESERVE, WIRE = 0.65, 4e9, 0.8
# FlashAttention-2, forward and backward: more than half of an A100's peak, but at most a third of an H100's, whose own
# instructions it does not use (Dao 2023, arXiv 2307.08691, section 4.1).
ATTENTION, OTHERS_ATTENTION = {"H100": 0.3, "H200": 0.3}, 0.5


GIB = 2**30 / 1e9  # in GB


def _gpu(name: str, chip: str, gb: float, fp32: float, hbm: float, intra: float, inter: float, source: str) -> Device:
    """gb, hbm, intra, inter in GB and GB/s, fp32 in TFLOP/s."""
    return Device(
        name=name,
        memory=gb * 1e9,
        reserve=RESERVE,
        bf16=PEAK_TFLOPS[chip] * 1e12,
        fp32=fp32 * 1e12,
        efficiency=EFFICIENCY,
        attention=ATTENTION.get(chip, OTHERS_ATTENTION),
        memory_bandwidth=hbm * 1e9,
        intra=Interconnect(NVLINK, intra * WIRE * 1e9),
        inter=Interconnect(NETWORK, inter * WIRE * 1e9),
        nodes_of=8,
        source=source,
        chip=chip,
    )


def _card(name: str, chip: str, gib: float, fp32: float, hbm: float, pcie: float) -> Device:
    """One that people have in a machine of their own: over PCIe, with 10 Gbit/s Ethernet between machines."""
    source = "NVIDIA GA102, AD102 or GB202 whitepaper, RTX A6000 data sheet; PCIe x16, 10 Gbit/s Ethernet"
    return _gpu(name, chip, gib * GIB, fp32, hbm, pcie, 1.25, source)


DEVICES = {
    device.name: device
    for device in (
        _gpu(
            "a100", "A100", 80, 19.5, 2039, 300, 25, "NVIDIA A100 SXM 80GB data sheet; NVLink 600 GB/s, HDR InfiniBand"
        ),
        _gpu("h100", "H100", 80, 67, 3350, 450, 50, "NVIDIA H100 SXM data sheet; NVLink 900 GB/s, NDR InfiniBand"),
        _gpu("h200", "H200", 141, 67, 4800, 450, 50, "NVIDIA H200 SXM data sheet; NVLink 900 GB/s, NDR InfiniBand"),
        _gpu("l40s", "L40S", 48, 91.6, 864, 32, 25, "NVIDIA L40S data sheet; PCIe 4.0 x16, HDR InfiniBand"),
        _card("rtx3090", "RTX 3090", 24, 35.6, 936, 32),
        _card("rtx4090", "RTX 4090", 24, 82.6, 1008, 32),
        _card("rtx5090", "RTX 5090", 32, 104.8, 1792, 64),
        _card("a6000", "RTX A6000", 48, 38.7, 768, 32),
        Device(
            name="cpu",
            memory=12e9,
            reserve=1e9,
            bf16=20e9,
            fp32=40e9,
            efficiency=1.0,
            attention=1.0,
            memory_bandwidth=10e9,
            intra=Interconnect(1e-4, 1e9),
            inter=Interconnect(1e-3, 1e8),
            nodes_of=2,
            source="no data sheet: one core with some GB, assumed throughout",
        ),
    )
}


def device(name: str) -> Device:
    """By its name, however it is written: `RTX 4090`, `rtx-4090`, `NVIDIA GeForce RTX 4090` and `4090` are one card."""
    short = re.sub(r"[^a-z0-9]|nvidia|geforce", "", name.lower())
    found = DEVICES.get(short) or DEVICES.get(f"rtx{short}")
    if found is None:
        remedy = f"use one of {', '.join(DEVICES)}, and --gpu-memory-gib, --gpu-tflops and --gpu-gbs for what differs"
        raise UserError("--gpu", name, "is not in the table", remedy)
    return found


def like(name: str, memory: float, nodes_of: int) -> Device:
    """The GPU that its driver calls so, with so many bytes and so many of its kind in a node; where the table lacks it,
    an H100 with that memory: layouts then come in the order that they would have there."""
    chip = chip_of(name)
    base = next((one for one in DEVICES.values() if chip is not None and one.chip == chip), DEVICES["h100"])
    return replace(base, name=name, memory=memory, nodes_of=nodes_of)
