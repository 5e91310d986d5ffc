from __future__ import annotations

from importlib import import_module

import pytest


@pytest.fixture(scope="package", autouse=True)
def libraries():
    """lm_eval and scikit-learn with what they bring, before ranks are forked: else each of these would import them."""
    import_module("megabus.nli.results")
