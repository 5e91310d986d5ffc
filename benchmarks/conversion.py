"""Speed and memory of tools/convert.py on more than 1 GB of weights, beside a plain copy of the same files.

python benchmarks/conversion.py --json conversion.json

Every conversion runs in turn with a copy of the files it reads, each synced to the disk, in a process of its own; of
each, and of all copies of as many bytes, the fastest counts (how fast a virtual machine gets memory varies sevenfold).
Memory is what a process allocates at its peak, above what it needs to start; pages of files that the kernel keeps, and
can drop, are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megabus.checkpoint.state import Progress, SavedState
from megabus.checkpoint.store import checkpoints_of
from megabus.command import Parser
from megabus.command import run as run_command
from megabus.config import Layout, ModelConfig
from megabus.convert.checkpoint import write_checkpoint
from megabus.parallel.placement import Placement

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(kind="ngpt", vocab_size=32_000, d_model=1024, n_layers=16, n_heads=16, head_dim=64, d_ff=2816)
SMALL = ModelConfig(kind="ngpt", vocab_size=67, d_model=16, n_layers=4, n_heads=2, head_dim=8, d_ff=16)
# Both arms begin with the same imports and then remove what they will write: a virtual machine gives freed memory back
# to its host after some seconds, and whoever comes after that waits for it.
PRELUDE = """
import os, runpy, shutil, sys, time
import megabus.convert.convert
sys.argv = sys.argv[1:]
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""
CONVERT = PRELUDE + "runpy.run_path(sys.argv[0], run_name='__main__')"
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


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each pair (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args()
    model = SMALL if args.small else MODEL
    placement = Placement(model, Layout(1, 1, 1))
    sizes = [4 * placement.numel(name) for name in placement.specs]
    print(f"{sum(sizes) / 1e9:.3f} GB of weights, the largest tensor {max(sizes) / 1e6:.0f} MB", flush=True)
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        rows = measure(model, Path(folder), args.rounds)
    print(table(rows))
    if args.json:
        facts = {"bytes": sum(sizes), "largest_tensor": max(sizes), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def measure(model: ModelConfig, place: Path, rounds: int) -> list[dict[str, object]]:
    """Rows of the table; `place` is an empty directory on the disk that is meant."""
    write_checkpoint(Random(model), checkpoints_of(place / "run"), Layout(2, 2, 1))
    llama = model.model_copy(update={"kind": "gpt"})
    write_checkpoint(Random(llama), checkpoints_of(place / "gpt"), Layout(1, 1, 1))
    chain = [
        ("checkpoint TP2/PP2 → TP1/PP4/DP2", "run", "again", "--to checkpoint --pp 4 --dp 2"),
        ("checkpoint → shard files TP2/PP2", "run", "shards", "--to shards --tp 2 --pp 2"),
        ("shard files → checkpoint", "shards", "back", "--to checkpoint"),
        ("checkpoint → Hugging Face, fp32", "run", "hf", "--to hf"),
        ("checkpoint → Hugging Face, bf16", "run", "hf16", "--to hf --dtype bfloat16"),
        ("Hugging Face, fp32 → checkpoint", "hf", "home", "--to checkpoint"),
        ("gpt checkpoint → Llama, fp32", "gpt", "llama", "--to hf"),
        ("Llama, fp32 → checkpoint TP2", "llama", "grown", "--to checkpoint --tp 2"),
    ]
    idle = run([sys.executable, "-c", "import torch, megabus.convert.convert; print('0 GB in 1 s')"])[1]
    copies: dict[int, list[float]] = defaultdict(list)  # by the bytes that are read
    found = []
    for name, source, out, options in chain:
        paths = [str(place / source), str(place / out)]
        read = sum(path.stat().st_size for path in (place / source).rglob("*") if path.is_file())
        converted = []
        for _ in range(rounds):
            copies[round(read / 1e7)].append(run([sys.executable, "-c", COPY, "copy", *paths])[0])
            converted.append(run([sys.executable, "-c", CONVERT, "tools/convert.py", *paths, *options.split()]))
        found.append((name, read, min(seconds for seconds, _ in converted), max(peak for _, peak in converted)))
        print(f"  {name}: {found[-1][2]:.2f} s, copy {copies[round(read / 1e7)][-1]:.2f} s", flush=True)
    rows: list[dict[str, object]] = []
    for name, read, seconds, peak in found:
        copy = min(copies[round(read / 1e7)])
        rows.append(
            {
                "conversion": name,
                "gb_per_s": read / 1e9 / seconds,
                "copy_gb_per_s": read / 1e9 / copy,
                "ratio": copy / seconds,
                "peak_mb": (peak - idle) / 1e6,
            }
        )
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
    return float(text.split(" GB in ")[1].split()[0]), peak


def table(rows: Sequence[dict[str, object]]) -> str:
    lines = ["| conversion | GB/s | plain copy, GB/s | ratio | peak memory |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['gb_per_s']:.2f} | {row['copy_gb_per_s']:.2f} | {row['ratio']:.2f} | {row['peak_mb']:.0f} MB"
        lines.append(f"| {row['conversion']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
