"""Which code was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ("benchmarks/growth/results", "benchmarks/measured.json", "docs/performance.md")  # while it is measured


def commit() -> str:
    """Of this checkout, marked where it has changes; empty where it is none."""
    name, changes = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        for command in (
            ("describe", "--always", "--exclude=*"),
            ("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":(exclude){path}" for path in WRITTEN)),
        )
    )
    dirty = "-dirty" if changes.stdout.strip() else ""
    return name.stdout.strip() + dirty if name.returncode == 0 else ""
