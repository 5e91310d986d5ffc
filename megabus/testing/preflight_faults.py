"""Faults that a preflight must find, each planted in a small run on 4 processes that is checked and not trained."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from megabus.config import RunConfig, parse_config
from megabus.data.indexed import IndexedWriter, meta_path
from megabus.errors import UserError
from megabus.preflight import identity, links, machine
from megabus.testing.ranks import run_ranks
from megabus.train.run import check_only

WORLD = 4
VOCAB = 67


@dataclass(frozen=True)
class Fault:
    """What is wrong, and what must be said of it.

    check, words: a row of the table, and words of it. refused: whether all ranks end with it as their error.
    plant: on the disk, and in what all ranks are configured with. change: in one process, a rank's own.
    """

    name: str
    check: str
    words: str
    refused: bool = True
    plant: Callable[[Path], dict[str, Any]] = lambda folder: {}
    change: Callable[[int, Path], dict[str, Any] | None] = lambda rank, folder: None


@dataclass(frozen=True)
class Ended:
    """What a rank printed, and the error that it ended with."""

    out: str
    error: str | None
    seconds: float  # of the processor


def write_corpora(folder: Path, *, last: int = VOCAB - 1) -> None:
    """Training and validation tokens; the last token of training is `last`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in (("train", 1), ("valid", 2)):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, 2000)
        tokens[-1] = last
        with IndexedWriter(folder / name, np.dtype(np.uint16)) as writer:
            writer.append(tokens)
        meta = f'{{"vocab_size": {VOCAB}, "tokenizer_sha256": "", "n_tokens": 2000, "bin_sha256": "{writer.sha256}"}}'
        meta_path(folder / name).write_text(meta)


def run_config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """A run that grows from one layout into another. changes: by dotted key."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"vocab_size": VOCAB, "d_model": 36, "n_layers": 3, "n_heads": 2, "head_dim": 6, "d_ff": 62},
        "layout": {"tp": 2, "pp": 2},
        "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "max_steps": 4},
        "optimizer": {"lr": 1e-2},
        "growth": {"max_tokens": 256, "stages": [{"n_layers": 5, "layout": {"tp": 1, "pp": 2}}]},
        "data": {"train": str(folder / "train"), "valid": str(folder / "valid")},
        "eval": {"tokens": 128},
        "faults": {"hang_timeout": 120.0},
    }
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return parse_config(tree)


def check(fault: Fault, folder: Path) -> list[Ended]:
    """The preflight of a run with that fault, on every rank."""
    write_corpora(folder)
    planted = fault.plant(folder)
    return run_ranks(WORLD, _check_rank, fault, folder, planted)


def row_of(out: str, check: str) -> str:
    """The line of the table of that check, "" if there is none."""
    return next((line for line in out.splitlines() if line.startswith(check + " ")), "")


def problems(fault: Fault, ranks: Sequence[Ended]) -> list[str]:
    """What the preflight did not do about the fault."""
    found, row = [], row_of(ranks[0].out, fault.check)
    if f" {'refused' if fault.refused else 'warning'} " not in row or fault.words not in row:
        found.append(f"no row {fault.check} says '{fault.words}'")
    errors = {rank.error for rank in ranks}
    if len(errors) > 1 or (None in errors) == fault.refused:
        found.append(f"ranks ended with {errors}")
    return found


def _check_rank(fault: Fault, folder: Path, planted: dict[str, Any]) -> Ended:
    said = io.StringIO()
    own = fault.change(dist.get_rank(), folder) or {}
    config, error, begun = run_config(folder, planted | own), None, time.process_time()
    with contextlib.redirect_stdout(said):
        try:
            check_only(config)
        except UserError as caught:
            error = str(caught)
    return Ended(said.getvalue(), error, time.process_time() - begun)


# ---- what may be wrong


def _other_code(rank: int, folder: Path) -> None:
    if rank == 2:
        copy = folder / "elsewhere/megabus"
        shutil.copytree(identity.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / "splitmix.py").open("a") as file:
            file.write("# a line more\n")
        identity.PACKAGE = copy


def _other_torch(rank: int, folder: Path) -> None:
    if rank == 1:
        torch.__version__ = "2.12.0"  # type: ignore[assignment]


def _deepspeed_of_all(rank: int, folder: Path) -> None:
    deepspeed.__version__ = "0.17.0"


def _without_index(folder: Path) -> dict[str, Any]:
    (folder / "valid.idx").unlink()
    return {}


def _truncated(folder: Path) -> dict[str, Any]:
    os.truncate(folder / "train.bin", 3000)
    return {}


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def _flipped_everywhere(folder: Path) -> dict[str, Any]:
    _flipped(folder / "train.bin")
    return {}


def _apart(folder: Path) -> dict[str, Any]:
    """Ranks will work in directories of their own: a relative path is another file on each."""
    for name in ("here", "there"):
        write_corpora(folder / name)
    _flipped(folder / "there/valid.bin")
    return {"data.valid": "valid"}


def _moved(rank: int, folder: Path) -> None:
    os.chdir(folder / ("there" if rank == 3 else "here"))
    if rank == 3:  # as if it were the first of a machine of its own, which reads
        os.environ["LOCAL_RANK"] = "0"


def _unknown_token(folder: Path) -> dict[str, Any]:
    write_corpora(folder, last=VOCAB)
    return {}


def _no_directory(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("in the way")
    return {"run_dir": str(folder / "file/run")}


def _little_memory(rank: int, folder: Path) -> None:
    machine.free_memory = lambda: 2**20


def _slow_matmul(rank: int, folder: Path) -> None:
    if rank == 2:
        product = machine.matmul

        def slowly(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                product(a, b)
            return product(a, b)

        machine.matmul = slowly


def _slow_messages(*pairs: tuple[int, int]) -> Callable[[int, Path], None]:
    """Every message between these ranks takes 30 ms longer."""

    def change(rank: int, folder: Path) -> None:
        true_exchange = links.exchange

        def slowly(peer: int, out: torch.Tensor, into: torch.Tensor, wire: links.Wire) -> None:
            if (rank, peer) in pairs:
                time.sleep(0.03)
            true_exchange(peer, out, into, wire)

        links.exchange = slowly

    return change


NONE = Fault("nothing", "links within machines", "GB/s", refused=False)
FAULTS = (
    Fault(
        "rank 3 has another learning rate",
        "configuration",
        "optimizer.lr = 0.02: on rank 3 is 0.01 on most ranks",
        change=lambda rank, folder: {"optimizer.lr": 2e-2} if rank == 3 else None,
    ),
    Fault(
        "rank 0 has another seed",
        "configuration",
        "train.seed = 1: on rank 0 is 0 on most ranks",
        change=lambda rank, folder: {"train.seed": 1} if rank == 0 else None,
    ),
    Fault("rank 2 runs changed code", "code", "on rank 2 (", change=_other_code),
    Fault("rank 1 has another torch", "versions", "torch = 2.12.0: on rank 1 is not the 2.13", change=_other_torch),
    Fault("DeepSpeed is not the pinned one", "versions", "deepspeed = 0.17.0: is not the", change=_deepspeed_of_all),
    Fault("an index is missing", "data", "valid.idx: the file does not exist", plant=_without_index),
    Fault("tokens are cut off", "data", "train.bin: holds 3000 bytes where", plant=_truncated),
    Fault("a bit is flipped", "data", "train.bin: has SHA-256", plant=_flipped_everywhere),
    Fault("rank 3 reads other bytes", "data", "valid.bin: has other bytes on rank 3", plant=_apart, change=_moved),
    Fault("a token is outside the vocabulary", "data", f"has a token {VOCAB}, outside", plant=_unknown_token),
    Fault("run_dir cannot be made", "run_dir", "cannot be written (Not a directory)", plant=_no_directory),
    Fault(
        "run_dir is not shared",
        "run_dir",
        "run: is not the same directory on rank 3",
        plant=lambda folder: _apart(folder) and {"run_dir": "run"},
        change=_moved,
    ),
    Fault(
        "the disk is too small",
        "disk",
        "100000000 + 1 checkpoints of",
        plant=lambda folder: {"checkpoint.keep_last": 100_000_000},
    ),
    Fault("memory is too small", "memory", "take 1.3 MiB at least, and 1.0 MiB are free", change=_little_memory),
    Fault("rank 2 computes slowly", "compute", "rank 2 (", refused=False, change=_slow_matmul),
    Fault(
        "rank 3's messages are slow",
        "links within machines",
        "rank 3 (",
        refused=False,
        change=_slow_messages((3, 2), (3, 1)),
    ),
    Fault(
        "one link is slow",
        "links within machines",
        "link 0-1 slow",
        refused=False,
        change=_slow_messages((0, 1)),
    ),
    Fault(
        "links carry less than they must",
        "links within machines",
        "preflight.min_bandwidth = 1000.0: is more than the",
        plant=lambda folder: {"preflight.min_bandwidth": 1000.0},
    ),
)
