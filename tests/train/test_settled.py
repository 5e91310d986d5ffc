"""`train.kernels: auto` on GPUs, without one: all ranks take one form, and a run goes on in the form that it had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from megabus.config import parse_config, resolve_stages
from megabus.engine import forms
from megabus.errors import UserError
from megabus.train import settled
from megabus.train.settled import settle_kernels
from tests.support.tiny_config import BASE


@dataclass
class Gpus:
    """What `auto` stands for on this rank, and on another one."""

    mine: str = "triton"
    other: str = "triton"
    name: str = "cuda"

    def device_name(self):
        return self.name


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    monkeypatch.setattr(settled, "get_accelerator", lambda: found)
    monkeypatch.setattr(forms, "automatic", lambda *_: (found.mine, None))
    monkeypatch.setattr(forms, "on_any_rank", lambda flags, _: [flags[0] or found.other == "eager"])
    return found


def settle(kernels="auto", deterministic=False, was=None):
    tree = yaml.safe_load(BASE)
    tree["train"] |= {"kernels": kernels, "deterministic": deterministic}
    config = parse_config(tree)
    found = None
    if was is not None:
        state = SimpleNamespace(config={"train": {"kernels": was}})
        found = SimpleNamespace(folder=Path("step-8"), state=state)
    now, told = settle_kernels(config, resolve_stages(config, 1), found)
    assert now.model_copy(update={"train": config.train}) == config
    return now.train.kernels, told


@pytest.mark.parametrize(
    ("mine", "other", "form"),
    [("triton", "triton", "triton"), ("triton", "eager", "eager"), ("eager", "triton", "eager")],
)
def test_one_form_for_all(gpus, mine, other, form):
    gpus.mine, gpus.other = mine, other
    assert settle() == (form, [])
    assert forms.agreed_form("auto", torch.device("cuda"), []) == form
    assert settle("triton") == ("triton", [])  # not asked
    gpus.name = "cpu"
    assert settle() == ("auto", [])


def test_another_form_than_the_checkpoint_s_is_told(gpus):
    assert settle(was="triton") == ("triton", [])
    assert settle(was="eager") == ("triton", ["train.kernels: eager -> triton, which rounds otherwise"])
    assert settle("eager", was="compiled") == ("eager", ["train.kernels: compiled -> eager, which rounds otherwise"])
    gpus.name = "cpu"
    assert settle(was="auto") == ("auto", [])
    assert settle(was="triton") == ("auto", ["train.kernels: triton -> eager, which rounds otherwise"])


def test_a_deterministic_run_keeps_its_form(gpus):
    assert settle(deterministic=True, was="triton") == ("triton", [])
    form, (told,) = settle(deterministic=True, was="eager")
    assert (form, "stays eager" in told) == ("eager", True)
    gpus.other = "eager"
    with pytest.raises(UserError, match=r"^train.kernels = auto: stands for eager .* step-8 was computed with triton"):
        settle(deterministic=True, was="triton")
    assert settle("eager", deterministic=True, was="triton")[0] == "eager"  # asked for
