"""Measuring a model in one process: its loss on token files, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megabus.data.batches import TokenSource
from megabus.errors import UserError
from megabus.extras import need
from megabus.model.decoder import Decoder
from megabus.model.documents import Documents

BATCH = 8  # sequences at a time


@torch.no_grad()
def token_file_loss(model: Decoder, source: TokenSource, n_tokens: int, seq_len: int, document_mask: bool) -> float:
    """Mean loss in nats of the first `n_tokens` in the source's order, cut in sequences, on the model's device.

    The order is drawn by the source's seed: of a file with more tokens this is a sample of its chunks, the same each
    time, but another for another chunk length.
    """
    device, rows = next(model.parameters()).device, range(n_tokens // seq_len)
    total = 0.0
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        inputs_BT, targets_BT = (tokens.to(device) for tokens in source.batch(0, seq_len, part))
        apart = None
        if document_mask:
            apart = Documents(source.document_lengths(0, seq_len, part), seq_len).moved(lambda x: x.to(device))
        loss, _ = model.loss(model.hidden(inputs_BT, None, apart), targets_BT, torch.sum)
        total += float(loss)
    return total / (len(rows) * seq_len)


def check_tasks(
    key: str, names: Sequence[str], task_path: str | Path | None, metadata: Mapping[str, Any] | None = None
) -> Any:
    """The harness's manager that knows these tasks. Its own are looked through where a name is not among the files of
    `task_path`, which takes seconds. Raises `UserError` where lm_eval is not installed, or has no such task."""
    need("eval", key, ", ".join(names))
    if task_path is not None and not Path(task_path).is_dir():
        raise UserError(f"{key.rpartition('.')[0]}.task_path".lstrip("."), task_path, "is no directory", "name one")
    manager = None if task_path is None else _manager(task_path, metadata, False)
    if manager is None or {*names} - {*manager.all_tasks}:
        manager = _manager(task_path, metadata, True)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 1)
            remedy = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them, task_path adds others"
            raise UserError(key, name, "is no task of lm-evaluation-harness", remedy)
    return manager


def _manager(task_path: str | Path | None, metadata: Mapping[str, Any] | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager  # slow to import

    return TaskManager(
        include_path=None if task_path is None else str(task_path),
        include_defaults=include_defaults,
        metadata=dict(metadata or {}),
    )


def task_scores(
    model: str | Path, tasks: Sequence[str], manager: Any, limit: int | None = None, device: str = "cpu"
) -> dict[str, float]:
    """`task/metric` -> value, of the model as lm-evaluation-harness computes it: exported for transformers into a
    directory that is gone afterwards. model: weights in any form. manager: that of `check_tasks`. limit: documents of a
    task."""
    from lm_eval import simple_evaluate  # slow to import

    from megabus.convert.convert import convert, model_at, open_source
    from megabus.convert.source import OpenFiles

    folder = Path(tempfile.mkdtemp(prefix="megabus-evaluate-"))
    try:
        with OpenFiles() as files:
            convert(open_source(model_at(model), files, weights_only=True), folder / "hf", "hf")
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder / "hf"), "trust_remote_code": True, "dtype": "float32"},
            tasks=list(tasks),
            task_manager=manager,
            device=device,
            batch_size=BATCH,
            limit=limit,
            bootstrap_iters=0,
        )
    finally:
        shutil.rmtree(folder)
    return dict(_flat(found["results"]))


def _flat(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Numbers alone, without the standard errors and the filter that does nothing."""
    return [
        (f"{task}/{metric.removesuffix(',none')}", float(value))
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "," in metric and "_stderr" not in metric
    ]
