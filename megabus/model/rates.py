"""How a parameter's learning rate follows the width, by its declaration: rates tuned at one size hold at others.

ngpt: nu-GPT (Shigida et al. 2026, arXiv 2604.27077). gpt: muP for Adam (Yang et al. 2022, arXiv 2203.03466, table 3).
What follows with them at the start of a stage, initial values, is `megabus.config.transfer`'s.
"""

from __future__ import annotations

from typing import NamedTuple

from megabus.config.schema import ModelConfig
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec


class Exponents(NamedTuple):
    """Powers of d_model that the rate of a matrix falls with: of rows that are picked, and of those that multiply."""

    lookup: float
    products: float


WIDTH = {"ngpt": Exponents(lookup=1 / 2, products=3 / 4), "gpt": Exponents(lookup=0, products=1)}


def relative_rate(spec: ParamSpec, model: ModelConfig, d_model: int) -> float:
    """What the learning rate that was tuned at a width of `d_model` is multiplied by for a parameter of `model`.

    A gain's follows its raw start, so that it moves by the same share of what it starts with: 1/sqrt(d_model) where it
    is stored so, and no width where it starts at 1. (nu-GPT stores gains at 0.03 whatever the width, at one rate.)
    """
    if spec.role == "bias":  # muP: as inputs' weights are
        return 1.0
    if not spec.is_matrix:
        tuned = param_specs(model.grown(d_model=d_model))[spec.name]
        return spec.init / tuned.init
    exponents = WIDTH[model.kind]
    return (d_model / model.d_model) ** (exponents.lookup if spec.lookup else exponents.products)
