"""Add tokens to a tokenizer: special ones, words of another language or of a trade. Its own pieces keep their ids.

  megabus extend-tokenizer path/to/llama data/llama-chat --special '<|user|>' '<|assistant|>'
  megabus extend-tokenizer data/mine-tokenizer.json data/mine-plus --add-file words.txt

A run goes on from a model with it by init_from, data.tokenizer and extend_vocabulary: true, on token files that
`megabus preprocess --tokenizer OUT` makes. Tokens are matched in the text before all else; nothing is learnt from text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabus.command import Parser
from megabus.errors import UserError
from megabus.table import aligned

SHOWN = 20  # of new tokens


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus extend-tokenizer", description=__doc__)
    parser.add_argument("tokenizer", help="a file, a directory or a name of the hub")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--add", nargs="+", default=[], metavar="TEXT", help="tokens of text")
    parser.add_argument("--add-file", type=Path, metavar="FILE", help="the same, one in each line")
    parser.add_argument(
        "--special", nargs="+", default=[], metavar="TEXT", help="tokens that are left out when ids become text"
    )
    args = parser.parse_args(argv)

    from megabus.data.tokenizer import Tokenizer
    from megabus.data.tokenizer.extend import extend_tokenizer

    listed = _lines(args.add_file) if args.add_file is not None else []
    spelled = extend_tokenizer(args.tokenizer, args.add, args.special, args.out, listed)
    old, new = Tokenizer(args.tokenizer), Tokenizer(args.out)
    rows = [[str(number), new.shown([number]), old.shown(ids)] for number, ids in spelled.items()]
    print(aligned(["id", "token", "spelled before"], rows[:SHOWN], left={1, 2}))
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN} more")
    print(f"\n{args.out}: {new.vocab_size} ids, {len(spelled)} more than before")
    return 0


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
    except UnicodeDecodeError as error:
        raise UserError("--add-file", path, f"is not UTF-8 ({error})", "convert it") from error
    except OSError as error:
        raise UserError("--add-file", path, f"cannot be read ({error.strerror})", "check the path") from error
    if not lines:
        raise UserError("--add-file", path, "holds no token", "write one in each line, or leave it out")
    return lines
