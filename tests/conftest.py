"""Imports torch and DeepSpeed once: ranks are forked from here (see megabus.testing.ranks)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabus.testing.ranks import preload

preload()
