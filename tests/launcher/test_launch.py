"""Runs as their users start them: what ends well, and what is refused in one line on rank 0 by all ranks.

One refusal before torch is imported, and one after, is of a real process a rank; the others run the same `main` in
forked ranks, where they take a second.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import megabus
from megabus.config import load_config
from megabus.data.indexed import IndexedTokens, IndexedWriter, meta_path
from megabus.errors import UserError
from tests.support.launching import (
    LAUNCHER,
    LIMIT,
    START,
    environment,
    free_port,
    launch,
    launch_forked,
    the_error,
    tree,
)
from tests.support.tiny_config import tiny_config

VOCAB = 67
CONFIG = tiny_config(
    model__n_layers=2,
    train__max_steps=6,
    eval={"every": 2, "tokens": 256},
    log={"every": 1, "unit_norm_every": 1},
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "text")


def write_corpus(prefix: Path, n_tokens: int = 5000, vocab_size: int = VOCAB) -> Path:
    """Random walks over the vocabulary: learnable, and made as tools/preprocess.py makes corpora."""
    steps = np.random.default_rng(0).integers(0, 3, n_tokens)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.append(np.cumsum(steps) % VOCAB)
    meta = {"vocab_size": vocab_size, "tokenizer_sha256": "0" * 64, "n_tokens": n_tokens}
    meta_path(prefix).write_text(json.dumps(meta))
    return prefix


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "config.yaml"
    data = {"train": str(corpus), "valid": str(corpus)}
    path.write_text(yaml.safe_dump(CONFIG | {"run_dir": str(tmp_path / "run"), "data": data}))
    return path


# ---- refused before torch is imported ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (["modle.d_model=3"], "error: modle = {'d_model': 3}: unknown key; did you mean model?"),
        (
            ["layout.tp=2", "model.n_heads=3"],
            "error: model.n_heads = 3: is not divisible by layout.tp = 2; choose",
        ),
        (
            ["growth.stages=[{d_model: 24}]"],
            "error: growth.stages.0.d_model = 24: shrinks from 36; stages only grow",
        ),
        (["layout.pp=3"], "error: layout = tp 1 x pp 3: cannot fill the world of 2 rank(s); launch a number"),
        (["--confg"], "error: command line = "),
    ],
    ids=["unknown key", "indivisible", "shrinking", "world", "option"],
)
def test_a_wrong_configuration(config: Path, bad: list[str], told: str, request: pytest.FixtureRequest) -> None:
    before = tree(config.parent)
    # One in true processes, where rank 1 leaves rank 0 seconds to tell.
    launched = launch if "world" in request.node.callspec.id else launch_forked
    assert the_error(launched("--config", config, *bad)).startswith(told)
    assert tree(config.parent) == before


def test_a_wrong_configuration_imports_no_torch(config: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(LAUNCHER), "--config", str(config), "modle=3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert ended.returncode != 0
    imported = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines()}
    assert "pydantic" in imported
    assert not {"torch", "deepspeed", "numpy"} & imported


def test_a_terminal_that_cannot_show_everything_ends_nothing(config: Path) -> None:
    """As under LC_ALL=C: from the preflight's table to the closing one."""
    (rank,) = launch_forked("--config", config, "train.max_steps=2", world=1, encoding="ascii")
    assert (rank.code, rank.err) == (0, "")
    for shown in ("???", "step     2 | d36 L2", "checkpoint: "):
        assert shown in rank.out


def test_no_rank_ends_before_rank_0_has_told_all(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher says so when a rank ends: that would stand inside the closing table."""
    told = tmp_path / "told"

    def show(run_dir: str) -> None:
        time.sleep(0.3)  # the others are not so long about what they have to do
        told.touch()

    monkeypatch.setattr("megabus.cli.train._show", show)
    monkeypatch.setattr("megabus.parallel.mesh.forget_process_groups", lambda: print("left", told.exists()))
    ranks = launch_forked("--config", config, "train.max_steps=1")
    assert [(rank.code, rank.out.splitlines()[-1]) for rank in ranks] == [(0, "left True")] * 2


# ---- refused by ranks that have met ------------------------------------------------------------------------


def test_missing_data(config: Path, tmp_path: Path) -> None:
    ranks = launch_forked("--config", config, "data.valid=nowhere/text")
    assert the_error(ranks).startswith(
        "error: data.valid = nowhere/text.bin: the file does not exist; check the prefix"
    )
    assert tree(tmp_path).keys() == {"config.yaml"}


def test_a_package_that_is_installed_and_broken(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises
    line = the_error(launch_forked("--config", config, "log.tensorboard=true"))
    assert line.startswith("error: log.tensorboard = true: needs torch.utils.tensorboard, which cannot be imported (")
    assert line.endswith("; mend its installation, or set log.tensorboard=false")
    assert tree(tmp_path).keys() == {"config.yaml"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_truncated_data(config: Path, tmp_path: Path, suffix: str) -> None:
    prefix = write_corpus(tmp_path / "cut")
    IndexedTokens(prefix)  # control: it is whole
    truncate(tmp_path / f"cut.{suffix}")
    before = tree(tmp_path)
    line = the_error(launch_forked("--config", config, f"data.train={prefix}"))
    assert line.startswith(f"error: data.train = {prefix}.{suffix}: ")
    assert line.endswith("; run megabus preprocess again")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "pp=2"])
def test_another_vocabulary(config: Path, tmp_path: Path, layout: str) -> None:
    prefix = write_corpus(tmp_path / "other", vocab_size=100)
    before = tree(tmp_path)
    line = the_error(launch_forked("--config", config, f"data.train={prefix}", f"layout.{layout}"))
    told = f"error: data.train = {prefix}: was made with vocab_size 100, the model has 67; set the model's vocab_size"
    assert line.startswith(told)
    assert tree(tmp_path) == before


def test_a_corpus_shorter_than_a_sample(config: Path, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "short", n_tokens=16)
    line = the_error(launch_forked("--config", config, f"data.train={prefix}"))
    assert line.startswith(f"error: data.train = {prefix}: has 16 tokens, one sample takes 17; add text or shorten")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_exists_is_left_alone(config: Path, tmp_path: Path) -> None:
    """`never` refuses a run that can go on. What one that cannot has written is set aside, and nothing is lost."""
    run, theirs = tmp_path / "run", {"metrics": '{"event": "start", "step": 0}\n', "config": "theirs"}
    run.mkdir()
    (run / "metrics.jsonl").write_text(theirs["metrics"])
    (run / "config.yaml").write_text(theirs["config"])
    for number in (1, 2):
        ranks = launch_forked("--config", config, "train.max_steps=1", "resume=never")
        assert all(rank.code == 0 for rank in ranks)
        assert (run / f"metrics-{number}.jsonl").read_text() == theirs["metrics"]
        assert (run / f"config-{number}.yaml").read_text() == theirs["config"]
        theirs = {"metrics": (run / "metrics.jsonl").read_text(), "config": (run / "config.yaml").read_text()}
        before = tree(tmp_path)
        line = the_error(launch_forked("--config", config, "resume=never"))
        assert line == f"error: run_dir = {run}: holds a run; choose another, or resume=auto"
        assert tree(tmp_path) == before
        shutil.rmtree(run / "checkpoints")


def test_a_run_dir_that_cannot_be(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    before = tree(tmp_path)
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        line = the_error(launch_forked("--config", config, f"run_dir={run}"))
        assert line.startswith(f"error: run_dir = {run}: cannot be written (")
        assert line.endswith("; choose a writable place")
    assert tree(tmp_path) == before


def test_data_that_one_rank_alone_cannot_read(config: Path, tmp_path: Path) -> None:
    """Rank 1 works where a relative prefix leads nowhere. Rank 0 tells it; no rank waits for the other."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    write_corpus(here / "text")
    ranks = launch_forked("--config", config, "data.train=text", folders=(here, there))
    assert the_error(ranks).startswith("error: data.train = text.bin: the file does not exist")
    assert not (tmp_path / "run").exists()


# nGPT's weights cannot leave the sphere, but its gains can. In a pipeline rank 1 alone computes the loss.
@pytest.mark.parametrize("options", [["model.kind=gpt"], ["model.kind=ngpt"], ["model.kind=gpt", "layout.pp=2"]])
def test_a_loss_that_is_not_finite(config: Path, tmp_path: Path, options: list[str]) -> None:
    wild = ["optimizer.lr=1e30", "train.gradient_clipping=0", "optimizer.schedule=constant"]
    ranks = launch_forked("--config", config, *options, *wild)
    line = the_error(ranks)
    assert re.fullmatch(
        r"error: train.loss = nan: is not finite at step (\d), the last of 4 such steps in a row, and there is no "
        r"checkpoint to return to; lower optimizer.lr or look at the data of those steps",
        line,
    )
    assert not (tmp_path / "run/checkpoints").exists()
    told = rows(tmp_path / "run")
    steps = [row for row in told if row["event"] == "step"]
    assert steps
    assert all(row["loss"] is not None for row in steps)  # none of the refused steps is among them
    assert len([row for row in told if row["event"] == "skip"]) == 4


def test_a_loss_that_is_not_finite_ends_all_processes(config: Path) -> None:
    ranks = launch(
        "--config",
        config,
        "layout.tp=2",
        "model.kind=gpt",
        "optimizer.lr=1e30",
        "train.gradient_clipping=0",
        limit=LIMIT + START,
    )
    assert "is not finite at step" in the_error(ranks)


def test_what_torchrun_prints_ends_with_the_error(config: Path) -> None:
    """The real one: a line of rank 0, which the last of torchrun's own page says again; the other rank says nothing."""
    command = [sys.executable, *STARTERS["torchrun"], free_port(), str(LAUNCHER), "--config", str(config)]
    ended = subprocess.run(
        [*command, "model.d_modle=3"], capture_output=True, text=True, timeout=180, env=environment()
    )
    assert ended.returncode != 0
    (line,) = re.findall(r"^error: .*", ended.stderr, re.MULTILINE)
    assert "d_modle" in line
    *_, last, ruler = ended.stderr.rstrip().splitlines()
    assert (last.strip(), {*ruler}) == (f"traceback : {line}", {"="})
    assert ended.stdout == ""


# ---- runs that end well ------------------------------------------------------------------------------------


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


GROWTH = "growth.stages=[{d_model: 48, n_heads: 4, d_ff: 90, n_layers: 3, layout: {%s}}]"
STARTERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
}


@pytest.mark.parametrize(
    ("starter", "layout", "grown"),
    [("deepspeed", "tp", "pp: 2"), ("torchrun", "pp", "dp: 2")],
    ids=list(STARTERS),
)
def test_a_run_that_grows(config: Path, tmp_path: Path, starter: str, layout: str, grown: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, *STARTERS[starter], free_port(), str(LAUNCHER), "--config", str(config)]
    overrides = [f"layout.{layout}=2", GROWTH % grown, "growth.max_tokens=512"]
    ended = subprocess.run(
        [*command, *overrides],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        env=environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "GROWTH (cap)" in ended.stdout
    assert f"checkpoint: {run / 'checkpoints/step-00000006'}" in ended.stdout

    told = rows(run)
    assert told[0]["event"] == "start"
    steps = [row for row in told if row["event"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert [row["stage"] for row in steps] == [0] * 4 + [1] * 2
    assert steps[-1]["share"] == 1
    assert all(row["unit_error"] < 1e-6 for row in steps)
    assert [row["step"] for row in told if row["event"] == "eval"] == [0, 2, 4, 4, 6]
    assert [row["step"] for row in told if row["event"] == "save"] == [4, 6]
    (growth,) = (row for row in told if row["event"] == "growth")
    assert (growth["from_stage"], growth["to_stage"], growth["step"], growth["reason"]) == (0, 1, 4, "cap")
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]

    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"report:     {run / 'report.html'}\n" in ended.stdout
    assert "gain:alpha_attn" in (run / "report.html").read_text()
    assert load_config(run / "config.yaml") == load_config(config, overrides)
    model = megabus.load(run)
    assert (model.config.d_model, model.config.n_layers) == (48, 3)
    logits = model(torch.arange(20)[None])
    assert logits.shape == (1, 20, VOCAB)
    assert logits.isfinite().all()
    assert logits.std() > 0
    again = megabus.load(run / "checkpoints/step-00000006").state_dict()
    assert all(torch.equal(again[name], values) for name, values in model.state_dict().items())
    with pytest.raises(UserError, match="holds none"):
        megabus.load(tmp_path)
