"""tools/plan_growth.py takes every configuration that comes with the project, whatever layouts its stages have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_a_shipped_configuration_can_be_planned(config):
    command = [sys.executable, "tools/plan_growth.py", f"configs/{config}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "predicted: loss " in done.stdout
