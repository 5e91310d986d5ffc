"""What pyproject.toml declares is enough: every command can be imported with the declared packages alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megabus.cli import COMMANDS
from tests.support.launching import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Importing with all other packages hidden, as in an environment that has none of them.
IMPORT = """
import sys
from importlib import import_module
hidden = set({hidden!r})
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}} among the declared", name=name)
sys.meta_path.insert(0, Hide())
for name in {modules!r}:
    import_module(name)
"""


def closure(names: list[str]) -> set[str]:
    """The distributions that installing these requirements brings, as far as they are installed here."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(name), "") for name in names]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for each in requirement.extras or {""}:
            if (name, each) in found:
                continue
            found.add((name, each))
            try:
                waiting += [(Requirement(text), each) for text in requires(name) or ()]
            except PackageNotFoundError:  # of another platform
                continue
    return {name for name, _ in found}


def hidden(names: list[str]) -> list[str]:
    """Top-level modules that only packages outside of these requirements' closure bring."""
    there = closure(names)
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if module != "megabus" and not any(canonicalize_name(owner) in there for owner in owners)
    )


def imported(names: list[str], tmp_path) -> str:
    """What importing every command says on stderr where these requirements alone are installed; "" if it works."""
    modules = [f"megabus.cli.{name.replace('-', '_')}" for name in COMMANDS if name != "evaluate-nli"]
    modules += ["megabus.train.loop", "megabus.convert.hugging_face"]
    script = tmp_path / "imports.py"
    script.write_text(IMPORT.format(hidden=hidden(names), modules=modules))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )
    return done.stderr if done.returncode else ""


def test_declared_packages_are_enough(tmp_path):
    assert imported(PROJECT["dependencies"], tmp_path) == ""


@pytest.mark.parametrize("left_out", ["protobuf"])
def test_an_undeclared_package_is_seen(tmp_path, left_out):
    """The control: what sentencepiece's files need, and does not declare."""
    names = [name for name in PROJECT["dependencies"] if Requirement(name).name != left_out]
    assert "ModuleNotFoundError" in imported(names, tmp_path)
