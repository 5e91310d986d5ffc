"""What is only needed for a part of megabus, and asked for before that part writes anything."""

from __future__ import annotations

from importlib.util import find_spec

from megabus.errors import UserError

# Extra of pyproject.toml: the modules that this package imports of it, and the packages they come in.
EXTRAS = {
    "report": {"matplotlib": "matplotlib", "jinja2": "jinja2"},
    "wandb": {"wandb": "wandb"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "hf": {"transformers": "transformers"},
    "eval": {"lm_eval": "lm_eval", "sklearn": "scikit-learn"},
}

SINKS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # key of log: what `Metrics` imports for it


def need_sink(name: str) -> str:
    """What `log.NAME: true` needs, which has an extra of that name: as `need`. Returns the remedy without it."""
    remedy = f"or set log.{name}=false"
    need(name, f"log.{name}", "true", remedy)
    return remedy


def need(extra: str, key: str, value: object, remedy: str = "then start the same command again") -> None:
    """Raise `UserError` where a module of the extra is not installed, because `key` has this value."""
    for module, package in EXTRAS[extra].items():
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # no origin: a mere folder of this name, such as wandb's own ./wandb
            raise UserError(key, value, f"needs {package}: pip install megabus[{extra}]", remedy)
