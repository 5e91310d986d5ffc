"""What GPUs compute at most, of which a run reaches a share (MFU)."""

from __future__ import annotations

# Dense bf16 tensor-core peaks in TFLOP/s without sparsity, from the vendors' data sheets.
PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,  # after the others of its kind: the first name that is part of the GPU's counts
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    # Cards for one machine add up bf16 products in fp32 at the rates of NVIDIA's GA102, AD102 and GB202 whitepapers.
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "RTX A6000": 154.8,
}
VARIANTS = (" Ti", " D", " SUPER", " Laptop")  # after a card's name: another chip, or slower clocks


def chip_of(name: str) -> str | None:
    """The chip of `PEAK_TFLOPS` that a GPU has, by the name that its driver gives it."""
    return next(
        (chip for chip in PEAK_TFLOPS if chip in name and not name.partition(chip)[2].startswith(VARIANTS)), None
    )


def peak_flops(tflops: float | None, precision: str) -> float | None:
    """One device's peak in FLOP/s: as configured, or this GPU's for bf16 where it is known, or None."""
    if tflops is not None:
        return tflops * 1e12
    import torch  # here: the table is for commands too that answer --help at once

    if precision == "bf16" and torch.cuda.is_available():
        chip = chip_of(torch.cuda.get_device_name())
        return None if chip is None else PEAK_TFLOPS[chip] * 1e12
    return None
