"""What tests of `megabus preprocess` share."""

from __future__ import annotations

import pytest

from tests.support.small_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tokenizer's file."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
