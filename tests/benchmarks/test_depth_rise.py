"""The table of what growing depth costs: silent layers cost nothing."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch

import megabus
from benchmarks import depth_rise
from megabus.config.depth import DEPTHS
from megabus.config.schema import Depth
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from tests.support.small_runs import VOCAB, write_corpus


def test_every_manner_has_a_row(tmp_path, capsys):
    corpus, threads = write_corpus(tmp_path), torch.get_num_threads()
    words = ["--vocab-size", str(VOCAB), "--steps", "3", "1", "--sequences", "8"]
    try:
        assert depth_rise.main([str(corpus / "train"), str(corpus / "valid"), *words]) == 0
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    table = {line.split("  ")[0]: re.findall(r"[+-]\d\.\d{4}|–", line) for line in told.splitlines()}
    assert [re.sub(r"\D+", " ", line).split() for line in told.splitlines() if line.startswith("new")] == [
        ["1", "2", "1", "1", "4", "1", "1", "2", "3", "1", "4", "3", "2", "4", "1", "2", "4", "3"]
    ]
    assert set(get_args(Depth)) < table.keys()
    for depth in get_args(Depth):
        assert len(table[depth]) == 6
        zeros = [abs(float(rise)) <= 1e-4 for rise in table[depth]]
        assert all(zeros) if DEPTHS[depth].gates == "silent" else DEPTHS[depth].shares_gates or not any(zeros)


@pytest.mark.parametrize("steps", [["300", "300"], ["0"], ["5", "-1"]])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(UserError, match=r"^--steps = .*each once$"):
        depth_rise.main(["nowhere", "nowhere", "--steps", *steps])


def test_taper_has_the_proportions_that_its_row_names():
    old, new = depth_rise.model_of(1, 64), depth_rise.model_of(2, 64)
    state = {name: value.clone() for name, value in megabus.build_model(old, seed=0).state_dict().items()}
    grown = dict(depth_rise.grown_states(old, new, state))
    one, own, ninth = (grown[name] for name in ("taper, ratio 1.00", "taper", "taper, ratio 0.11"))
    for name in (name for name, spec in param_specs(new).items() if spec.gate):
        assert not torch.equal(one[name], own[name])
        assert bool(((ninth[name] - own[name]) * (own[name] - one[name]) > 0).all())
