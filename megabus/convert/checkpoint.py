"""Write a checkpoint in one process, as the ranks of any layout would have written it together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from megabus.checkpoint.contents import shard_name, tensor_key, written_by
from megabus.checkpoint.manifest import THREADS, settle
from megabus.checkpoint.state import write_state
from megabus.checkpoint.store import begin, publish
from megabus.checkpoint.tensor_file import TensorFileWriter
from megabus.config import Layout
from megabus.convert.source import Source, blocks
from megabus.data.tokenizer import read_tokenizer_files
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Piece, Placement


def write_checkpoint(source: Source, root: Path, layout: Layout) -> Path:
    """`root`/step-N in shards for `layout`, which any run of the same model resumes from; its directory."""
    state = replace(source.state, layout=layout)
    placement = Placement(state.model, layout)
    partial, settled = begin(root, state.progress.step), []
    with ThreadPoolExecutor(THREADS) as pool:  # syncs a file while the next is written
        for rank in range(layout.world):
            pieces = written_by(placement, rank, placement.owned(rank))
            for number, kind in enumerate(state.kinds if pieces else (), 1):
                path = partial / shard_name(rank, number, len(state.kinds))
                digest = _write_file(source, path, kind, pieces)
                settled.append(pool.submit(settle, path, rank, digest=digest))
    entries = [future.result() for future in settled]
    rest = [write_state(partial, state)]
    if source.tokenizer is not None:
        rest += read_tokenizer_files(source.tokenizer).write(partial)
    return publish(partial, entries + [settle(path, 0) for path in rest])


def _write_file(source: Source, path: Path, kind: Kind, pieces: Sequence[Piece]) -> str:
    """Its digest."""
    shapes = {tensor_key(kind, piece.name): (len(piece),) for piece in pieces}
    offsets = {tensor_key(kind, piece.name): {"saved_offsets": [piece.start]} for piece in pieces}
    # So that torch.distributed.checkpoint itself can read the file, without us.
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
    with TensorFileWriter(path, shapes, "float32", metadata) as file:
        for piece in pieces:
            for start, stop in blocks(piece.start, piece.stop):
                values = source.read(kind, piece.name, start, stop)
                file.write(tensor_key(kind, piece.name), values, start - piece.start)
    return file.digest
