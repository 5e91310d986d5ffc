"""Turns text into the token files that the trainer reads.

  megabus preprocess corpus/ --train-tokenizer 32000 --valid-fraction 0.01 --out data/corpus
  megabus preprocess 'dumps/*.jsonl.gz' --tokenizer path/to/llama --text-key content --out data/dumps
  megabus preprocess --dataset roneneldan/TinyStories --tokenizer my.model --out data/stories

Inputs are files, quoted globs or directories of .txt, .jsonl (both also .gz or .zst) and .parquet, or a dataset of
the Hugging Face hub. Each file is read once; hidden ones and links to folders are read only if they are named.
A folder given as --dataset is read as the library `datasets` reads it, in splits that its README.md may name; of a
.txt each line is a document then.
Writes PREFIX.bin, .idx and .meta.json (PREFIX-train.* and PREFIX-valid.* with a --valid-fraction) and, when it
trains one, PREFIX-tokenizer.json (or .model): all of them, or on any error none. The bytes do not depend on --workers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megabus.command import Parser
from megabus.data.preprocess import preprocess
from megabus.data.tokenizer import MODEL_TYPES, NORMALIZATIONS
from megabus.errors import UserError, note
from megabus.pathname import path_text

MOST_IDS = 1 << 22  # of a tokenizer that is trained; libraries make room for all of them at once


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporaries are removed
    try:
        print(preprocess(args))
    except KeyboardInterrupt:
        note("stopped: nothing was written")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="megabus preprocess", description=__doc__, allow_abbrev=False)
    parser.add_argument("inputs", type=path_text, nargs="*", default=[], help="files, quoted globs or directories")
    parser.add_argument("--dataset", type=path_text, help="instead of inputs: a hub dataset, NAME or a local directory")
    parser.add_argument("--subset", help="its configuration")
    parser.add_argument("--split", help="its split (train)")
    parser.add_argument(
        "--text-key", default="text", help="column of tables with the text, or DOC.TEXT in one (%(default)s)"
    )
    parser.add_argument(
        "--split-documents",
        choices=("blank-lines", "file", "line"),
        help="what ends a document of a .txt: two or more blank lines (when left out), its end, every line",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer",
        type=path_text,
        metavar="NAME",
        help="a tokenizer.json, a SentencePiece model, a tiktoken rank file, a directory of one, or a hub name",
    )
    which.add_argument("--train-tokenizer", metavar="VOCAB_SIZE", type=int, help="train one on the inputs")
    parser.add_argument(
        "--model-type",
        choices=MODEL_TYPES,
        default=MODEL_TYPES[0],
        help="of one that is trained: byte-level BPE of the library tokenizers, or SentencePiece's (%(default)s)",
    )
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS, default="identity", help="of SentencePiece's (%(default)s)"
    )
    parser.add_argument(
        "--tokenizer-sample-mb", type=float, default=200.0, help="MB of text to train the tokenizer on (%(default)s)"
    )
    parser.add_argument(
        "--out", type=path_text, required=True, metavar="PREFIX", help="of the files to write: DIRECTORY/NAME"
    )
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="of the documents, picked by hash")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the tokenizer's end of text after each document (%(default)s)",
    )
    parser.add_argument(
        "--bos", metavar="TOKEN", help="write this before each document, or none (as the tokenizer's post-processor)"
    )
    parser.add_argument("--eos", metavar="TOKEN", help="write this after each document, or none (see --append-eod)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(%(default)s)")
    args = parser.parse_args(argv)
    if bool(args.inputs) == bool(args.dataset):
        parser.error("give either inputs or --dataset")
    if args.dataset and args.split_documents not in (None, "line"):
        problem = "is of inputs, and --dataset reads a .txt line by line"
        raise UserError("--split-documents", args.split_documents, problem, "leave it out, or give files as inputs")
    for name, value in (("--subset", args.subset), ("--split", args.split)):
        if value is not None and not args.dataset:
            raise UserError(name, value, "is of a --dataset, and inputs are given", "leave it out")
    args.split = args.split or "train"
    if not args.dataset:
        args.split_documents = args.split_documents or "blank-lines"
    if args.eos is not None and not args.append_eod:
        raise UserError("--eos", args.eos, "says what --no-append-eod forbids", "leave one of them out")
    if not 0 <= args.valid_fraction < 1:
        raise UserError("--valid-fraction", args.valid_fraction, "not in [0, 1)", "give a fraction such as 0.05")
    if not args.tokenizer_sample_mb > 0:
        raise UserError("--tokenizer-sample-mb", args.tokenizer_sample_mb, "not positive", "give MB of text")
    if args.out.endswith(os.sep) or Path(args.out).is_dir():
        raise UserError("--out", args.out, "is a directory", "name the files in it: DIRECTORY/NAME")
    if args.tokenizer == "":
        raise UserError("--tokenizer", "''", "names none", "name one, or give --train-tokenizer")
    if args.train_tokenizer is not None and not 0 < args.train_tokenizer <= MOST_IDS:
        problem = f"is no number of pieces from 1 to {MOST_IDS}"
        raise UserError("--train-tokenizer", args.train_tokenizer, problem, "give some thousand")
    if args.workers < 1:
        raise UserError("--workers", args.workers, "not positive", "give the number of processes")
    return args
