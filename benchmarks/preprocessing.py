"""Text to token ids: tools/preprocess.py beside `datasets.map` with the same tokenizer, text and processes."""

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
from megabus.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "data/demo/shakespeare.txt"
TOKENIZER = ROOT / "data/demo/shakespeare-tokenizer.model"
# A run of either takes half a minute.
OURS, THEIRS = "preprocess.py", "datasets.map"
COPIES = 8  # of the demo's 5 MB
PIECES = 4096  # of the byte-level BPE that is trained on it
BAR = ">= 0.95"

# What the documentation of `datasets` shows, written to a flat file of ids as nanoGPT does it.
MAPPED = """
import sys
import datasets, numpy as np
text, tokenizer, out, workers = sys.argv[1:]
if tokenizer.endswith(".json"):
    import tokenizers
    backend = tokenizers.Tokenizer.from_file(tokenizer)
    end = backend.token_to_id("<|endoftext|>")
    encode_all = lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
else:
    import sentencepiece
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    end, encode_all = processor.eos_id(), processor.encode
def encode(batch):
    return {"ids": [ids + [end] for ids in encode_all(batch["text"])]}
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
        folder = Path(name)
        datasets.Dataset.from_dict({"text": documents}).to_json(folder / "text.jsonl")
        byte_bpe = train_tokenizer(documents[: len(documents) // COPIES], PIECES, folder / "bpe")
        found = {"SentencePiece": TOKENIZER, "byte-level BPE": byte_bpe}
        return [_compared(kind, path, folder, min(rounds, 3)) for kind, path in found.items()]


def _compared(kind: str, tokenizer: Path, folder: Path, rounds: int) -> Comparison:
    text, workers = str(folder / "text.jsonl"), str(len(os.sched_getaffinity(0)))
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for turn in range(rounds):
        ours, theirs = (str(folder / f"{kind}-{whose}{turn}") for whose in ("ours", "theirs"))
        command = ["tools/preprocess.py", text, "--tokenizer", str(tokenizer), "--out", ours]
        seconds[OURS].append(_timed([*command, "--workers", workers]))
        seconds[THEIRS].append(_timed(["-c", MAPPED, text, str(tokenizer), theirs, workers]))
    ids = np.fromfile(ours + ".bin", np.uint16)
    if not np.array_equal(ids, np.fromfile(theirs, np.uint16)):
        raise RuntimeError(f"the two ways give different ids of {kind}")
    timings = {label: Timing([s / len(ids) for s in found], 0) for label, found in seconds.items()}
    what = f"tokens/s, {kind}, {len(ids) / 1e6:.1f}M tokens, {workers} processes"
    return compare_speeds(what, OURS, THEIRS, timings, BAR)


def _timed(command: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:2]} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - begun
