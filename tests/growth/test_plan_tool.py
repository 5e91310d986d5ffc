"""`megabus plan` takes every configuration that comes with the project, whatever layouts its stages have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import run_command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_a_shipped_configuration_can_be_planned(config):
    done = run_command("plan", "--config", ROOT / "configs" / config)
    assert done.returncode == 0, done.stderr
    assert "predicted: loss " in done.stdout
