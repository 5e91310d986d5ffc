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
from support.launching import ROOT
from support.slurm_cluster import NODES, Cluster, missing, slurm_cluster, until
from support.small_runs import rows_of, run_config, start, untimed, write_corpus

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


@pytest.fixture
def submit(cluster: Cluster, tmp_path):
    """Submit the run of a config; the job's number."""

    def go(config, *arguments: str) -> str:
        path = tmp_path / "it's a config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        ended = subprocess.run(
            [sys.executable, str(ROOT / "launcher/submit.py"), "--config", path.name, *SMALL, *HERE, *arguments],
            cwd=tmp_path,
            env=cluster.environment,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return re.match(r"job (\d+): ", ended.stdout)[1]

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


def test_the_limit_comes_near_on_two_nodes(cluster, submit, corpus, tmp_path):
    """Told in time, the run saves; the job is queued again, and ends with the numbers of one that went through."""
    layouts = [{"tp": 2}, {"dp": 2}, {"pp": 2}]
    sizes = {"train__max_tokens": 128 * 120, "growth__max_tokens": 1024, "eval__every": 40}
    run = run_config(corpus, tmp_path / "run of it's own", layouts, **sizes)
    job = submit(run, "--nodes", "2", "--time", "60", "--grace", "58")
    metrics, stop = Path(run.run_dir) / "metrics.jsonl", Path(run.run_dir) / "stop"
    until(lambda: metrics.exists() and '"growth"' in metrics.read_text(), "the first growth")
    ranks = trainers(run)
    assert len(ranks) == 2
    for rank in ranks:  # the machine is slow until the signal comes
        os.kill(rank, signal.SIGSTOP)
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + minutes + 1}")
    until(stop.exists, "slurm's signal")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # of the second start
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)

    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), log(run, job)
    said = log(run, job)
    assert re.findall(r"slurm: job \d+, start (\d) of .* on (.*)", said) == [(str(n), " ".join(NODES)) for n in (1, 2)]
    assert "the time limit is near" in said
    assert f"asked to stop by the file {stop}: saving" in said
    assert "saved before the time limit: queued again" in said
    (resumed,) = rows_of(run, "resume")
    assert 8 <= resumed["step"] < 120  # between the first growth and the end
    assert not resumed["changes"]
    assert not stop.exists()
    assert sorted(path.name for path in (Path(run.run_dir) / "slurm").iterdir()) == [f"{job}.log"]

    through = run.model_copy(update={"run_dir": str(tmp_path / "through")})
    start(through, 2)
    assert told(run) == told(through)
    assert len(told(run)["growth"]) == 2


def test_a_sweep_with_deepspeed(cluster, submit, corpus, tmp_path):
    """Both members at the same time; the numbers of each are those of a run of its own."""
    run = run_config(corpus, tmp_path / "sweep", [{}, {}, {}], train__max_tokens=128 * 6, log__unit_norm_every=3)
    job = submit(run, "--launcher", "deepspeed", "--array", "optimizer.lr=1e-2,3e-3")
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
    job = submit(run, "--sbatch=--hold")
    with (tmp_path / "it's a config.yaml").open("a") as file:
        file.write("modle: 3\n")
    cluster.ask("scontrol", "release", job)
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: modle = 3: unknown key; did you mean model?" in log(run, job)


# ---- the script's own part, with a trainer that does no more than it must -----------------------------------

TRAINER = """#!/bin/bash
echo "trainer on $SLURMD_NODENAME"
[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || { echo finished >"$MEGABUS_OUTCOME"; exit; }
until [[ -e $run_dir/stop ]]; do sleep 0.2; done
rm "$run_dir/stop"
echo stopped >"$MEGABUS_OUTCOME"
"""


@pytest.fixture
def stand_in(tmp_path):
    """--python for a trainer in bash."""

    def make(text: str) -> tuple[str, str, str, str]:
        (tmp_path / "trainer").write_text(text)
        (tmp_path / "trainer").chmod(0o755)
        return "--python", str(tmp_path / "trainer"), "--setup", "export run_dir"

    return make


def test_a_failing_run_is_tried_again_so_often(cluster, submit, corpus, tmp_path, stand_in):
    run = run_config(corpus, tmp_path / "run", [{}, {}, {}])
    job = submit(run, "--max-restarts", "1", *stand_in("#!/bin/bash\nexit 3\n"))
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "1")
    assert log(run, job).count("slurm: the run failed (3)") == 2


def test_a_cancelled_run_saves_and_is_gone(cluster, submit, corpus, tmp_path, stand_in):
    run = run_config(corpus, tmp_path / "run", [{}, {}, {}])
    job = submit(run, *stand_in(TRAINER.replace("echo", "trap '' TERM\necho", 1)))
    until(lambda: "trainer on n" in _log_so_far(run, job), "the trainer")
    cluster.ask("scancel", job)
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    until(lambda: "saved, not finished" in log(run, job), "the script's end")


def test_asked_by_hand_to_save_and_queue_again(cluster, submit, corpus, tmp_path, stand_in):
    """As by the time limit; a job that depends on this one waits for its end, not for that of a start."""
    run = run_config(corpus, tmp_path / "run", [{}, {}, {}])
    job = submit(run, *stand_in(TRAINER))
    until(lambda: "trainer on n" in _log_so_far(run, job), "the trainer")
    starts = f"grep --count 'trainer on' '{run.run_dir}/slurm/{job}.log' >'{tmp_path}/after'"
    ask = ("sbatch", "--parsable", "--output=/dev/null", f"--dependency=afterok:{job}", f"--wrap={starts}")
    after = cluster.ask(*ask).strip()
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert cluster.ended(after)["JobState"] == "COMPLETED"
    assert (tmp_path / "after").read_text() == "2\n"  # what depends on the job has waited for its last start


def test_a_preempted_run_starts_again(cluster, submit, corpus, tmp_path, stand_in):
    """As slurm does it, here by hand: the job is ended, and queued again without being asked to."""
    run = run_config(corpus, tmp_path / "run", [{}, {}, {}])
    job = submit(run, *stand_in(TRAINER))
    until(lambda: "trainer on n" in _log_so_far(run, job), "the trainer")
    cluster.ask("scontrol", "requeue", job)
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")


def _log_so_far(run, job: str) -> str:
    path = Path(run.run_dir) / f"slurm/{job}.log"
    return path.read_text() if path.exists() else ""
