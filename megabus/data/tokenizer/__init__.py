"""Text to token ids and back, by whatever tokenizer a model came with, or one that is trained here."""

from megabus.data.tokenizer.face import NO_TREE, ROWLESS, Tokenizer, check_carried, open_tokenizer
from megabus.data.tokenizer.files import FILES, TokenizerFiles, read_tokenizer_files
from megabus.data.tokenizer.spelling import spellings
from megabus.data.tokenizer.train import MODEL_TYPES, NORMALIZATIONS, train_tokenizer, trained_path

__all__ = [
    "FILES",
    "MODEL_TYPES",
    "NORMALIZATIONS",
    "NO_TREE",
    "ROWLESS",
    "Tokenizer",
    "TokenizerFiles",
    "check_carried",
    "open_tokenizer",
    "read_tokenizer_files",
    "spellings",
    "train_tokenizer",
    "trained_path",
]
