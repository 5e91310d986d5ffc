"""Give a tokenizer more: special tokens, words, pieces learnt from text. Its own pieces keep their ids.

  megabus extend-tokenizer path/to/llama data/llama-chat --special '<|user|>' '<|assistant|>'
  megabus extend-tokenizer data/mine-tokenizer.json data/mine-plus --add-file words.txt
  megabus extend-tokenizer path/to/llama data/llama-de --learn 8000 --text german/ more.jsonl

A run goes on from a model with it by init_from, data.tokenizer and extend_vocabulary: true, on token files that
`megabus preprocess --tokenizer OUT` makes. Added tokens are matched in the text before all else. Learnt pieces are for
another language or a trade: byte-pair encoding goes on where the tokenizer's own training ended, so text that holds
none of them keeps its ids.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megabus.command import Parser
from megabus.data.preprocess import Documents, ticking
from megabus.data.tokenizer import Tokenizer
from megabus.data.tokenizer.extend import extend_tokenizer
from megabus.data.tokenizer.learn import Lesson
from megabus.errors import UserError, warn
from megabus.pathname import path_of, path_text
from megabus.plain_file import NotPlainError, read_regular
from megabus.table import aligned, clock

SHOWN = 20  # of new tokens


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    listed = _lines(args.add_file) if args.add_file is not None else []
    if args.learn is None:
        spelled = extend_tokenizer(args.tokenizer, args.add, args.special, args.out, listed)
        learnt = ""
    else:
        spelled, learnt = _with_lesson(args, listed)
    old, new = Tokenizer(args.tokenizer), Tokenizer(args.out)
    rows = [[str(number), new.shown([number]), old.shown(ids)] for number, ids in spelled.items()]
    print(aligned(["id", "token", "spelled before"], rows[:SHOWN], left={1, 2}))
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN} more")
    print(f"\n{learnt}{args.out}: {new.vocab_size} ids, {len(spelled)} more than before")
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="megabus extend-tokenizer", description=__doc__)
    parser.add_argument("tokenizer", type=path_text, help="a file, a directory or a name of the hub")
    parser.add_argument("out", type=path_of, help="directory to make")
    parser.add_argument("--add", nargs="+", default=[], metavar="TEXT", help="tokens of text")
    parser.add_argument("--add-file", type=path_of, metavar="FILE", help="the same, one in each line")
    parser.add_argument(
        "--special", nargs="+", default=[], metavar="TEXT", help="tokens that are left out when ids become text"
    )
    parser.add_argument("--learn", type=int, metavar="N", help="learn up to N pieces from --text")
    parser.add_argument(
        "--text",
        type=path_text,
        nargs="+",
        metavar="FILE",
        help="files, quoted globs or directories, as `megabus preprocess` takes them",
    )
    parser.add_argument("--text-key", default="text", help="column of tables with the text (%(default)s)")
    args = parser.parse_args(argv)
    if args.learn is not None and args.learn < 1:
        raise UserError("--learn", args.learn, "is no number of pieces", "give some hundred or thousand")
    if args.learn is not None and args.text is None:
        raise UserError("--text", "(missing)", "--learn has nothing to learn from", "give files of text")
    if args.learn is None and args.text is not None:
        raise UserError("--text", args.text[0], "is what --learn learns from, which is missing", "give --learn N")
    return args


def _with_lesson(args: argparse.Namespace, listed: Sequence[str]) -> tuple[dict[int, list[int]], str]:
    """What each new piece was spelled with, and a line on what is learnt."""
    inputs = argparse.Namespace(inputs=args.text, dataset=None, text_key=args.text_key, split_documents="blank-lines")
    with _of_text():
        texts = Documents(inputs)
    share, started = 0.0, time.monotonic()

    def read() -> Iterator[str]:
        nonlocal share
        with _of_text():
            for text in texts:
                share = texts.share  # here: the thread that tells it would find files closed
                yield text

    lesson = Lesson(args.learn, read(), texts.name)

    def progress() -> str:
        seconds = clock(time.monotonic() - started)
        if lesson.is_read:
            return f"{len(lesson.pieces)} of {lesson.n} pieces, {seconds}"
        return f"{lesson.n_bytes / 1e6:.0f} MB of text in pieces, {share:.0%} of the files read, {seconds}"

    with ticking(progress):
        spelled = extend_tokenizer(args.tokenizer, args.add, args.special, args.out, listed, lesson)
    if texts.n_mended:
        warn(f"{texts.n_mended} document(s) held halves of surrogate pairs, which were read as U+FFFD")
    if len(lesson.pieces) < lesson.n:
        warn(f"the text gives {len(lesson.pieces)} pieces of the {lesson.n}: no other pair occurs twice in it")
    before, now = lesson.n_tokens, lesson.n_tokens - lesson.fewer
    message = f"{lesson.n_bytes} bytes of text: {before} tokens before, {now} now, {1 - now / before:.1%} fewer\n"
    return spelled, message


@contextmanager
def _of_text() -> Iterator[None]:
    """What is wrong with an input is told of the option that gave it."""
    try:
        yield
    except UserError as error:
        raise UserError("--text", error.value, error.problem, error.remedy) from error


def _lines(path: Path) -> list[str]:
    try:
        text = read_regular(path, links=True).decode("utf-8-sig")
        lines = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    except NotPlainError as error:
        raise UserError("--add-file", path, str(error), "give a file of text") from error
    except UnicodeDecodeError as error:
        raise UserError("--add-file", path, f"is not UTF-8 ({error})", "convert it") from error
    except OSError as error:
        raise UserError("--add-file", path, f"cannot be read ({error.strerror})", "check the path") from error
    if not lines:
        raise UserError("--add-file", path, "holds no token", "write one in each line, or leave it out")
    return lines
