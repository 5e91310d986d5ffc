"""Jobs under slurm itself, on two nodes that are this machine: signalled, queued again, resumed, refused, cancelled."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.launching import ROOT
from tests.support.slurm_cluster import NODES, Cluster, missing, slurm_cluster, until
from tests.support.small_runs import rows_of, run_config, start, untimed, write_corpus

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"slurm is not installed: no {', '.join(missing())}")

SMALL = ("--gpus-per-node", "0", "--ranks-per-node", "1")
# Where node names lead nowhere.
HERE = ("--setup", "export MASTER_ADDR=127.0.0.1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def submit(cluster: Cluster, tmp_path_factory):
    """Submit the run of a config, from a folder of its own; the job's number and that folder."""

    def go(config, *arguments: str) -> tuple[str, Path]:
        path = tmp_path_factory.mktemp("submitted") / "it's a config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        ended = subprocess.run(
            [sys.executable, str(ROOT / "launcher/submit.py"), "--config", path.name, *SMALL, *HERE, *arguments],
            cwd=path.parent,
            env=cluster.environment,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return re.match(r"job (\d+): ", ended.stdout)[1], path.parent

    return go


def log(config, name: str) -> str:
    return (Path(config.run_dir) / f"slurm/{name}.log").read_text()


def told(config):
    """What a run has told, whenever it was stopped and started."""
    return {event: untimed(rows_of(config, event)) for event in ("step", "eval", "growth")}


def trainers(config) -> list[int]:
    """The ranks of a run: processes that train, without what has started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if words[1:5] == ["-u", "-m", "megabus", "train"] and config.run_dir in "".join(words):
            found.append(int(process.name))
    return found


# ---- what slurm makes wait for: begun together, before the first test ---------------------------------------


@pytest.fixture(scope="module", autouse=True)
def all_begun(limited, failing, cancelled, asked, requeued):
    """Slurm looks for time limits every 30 s, and starts a job again 6 s after it was queued again at the earliest."""


@pytest.fixture(scope="module")
def limited(cluster, submit, corpus, tmp_path_factory):
    """A job on two nodes whose limit comes near after its first growth; until slurm's signal comes it stands still."""
    layouts = [{"tp": 2}, {"dp": 2}, {"pp": 2}]
    sizes = {"train__max_tokens": 128 * 48, "growth__max_tokens": 1024, "eval__every": 40}
    run = run_config(corpus, tmp_path_factory.mktemp("limit") / "run of it's own", layouts, **sizes)
    job, _ = submit(run, "--nodes", "2", "--time", "60", "--grace", "58")
    metrics = Path(run.run_dir) / "metrics.jsonl"
    until(lambda: metrics.exists() and '"growth"' in metrics.read_text(), "the first growth")
    ranks = trainers(run)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + minutes + 1}")
    return run, job, ranks


# The script's own part is tried with a trainer that does no more than it must.
TRAINER = """#!/bin/bash
echo "trainer on $SLURMD_NODENAME"
[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || { echo finished >"$MEGABUS_OUTCOME"; exit; }
until [[ -e $run_dir/stop ]]; do sleep 0.2; done
rm "$run_dir/stop"
echo stopped >"$MEGABUS_OUTCOME"
"""


@pytest.fixture(scope="module")
def stand_in(submit, corpus, tmp_path_factory):
    """Submit a run with such a trainer; the run, and the job's number."""

    def go(trainer: str, *arguments: str):
        folder = tmp_path_factory.mktemp("stand-in")
        (folder / "trainer").write_text(trainer)
        (folder / "trainer").chmod(0o755)
        run = run_config(corpus, folder / "run", [{}, {}, {}])
        python = ("--python", str(folder / "trainer"), "--setup", "export run_dir")
        return run, submit(run, *python, *arguments)[0]

    return go


@pytest.fixture(scope="module")
def failing(stand_in):
    return stand_in("#!/bin/bash\nexit 3\n", "--max-restarts", "1")


@pytest.fixture(scope="module")
def cancelled(cluster, stand_in):
    run, job = stand_in(TRAINER.replace("echo", "trap '' TERM\necho", 1))
    _trains(run, job)
    cluster.ask("scancel", job)
    return run, job


@pytest.fixture(scope="module")
def asked(cluster, stand_in):
    """With a job that depends on this one, and what that finds of the other's starts."""
    run, job = stand_in(TRAINER)
    _trains(run, job)
    found = Path(run.run_dir).with_name("found")
    starts = f"grep --count 'trainer on' '{run.run_dir}/slurm/{job}.log' >'{found}'"
    ask = ("sbatch", "--parsable", "--output=/dev/null", f"--dependency=afterok:{job}", f"--wrap={starts}")
    after = cluster.ask(*ask).strip()
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    return job, after, found


@pytest.fixture(scope="module")
def requeued(cluster, stand_in):
    """As slurm preempts, here by hand: the job is ended, and queued again without being asked to."""
    run, job = stand_in(TRAINER)
    _trains(run, job)
    cluster.ask("scontrol", "requeue", job)
    return job


def _trains(run, job: str) -> None:
    path = Path(run.run_dir) / f"slurm/{job}.log"
    until(lambda: path.exists() and "trainer on n" in path.read_text(), "the trainer")


# ---- the tests ---------------------------------------------------------------------------------------------


def test_a_sweep_with_deepspeed(cluster, submit, corpus, tmp_path):
    """Both members at the same time; the numbers of each are those of a run of its own."""
    run = run_config(corpus, tmp_path / "sweep", [{}, {}, {}], train__max_tokens=128 * 6, log__unit_norm_every=3)
    job, _ = submit(run, "--launcher", "deepspeed", "--array", "optimizer.lr=1e-2,3e-3")
    for index, lr in enumerate((1e-2, 3e-3)):
        assert cluster.ended(f"{job}_{index}")["JobState"] == "COMPLETED", log(run, f"{job}_{index}")
        member = f"{run.run_dir}/{index}_optimizer.lr={('1e-2', '3e-3')[index]}"
        alone = run.model_copy(
            update={"run_dir": f"{tmp_path}/{index}", "optimizer": run.optimizer.model_copy(update={"lr": lr})}
        )
        start(alone, 1)
        assert told(alone.model_copy(update={"run_dir": member})) == told(alone)
        assert "deepspeed.launcher.launch" in log(run, f"{job}_{index}")


def test_bad_input_is_not_tried_again(cluster, submit, corpus, tmp_path):
    """What was sound when it was submitted, and is not when the job starts."""
    run = run_config(corpus, tmp_path / "run", [{}, {}, {}])
    job, folder = submit(run, "--sbatch=--hold")
    with (folder / "it's a config.yaml").open("a") as file:
        file.write("modle: 3\n")
    cluster.ask("scontrol", "release", job)
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: modle = 3: unknown key; did you mean model?" in log(run, job)


def test_a_failing_run_is_tried_again_so_often(cluster, failing):
    run, job = failing
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "1")
    assert log(run, job).count("slurm: the run failed (3)") == 2


def test_a_cancelled_run_saves_and_is_gone(cluster, cancelled):
    run, job = cancelled
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    until(lambda: "saved, not finished" in log(run, job), "the script's end")


def test_asked_by_hand_to_save_and_queue_again(cluster, asked):
    """As by the time limit; a job that depends on this one waits for its end, not for that of a start."""
    job, after, found = asked
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert cluster.ended(after)["JobState"] == "COMPLETED"
    assert found.read_text() == "2\n"  # what depends on the job has waited for its last start


def test_a_preempted_run_starts_again(cluster, requeued):
    end = cluster.ended(requeued)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")


def test_the_limit_comes_near_on_two_nodes(cluster, limited, tmp_path):
    """Told in time, the run saves; the job is queued again, and ends with the numbers of one that went through."""
    run, job, ranks = limited
    stop = Path(run.run_dir) / "stop"
    until(stop.exists, "slurm's signal")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # of the second start
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    through = run.model_copy(update={"run_dir": str(tmp_path / "through")})
    start(through, 2)  # while the job saves, and waits to be started again

    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), log(run, job)
    said = log(run, job)
    assert re.findall(r"slurm: job \d+, start (\d) of .* on (.*)", said) == [(str(n), " ".join(NODES)) for n in (1, 2)]
    assert "the time limit is near" in said
    assert f"asked to stop by the file {stop}: saving" in said
    assert "saved before the time limit: queued again" in said
    (resumed,) = rows_of(run, "resume")
    assert 8 <= resumed["step"] < 28  # between the first growth and the end
    assert not resumed["changes"]
    assert not stop.exists()
    assert sorted(path.name for path in (Path(run.run_dir) / "slurm").iterdir()) == [f"{job}.log"]

    assert told(run) == told(through)
    assert len(told(run)["growth"]) == 2
