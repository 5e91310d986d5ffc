"""Imports torch and DeepSpeed once a process: ranks are forked from here (see megabus.testing.ranks)."""

import gc
import os
import platform
import shutil
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub; unknown names are refused at once
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; read when triton is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="also the tests that need an NVIDIA GPU (make test GPU=1)")


def pytest_configure(config: pytest.Config) -> None:
    """With `-n`, each worker imports for itself, and the process that hands out the tests imports nothing."""
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, and is left out without --gpu")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from megabus import command
        from megabus.testing.ranks import preload

        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")  # of torch's own modules
        preload()
        gc.disable()  # until all tests are collected: what that makes stays
        command.PATIENCE = 0.2  # of forked ranks: they have no launcher that would end rank 0 when another has ended


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in forked ranks end without their picture and their page, which take longer than a few steps."""
    monkeypatch.setattr("megabus.cli.train._show", lambda run_dir: None)


TENSORS_ALONE = """#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>
namespace torch {
using at::Tensor;
constexpr auto kFloat32 = at::kFloat;
}  // namespace torch
"""


@pytest.fixture(scope="session")
def deepspeed_adam(pytestconfig: pytest.Config) -> None:
    """DeepSpeed's AdamW for CPUs is built and loaded, here and in the ranks that are forked from here.

    Built once a checkout, Python and torch, before ranks are timed: hardly optimized, without what debuggers read, and
    as one file that reads only what it uses of torch's headers. Reading all of them, twice, takes four times as long.
    """
    if shutil.which("ninja") is None or shutil.which("g++") is None:
        pytest.skip("DeepSpeed builds its own with ninja and g++")
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = pytestconfig.cache.mkdir(f"deepspeed-adam-python{platform.python_version()}-torch{torch.__version__}")
    builder = CPUAdamBuilder()
    (folder / "torch").mkdir(exist_ok=True)
    _written(folder / "torch/extension.h", TENSORS_ALONE)
    sources = [builder.deepspeed_src_path(path) for path in builder.sources()]
    _written(folder / "whole.cpp", "".join(f'#include "{path}"\n' for path in sources))
    flags = ["-O1" if flag.startswith("-O") else flag for flag in builder.cxx_args() if flag != "-g"]
    headers = [str(folder), *builder.include_paths()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(CPUAdamBuilder, "sources", lambda self: [str(folder / "whole.cpp")])
        patch.setattr(CPUAdamBuilder, "include_paths", lambda self: list(headers))
        patch.setattr(CPUAdamBuilder, "cxx_args", lambda self: list(flags))
        DeepSpeedCPUAdam([torch.zeros(1)])


def _written(path: Path, text: str) -> None:
    """Not anew where it is there: another worker has built of it, and ninja goes by its time."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported and collected lives for ever: later collections pass it over
    gc.enable()


SLOWEST = (  # files that take a minute or more: begun first, so that no worker is left with one when the other is done
    "test_adam.py",
    "test_slurm_jobs.py",
    "test_launch.py",
    "test_chaos.py",
    "test_growth_runner.py",
    "test_transition.py",
    "test_parallel.py",
)
HEAVY = (  # they import or compile what all later forks of their worker carry: begun when most others are done
    "test_kernels.py",
    "test_nli.py",
    "test_nli_data.py",
    "test_nli_lm_eval.py",
    "test_next_line.py",
    "test_evaluate.py",
    "test_families.py",
)
FORKLESS = (  # nothing is forked in these: after heavy ones
    "test_growth_exact.py",
    "test_growth_moments.py",
    "test_growth_bits.py",
    "test_growth_reads.py",
    "test_planner.py",
    "test_plan_properties.py",
    "test_redistribute.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the same order in every worker, as xdist asks."""
    if not config.getoption("--gpu"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    early = {name: place for place, name in enumerate(SLOWEST, -len(SLOWEST))}
    late = {name: place for place, name in enumerate(HEAVY + FORKLESS, 1)}
    items.sort(key=lambda item: (early | late).get(item.path.name, 0))
