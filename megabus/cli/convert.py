"""Convert weights: to another layout's shards, to and from mp_rank_XX_YYY files, to and from Hugging Face.

  megabus convert runs/demo out/ --to shards --tp 2 --pp 2
  megabus convert runs/demo out/ --to hf --dtype bfloat16
  megabus convert runs/demo out/ --to hf --ema 0.999
  megabus convert path/to/llama out/ --to checkpoint

SOURCE is a run, one of its checkpoints, a directory of shard files, a Hugging Face directory or its name on the hub;
OUT must not exist.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from megabus.checkpoint.dtypes import CODES
from megabus.command import Parser
from megabus.errors import UserError
from megabus.extras import need
from megabus.pathname import path_of, path_text
from megabus.table import in_bytes

if TYPE_CHECKING:  # it imports torch, as all that converts does: only where it is needed
    from megabus.parallel.fragments import Kind

OPTIONS = {
    "tp": ("checkpoint", "shards"),
    "pp": ("checkpoint", "shards"),
    "dp": ("checkpoint",),
    "dtype": ("hf",),
    "max_shard_gb": ("hf",),
    "like": ("hf",),
}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus convert", description=__doc__)
    parser.add_argument(
        "source", type=path_text, help="a run, a checkpoint, shard files, a Hugging Face directory or a name of the hub"
    )
    parser.add_argument("out", type=path_of, help="directory to make")
    parser.add_argument("--to", choices=("checkpoint", "shards", "hf"), required=True, help="the form to write")
    parser.add_argument("--tp", type=int, help="of checkpoint and shards (1)")
    parser.add_argument("--pp", type=int, help="of checkpoint and shards (1)")
    parser.add_argument("--dp", type=int, help="of a checkpoint (1)")
    parser.add_argument("--dtype", choices=tuple(CODES), help="of hf (float32)")
    parser.add_argument("--max-shard-gb", type=float, help="largest file of hf (5)")
    parser.add_argument(
        "--like", type=path_of, metavar="DIR", help="hf: take tokenizer and special tokens from this one"
    )
    parser.add_argument(
        "--without-tokenizer", action="store_true", help="leave the tokenizer behind, also one that cannot be read"
    )
    parser.add_argument("--weights-only", action="store_true", help="leave Adam's moments and running means behind")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="take a running mean of the weights (weights alone)")
    parser.add_argument("--untie", action="store_true", help="give a tied head rows of its own (weights alone)")
    parser.add_argument("--unit-rows", action="store_true", help="ngpt: divide rows by their lengths (weights alone)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read both sides again and compare them bit by bit; of a Hugging Face model logits too, with transformers",
    )
    args = parser.parse_args(argv)
    for option, forms in OPTIONS.items():
        if getattr(args, option) is not None and args.to not in forms:
            name = "--" + option.replace("_", "-")
            raise UserError(name, getattr(args, option), f"says nothing to --to {args.to}", "leave it out")
    for option in ("tp", "pp", "dp"):
        if (degree := getattr(args, option)) is not None and degree < 1:
            raise UserError(f"--{option}", degree, "is no number of ranks", "give 1 or more")
    dtype, limit = args.dtype or "float32", 5.0 if args.max_shard_gb is None else args.max_shard_gb
    if not 0 < limit < math.inf:
        raise UserError("--max-shard-gb", limit, "is no size", "give a positive number")
    from megabus.convert.changed import RowsMadeUnit, Untied, averaged, unit_error
    from megabus.convert.checks import Checks
    from megabus.convert.convert import convert, model_at, open_source
    from megabus.convert.hf_tokenizer import compare_as_read
    from megabus.convert.hugging_face import HuggingFaceSource
    from megabus.convert.source import OpenFiles, Source
    from megabus.convert.verify import verify
    from megabus.convert.verify_logits import verify_logits
    from megabus.data.tokenizer.files import TREE
    from megabus.model.params import UNIT_ERROR

    begun = time.perf_counter()
    with OpenFiles() as files, Checks() as checks:
        folder = model_at(args.source)
        source: Source
        weights_only = args.weights_only and args.ema is None
        given = source = open_source(folder, files, weights_only, checks, not args.without_tokenizer)
        if isinstance(given, HuggingFaceSource) and given.without_tokenizer:
            remedy = "or leave it behind: --without-tokenizer"
            raise UserError("tokenizer", args.source, given.without_tokenizer, remedy)
        logits = args.verify and isinstance(given, HuggingFaceSource) and given.state.model.kind == "gpt"
        if logits:
            need("hf", "--verify", True, "or leave it out")
        if args.ema is not None:
            source = averaged(given, args.ema)
        if args.untie:
            source = Untied(source)
        if args.unit_rows:
            source = RowsMadeUnit(source)
        nbytes = convert(
            source,
            args.out,
            args.to,
            (args.tp or 1, args.pp or 1, args.dp or 1),
            dtype=dtype,
            max_shard_bytes=int(limit * 1e9),
            like=args.like,
            checks=checks,
        )
        seconds = time.perf_counter() - begun
        print(f"{args.out}: {in_bytes(nbytes)} in {seconds:.3g} s, {in_bytes(nbytes / seconds)}/s")
        if args.to == "checkpoint":
            model = source.state.model.model_dump(exclude_none=True, exclude_defaults=True)
            print(f"its section of a run's file:\n{yaml.safe_dump({'model': model}, sort_keys=False)}", end="")
        if isinstance(given, HuggingFaceSource):
            if given.left:
                print(f"left behind: {', '.join(given.left)}; --to hf --like {args.source} takes them up again")
            error, name = unit_error(source)
            if error > UNIT_ERROR:
                print(f"rows are no unit vectors, by up to {error:.2g} in {name}: --unit-rows divides by their lengths")
        if args.verify:
            begun = time.perf_counter()
            kinds: tuple[Kind, ...] | None = ("weight",) if args.to == "hf" else None
            total = verify(source, open_source(args.out, files), dtype, kinds)
            print(f"verified: {in_bytes(total)} equal bit for bit, {time.perf_counter() - begun:.1f} s")
            if logits:
                print(verify_logits(folder, args.out))
            if isinstance(given, HuggingFaceSource) and given.tokenizer is not None and (folder / TREE).exists():
                compare_as_read(folder, "the model's")  # else only an export would tell, when all is trained
    return 0
