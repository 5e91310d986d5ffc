"""Text to token ids: tools/preprocess.py beside `datasets.map` with SentencePiece, on the same text and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare_speeds

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "data/demo/shakespeare.txt"
TOKENIZER = ROOT / "data/demo/shakespeare-tokenizer.model"
# A run of either takes half a minute.
OURS, THEIRS = "preprocess.py", "datasets.map"
COPIES = 8  # of the demo's 5 MB

# What the documentation of `datasets` shows, written to a flat file of ids as nanoGPT does it.
MAPPED = """
import sys
import datasets, numpy as np, sentencepiece
text, tokenizer, out, workers = sys.argv[1:]
processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
def encode(batch):
    return {"ids": [ids + [processor.eos_id()] for ids in processor.encode(batch["text"])]}
rows = datasets.load_dataset("json", data_files=text, split="train", cache_dir=out + ".cache")
rows = rows.map(encode, batched=True, num_proc=int(workers), remove_columns=["text"])
with open(out, "wb") as file:
    for batch in rows.with_format("numpy").iter(1000):
        file.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())
"""


def missing() -> str | None:
    """Why it cannot run."""
    absent = [path for path in (TEXT, TOKENIZER) if not path.exists()]
    return f"{absent[0]} is not there: make demo writes it" if absent else None


def preprocessing(rounds: int, small: bool) -> list[Comparison]:
    """Whole commands, start to end; the ids of both must be the same."""
    import datasets

    documents = TEXT.read_text().split("\n\n\n") * (1 if small else COPIES)
    with tempfile.TemporaryDirectory() as name:
        folder, workers = Path(name), str(len(os.sched_getaffinity(0)))
        datasets.Dataset.from_dict({"text": documents}).to_json(folder / "text.jsonl")
        text = str(folder / "text.jsonl")
        seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
        for turn in range(min(rounds, 3)):
            ours, theirs = str(folder / f"ours{turn}"), str(folder / f"theirs{turn}.bin")
            command = ["tools/preprocess.py", text, "--tokenizer", str(TOKENIZER), "--output", ours]
            seconds[OURS].append(_timed([*command, "--workers", workers]))
            seconds[THEIRS].append(_timed(["-c", MAPPED, text, str(TOKENIZER), theirs, workers]))
        ids = np.fromfile(ours + ".bin", np.uint16)
        if not np.array_equal(ids, np.fromfile(theirs, np.uint16)):
            raise RuntimeError("the two ways give different ids")
    timings = {label: Timing([s / len(ids) for s in found], 0) for label, found in seconds.items()}
    what = f"tokens/s, {len(ids) / 1e6:.1f}M tokens, {workers} processes"
    return [compare_speeds(what, OURS, THEIRS, timings)]


def _timed(command: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:2]} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - begun
