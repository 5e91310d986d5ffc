"""Runs that tell wandb's server: one that goes on keeps its id there, one that begins anew has one of its own, and who
may not log in is told so before anything is made. wandb itself talks to a server of this machine."""

from __future__ import annotations

import base64
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megabus.errors import UserError
from megabus.preflight.software import check_sinks
from megabus.train.run_dir import open_metrics
from tests.support.forked import Begun
from tests.support.small_runs import run_config
from tests.support.wandb_server import wandb_server

KEY = "0123456789" * 4


# All in forks: wandb starts threads and a service, and ranks of later tests are forked from this process.


def with_wandb(folder: Path, url: str, key: str) -> None:
    places = {f"WANDB_{name}_DIR": str(folder / name) for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    os.environ.update(places | quiet, HOME=str(folder), WANDB_BASE_URL=url, WANDB_API_KEY=key, WANDB_HTTP_TIMEOUT="3")
    os.chdir(folder)


def online(folder: Path) -> Any:
    return run_config(folder, folder / "run", [{}] * 3, log={"wandb": True, "wandb_mode": "online"})


def starts(folder: Path) -> tuple[list[str], dict[str, list[tuple[int, float]]]]:
    """Two starts from nothing, and one that goes on from a checkpoint; what the server has heard."""
    config, found = online(folder), SimpleNamespace(state=SimpleNamespace(progress=SimpleNamespace(step=1)))
    Path(config.run_dir).mkdir()
    with wandb_server(base64.b64encode(f"api:{KEY}".encode()).decode()) as server:
        with_wandb(folder, server.url, KEY)
        check_sinks(config)
        for where, losses in ((None, {1: 4.0, 2: 3.5}), (None, {1: 3.0, 2: 2.5}), (found, {2: 2.25})):
            metrics = open_metrics(config, where)
            for step, loss in losses.items():
                metrics.write("step", {"step": step, "loss": loss})
            metrics.close()
        heard = {run: [(row["trainer/step"], row["step/loss"]) for row in rows] for run, rows in server.rows.items()}
        return server.begun, heard


def test_a_run_keeps_its_id_when_it_goes_on_and_no_other_does(tmp_path):
    begun, heard = Begun(partial(starts, tmp_path)).wait(120)
    first, second = ((tmp_path / "run" / name).read_text() for name in ("wandb-id-1", "wandb-id"))
    assert begun == [first, second, second]
    assert heard == {first: [(1, 4.0), (2, 3.5)], second: [(1, 3.0), (2, 2.5), (2, 2.25)]}
    assert len(list((tmp_path / "run").glob("wandb/run-*"))) == 2
    assert len(list((tmp_path / "run").glob("wandb-1/run-*"))) == 1


def refusal(folder: Path, key: str, url: str | None, **more: str) -> str:
    """What a start is refused with; url: None for a server that is there; more: of the environment."""
    with wandb_server(base64.b64encode(f"api:{KEY}".encode()).decode()) as server:
        with_wandb(folder, url or server.url, key)
        os.environ.update(more)
        try:
            check_sinks(online(folder))
        except UserError as error:
            return str(error)
    return "logged in"


REFUSED = {
    "no key": ("", None, "No API key configured"),
    "another key": ("9" * 40, None, "Failed to authenticate with http://127.0.0.1:"),
    "no server": (KEY, "http://127.0.0.1:9", "Failed to authenticate with http://127.0.0.1:9"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """All begun at once: wandb waits ten seconds for a server that is not there."""
    begun = {}
    for name, (key, url, _) in REFUSED.items():
        folder = tmp_path_factory.mktemp("refused")
        begun[name] = folder, Begun(partial(refusal, folder, key, url))
    yield begun
    for _, job in begun.values():
        job.kill()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_mode_of_the_environment_that_logs_nobody_in_is_named(tmp_path, mode):
    line = Begun(partial(refusal, tmp_path, KEY, None, WANDB_MODE=mode)).wait(120)
    assert line.startswith(f"log.wandb_mode = online: is not what the environment says, WANDB_MODE = {mode}, ")
    assert line.endswith("; unset WANDB_MODE, or set log.wandb_mode=offline")


def test_a_server_that_is_no_address_is_named(tmp_path):
    line = Begun(partial(refusal, tmp_path, KEY, "no address")).wait(120)
    assert line == (
        "log.wandb_mode = online: does not start (its setting base_url = no address: Input should be a valid URL, "
        "relative URL without a base); mend WANDB_BASE_URL, or what wandb's settings file says, or set "
        "log.wandb_mode=offline"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_login_that_fails_is_one_line(refusals, name):
    folder, job = refusals[name]
    line = job.wait(120)
    assert line.startswith("log.wandb_mode = online: ")
    assert REFUSED[name][2] in line
    assert line.endswith("; log in (`wandb login`, or WANDB_API_KEY), or set log.wandb_mode=offline")
    assert "\n" not in line
    assert not (folder / "run").exists()
