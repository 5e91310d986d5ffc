"""A decoder, or the slice of one that a pipeline rank holds. It knows its shape and nothing of engines."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabus.config.schema import ModelConfig
from megabus.kernels.form import EAGER, Kernels
from megabus.model import gpt, ngpt
from megabus.model.documents import Documents
from megabus.model.layers import KVCache
from megabus.model.loss import Reduce
from megabus.model.params import Declare, ParamSpec, name_parameters, spec_of
from megabus.model.tensor_parallel import TensorParallel, Unsharded

KINDS = {"ngpt": ngpt, "gpt": gpt}


class Decoder(nn.Module):
    """Layers [first, last) of `config`'s model; the embedding comes with layer 0, the head with the last one (and with
    a tied head the embedding's rows once more).

    forward: token ids (B, T) int64, or h (B, T, D) from the layers before; returns h, or this tensor-parallel
    rank's logits (B, T, vocabulary rows). With a `cache` they follow what was read with it before; `documents` keeps
    what the sequences are packed of apart. Under sequence parallelism h, and only h, is (B, T / tp, D).
    logit_power: of nGPT's logit gradient preconditioning, see `megabus.model.loss.preconditioned`; None: none.
    Parameters start at zero (see `Declare`).
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: tuple[int, int] | None = None,
        tp: TensorParallel | None = None,
        recompute: bool = False,
        kernels: Kernels = EAGER,
        logit_power: float | None = None,
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.logit_power = config, recompute, logit_power
        first, last = layers or (0, config.n_layers)
        declare, kind = Declare(config, tp or Unsharded(), kernels), KINDS[config.kind]
        self.begins, ends = first == 0, last == config.n_layers
        # A tied head's rows are the embedding's, which is then also where the head is, and does not look up there.
        self.embed = kind.embedding(declare) if self.begins or (ends and config.tie_embeddings) else None
        self.layers = nn.ModuleDict({str(i): kind.Block(declare, i) for i in range(first, last)})
        self.output = kind.Output(declare, self.embed if config.tie_embeddings else None) if ends else None
        name_parameters(self, _layer_of)

    def forward(self, x: Tensor, cache: KVCache | None = None, documents: Documents | None = None) -> Tensor:
        h_BTD = self.hidden(x, cache, documents)
        return h_BTD if self.output is None else self.output(h_BTD)

    def hidden(self, x: Tensor, cache: KVCache | None = None, documents: Documents | None = None) -> Tensor:
        """What the last block of these layers gives, (B, T, D)."""
        assert cache is None or documents is None, "text that is generated is one document"
        h_BTD = self.embed(x) if self.begins and self.embed is not None else x
        for block in self.layers.values():
            if self.recompute and self.training:
                h_BTD = checkpoint(block, h_BTD, None, documents, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BTD = block(h_BTD, cache, documents)
        if cache is not None:
            cache.length += h_BTD.shape[1]
        return h_BTD

    def loss(self, h_BTD: Tensor, targets_BT: Tensor, reduce: Reduce = torch.mean) -> tuple[Tensor, Tensor]:
        """From what `hidden` gave on the last layers: (the reduced loss, the token losses (B, T)), see `head_loss`."""
        assert self.output is not None, "these layers have no head"
        return self.output.loss(h_BTD, targets_BT, reduce, self.logit_power)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


@lru_cache(maxsize=32)
def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter's declaration by canonical name, in canonical order; no storage is allocated."""
    with torch.device("meta"):
        return {name: spec_of(parameter) for name, parameter in Decoder(config).named_parameters()}
