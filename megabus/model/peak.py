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
}


def peak_flops(tflops: float | None, precision: str) -> float | None:
    """One device's peak in FLOP/s: as configured, or this GPU's for bf16 where it is known, or None."""
    if tflops is not None:
        return tflops * 1e12
    import torch  # here: the table is for commands too that answer --help at once

    if precision == "bf16" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None
