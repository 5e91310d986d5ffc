"""What a new run begins with: a checkpoint's weights, or those of another form, read straight into an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megabus.checkpoint.contents import Found, look
from megabus.checkpoint.load import checkpoint_at
from megabus.checkpoint.manifest import Heartbeat, idle
from megabus.checkpoint.restore import re_express, restore, weights_of
from megabus.checkpoint.state import SavedState
from megabus.convert.convert import in_other_form, model_at, open_source
from megabus.convert.hugging_face import CONFIG, HuggingFaceSource, context_of, described
from megabus.convert.source import CheckpointSource, FolderSource, OpenFiles
from megabus.convert.vocabulary import LargerVocabulary
from megabus.data.tokenizer import Tokenizer, spellings
from megabus.data.tokenizer.odd_text import differences, odd_lines
from megabus.data.tokenizer.spelling import KEPT
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.hub import local_copy, of_hub
from megabus.parallel.agree import agreement, rank_0_tells
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Placement
from megabus.plain_file import shown

NO_SPELLER = "begin from weights that lie with their tokenizer, or leave out extend_vocabulary"
BEAT = 1.0  # seconds between two signs of a download that goes on


class Described(NamedTuple):
    """A model of the hub of which nothing but the description has been fetched."""

    folder: Path
    state: SavedState


def origin_of(path: str | Path, heartbeat: Heartbeat = idle) -> Found | FolderSource:
    """A checkpoint, the newest of a run, or weights in another form (shard files, a Hugging Face directory or a name on
    the hub), to begin from with its weights alone. Collective."""
    folder = _fetched(path, heartbeat)
    if not rank_0_tells(lambda: in_other_form(folder)):
        return weights_of(folder, heartbeat)
    with agreement():
        if not in_other_form(folder):
            problem = f"is not on the host of rank {dist.get_rank()}"
            raise UserError("init_from", folder, problem, "share it between hosts, or fetch it on each")
        return open_source(folder, OpenFiles(), weights_only=True)


def unread_tokenizer(origin: Found | FolderSource) -> str:
    """Why the tokenizer that lies with weights cannot be read; empty where it can, or where there is none."""
    return origin.without_tokenizer if isinstance(origin, HuggingFaceSource) else ""


def _fetched(path: str | Path, heartbeat: Heartbeat) -> Path:
    """`model_at` on rank 0, which may take longer than ranks wait for each other. Collective."""
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(model_at, path) if dist.get_rank() == 0 else None
        while rank_0_tells(lambda: bool(job and wait([job], BEAT).not_done)):
            heartbeat()
        heartbeat()
        return rank_0_tells(lambda: job.result() if job else Path(path))


def read_description(path: str | Path) -> Found | FolderSource | Described:
    """What an origin says of itself: its tensors are not read, and those of the hub not fetched. In one process."""
    if of_hub(path):
        folder = local_copy(path, [CONFIG])
        return Described(folder, described(folder))
    folder = Path(path)
    if in_other_form(folder):
        return open_source(folder, OpenFiles(), weights_only=True)
    return look(checkpoint_at(folder))


def past_context(origin: Found | FolderSource | Described, longest: int) -> list[str]:
    """A line where a run's `longest` sequence is longer than any that its origin was made for."""
    context = context_of(origin.folder, origin.state)
    if context is None or longest <= context:
        return []
    beyond = "positions beyond it are new to them, and the loss may begin high"
    return [f"seq_len {longest}: the longest sequence of the weights of {origin.folder} is {context}; {beyond}"]


def extended(
    origin: Found | FolderSource, tokenizer: Tokenizer, vocab_size: int, heartbeat: Heartbeat = idle
) -> LargerVocabulary:
    """The origin with a vocabulary for a tokenizer that has more pieces than its own. In one process. Raises
    `UserError` where the origin has no tokenizer, or this one gives its pieces other ids (see `spellings`)."""
    source: FolderSource = CheckpointSource(origin, OpenFiles()) if isinstance(origin, Found) else origin
    if source.tokenizer is None:
        problem = "has no tokenizer that could spell new pieces"
        why = unread_tokenizer(origin)
        raise UserError("init_from", source.folder, problem + (f": its own {why}" if why else ""), NO_SPELLER)
    own = Tokenizer(source.tokenizer)
    try:
        spelled = spellings(own, tokenizer)
    except UserError as error:
        raise UserError("data.tokenizer", error.value, error.problem, error.remedy) from error
    _check_old_text(own, tokenizer, spelled)
    if not spelled and vocab_size == source.state.model.vocab_size:
        problem = f"and {tokenizer.name} has no piece that the tokenizer of {source.folder} lacks"
        raise UserError("extend_vocabulary", True, problem, "leave it out")
    return LargerVocabulary(source, vocab_size, spelled, own.vocab_size, tokenizer.path, heartbeat)


def _check_old_text(own: Tokenizer, tokenizer: Tokenizer, new: Mapping[int, Sequence[int]]) -> None:
    """Pieces may be the same and text still be cut into others: by merges in another order, or once it is normalised in
    another way. Raise `UserError` for a text that has no new piece and is spelled otherwise."""
    some = range(0, own.vocab_size, -(-own.vocab_size // 2000))
    texts = odd_lines(own.codec.symbols) + [own.decode([number]) for number in some]
    found = differences(texts, own, tokenizer.encode_batch)
    others = [one for one in found if not new.keys() & {*one.others}]
    if others:
        text, was, now = min(others, key=lambda one: len(one.text))
        problem = f"spells {shown(text)} as {now}, and the tokenizer of the weights as {was}"
        raise UserError("data.tokenizer", tokenizer.name, problem, f"extend that one: {KEPT}")


def begin(origin: Found | FolderSource, engine: Engine, heartbeat: Heartbeat = idle) -> None:
    """Set the engine's masters from an origin of the same model. Each rank reads what it owns. Collective."""
    if isinstance(origin, Found):
        restore(origin, engine, heartbeat)
        return
    fragments: Fragments = {}
    placement = engine.placement
    # Matrices first: gains of new rows are made of what their heads' are, which then is known.
    owned = sorted(placement.owned(engine.mesh.rank), key=lambda piece: not placement.specs[piece.name].is_matrix)
    with agreement():
        for piece in owned:
            fragments[piece] = {"weight": origin.read("weight", piece.name, piece.start, piece.stop)}
            heartbeat()
    re_express(fragments, Placement(origin.state.model, origin.state.layout), placement)
    engine.write(fragments)
