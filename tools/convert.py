"""Convert weights: to another layout's shards, to and from mp_rank_XX_YYY files, to and from Hugging Face.

python tools/convert.py runs/demo out/ --to shards --tp 2 --pp 2
python tools/convert.py runs/demo out/ --to hf --dtype bfloat16
python tools/convert.py path/to/llama out/ --to checkpoint

SOURCE is a run, one of its checkpoints, a directory of shard files, or a Hugging Face directory; OUT must not exist.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.convert.tensor_file import DTYPES
from megabus.convert.verify import verify
from megabus.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--to", choices=("checkpoint", "shards", "hf"), required=True)
    parser.add_argument("--tp", type=int, default=1, help="of checkpoint and shards (%(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="of checkpoint and shards (%(default)s)")
    parser.add_argument("--dp", type=int, default=1, help="of a checkpoint (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of hf (%(default)s)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file of hf (%(default)s)")
    parser.add_argument("--weights-only", action="store_true", help="leave Adam's moments behind")
    parser.add_argument("--verify", action="store_true", help="read both sides again and compare them bit by bit")
    args = parser.parse_args()
    begun = time.perf_counter()
    with OpenFiles() as files:
        source = open_source(args.source, files, weights_only=args.weights_only)
        nbytes = convert(
            source,
            args.out,
            args.to,
            (args.tp, args.pp, args.dp),
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
        )
        seconds = time.perf_counter() - begun
        print(f"{args.out}: {nbytes / 1e9:.3f} GB in {seconds:.3g} s, {nbytes / 1e9 / seconds:.2f} GB/s")
        if args.to == "checkpoint":
            model = source.state.model.model_dump(exclude_none=True, exclude_defaults=True)
            print(f"its section of a run's file:\n{yaml.safe_dump({'model': model}, sort_keys=False)}", end="")
        if args.verify:
            begun = time.perf_counter()
            total = verify(source, open_source(args.out, files), args.dtype if args.to == "hf" else "float32")
            print(f"verified: {total / 1e9:.3f} GB equal bit for bit, {time.perf_counter() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
