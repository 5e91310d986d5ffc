"""Find the newest checkpoint that is whole, and fill an engine of any layout from it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megabus.checkpoint.contents import Found, check_entry, check_tokenizer, look
from megabus.checkpoint.load import checkpoint_at
from megabus.checkpoint.manifest import DamagedError, Heartbeat, idle, read_manifest
from megabus.checkpoint.state import weights_alone
from megabus.checkpoint.store import LATEST, complete, latest_of, point_latest, set_aside
from megabus.engine.engine import Engine
from megabus.errors import UserError, warn
from megabus.parallel.agree import agreement, rank_0_says, rank_0_tells
from megabus.parallel.fragments import Fragments, decay_of
from megabus.parallel.placement import Placement


def find_checkpoint(root: Path, strict: bool, heartbeat: Heartbeat = idle) -> Found | None:
    """The newest good checkpoint under `root`; None where there is none of any kind. Collective.

    Damage is told on rank 0's stderr, and the next older checkpoint is tried; the damaged ones are set aside once a
    good one is found. `strict`: any damage raises `UserError` instead. Raises it too where all are damaged.
    """
    folders = rank_0_tells(lambda: _candidates(root, strict))
    damaged: list[Path] = []
    for folder in folders:
        try:
            found = verified(folder, heartbeat)
        except DamagedError as error:
            if strict:
                raise
            damaged.append(folder)
            rank_0_says(str(error), warn)
            continue
        rank_0_tells(partial(_tidy, root, found.folder, damaged))
        return found
    if damaged:
        problem = f"holds no good one ({len(damaged)} damaged)"
        raise UserError("checkpoint", root, problem, "restore one, or start anew in another run_dir")
    return None


def restore(found: Found, engine: Engine, heartbeat: Heartbeat = idle) -> None:
    """Set the engine's masters, moments and running means from a checkpoint of the same model, saved under any layout.
    Means that it lacks begin with its weights. Collective.

    Weights alone may come from a model whose gains are stored in other multiples: raw * multiplier is what is kept.
    """
    from megabus.checkpoint.shards import read_shards  # slow to import, and a new run reads none

    averaged = {kind: found.state.averaged[kind] for kind in engine.averages.kinds if kind in found.state.averaged}
    kinds = [kind for kind in found.state.kinds if decay_of(kind) is None or kind in averaged]
    fragments: Fragments = {
        piece: {kind: torch.empty(len(piece)) for kind in kinds} for piece in engine.placement.owned(engine.mesh.rank)
    }
    read_shards(found, fragments)
    heartbeat()
    re_express(fragments, found.placement, engine.placement)
    engine.write(fragments, found.state.optimizer_step, averaged)


def re_express(fragments: Fragments, old: Placement, new: Placement) -> None:
    """Let weights stand for the same where they are stored in other multiples."""
    for piece, tensors in fragments.items():
        was, now = (placement.specs[piece.name].multiplier for placement in (old, new))
        if was != now:
            assert tensors.keys() == {"weight"}, "moments are of raw weights"
            tensors["weight"] = tensors["weight"] * (was / now)  # what was read may be a file, mapped


def weights_of(path: str | Path, heartbeat: Heartbeat = idle) -> Found:
    """A checkpoint, or the newest of a run, to begin from with its weights alone. Collective."""
    found = verified(rank_0_tells(lambda: checkpoint_at(path)), heartbeat)
    return replace(found, state=weights_alone(found.state))


def _candidates(root: Path, strict: bool) -> list[Path]:
    folders = complete(root)
    if len(folders) > 1 or (root / LATEST).exists():  # a run killed right after its first one appeared has none
        try:
            if strict and folders:
                read_manifest(folders[0])  # else `latest`, which holds its hash, would be blamed for its damage
            latest_of(root)
        except DamagedError as error:
            if strict:
                raise
            rank_0_says(str(error), warn)
    return folders


def verified(folder: Path, heartbeat: Heartbeat = idle) -> Found:
    """Rank 0 reads what a checkpoint says, then every rank reads and hashes its share of the files. Collective."""
    found = rank_0_tells(lambda: look(folder))
    heartbeat()
    try:
        with agreement():
            for entry in found.entries[dist.get_rank() :: dist.get_world_size()]:
                check_entry(found, entry, heartbeat)
    except DamagedError as error:
        again = next(entry for entry in found.entries if entry.name == Path(str(error.value)).name)
        rank_0_tells(lambda: check_entry(found, again, heartbeat))
        problem = f"reads well on rank 0, but for another rank it {error.problem}"
        raise UserError("checkpoint", error.value, problem, "let all nodes share the file system") from error
    rank_0_tells(lambda: check_tokenizer(folder, found.entries, found.state))
    return found


def _tidy(root: Path, good: Path, damaged: list[Path]) -> None:
    try:
        for folder in damaged:
            rank_0_says(f"{folder} is set aside as {set_aside(folder).name}; {good.name} is used instead", warn)
        point_latest(good)
    except OSError as error:
        raise UserError("checkpoint", root, f"cannot be tidied ({error})", "make it writable") from error
