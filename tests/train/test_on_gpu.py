"""What is said of a configuration on GPUs before anything is built."""

from __future__ import annotations

import pytest
import yaml
from support.tiny_config import BASE

from megabus.config import parse_config, resolve_stages
from megabus.errors import UserError
from megabus.train import before
from megabus.train.on_gpu import check_deterministic, slow_heads


def config_of(vocab_size=67, tp=1, head_dim=6, **train):
    tree = yaml.safe_load(BASE)
    tree["model"] |= {"vocab_size": vocab_size, "head_dim": head_dim}
    tree["layout"] = {"tp": tp}
    tree["train"] |= train
    return parse_config(tree)


def stages_of(config):
    return resolve_stages(config, config.layout.tp)


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


@pytest.mark.parametrize(
    ("vocab_size", "tp", "precision", "better"),
    [
        (67, 1, "bf16", 72),
        (67, 1, "fp32", 68),
        (72, 1, "bf16", None),
        (72, 2, "bf16", 80),  # 36 rows each
        (72, 2, "fp32", None),
        (80, 2, "bf16", None),
    ],
)
def test_a_vocabulary_that_slows_the_head_is_told(vocab_size, tp, precision, better):
    config = config_of(vocab_size, tp, precision=precision)
    told = list(slow_heads(config, stages_of(config)))
    assert len(told) == (better is not None)  # once, though all stages have it
    if better is not None:
        start = f"model.vocab_size = {vocab_size}: shards under layout.tp = {tp} are no multiples of "
        assert told[0].startswith(start)
        assert f"with {better}, " in told[0]
        again = config_of(better, tp, precision=precision)
        assert list(slow_heads(again, stages_of(again))) == []


class Device:
    def __init__(self, name):
        self.name = name

    def device_name(self):
        return self.name


def test_it_is_of_the_device(monkeypatch):
    config = config_of(deterministic=True)
    stages = stages_of(config)
    monkeypatch.setattr(before, "get_accelerator", lambda: Device("cpu"))
    told = "train.deterministic = true: has no effect on CPUs, which are so anyway; leave it out"
    assert before._of_device(config, stages) == [told]
    assert before._of_device(config_of(), stages) == []
    monkeypatch.setattr(before, "get_accelerator", lambda: Device("cuda"))
    assert len(before._of_device(config_of(), stages)) == 1  # the vocabulary
    with pytest.raises(UserError, match=r"train\.deterministic"):
        before._of_device(config_of(deterministic=True, kernels="compiled"), stages)
