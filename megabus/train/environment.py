"""What a run runs on, for whoever reads its numbers later, and how much memory its ranks take."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import sys
from datetime import UTC, datetime
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist

import megabus
from megabus.parallel.hosts import Host, host_names, this_host
from megabus.preflight.machine import processor
from megabus.upload import upload

PACKAGES = (torch, deepspeed, numpy)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and ranks; what cannot be known is None. Of the machine of the rank that asks, but for `hosts`
    and `devices`, which are all that the ranks are on. Collective."""
    mine = (this_host(), torch.cuda.get_device_name(device) if device.type == "cuda" else processor())
    places: list[tuple[Host, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(places, mine)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "megabus": megabus.__version__,
        "python": platform.python_version(),
        **{package.__name__: str(package.__version__) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "hosts": sorted({*host_names([host for host, _ in places])}),
        "devices": sorted({name for _, name in places}),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most bytes that tensors took on a rank's GPU, or the process in main memory, since the process began: the
    rank that took most, and all of them in short. The same on every rank. Collective, one small gather."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    mine = upload([peak], device)
    peaks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(peaks, mine)
    of_ranks = torch.cat(peaks).tolist()
    most = max(of_ranks)
    return {
        "max_bytes": most,
        "max_rank": of_ranks.index(most),
        "mean_bytes": sum(of_ranks) / len(of_ranks),
        "min_bytes": min(of_ranks),
        "of": "GPU" if device.type == "cuda" else "process",
    }
