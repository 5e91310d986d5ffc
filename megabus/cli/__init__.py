"""The command `megabus`. Each subcommand is a module here, imported only when it is called: `--help` needs no torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from megabus import __version__
from megabus.command import MORE, end_rank, run, run_rank
from megabus.errors import UserError

GROUPS = {
    "Prepare": {
        "preprocess": "turn text into token files, and train a tokenizer",
        "extend-tokenizer": "add tokens to a tokenizer, or learn pieces from text: its own keep their ids",
        "plan": "propose stages for a final size and a budget",
        "estimate": "memory, step time and layouts of a run on a cluster, computed without one",
        "coord-check": "how far a step moves parameters at each size of a run, before and after growths",
    },
    "Train": {
        "train": "train a model that grows while it trains, on one process or many",
        "submit": "submit a run, or a sweep of runs, to slurm",
    },
    "Look at runs": {
        "plot": "draw loss curves of runs, and print a table of their stages",
        "report": "write one page about runs, for a browser without a network",
        "layers": "loss of a checkpoint without each of its layers",
    },
    "Use a model": {
        "generate": "sample text",
        "convert": "to other layouts, to and from shard files and Hugging Face",
        "evaluate": "loss on token files, and tasks of lm-evaluation-harness",
        "evaluate-nli": "natural language inference, zero-shot or fine-tuned, beside baselines",
    },
    "Test megabus itself": {
        "parity": "every layout of 1, 2 and 4 ranks against one process of plain PyTorch",
        "chaos": "kill ranks, damage checkpoints, fill the disk: nothing may be lost",
        "preflight-faults": "plant faults in small runs: the preflight must find each",
        "simulate": "build and plan as single ranks of a large world, on one core",
    },
}
COMMANDS = {name: summary for group in GROUPS.values() for name, summary in group.items()}
SHORT_OF_MEMORY = {  # what to do then; of the other commands nothing better than `MORE`
    "train": "lower train.micro_batch_size, or see with `megabus estimate` what fits where",
    "preprocess": "use fewer --workers",
    "evaluate-nli": "lower --micro-batch-size, or raise --tp or --pp",
}
OF_RANKS = ("train", "evaluate-nli")  # run as one process a rank


def main(argv: Sequence[str] | None = None) -> int:
    """Run `megabus ARGV` in this process; its exit code. Bad input is told in one line on stderr, and the code is 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    runner = run_rank if words and words[0] in OF_RANKS else run
    return runner(_call(words), _advice(words))


def entry(*before: str) -> NoReturn:
    """Run `megabus BEFORE...` with this process's arguments behind, and end the process."""
    words = [*before, *sys.argv[1:]]
    if words and words[0] in OF_RANKS:
        end_rank(_call(words), _advice(words))
    sys.exit(run(_call(words), _advice(words)))


def overview() -> str:
    """What `megabus --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: megabus COMMAND [ARGUMENT ...]", "", "Train GPTs that grow in width and depth while they train."]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}}{summary}" for name, summary in group.items())]
    return "\n".join([*lines, "", "`megabus COMMAND --help` shows a command's options and examples."])


def _advice(words: Sequence[str]) -> str:
    return SHORT_OF_MEMORY.get(words[0], MORE) if words else MORE


def _call(words: Sequence[str]) -> Callable[[], int]:
    def call() -> int:
        if words[:1] == ["help"] and len(words) > 1:
            return _call([words[1], "--help", *words[2:]])()
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"megabus {__version__}")
            return 0
        name, *rest = words
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            remedy = f"did you mean {close[0]}?" if close else "see megabus --help"
            raise UserError("command", name, "is no command", remedy)
        module = import_module(f"megabus.cli.{name.replace('-', '_')}")
        code: int = module.main(rest)
        return code

    return call
