"""Speed and memory of `megabus convert` on more than 1 GB of weights, beside a plain copy of the same files.

Every conversion runs in turn with a copy of the files it reads, each synced to the disk, in a process of its own.
Memory is what a process allocates at its peak, above what it needs to start; pages of files that the kernel keeps, and
can drop, are not counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare
from megabus.checkpoint.state import Progress, SavedState
from megabus.checkpoint.store import checkpoints_of
from megabus.config import Layout, ModelConfig
from megabus.convert.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(kind="ngpt", vocab_size=32_000, d_model=1024, n_layers=16, n_heads=16, head_dim=64, d_ff=2816)
SMALL = ModelConfig(kind="ngpt", vocab_size=67, d_model=16, n_layers=4, n_heads=2, head_dim=8, d_ff=16)
# Both arms begin with the same imports and then remove what they will write: a virtual machine gives freed memory back
# to its host after some seconds, and whoever comes after that waits for it.
PRELUDE = """
import os, shutil, sys, time
import megabus.convert.convert
sys.argv = sys.argv[1:]
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""
CONVERT = PRELUDE + "from megabus.cli.convert import main\nmain(sys.argv[1:])"
COPY = (
    PRELUDE
    + """
begun = time.perf_counter()
shutil.copytree(sys.argv[1], sys.argv[2])
for folder, _, names in os.walk(sys.argv[2]):
    for name in names:
        with open(os.path.join(folder, name)) as file:
            os.fsync(file.fileno())
print(f"0 GB in {time.perf_counter() - begun} s")
"""
)


class Random:
    """Weights that no compression helps with."""

    tokenizer: Path | None = None

    def __init__(self, model: ModelConfig) -> None:
        self.state = SavedState(Progress(), 0, model, Layout(1, 1, 1), 0, ("weight",), {}, {}, {})
        self.block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        places = torch.arange(start, stop)
        return self.block[(places + len(name)) % len(self.block)]


def conversions(rounds: int, small: bool) -> list[Comparison]:
    """Every pair of forms, 1.085 GB of weights or more."""
    model = SMALL if small else MODEL
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        return _compared(model, Path(folder), min(rounds, 3))


def _compared(model: ModelConfig, place: Path, rounds: int) -> list[Comparison]:
    """`place` is an empty directory on the disk that is meant."""
    write_checkpoint(Random(model), checkpoints_of(place / "run"), Layout(2, 2, 1))
    llama = model.model_copy(update={"kind": "gpt"})
    write_checkpoint(Random(llama), checkpoints_of(place / "gpt"), Layout(1, 1, 1))
    chain = [
        ("checkpoint TP2/PP2 → TP1/PP4/DP2", "run", "again", "--to checkpoint --pp 4 --dp 2"),
        ("checkpoint → shard files TP2/PP2", "run", "shards", "--to shards --tp 2 --pp 2"),
        ("shard files → checkpoint", "shards", "back", "--to checkpoint"),
        ("shard files → Hugging Face", "shards", "from_shards", "--to hf"),
        ("checkpoint → Hugging Face, fp32", "run", "hf", "--to hf"),
        ("checkpoint → Hugging Face, bf16", "run", "hf16", "--to hf --dtype bfloat16"),
        ("Hugging Face, fp32 → checkpoint", "hf", "home", "--to checkpoint"),
        ("Hugging Face, fp32 → shard files", "hf", "cut", "--to shards --tp 2 --pp 2"),
        ("gpt checkpoint → Llama, fp32", "gpt", "llama", "--to hf"),
        ("Llama, fp32 → checkpoint TP2", "llama", "grown", "--to checkpoint --tp 2"),
    ]
    _, idle = run([sys.executable, "-c", "import torch, megabus.convert.convert; print('0 GB in 1 s')"])
    rows = []
    for name, source, out, options in chain:
        paths = [str(place / source), str(place / out)]
        size = sum(path.stat().st_size for path in (place / source).rglob("*") if path.is_file())
        copied, converted, peak = [], [], 0
        for _ in range(rounds):
            copied.append(size / run([sys.executable, "-c", COPY, "copy", *paths])[0])
            seconds, most = run([sys.executable, "-c", CONVERT, "convert", *paths, *options.split()])
            converted.append(size / seconds)
            peak = max(peak, most - idle)
        one, other = Timing(converted, max(1, peak)), Timing(copied, 0)
        what = f"conversion of {size / 1e9:.2f} GB, {name}"
        rows.append(compare(what, "converted, synced", "copied, synced", one, other, ">= 0.7", "B/s"))
    return rows


def run(command: Sequence[str]) -> tuple[float, int]:
    """(seconds the command says it took, its largest anonymous memory in bytes)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
            peak = max(peak, int(found[0].split()[1]) * 1024 if found else 0)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    text = process.stdout.read()  # it ends with the process, which is reaped after the watcher is done with it
    ended.set()
    watcher.join()
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    said = re.search(r" [kMGT]?B in ([0-9.e+-]+) s", text)
    if said is None:
        raise SystemExit(f"it does not say how long it took: {' '.join(command)}: {text}")
    return float(said[1]), peak
