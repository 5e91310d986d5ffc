"""Imports torch and DeepSpeed once a process: ranks are forked from here (see megabus.testing.ranks)."""

import os
import warnings

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub; unknown names are refused at once
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; read when triton is imported


def pytest_configure(config: pytest.Config) -> None:
    """With `-n`, each worker imports for itself, and the process that hands out the tests imports nothing."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from megabus import command
        from megabus.testing.ranks import preload

        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")  # of torch's own modules
        preload()
        command.PATIENCE = 0.2  # of forked ranks: they have no launcher that would end rank 0 when another has ended


SLOWEST = (  # files that take a minute or more: begun first, so that no worker is left with one when the other is done
    "test_adam.py",
    "test_slurm_jobs.py",
    "test_kernels.py",
    "test_launch.py",
    "test_chaos.py",
    "test_growth_runner.py",
    "test_transition.py",
    "test_parallel.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the same order in every worker, as xdist asks."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOWEST)))
