"""megabus: tensor- and pipeline-parallel normalized GPTs that grow in width and depth while they train.

The plain, single-process face:

    model = megabus.load("runs/demo")                     # torch.nn.Module: tokens (B, T) -> logits (B, T, V)
    state = megabus.grow_state(model.state_dict(), model.config, larger_config, seed=0)
    model = megabus.build_model(config, seed=0)           # a fresh model of any size
    megabus.train("configs/demo.yaml", callbacks=[Mine()])  # as `megabus train`; Mine is a megabus.Callback
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabus.config import GrowthConfig, ModelConfig
    from megabus.convert.load import load
    from megabus.growth.state import grow_state
    from megabus.model.init import build_model
    from megabus.train.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["Callback", "GrowthConfig", "ModelConfig", "__version__", "build_model", "grow_state", "load", "train"]

_HOMES = {
    "load": "megabus.convert.load",
    "grow_state": "megabus.growth.state",
    "build_model": "megabus.model.init",
    "ModelConfig": "megabus.config",
    "GrowthConfig": "megabus.config",
    "Callback": "megabus.train.callbacks",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that tools which need no torch start at once.
    if name == "train":
        return import_module("megabus.train")  # a package that can be called
    if name not in _HOMES:
        raise AttributeError(f"module 'megabus' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
