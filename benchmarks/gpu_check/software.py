"""What the machine has: versions, compilers, and what its matrix products and copies reach."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu_check.part import Check
from megabus.model.peak import peak_flops

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pydantic")


def software(check: Check) -> None:
    tell = check.tell
    tell("python", f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            tell(package, version(package), True)
        except PackageNotFoundError:
            tell(package, "is not installed", None if package == "triton" and not check.on_gpu else False)
    cc = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    wanted = None if not check.on_gpu else cc is not None and header.exists()  # Triton compiles its launchers
    tell("C compiler, Python.h", f"{cc or 'none'}, {header if header.exists() else 'none'}", wanted)
    if not check.on_gpu:
        tell("GPU", "needs a GPU: driver, NCCL, cuDNN and the card are told there")
        _speeds(check, torch.device("cpu"), 256, 1 << 20)
        return
    device = torch.device("cuda")
    card = torch.cuda.get_device_properties(device)
    smi = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    if shutil.which(smi[0]):
        tell("nvidia-smi", _answer(smi))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    tell(
        "GPU",
        f"{card.name}, {card.multi_processor_count} SMs, capability {capability}, {card.total_memory / 2**30:.1f} GiB",
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    tell("CUDA, cuDNN, NCCL", f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {nccl}")
    from megabus.kernels.checked import this_device
    from megabus.kernels.choice import why_not

    problem = why_not("triton", device)
    tell("Triton kernels", problem or "can run here", problem is None)
    if problem is None:
        check.tell.facts["device"] = this_device(device)
    _speeds(check, device, 8192, 1 << 30)


def _answer(command: list[str], seconds: float = 20) -> str:
    """What a command prints, or why it does not: a driver that hangs is worth knowing of, and no reason to stop."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"does not answer: {error}"
    said = done.stdout.strip()
    return said if done.returncode == 0 else f"ends with {done.returncode}: {said or done.stderr.strip()}"


def _speeds(check: Check, device: torch.device, size: int, copied: int) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    reached = 2 * size**3 / _best(device, lambda: a @ a)
    peak = peak_flops(None, "bf16")
    share = "" if peak is None or device.type != "cuda" else f", {reached / peak:.0%} of the peak"
    tell = check.tell
    tell(f"matrix product of {size}, {dtype}", f"{reached / 1e12:.3g} TFLOP/s{share}")
    source = torch.empty(copied // 4, device=device)
    target = torch.empty_like(source)
    tell("copy, read and written", f"{2 * copied / _best(device, lambda: target.copy_(source)) / 1e9:.4g} GB/s")


def _best(device: torch.device, job: Callable[[], object]) -> float:
    """Seconds of the fastest of ten calls."""
    best = float("inf")
    for _ in range(10):
        _wait(device)
        begun = time.perf_counter()
        job()
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
