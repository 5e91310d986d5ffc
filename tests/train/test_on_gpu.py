"""What is said of a configuration on GPUs before anything is built."""

from __future__ import annotations

import pytest
import torch
import yaml

from megabus.config import parse_config
from megabus.errors import UserError
from megabus.train import before
from megabus.train.on_gpu import check_bf16, check_deterministic
from tests.support.tiny_config import BASE


def config_of(head_dim=6, **train):
    tree = yaml.safe_load(BASE)
    tree["model"] |= {"head_dim": head_dim}
    tree["train"] |= train
    return parse_config(tree)


def test_what_has_no_deterministic_form_is_refused():
    problem = r"^train.deterministic = true: .* which a resumed run sees in another order; set train.kernels to auto, "
    with pytest.raises(UserError, match=problem):
        check_deterministic(config_of(deterministic=True, kernels="compiled"))
    check_deterministic(config_of(kernels="compiled"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["auto", "eager", "triton"])
@pytest.mark.parametrize("head_dim", [6, 264])
def test_what_has_one_is_not(precision, kernels, head_dim):
    check_deterministic(config_of(deterministic=True, precision=precision, kernels=kernels, head_dim=head_dim))


class Device:
    def __init__(self, name):
        self.name = name

    def device_name(self):
        return self.name


@pytest.fixture
def has(monkeypatch):
    """Set the capability that a GPU of this process has."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")

    def of(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return of


def test_bf16_needs_a_gpu_that_has_it(has):
    cuda = torch.device("cuda")
    has(7, 5)
    check_bf16(config_of(precision="fp32"), cuda)
    problem = "needs a GPU of compute capability 8.0 or newer, and NVIDIA X1 has 7.5; set it to fp32"
    with pytest.raises(UserError, match=f"^train.precision = bf16: {problem}$"):
        check_bf16(config_of(precision="bf16"), cuda)
    has(8, 0)
    check_bf16(config_of(precision="bf16"), cuda)


def test_it_is_of_the_device(has, monkeypatch):
    has(9, 0)
    config = config_of(deterministic=True)
    monkeypatch.setattr(before, "get_accelerator", lambda: Device("cpu"))
    told = "train.deterministic = true: has no effect on CPUs, which are so anyway; leave it out"
    assert before._of_device(config) == [told]
    assert before._of_device(config_of()) == []
    monkeypatch.setattr(before, "get_accelerator", lambda: Device("cuda"))
    assert before._of_device(config_of()) == []
    has(7, 5)
    with pytest.raises(UserError, match=r"train\.precision"):
        before._of_device(config_of(precision="bf16"))
    with pytest.raises(UserError, match=r"train\.deterministic"):
        before._of_device(config_of(deterministic=True, kernels="compiled"))
