"""A tokenizer that takes no time to train, and the text that it knows."""

from __future__ import annotations

from megabus.data.tokenizer import train_tokenizer

SENTENCE = "the quick brown fox jumps over the lazy dog, and sixty wizards' quills make black jam.\n"


def make_tokenizer(folder):
    """A SentencePiece model of 300 pieces, as a file in the folder; its path."""
    return train_tokenizer([SENTENCE], 300, folder / "t", "bpe")
