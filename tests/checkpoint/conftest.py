"""A run's checkpoints, to be altered."""

from __future__ import annotations

import shutil

import pytest

from megabus.checkpoint.store import checkpoints_of, complete
from tests.support import altered


@pytest.fixture(scope="session")
def pristine_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    altered.write_run(run)
    return run


@pytest.fixture
def folder(pristine_run, tmp_path):
    """The newer of two checkpoints, to be altered."""
    return complete(checkpoints_of(shutil.copytree(pristine_run, tmp_path / "run")))[0]
