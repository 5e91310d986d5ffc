"""Sample text from a run's newest checkpoint, or from one checkpoint.

  megabus generate runs/demo --prompt "KING: " --temperature 0.8 --top-p 0.95
  megabus generate runs/demo/checkpoints/step-00000500 --max-tokens 50 --top-k 40 < prompt.txt

It runs in one process, on the CPU unless --device says otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megabus.command import Parser
from megabus.errors import UserError, warn
from megabus.pathname import path_text


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus generate", description=__doc__)
    parser.add_argument(
        "checkpoint",
        type=path_text,
        help="a run, one of its checkpoints, a Hugging Face directory or its name on the hub",
    )
    parser.add_argument("--prompt", help="text to go on from; standard input when left out")
    parser.add_argument("--max-tokens", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="from the fewest whose shares sum to p (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--tokenizer", type=path_text, help="file, directory or hub name; the model's own when left out"
    )
    args = parser.parse_args(argv)

    import torch

    import megabus
    from megabus.convert.load import longest_context, tokenizer_of_model
    from megabus.generate import generate

    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--device", args.device, "is not there", "use cpu")
    model = megabus.load(args.checkpoint).to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    tokenizer = tokenizer_of_model(args.checkpoint, args.tokenizer, model.config.vocab_size)
    if args.prompt is not None:
        try:  # whatever the terminal's encoding is: under LC_ALL=C each byte would stand for itself
            args.prompt = os.fsencode(args.prompt).decode("utf-8")
        except UnicodeError as error:
            raise UserError("--prompt", ascii(args.prompt[:20]), "is not UTF-8", "give text") from error
    try:
        prompt = args.prompt if args.prompt is not None else sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError("standard input", error.object[:20], "is not UTF-8", "give text") from error
    ids, shown = [*tokenizer.prefix, *tokenizer.encode(prompt)] or tokenizer.start, ""
    tokens = generate(
        model,
        ids,
        args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tokenizer.eos,
        n_ids=tokenizer.vocab_size,
        never=tokenizer.gaps,
    )
    print(prompt, end="", flush=True)
    written: list[int] = []
    text, n_prompt = "", len(tokenizer.decode(ids))
    for token in tokens:
        written.append(token)
        text = tokenizer.decode(ids + written)[n_prompt:]
        if not text.endswith("\ufffd"):  # a character's last byte is yet to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :])
    context, length = longest_context(args.checkpoint), len(ids) + len(written)
    if context is not None and length > context:
        warn(
            f"{length} tokens with the prompt, and the model's longest context is {context}: beyond it text gets worse"
        )
    return 0
