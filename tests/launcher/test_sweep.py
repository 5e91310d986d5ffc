"""What `megabus submit` reads: sweeps, and slurm's time limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabus.errors import UserError
from megabus.slurm.render import seconds
from megabus.slurm.sweep import expand, folder


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-3", 183600), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_time_limits(time, expected):
    assert seconds(time) == expected


def test_a_sweep_is_all_combinations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("members").write_text("# two\n\ntrain.seed=1 data.train='a b'\ntrain.seed=2  # the other\n")
    layouts = "growth.stages=[{d_model: 48, n_heads: 4}],[]"
    assert expand(["members", layouts]) == [
        ["train.seed=1", "data.train=a b", "growth.stages=[{d_model: 48, n_heads: 4}]"],
        ["train.seed=1", "data.train=a b", "growth.stages=[]"],
        ["train.seed=2", "growth.stages=[{d_model: 48, n_heads: 4}]"],
        ["train.seed=2", "growth.stages=[]"],
    ]
    assert expand(["data.train='a,b',\"c,d\""]) == [["data.train='a,b'"], ['data.train="c,d"']]
    Path("empty").write_text("# none\n")
    with pytest.raises(UserError, match="has no member"):
        expand(["empty"])
    assert expand(["train.seed=1"], ["optimizer.lr=1"]) == [["train.seed=1"]]
    with pytest.raises(UserError, match=r"^--array = train\.seed=1: changes train\.seed, which the command line gives"):
        expand(["train.seed=1,2"], ["optimizer.lr=1", "train.seed=3"])
    for sweep, override in (("layout={tp: 1},{tp: 2}", "layout.tp=2"), ("layout.tp=1,2", "layout={tp: 1}")):
        with pytest.raises(UserError, match="which the command line gives to all members"):
            expand([sweep], [override])
    assert len(expand(["layout.tp=1,2"], ["layout.tp_x=1"])) == 2
    Path("torn").write_text("a='b\n")
    with pytest.raises(UserError, match="No closing quotation"):
        expand(["torn"])


def test_folders_of_a_sweep():
    odd = 'it\'s a "run" \\o/ $HOME `id` #1; 50% *?é'
    assert folder(3, ["optimizer.lr=1e-3", "train.seed=2"]) == "3_optimizer.lr=1e-3,train.seed=2"
    assert folder(0, [f"data.train={odd}/../x"]) == "0_data.train=it_s_a_run_o_HOME_id_1_50_.._x"
    assert len(folder(0, ["x" * 500])) == 100
