"""Measure a model: its loss on token files, and tasks of lm-evaluation-harness.

  megabus evaluate runs/demo --data data/code-valid poems=data/poems
  megabus evaluate runs/demo --tasks lambada_openai --limit 200
  megabus evaluate runs/demo --tasks megabus_next_line --task-path configs/eval/lines --metadata '{"text": "book.txt"}'

In this process, on the CPU or one GPU. Documents are kept apart where the run did so. Of a file with more than --tokens
sequences are drawn, the same ones each time; another --seq-len draws others.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabus.command import Parser
from megabus.durable import partial_name
from megabus.errors import UserError
from megabus.pathname import path_of, path_text
from megabus.table import aligned

LOOK_EVERY = 1.0  # seconds, for whether the process that this one is to end with is there


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus evaluate", description=__doc__)
    parser.add_argument(
        "model", type=path_text, help="a run, one of its checkpoints, a Hugging Face directory or its name on the hub"
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="[NAME=]PREFIX", help="of .bin/.idx pairs")
    parser.add_argument(
        "--tokens", type=int, default=65536, help="of each; of a larger one, a drawn sample (%(default)s)"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        help="tokens of a sequence; when left out the longest of the model's run, or max_position_embeddings of an "
        "export (of others' models 2048 of these at most)",
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="of lm-evaluation-harness")
    parser.add_argument("--task-path", type=path_text, help="directory of task files, beside the harness's own")
    parser.add_argument("--metadata", default="{}", metavar="JSON", help="what tasks are told, as lm_eval's option")
    parser.add_argument("--limit", type=int, help="documents of a task at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--json", type=path_of, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--end-with", type=int, metavar="PID", help="end when this parent process has ended")
    args = parser.parse_args(argv)
    if args.end_with is not None:
        end_with(args.end_with)
    if not args.data and not args.tasks:
        raise UserError("--data, --tasks", "(missing)", "there is nothing to measure", "give one of them")
    metadata = _metadata(args.metadata)
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit", args.limit, "is no number of documents", "give 1 or more")
    prefixes = dict(_named(word) for word in args.data)
    if args.json is not None:
        _check_writable(args.json)
    if len(prefixes) < len(args.data):
        raise UserError("--data", " ".join(args.data), "names one twice", "give each a NAME= of its own")

    import torch

    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--device", args.device, "is not there", "use cpu")
    from megabus.evaluation import check_tasks, task_scores

    manager = check_tasks("--tasks", args.tasks, args.task_path, metadata) if args.tasks else None
    found: dict[str, Any] = {"data": _losses(args, prefixes) if prefixes else {}, "tasks": {}}
    if args.tasks:
        found["tasks"] = task_scores(args.model, args.tasks, manager, args.limit, args.device)
    rows = [[name, *(_figure(value) for value in of.values())] for name, of in found["data"].items()]
    if rows:
        print(aligned(["data", "loss", "bits/byte", "tokens", "seq_len"], rows, left={0}))
    if found["tasks"]:
        rows = [[name, f"{value:.4f}"] for name, value in found["tasks"].items()]
        print(aligned(["task", "score"], rows, left={0}))
    if args.json is not None:
        _write(args.json, json.dumps(found, indent=1) + "\n")
    return 0


def end_with(parent: int) -> None:
    """End this process when its parent has ended, however that happened: one that is killed cannot end its own."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _check_writable(path: Path) -> None:
    """Before hours of tasks, not after them."""
    if path.is_dir():
        raise UserError("--json", path, "is a directory", "name a file in it")
    above = path.parent
    if not (above.is_dir() and os.access(above, os.W_OK)):
        problem = "does not exist" if not above.exists() else "cannot be written" if above.is_dir() else "is a file"
        raise UserError("--json", path, f"its directory {problem}", "choose a writable place")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another program may wait for it."""
    partial = partial_name(path)
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # where the disk became full
        raise UserError("--json", path, f"cannot be written ({error.strerror})", "choose a writable place") from error


def _named(word: str) -> tuple[str, str]:
    name, equals, prefix = word.partition("=")
    try:
        return (name, path_text(prefix)) if equals else (Path(word).name, path_text(word))
    except ArgumentTypeError as error:
        problem, _, remedy = str(error).partition("; ")
        raise UserError("--data", word, problem, remedy) from error


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("--metadata", text, f"is no JSON ({error})", "give an object") from error
    if not isinstance(value, dict):
        raise UserError("--metadata", text, "is no JSON object", "give names and values")
    return value


def _losses(args: Any, prefixes: dict[str, str]) -> dict[str, dict[str, float | int | None]]:
    import megabus
    from megabus.convert.load import read_data, state_of
    from megabus.data.sources import bits_per_byte
    from megabus.evaluation import token_file_loss

    known = state_of(args.model)
    longest = known.longest if args.seq_len is None else args.seq_len
    if longest < 1:
        raise UserError("--seq-len", longest, "is no length", "give 1 or more")
    if args.tokens < longest:
        raise UserError("--tokens", args.tokens, "hold no sequence", f"give --seq-len ({longest}) or more")
    sources = {name: read_data(prefix, longest, known) for name, prefix in prefixes.items()}
    model = megabus.load(known.folder).to(args.device)
    found = {}
    for name, source in sources.items():
        n_tokens = min(args.tokens // longest, source.orders[0].n_chunks) * longest
        loss = token_file_loss(model, source, n_tokens, longest, bool(known.state.data.get("document_mask")))
        found[name] = {"loss": loss, "bits_per_byte": bits_per_byte(source, loss)}
        found[name] |= {"tokens": n_tokens, "seq_len": longest}
    return found


def _figure(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
