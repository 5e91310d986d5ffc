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
