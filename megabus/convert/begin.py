"""What a new run begins with: a checkpoint's weights, or those of another form, read straight into an engine."""

from __future__ import annotations

from pathlib import Path

from megabus.checkpoint.contents import Found, look
from megabus.checkpoint.load import checkpoint_at
from megabus.checkpoint.manifest import Heartbeat, idle
from megabus.checkpoint.restore import re_express, restore, weights_of
from megabus.convert.convert import in_other_form, open_source
from megabus.convert.hub import local_copy
from megabus.convert.source import FolderSource, OpenFiles
from megabus.engine.engine import Engine
from megabus.parallel.agree import agreement, rank_0_tells
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Placement


def origin_of(path: str | Path, heartbeat: Heartbeat = idle) -> Found | FolderSource:
    """A checkpoint, the newest of a run, or weights in another form (shard files, a Hugging Face directory or a name on
    the hub), to begin from with its weights alone. Collective."""
    folder = rank_0_tells(lambda: local_copy(path))
    heartbeat()
    if not in_other_form(folder):
        return weights_of(folder, heartbeat)
    with agreement():
        return open_source(folder, OpenFiles(), weights_only=True)


def foreseen(path: str | Path) -> Found | FolderSource:
    """What an origin says of itself: its tensors are not read. In one process."""
    folder = local_copy(path)
    if in_other_form(folder):
        return open_source(folder, OpenFiles(), weights_only=True)
    return look(checkpoint_at(folder))


def begin(origin: Found | FolderSource, engine: Engine, heartbeat: Heartbeat = idle) -> None:
    """Set the engine's masters from an origin of the same model. Each rank reads what it owns. Collective."""
    if isinstance(origin, Found):
        restore(origin, engine, heartbeat)
        return
    fragments: Fragments = {}
    with agreement():
        for piece in engine.placement.owned(engine.mesh.rank):
            fragments[piece] = {"weight": origin.read("weight", piece.name, piece.start, piece.stop)}
            heartbeat()
    re_express(fragments, Placement(origin.state.model, origin.state.layout), engine.placement)
    engine.write(fragments)
