"""What each layer of a checkpoint is worth: the validation loss with one of its branches silenced.

python tools/layers.py runs/demo
python tools/layers.py runs/demo/checkpoints/step-00000500 --valid data/demo/shakespeare-valid --tokens 65536
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabus.command import Parser, run
from megabus.errors import UserError


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("--valid", help="prefix of a .bin/.idx pair; the run's own when left out")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence; the run's own when left out")
    parser.add_argument("--tokens", type=int, default=16384, help="of the beginning of the text (%(default)s)")
    args = parser.parse_args()

    import megabus
    from megabus.checkpoint.load import checkpoint_at
    from megabus.config import load_config
    from megabus.data.batches import TokenSource
    from megabus.silenced import silenced
    from megabus.table import aligned

    model = megabus.load(args.checkpoint)
    if args.valid is None or args.seq_len is None:
        config = load_config(checkpoint_at(args.checkpoint).parents[1] / "config.yaml")
        args.valid = args.valid or config.data.valid
        args.seq_len = args.seq_len or config.train.seq_len
    if args.seq_len < 1 or args.tokens < args.seq_len:
        raise UserError("--tokens", args.tokens, "hold no sequence", f"give --seq-len ({args.seq_len}) or more")
    source = TokenSource([(args.valid, 1.0)], args.seq_len, 0, model.config.vocab_size)
    rows = min(args.tokens, source.n_tokens - 1) // args.seq_len
    loss, branches = silenced(model, *source.batch(0, args.seq_len, range(rows)))
    lines = [
        [str(branch.layer), branch.gate, f"{branch.strength:.4f}", f"{branch.loss:.4f}", f"{branch.loss - loss:+.4f}"]
        for branch in branches
    ]
    print(aligned(["layer", "branch", "strength", "loss without it", "more"], lines, left={1}))
    print(f"\nloss of the whole model {loss:.4f}, over {rows * args.seq_len} tokens of {args.valid}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
