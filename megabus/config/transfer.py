"""Initial values that follow a model's size, so that a learning rate tuned at one size holds at others.

The rates themselves are of parameters, and so `megabus.model.rates`'s.
"""

from __future__ import annotations

from math import sqrt

from megabus.config.schema import ModelConfig, TransferConfig


def transferred(model: ModelConfig, tuned: TransferConfig | None) -> ModelConfig:
    """A stage's model with the initial values that follow from those of the run in which lr was tuned.

    ngpt: alpha falls with depth, and the logits' scale grows with the root of the width (nu-GPT, arXiv 2604.27077).
    gpt: products keep their variance, and the head's falls as 1/d_model (muP, arXiv 2203.03466, table 3).
    """
    if tuned is None:
        return model
    width = model.d_model / tuned.d_model
    if model.kind == "gpt":
        values = {
            "init_std": model.init_std / sqrt(width),
            "embed_init_std": model.embed_std,
            "head_init_std": model.head_std / width,
        }
    else:
        values = {"s_z_init": model.s_z_init * sqrt(width)}
        if model.n_layers and tuned.n_layers:  # a model of no layers has no alpha
            depth = model.n_layers / tuned.n_layers
            values["alpha_init"] = model.alpha_init / depth
    return model.model_copy(update=values)
