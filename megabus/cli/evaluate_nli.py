"""Natural language inference with a checkpoint: zero-shot scores of the labels, or fine-tuning, beside baselines.

megabus evaluate-nli runs/demo --data snli --split test
megabus evaluate-nli runs/demo --valid dev.jsonl --train train.jsonl --fine-tune --epochs 1 --lr 1e-3 --out nli
megabus evaluate-nli --nproc-per-node 4 runs/demo --data mnli --tp 2

Files are JSONL (or .gz) in SNLI's form: gold_label, sentence1 (the premise), sentence2; pairs labelled - are left out.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabus.cli.ranks import check_ranks, start_ranks
from megabus.command import RankParser
from megabus.engine.startup import prepare_environment, start_distributed, stop_distributed
from megabus.errors import UserError
from megabus.extras import need

if TYPE_CHECKING:
    from megabus.nli.settings import Settings


def parser() -> RankParser:
    parser = RankParser(prog="megabus evaluate-nli", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model; the checkpoint's own when left out")

    data = parser.add_argument_group("pairs")
    data.add_argument("--data", help="snli, mnli, a hub data set of their form, or a local directory of one")
    data.add_argument("--split", nargs="+", help="splits of --data to report (test; mnli: both validation splits)")
    data.add_argument("--valid", type=Path, metavar="FILE", help="pairs to report; the curve is measured on them too")
    data.add_argument("--test", type=Path, metavar="FILE", help="pairs to report, and nothing else")
    data.add_argument("--train", type=Path, metavar="FILE", help="pairs to fine-tune on, and to fit the baselines to")
    data.add_argument("--limit", type=int, metavar="N", help="report on the first N pairs of each set")
    data.add_argument("--train-limit", type=int, metavar="N", help="train on N pairs drawn from the training pairs")
    data.add_argument("--baseline-pairs", type=int, metavar="N", help="fit the baselines to N of them (all)")

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--template", help=r"text with {premise} and {hypothesis}, \n for a line break")
    prompt.add_argument(
        "--labels", nargs="+", default=[], metavar="LABEL=TEXT", help="what follows it: entailment=' True' ..."
    )
    prompt.add_argument("--max-length", type=int, metavar="TOKENS", help="of a prompt; the run's longest sequence")

    engine = parser.add_argument_group("engine")
    engine.add_argument("--tp", type=int, default=1, help="tensor parallelism (%(default)s)")
    engine.add_argument("--pp", type=int, default=1, help="pipeline parallelism (%(default)s)")
    engine.add_argument("--dp", type=int, help="data parallelism; what is left of the ranks")
    engine.add_argument("--layout", nargs="+", default=[], metavar="KEY=N", help="the same in one: tp=2 pp=2")
    engine.add_argument("--micro-batch-size", type=int, metavar="N", help="sequences a rank computes at once (16)")
    engine.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    engine.add_argument("--seed", type=int, default=0, help="of orders, samples and resampling (%(default)s)")
    engine.add_argument("--hang-timeout", type=float, default=600.0, metavar="S", help="seconds (%(default)s)")

    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--fine-tune", action="store_true", help="train on the gold labels; report before and after")
    tuning.add_argument("--epochs", type=float, default=1.0, help="(%(default)s)")
    tuning.add_argument("--lr", type=float, default=1e-3, help="(%(default)s)")
    tuning.add_argument("--schedule", choices=("constant", "linear"), default="linear", help="(%(default)s, to 0)")
    tuning.add_argument("--warmup-share", type=float, default=0.0, help="of the steps (%(default)s)")
    tuning.add_argument("--batch-size", type=int, default=32, help="pairs a step, all ranks together (%(default)s)")
    tuning.add_argument("--weight-decay", type=float, default=0.0, help="on matrices of a gpt (%(default)s)")
    tuning.add_argument("--gradient-clipping", type=float, default=1.0, help="0 clips nothing (%(default)s)")
    tuning.add_argument("--curve-every", type=int, default=100, metavar="STEPS", help="(%(default)s)")
    tuning.add_argument("--curve-pairs", type=int, default=1000, metavar="N", help="a point's pairs (%(default)s)")
    tuning.add_argument("--save", type=Path, metavar="DIR", help="write the fine-tuned model as a checkpoint")

    report = parser.add_argument_group("report")
    report.add_argument("--out", type=Path, metavar="DIR", help="write results.json and a picture of each set")
    report.add_argument("--predictions", action="store_true", help="and every pair's scores, predictions.jsonl")
    return parser


def settings_of(args: dict[str, Any]) -> Settings:
    """The arguments, checked as far as they can be without torch."""
    from megabus.nli.prompt import TEMPLATE, VERBALIZERS, Template
    from megabus.nli.settings import Settings

    for key, value in key_values("--layout", args.pop("layout"), ("tp", "pp", "dp")).items():
        if not value.isdigit():
            raise UserError("--layout", f"{key}={value}", "is no whole number", "write e.g. tp=2")
        args[key] = int(value)
    from megabus.nli.pairs import LABELS

    texts = key_values("--labels", args.pop("labels"), LABELS)
    labels = tuple(texts.get(label, default) for label, default in zip(LABELS, VERBALIZERS, strict=True))
    template = TEMPLATE if args["template"] is None else args["template"].replace("\\n", "\n")
    args["template"] = Template(template, tuple(label.replace("\\n", "\n") for label in labels))
    args["split"] = None if args["split"] is None else tuple(args["split"])
    settings = Settings(**args)
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
        return start_ranks(nproc, "evaluate-nli", argv)
    prepare_environment()
    start_distributed(timedelta(seconds=settings.hang_timeout + 60))  # later than the watchdog, which shows stacks
    from megabus.nli.results import report
    from megabus.nli.run import evaluate

    outcome = evaluate(settings)
    if os.environ["RANK"] == "0":  # the others are done: nothing below is collective
        typed = [word for word in argv if not word.startswith("--local_rank")]
        report(settings, outcome, shlex.join(["megabus", "evaluate-nli", *typed]))
    stop_distributed()
    return 0
