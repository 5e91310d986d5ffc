"""Natural language inference with a checkpoint: zero-shot scores of the labels, or fine-tuning, beside baselines.

  megabus evaluate-nli runs/demo --data snli --split test
  megabus evaluate-nli runs/demo --valid dev.jsonl --train train.jsonl --fine-tune --epochs 1 --lr 1e-3 --out nli
  megabus evaluate-nli --nproc-per-node 4 runs/demo --data mnli --tp 2

Files are JSONL (or .gz) in SNLI's form: gold_label, sentence1 (the premise), sentence2; pairs labelled - are left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megabus.cli.ranks import check_ranks, start_ranks
from megabus.command import RankParser
from megabus.config.read import described, parts_of
from megabus.engine.startup import prepare_environment, start_distributed, stop_distributed
from megabus.errors import UserError
from megabus.extras import need
from megabus.nli.pairs import LABELS
from megabus.nli.settings import Settings, Template

# Of the help: the field that each group begins with.
GROUPS = {"data": "pairs", "template": "prompt", "tp": "engine", "fine_tune": "fine-tuning", "out": "report"}
# What scoring knows nothing of: the options that were typed for what it is asked to do.
TYPED = {"max_length": "--max-length", "text to score": "--labels", "lr": "--lr"}
METAVARS = {Path: "PATH", int: "N", float: "X", str: "TEXT", Template: "TEXT"}


def parser() -> RankParser:
    """Each field of `Settings` is an option, kept as the text that was typed: `Settings` reads and checks it."""
    parser = RankParser(prog="megabus evaluate-nli", description=__doc__)
    parser.add_argument("checkpoint", help=Settings.model_fields["checkpoint"].description)
    group: Any = parser
    for name, field in Settings.model_fields.items():
        group = parser.add_argument_group(GROUPS[name]) if name in GROUPS else group
        if not field.is_required():
            group.add_argument(option_of(name), **form_of(field))
        if name == "template":
            shown = "what follows the prompt: neutral=' Maybe' ..."
            group.add_argument("--labels", nargs="+", default=[], metavar="LABEL=TEXT", help=shown)
        elif name == "dp":
            group.add_argument("--layout", nargs="+", default=[], metavar="KEY=N", help="the same in one: tp=2 pp=2")
    return parser


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def form_of(field: FieldInfo) -> dict[str, Any]:
    """What argparse is to know of a field."""
    parts, text = parts_of(field.annotation), str(field.description)
    if bool in parts:
        return {"action": "store_true", "help": text}
    if isinstance(field.default, str | int | float):
        text += f" ({field.default})"
    words = ",".join(part for part in parts if isinstance(part, str))  # of a Literal
    metavar = f"{{{words}}}" if words else next(METAVARS[part] for part in parts if part in METAVARS)
    several = {"nargs": "+"} if any(get_origin(part) is tuple for part in parts) else {}
    return {"default": argparse.SUPPRESS, "metavar": metavar, "help": text} | several


def settings_of(args: dict[str, Any]) -> Settings:
    """The arguments, checked as far as they can be without torch."""
    given, usual = key_values("--labels", args.pop("labels"), LABELS), Template()
    words = [given.get(label, word) for label, word in zip(LABELS, usual.labels, strict=True)]
    text, *labels = (part.replace("\\n", "\n") for part in (args.pop("template", usual.text), *words))
    layout = key_values("--layout", args.pop("layout"), ("tp", "pp", "dp"))
    try:
        settings = Settings(**args | layout, template=Template(text, tuple(labels)))
    except ValidationError as error:
        wrong = described(error, Settings)
        raise UserError(option_of(wrong.key), wrong.value, wrong.problem, wrong.remedy) from None
    settings.check()
    return settings


def key_values(option: str, items: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in keys:
            raise UserError(option, item, f"is not of the form KEY=VALUE with one of {', '.join(keys)}", "mend it")
        found[key] = value
    return found


def main(argv: Sequence[str]) -> int:
    args = vars(parser().parse_args(argv))
    del args["local_rank"]
    nproc, settings = args.pop("nproc_per_node"), settings_of(args)
    check_ranks(nproc)
    need("eval", "command", "evaluate-nli")
    if settings.out is not None:
        need("report", "--out", settings.out, "or leave it out")
    if nproc is not None:
        return start_ranks(nproc, "evaluate-nli", argv, "megabus.nli.run")
    prepare_environment()
    start_distributed(timedelta(seconds=settings.hang_timeout + 60))  # later than the watchdog, which shows stacks
    from megabus.nli.results import report
    from megabus.nli.run import evaluate

    try:
        outcome = evaluate(settings)
    except UserError as error:
        raise UserError(TYPED.get(error.key, error.key), error.value, error.problem, error.remedy) from error
    if os.environ["RANK"] == "0":  # the others are done: nothing below is collective
        report(settings, outcome)
    stop_distributed()
    return 0
