"""The wheel, installed alone in an environment of its own, in an empty folder: what a user has after pip install."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import yaml

from tests.support.launching import ROOT, environment

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "wizards",
    "make",
    "black",
    "jam",
]
CONFIG = {
    "run_dir": "run",
    "data": {"train": "corpus-train", "valid": "corpus-valid", "tokenizer": "corpus-tokenizer.model"},
    "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "head_dim": 8, "d_ff": 64},
    "layout": {"tp": 2},
    "train": {"seq_len": 32, "micro_batch_size": 2, "global_batch_size": 4, "max_steps": 6},
    "optimizer": {"lr": 2e-3},
    "growth": {"max_tokens": 384, "stages": [{"d_model": 48, "n_heads": 6, "d_ff": 96, "n_layers": 3}]},
    "eval": {"every": 3, "tokens": 256},
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """`bin` of a virtual environment that holds the wheel, and sees the packages of this one but no megabus of it."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "megabus", root / "megabus", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    call(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", root / "dist", root)
    (wheel,) = (root / "dist").iterdir()
    venv.create(root / "venv", symlinks=True)
    (site,) = (root / "venv/lib").glob("python*/site-packages")
    # Of folders that a .pth file names Python reads no .pth files: an editable megabus there is not seen.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(*pip, "--python", root / "venv/bin/python", "install", *offline, wheel)
    return root / "venv/bin"


def call(*command: object, cwd: Path | None = None) -> str:
    env = environment()
    env.pop("PYTHONPATH", None)
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=180, cwd=cwd, env=env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(installed, tmp_path_factory) -> Path:
    """Token files and a configuration, made with the installed command."""
    folder = tmp_path_factory.mktemp("empty")
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n\n\n".join(" ".join(draw.choices(WORDS, k=120)) for _ in range(300)))
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    options = ["--train-tokenizer", "300", "--model-type", "bpe", "--valid-fraction", "0.1", "--out", "corpus"]
    call(installed / "megabus", "preprocess", "text.txt", *options, cwd=folder)
    return folder


def test_it_trains_two_stages_and_converts_them(installed, folder):
    where = call(installed / "python", "-c", "import megabus; print(megabus.__file__)", cwd=folder)
    assert Path(where).is_relative_to(installed.parent)
    out = call(installed / "megabus", "train", "--nproc-per-node", "2", "--config", "run.yaml", cwd=folder)
    assert "GROWTH (cap) d32 L2 H4 ff64 TP2/PP1/DP1 -> d48 L3 H6 ff96 TP2/PP1/DP1" in out
    assert "checkpoint: run/checkpoints/step-00000006" in out
    assert (folder / "run/report.html").is_file()
    assert (folder / "run/loss.png").is_file()
    out = call(installed / "megabus", "convert", "run", "hf", "--to", "hf", "--verify", cwd=folder)
    assert "equal bit for bit" in out
    assert json.loads((folder / "hf/config.json").read_text())["hidden_size"] == 48
    assert (folder / "hf/modeling_ngpt.py").is_file()
    script = call(
        installed / "megabus", "submit", "--gpus-per-node", "2", "--config", "run.yaml", "--dry-run", cwd=folder
    )
    assert "-m megabus train" in script


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_are_given_time_to_save(installed, folder, number):
    """A signal to the one process that a user has started: all ranks stop and save, and their exit code is its own."""
    run_dir = f"stopped-by-{number.name}"
    command = [installed / "megabus", "train", "--nproc-per-node", "2", "--config", "run.yaml", f"run_dir={run_dir}"]
    command += ["train.max_steps=1000000", "faults.stop_exit_code=75", "log.every=1"]
    env = environment()
    env.pop("PYTHONPATH", None)
    metrics = folder / run_dir / "metrics.jsonl"
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=env
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (metrics.is_file() and '"event": "step"' in metrics.read_text()):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.kill(process.pid, number)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 75
    assert f"asked to stop by {number.name}: saving" in out
    assert f"stopped and saved: {run_dir}/checkpoints/" in out
    assert "Traceback" not in out
    assert "torch/distributed" not in out
