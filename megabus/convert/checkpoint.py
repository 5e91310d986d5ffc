"""Write a checkpoint in one process, as the ranks of any layout would have written it together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from megabus.checkpoint.manifest import settle
from megabus.checkpoint.save import TOKENIZER
from megabus.checkpoint.shards import tensor_key, written_by
from megabus.checkpoint.state import write_state
from megabus.checkpoint.store import begin, publish
from megabus.config import Layout
from megabus.convert.source import Source
from megabus.convert.tensor_file import TensorFileWriter
from megabus.parallel.placement import Placement


def write_checkpoint(source: Source, root: Path, layout: Layout) -> Path:
    """`root`/step-N in shards for `layout`, which any run of the same model resumes from; its directory.

    A shard's intervals are copied one after another, so memory holds the largest of them.
    """
    state = replace(source.state, layout=layout)
    placement, step = Placement(state.model, layout), state.progress.step
    partial, entries = begin(root, step), []
    for rank in range(layout.world):
        pieces = written_by(placement, rank, placement.owned(rank))
        for number, kind in enumerate(state.kinds, 1):
            if not pieces:
                continue
            path = partial / f"shard-{rank + 1:05d}-model-{number:05d}-of-{len(state.kinds):05d}.safetensors"
            shapes = {tensor_key(kind, piece.name): (len(piece),) for piece in pieces}
            offsets = {tensor_key(kind, piece.name): {"saved_offsets": [piece.start]} for piece in pieces}
            # So that torch.distributed.checkpoint itself can read the file, without us.
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
            with TensorFileWriter(path, shapes, "float32", metadata) as file:
                for piece in pieces:
                    values = source.read(kind, piece.name, piece.start, piece.stop)
                    file.write(tensor_key(kind, piece.name), values)
            entries.append(settle(path, rank))
    rest = [write_state(partial, state)]
    if source.tokenizer is not None:
        rest.append(Path(shutil.copyfile(source.tokenizer, partial / TOKENIZER)))
    return publish(partial, entries + [settle(path, 0) for path in rest])
