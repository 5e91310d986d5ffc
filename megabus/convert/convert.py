"""From any form to any other: open what is there, write what is asked for, whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from megabus.checkpoint.contents import check_entry, check_tokenizer, large, look
from megabus.checkpoint.load import checkpoint_at
from megabus.checkpoint.state import weights_alone
from megabus.checkpoint.store import checkpoints_of
from megabus.checkpoint.tensor_file import DTYPES
from megabus.config import Layout, ModelConfig
from megabus.convert.checkpoint import write_checkpoint
from megabus.convert.checks import Checks
from megabus.convert.hf_rest import TOKENIZER_FILES
from megabus.convert.hugging_face import CONFIG, HuggingFaceSource, named_files, write_hugging_face
from megabus.convert.hugging_face import INDEX as HF_INDEX
from megabus.convert.shard_files import INDEX, ShardFileSource, write_shard_files
from megabus.convert.source import CheckpointSource, FolderSource, OpenFiles, Source
from megabus.data.tokenizer import ROWLESS, open_tokenizer
from megabus.durable import partial_name, sync
from megabus.errors import UserError
from megabus.hub import local_copy, of_hub
from megabus.model.decoder import param_specs
from megabus.model.params import axis_sizes
from megabus.parallel.placement import Placement

Form = Literal["checkpoint", "shards", "hf"]
OF_HUB = (CONFIG, HF_INDEX, *TOKENIZER_FILES)  # what is fetched of a model before its weights: no code, no pickles


def model_at(path: str | Path) -> Path:
    """The path itself, or the directory of a model of the hub, fetched if this machine has it not yet. Of its weights
    come the files that its index names: some have the same weights in another form beside them."""
    folder = local_copy(path, OF_HUB)
    return local_copy(path, [*OF_HUB, *named_files(folder)]) if of_hub(path) else folder


def in_other_form(path: Path) -> bool:
    """Whether a directory holds weights in another form than a run's: something has the name of their first file,
    whatever it is."""
    return any(os.path.lexists(path / name) for name in (INDEX, CONFIG))


def open_source(
    path: Path,
    files: OpenFiles,
    weights_only: bool = False,
    checks: Checks | None = None,
    with_tokenizer: bool = True,
) -> FolderSource:
    """What `path` is, is seen from what lies in it. checks: they go on to look whether its tensors are those that were
    written; left out, all has been looked at on return. with_tokenizer: False leaves it behind unread."""
    if not path.is_dir():
        problem = "is no directory" if os.path.lexists(path) else "does not exist"
        raise UserError("source", path, problem, "give a run, a checkpoint, shard files or a HF directory")
    with nullcontext(checks) if checks is not None else Checks() as checking:
        source = _opened(path, files, checking, with_tokenizer)
    if weights_only:
        source.state = weights_alone(source.state)
    return source


def _opened(path: Path, files: OpenFiles, checks: Checks, with_tokenizer: bool) -> FolderSource:
    if os.path.lexists(path / INDEX):
        return ShardFileSource(path, files, checks, with_tokenizer)
    if os.path.lexists(path / CONFIG):
        return HuggingFaceSource(path, files, with_tokenizer)
    found = look(checkpoint_at(path))
    for entry in found.entries:
        if not large(entry):
            check_entry(found, entry)
    if with_tokenizer:
        check_tokenizer(found.folder, found.entries, found.state)
    source = CheckpointSource(found, files, with_tokenizer)
    for entry in filter(large, found.entries):
        checks.submit(check_entry, found, entry)
    return source


def convert(
    source: Source,
    out: Path,
    form: Form,
    layout: tuple[int, int, int] = (1, 1, 1),
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    like: Path | None = None,
    checks: Checks | None = None,
) -> int:
    """Write `out` in one of the forms; the bytes of its tensors. layout: (tp, pp, dp). checks: those that the source
    was opened with, if they go on; `out` appears when they have ended. The rest is Hugging Face's: see
    `write_hugging_face`."""
    tp, pp, dp = layout
    check_layout(source.state.model, Layout(tp, pp, dp))
    if source.tokenizer is not None:  # else what is made could be neither trained nor used, and says so late
        open_tokenizer(source.tokenizer, source.state.model.vocab_size, f"{ROWLESS}; or leave it: --without-tokenizer")
    partial = partial_name(out)
    try:
        if out.exists():
            raise UserError("out", out, "exists", "choose another, or remove it")
        partial.mkdir(parents=True)
        try:
            with nullcontext() if checks is None else checks.first():
                if form == "checkpoint":
                    write_checkpoint(source, checkpoints_of(partial), Layout(tp, pp, dp))
                elif form == "shards":
                    write_shard_files(source, partial, tp, pp)
                else:
                    write_hugging_face(source, partial, dtype, max_shard_bytes, like)
            for path in (*partial.rglob("*"), partial):
                sync(path)
            partial.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError("out", out, f"cannot be written ({error})", "make room or choose another place") from error
    placement = Placement(source.state.model, Layout(1, 1, 1))
    entries = sum(placement.numel(name) for name in placement.specs)
    return entries * (DTYPES[dtype][1].itemsize if form == "hf" else 4 * len(source.state.kinds))


def check_layout(model: ModelConfig, layout: Layout) -> None:
    """Raise `UserError` unless the model can be cut so."""
    for key, value in (("--tp", layout.tp), ("--pp", layout.pp), ("--dp", layout.dp)):
        if value < 1:
            raise UserError(key, value, "is below 1", "give 1 or more")
    sizes = axis_sizes(model)
    cut = {spec.rows for spec in param_specs(model).values() if spec.sharded}
    units = {"heads": model.n_heads, "kv_heads": model.kv_heads, "ffn": model.d_ff}
    for axis in sorted(cut):
        if units.get(axis, 0) % layout.tp or sizes[axis] < layout.tp:
            raise UserError("--tp", layout.tp, f"does not divide {axis} = {units[axis]}", "choose a divisor")
    if layout.pp > max(1, model.n_layers):
        raise UserError("--pp", layout.pp, f"exceeds n_layers = {model.n_layers}", "choose fewer stages")
