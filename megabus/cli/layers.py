"""What each layer of a checkpoint is worth: the validation loss with one of its branches left out.

The whole model is run in this process, on the CPU, twice for each layer. Documents are kept apart where the run did so.

  megabus layers runs/demo
  megabus layers runs/demo/checkpoints/step-00000500 --valid data/demo/shakespeare-valid --tokens 65536
"""

from __future__ import annotations

from collections.abc import Sequence

from megabus.command import Parser
from megabus.errors import UserError
from megabus.pathname import path_of, path_text


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus layers", description=__doc__)
    parser.add_argument(
        "checkpoint",
        type=path_of,
        help="a run, one of its checkpoints, a Hugging Face directory or its name on the hub",
    )
    parser.add_argument(
        "--valid", type=path_text, help="prefix of a .bin/.idx pair; when left out the run's own, from this directory"
    )
    parser.add_argument(
        "--seq-len", type=int, help="tokens of a sequence; those of the checkpoint's stage when left out"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="the first that a validation takes (%(default)s)")
    args = parser.parse_args(argv)

    import megabus
    from megabus.ablation import BATCH, ablate
    from megabus.config import parse_config, resolve_stages
    from megabus.convert.load import read_data, state_of
    from megabus.model.documents import Documents
    from megabus.table import aligned

    known = state_of(args.checkpoint)
    folder, saved = known.folder, known.state
    model = megabus.load(folder)
    longest = known.longest if args.seq_len is None else args.seq_len
    if model.config.n_layers == 0:
        raise UserError("checkpoint", folder, "has no layers", "name one of a later stage")
    if args.valid is None or args.seq_len is None:
        if "run_dir" not in saved.config:  # a conversion keeps only lengths
            raise UserError("checkpoint", folder, "is of no run", "give --valid and --seq-len")
        config = parse_config(saved.config)
        args.valid = args.valid or config.data.valid
        if args.seq_len is None:
            args.seq_len = resolve_stages(config, saved.layout.world, saved=True)[saved.stage].seq_len
    if args.seq_len < 1:
        raise UserError("--seq-len", args.seq_len, "is no length", "give 1 or more")
    if args.tokens < args.seq_len:
        raise UserError("--tokens", args.tokens, "hold no sequence", f"give --seq-len ({args.seq_len}) or more")
    source = read_data(args.valid, longest, known)
    rows = min(args.tokens, source.n_tokens - 1) // args.seq_len
    documents = []
    if saved.data.get("document_mask"):
        parts = (range(rows)[first : first + BATCH] for first in range(0, rows, BATCH))
        documents = [Documents(source.document_lengths(0, args.seq_len, part), args.seq_len) for part in parts]
    loss, branches = ablate(model, *source.batch(0, args.seq_len, range(rows)), documents)
    lines = [
        [str(branch.layer), branch.gate, f"{branch.strength:.4f}", f"{branch.loss:.4f}", f"{branch.loss - loss:+.4f}"]
        for branch in branches
    ]
    print(aligned(["layer", "branch", "strength", "loss without it", "more"], lines, left={1}))
    print(f"\nloss of the whole model {loss:.4f}, over {rows * args.seq_len} tokens of {args.valid}")
    return 0
