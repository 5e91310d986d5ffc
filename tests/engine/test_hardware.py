"""GPUs that the system has and torch does not see: no run computes on the CPU in silence."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
import torch

from megabus.engine import hardware
from megabus.engine.hardware import check_no_gpu_is_missed, compute_deterministically, nvidia_gpus
from megabus.engine.startup import prepare_environment, start_distributed
from megabus.errors import UserError


def machine(root, files=0, cards=(), driver=None):
    """A tree like that of a system: device files, PCI cards of (vendor, class), and a driver's version."""
    for folder in ("dev", "sys/bus/pci/devices", "sys/module/nvidia"):
        (root / folder).mkdir(parents=True)
    for name in [*(f"nvidia{number}" for number in range(files)), "nvidiactl", "nvidia-uvm"]:
        (root / "dev" / name).touch()
    for number, (vendor, kind) in enumerate(cards):
        card = root / f"sys/bus/pci/devices/0000:0{number}:00.0"
        card.mkdir()
        (card / "vendor").write_text(f"{vendor}\n")
        (card / "class").write_text(f"{kind}\n")
    if driver is not None:
        (root / "sys/module/nvidia/version").write_text(f"{driver}\n")
    return root


GPU, SOUND, OTHER = ("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x1002", "0x030000")


@pytest.mark.parametrize(
    ("files", "cards", "count"),
    [(0, (), 0), (2, (), 2), (0, (GPU, GPU, SOUND), 2), (0, (OTHER, SOUND), 0), (2, (GPU, GPU), 2)],
)
def test_gpus_are_counted_by_device_files_and_on_the_bus(tmp_path, files, cards, count):
    assert nvidia_gpus(machine(tmp_path, files, cards)) == count


@pytest.fixture
def unasked(monkeypatch):
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("cuda", [None, "13.0"])
@pytest.mark.parametrize("driver", [None, "535.54.03"])
def test_a_gpu_that_torch_does_not_see_is_refused(tmp_path, monkeypatch, unasked, cuda, driver):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    built = "the CPU alone" if cuda is None else "CUDA 13.0"
    text = f"NVIDIA GPUs = 0: this machine has 1, and torch {torch.__version__}, built for {built}, sees none of them "
    text += f"(driver: {driver or 'none is loaded'}); "
    with pytest.raises(UserError, match=f"^{re.escape(text)}.*or set DS_ACCELERATOR=cpu to train on the CPU$"):
        check_no_gpu_is_missed(machine(tmp_path, 1, driver=driver))


@pytest.mark.parametrize(("name", "value"), [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_the_cpu_may_be_asked_for(tmp_path, monkeypatch, unasked, name, value):
    root = machine(tmp_path, 1)
    monkeypatch.setenv(name, value)
    check_no_gpu_is_missed(root)


def test_a_gpu_that_is_seen_is_none_of_it(tmp_path, monkeypatch, unasked):
    root = machine(tmp_path, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_no_gpu_is_missed(root)


def test_ranks_look_before_they_meet(monkeypatch, unasked):
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda *_: 8)
    with pytest.raises(UserError, match="this machine has 8"):
        start_distributed(timedelta(seconds=60))


def test_settings_that_stand_before_torch_is_imported(monkeypatch):
    named = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    environ = {"MASTER_PORT": "1"}
    monkeypatch.setattr("megabus.engine.startup.os.environ", environ)
    prepare_environment()
    assert [environ.get(name) for name in named] == ["expandable_segments:True", None, None, None]
    prepare_environment(deterministic=True)
    assert [environ.get(name) for name in named[2:]] == [":4096:8", "Ring"]
    environ.clear()
    environ.update(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512", NCCL_ALGO="Tree")
    prepare_environment(deterministic=True)
    assert "PYTORCH_ALLOC_CONF" not in environ  # the user's own, under the older name
    assert environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(("value", "good"), [(None, False), (":0:0", False), (":16:8", True), (":4096:8", True)])
def test_a_deterministic_engine_asks_for_what_cublas_must_have_read(monkeypatch, value, good):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if value is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    if good:
        compute_deterministically(torch.device("cuda"))
    else:
        with pytest.raises(UserError, match=f"^CUBLAS_WORKSPACE_CONFIG = {value or 'unset'}: .* set it to :4096:8 in "):
            compute_deterministically(torch.device("cuda"))
    assert asked == [True] * good
