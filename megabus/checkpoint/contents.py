"""What a checkpoint must hold, beyond hashes that are right: the files that a save writes, and in them the tensors that
its state says. All that is cheap is looked at first, so nothing is allocated, built or read by a size that is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megabus.checkpoint.entries import ENTRY, LENGTH, longest_header, odd_by_name, scan
from megabus.checkpoint.manifest import (
    ANOTHER_COPY,
    MANIFEST,
    STATE,
    THREADS,
    DamagedError,
    Entry,
    Heartbeat,
    check_digest,
    check_file,
    check_size,
    idle,
    read_manifest,
    reading,
)
from megabus.checkpoint.state import SavedState, read_state
from megabus.checkpoint.store import step_of
from megabus.data.tokenizer.files import BESIDE, FILES, MODEL, TREE
from megabus.errors import UserError
from megabus.model.cost import totals
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate
from megabus.plain_file import LARGEST, shown

SHARD = "shard-{:05d}-model-{:05d}-of-{:05d}.safetensors"  # rank and kind, counted from 1, and the number of kinds
NAMED = 40  # bytes that a file takes at least for the name, dtype and place of a tensor
_SHARD = re.compile(r"shard-(\d{5,9})-model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are all what its manifest says, and hold what its state says."""

    folder: Path
    state: SavedState
    entries: list[Entry]

    @cached_property
    def placement(self) -> Placement:
        """Of the tensors in its files."""
        return Placement(self.state.model, self.state.layout)


def look(folder: Path) -> Found:
    """All of a checkpoint but its tensors, which `check_entry` checks. Raises `DamagedError`, `UserError`."""
    entries = read_manifest(folder)
    for entry in entries:
        check_size(folder, entry)
        if _SHARD.fullmatch(entry.name) is None and entry.bytes > LARGEST:  # shards are held against the state
            raise DamagedError(folder / MANIFEST, f"is damaged (files: {entry.name} has {entry.bytes} bytes)")
    check_file(folder, listed(folder, entries, STATE))
    state = read_state(folder)
    if state.progress.step != step_of(folder):
        raise DamagedError(folder, f"is the checkpoint of step {state.progress.step}", "give it its name back")
    check_fits(folder, state, sum(entry.bytes for entry in entries))
    _check_listing(folder, entries, state)
    return Found(folder, state, entries)


def check_entry(found: Found, entry: Entry, heartbeat: Heartbeat = idle) -> None:
    """Raise `DamagedError` unless the file has the manifest's bytes and, of a shard, the state's tensors, with entries
    that they can have."""
    shard, path = _shard_of(entry), found.folder / entry.name
    if shard is None:
        check_file(found.folder, entry, heartbeat)
        return
    rank, number = shard
    kind = found.state.kinds[number]
    pieces = written_by(found.placement, rank, found.placement.owned(rank))
    tensors = {tensor_key(kind, piece.name): (kind, len(piece)) for piece in pieces}
    check_size(found.folder, entry)
    with reading(path):
        scanned = scan(path, tensors, heartbeat, entry.digest)
    check_digest(path, scanned.digest, entry)
    check_header(path, {key: (length,) for key, (_, length) in tensors.items()})
    odd = scanned.odd if scanned.covered else odd_by_name(path, tensors)
    if odd is not None:
        raise DamagedError(path, f"is damaged ({odd[0]} holds {odd[1]})")


def check_tokenizer(folder: Path, entries: Iterable[Entry], state: SavedState, remedy: str = ANOTHER_COPY) -> None:
    """Raise `DamagedError` where the tokenizer that was saved with the weights is none, or none of the run's data. Its
    files have the manifest's bytes."""
    path = _tokenizer_in(folder, {entry.name for entry in entries})
    if path is None:
        return
    from megabus.data.tokenizer import Tokenizer  # it needs a library that checkpoints without one do without

    try:
        known_as = Tokenizer(path).files.known_as
    except UserError as error:
        raise DamagedError(path, f"is damaged (it {error.problem})", remedy) from error
    made_with = {sha256 for source in ("train", "valid") if state.data for sha256 in state.data[source]["tokenizers"]}
    if made_with and not known_as & made_with:
        raise DamagedError(path, f"is damaged (it is not the one that the data in {STATE} was made with)", remedy)


def opened(folder: Path) -> Found:
    """A checkpoint of which all has been checked, in this process."""
    found = look(folder)
    with ThreadPoolExecutor(THREADS) as pool:  # hashing lets go of the interpreter
        list(pool.map(partial(check_entry, found), found.entries))
    check_tokenizer(folder, found.entries, found.state)
    return found


def large(entry: Entry) -> bool:
    """Whether an entry is a shard's, so that to check it takes a while."""
    return _shard_of(entry) is not None


def check_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `DamagedError` unless a safetensors file holds just these tensors, in fp32."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            if odd := sorted(found.keys() ^ shapes.keys()):
                problem = "holds a tensor that it should not hold" if odd[0] in found else "lacks a tensor"
                raise DamagedError(path, f"{problem}, {shown(odd[0])}")
            for key, shape in shapes.items():
                dtype, there = found[key].get_dtype(), tuple(found[key].get_shape())
                if dtype != "F32" or there != shape:
                    raise DamagedError(path, f"is damaged ({key} is {dtype} {list(there)}, and not F32 {list(shape)})")
    except SafetensorError as error:
        raise DamagedError(path, f"is damaged ({shown(str(error))})") from error


def check_fits(folder: Path, state: SavedState, stored: int) -> None:
    """Raise `DamagedError` where `stored` bytes of files cannot hold the state's tensors: whatever is made by its sizes
    is made after that."""
    tensors, entries = totals(state.model)
    needed = (entries * ENTRY + tensors * NAMED) * len(state.kinds)
    if needed > stored:
        problem = f"is damaged (model: its sizes take {needed} bytes or more, all files listed have {stored})"
        raise DamagedError(folder / STATE, problem)


def written_by(placement: Placement, rank: int, pieces: Iterable[Piece]) -> list[Piece]:
    """Those of a rank's pieces that it saves: of tensor-parallel replicas the first."""
    first = coordinate(placement.layout, rank).tp == 0
    return [piece for piece in pieces if first or placement.specs[piece.name].sharded]


def shard_name(rank: int, number: int, kinds: int) -> str:
    """The file of a rank's tensors of the `number`-th of `kinds` kinds, counted from 1."""
    return SHARD.format(rank + 1, number, kinds)


def tensor_key(kind: Kind, name: str) -> str:
    """A tensor's name in the files."""
    return f"{kind}/{name}"


def listed(folder: Path, entries: Iterable[Entry], name: str) -> Entry:
    """Its entry in the manifest. Raises `DamagedError` where it has none: then nothing vouches for the file."""
    for entry in entries:
        if entry.name == name:
            return entry
    raise DamagedError(folder / MANIFEST, f"is damaged (files: {name} is not listed)")


def listed_tokenizer(folder: Path, entries: Iterable[Entry]) -> Path | None:
    """The tokenizer that was saved with the weights, if one was. Raises `UserError` about files of one that were put
    beside them later."""
    listed_names = {entry.name for entry in entries}
    for path in (folder / name for name in FILES):
        if path.name not in listed_names and os.path.lexists(path):
            problem = f"is not listed in {MANIFEST}: it was not saved with the weights"
            raise UserError("tokenizer", path, problem, "move it elsewhere, and name it where a tokenizer can be given")
    return _tokenizer_in(folder, listed_names)


def _tokenizer_in(folder: Path, names: Set[str]) -> Path | None:
    return next((folder / name for name in (TREE, MODEL) if name in names), None)


def _shard_of(entry: Entry) -> tuple[int, int] | None:
    """The rank and the number of the kind, from 0, that a shard's name says; None for another file."""
    match = _SHARD.fullmatch(entry.name)
    return None if match is None else (int(match[1]) - 1, int(match[2]) - 1)


def _check_listing(folder: Path, entries: Sequence[Entry], state: SavedState) -> None:
    """Raise `DamagedError` unless the files are just those that a save of this state writes, and large enough."""
    path, layout, kinds = folder / MANIFEST, state.layout, len(state.kinds)
    shards: dict[int, set[int]] = {}
    for entry in entries:
        match = _SHARD.fullmatch(entry.name)
        if match is None:
            if entry.name not in (STATE, *FILES):
                raise DamagedError(path, f"is damaged (files: {entry.name} is none that a save writes)")
            continue
        rank, number = int(match[1]) - 1, int(match[2])
        if entry.name != shard_name(rank, number, kinds) or not (0 <= rank < layout.world and 0 < number <= kinds):
            problem = f"is damaged (files: {entry.name} is no shard of {layout} with {kinds} kind(s) of tensors)"
            raise DamagedError(path, problem)
        if entry.rank != rank:
            raise DamagedError(path, f"is damaged (files: rank {entry.rank} did not write {entry.name})")
        shards.setdefault(rank, set()).add(number)
    beside = sorted({entry.name for entry in entries} & set(BESIDE))
    if beside and _tokenizer_in(folder, {entry.name for entry in entries}) is None:
        raise DamagedError(path, f"is damaged (files: {beside[0]} is listed, and no tokenizer that it goes with)")
    # What ranks own does not overlap: files that hold as much as there is hold all that there is.
    placement = Placement(state.model, layout)
    written = {rank: written_by(placement, rank, placement.owned(rank)) for rank in shards}
    held = {rank: sum(map(len, pieces)) for rank, pieces in written.items()}
    for rank, numbers in shards.items():
        if len(numbers) != kinds:
            raise DamagedError(path, f"is damaged (files: {len(numbers)} of rank {rank}'s {kinds} shards are listed)")
    _, total = totals(state.model)
    if (there := sum(held.values())) != total:
        problem = f"is damaged (files: the shards listed hold {there} of {total} entries that {STATE} says)"
        raise DamagedError(path, problem)
    for entry in filter(large, entries):
        needed, header = ENTRY * held[entry.rank], LENGTH + longest_header(len(written[entry.rank]))
        if not needed < entry.bytes <= needed + header:
            problem = f"is damaged (files: {entry.name} has {entry.bytes} bytes for {needed} bytes of tensors)"
            raise DamagedError(path, problem)
