"""A start imports no compiler and no distributed checkpoint before its first step: they were half of its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megabus.config.schema import PreflightConfig
from tests.support.small_runs import run_config, write_corpus

# A whole run's start, to the end of its first step.
PROBE = """
import os
import sys
from megabus.cli import main
from megabus.engine import engine

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "sympy", "matplotlib", "jinja2")
train_step = engine.Engine.train_step

def first_step(*args, **options):
    train_step(*args, **options)
    print([name for name in HEAVY if name in sys.modules], flush=True)
    os._exit(0)

engine.Engine.train_step = first_step
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def test_a_start_imports_nothing_that_it_does_not_use(tmp_path):
    config = run_config(write_corpus(tmp_path), tmp_path / "run", [{}] * 3)
    config = config.model_copy(update={"preflight": PreflightConfig(enabled=True)})
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROBE, str(tmp_path / "config.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
