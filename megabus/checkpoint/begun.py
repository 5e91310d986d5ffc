"""What the configuration of a run that has begun said of its growths. Nothing heavy is imported, and nothing of it is
believed for more than which line a user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megabus.checkpoint.manifest import STATE
from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import RunConfig
from megabus.config.schema import StageConfig
from megabus.plain_file import parse_json, read_regular


def growths_begun_with(config: RunConfig) -> list[StageConfig]:
    """`growth.stages` in the newest checkpoint that the run would go on from; none where there is none, or it is
    damaged, which is told when it is opened."""
    try:
        return [StageConfig.model_validate(stage) for stage in _newest(config)["config"]["growth"]["stages"]]
    except (ValueError, LookupError, TypeError):
        return []


def stage_begun(config: RunConfig) -> int:
    """The stage of that checkpoint; 0 where there is none. Whoever goes on from one asks that one again."""
    stage = _newest(config).get("stage")
    return stage if type(stage) is int else 0


def _newest(config: RunConfig) -> dict[str, Any]:
    folders = [] if config.resume == "never" else complete(checkpoints_of(Path(config.run_dir)))
    for folder in folders[:1]:
        try:
            tree = parse_json(read_regular(folder / STATE))
        except (OSError, ValueError):
            break
        return tree if isinstance(tree, dict) else {}
    return {}
