"""Typed configuration: one YAML file, dotted overrides, and the run's stages made from them."""

from megabus.config.load import load_config, parse_config
from megabus.config.schema import GrowthConfig, ModelConfig, RunConfig
from megabus.config.stages import Layout, Stage, resolve_stages

__all__ = [
    "GrowthConfig",
    "Layout",
    "ModelConfig",
    "RunConfig",
    "Stage",
    "load_config",
    "parse_config",
    "resolve_stages",
]
