"""Training a tokenizer of any kind that can be trained here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megabus.errors import UserError

BYTE_BPE = "byte-bpe"  # of the library tokenizers; the others are SentencePiece's
MODEL_TYPES = (BYTE_BPE, "unigram", "bpe")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")  # of SentencePiece


def trained_path(out_prefix: str | os.PathLike[str], model_type: str) -> Path:
    """Where `train_tokenizer` writes."""
    return Path(f"{os.fspath(out_prefix)}{'.json' if model_type == BYTE_BPE else '.model'}")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_prefix: str | os.PathLike[str],
    model_type: str = BYTE_BPE,
    normalization: str = "identity",
) -> Path:
    """Trains on `texts` and writes `OUT_PREFIX.json` or, of SentencePiece, `OUT_PREFIX.model`; the file's path.

    The same texts give the same bytes. Raises UserError if there is no text, or too little for vocab_size pieces.
    """
    path = trained_path(out_prefix, model_type)
    if model_type == BYTE_BPE:
        if normalization != "identity":
            remedy = "leave it out, or choose --model-type unigram or bpe"
            raise UserError(
                "--normalization", normalization, "is SentencePiece's, and byte-bpe changes no text", remedy
            )
        from megabus.data.tokenizer.byte_bpe import train_byte_bpe

        return train_byte_bpe(texts, vocab_size, path)
    from megabus.data.tokenizer.sentence_piece import train_sentence_piece

    return train_sentence_piece(texts, vocab_size, path, model_type, normalization)
