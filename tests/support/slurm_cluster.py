"""A slurm of two nodes on this machine, from Debian's slurm-wlm and munge: configured, started, watched, ended."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path

from tests.support.launching import environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
WHERE = f"{os.environ['PATH']}:/usr/sbin"
NODES = ("n0", "n1")
PATIENCE = 600.0  # seconds that anything may take on a busy machine
# No cgroups, no accounting. A requeued job waits for cred_expire, of which 5 is the least. Jobs may exceed their time
# limit: slurm signals them before it all the same, and a slow machine fails no test.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
OverTimeLimit=UNLIMITED
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def missing() -> list[str]:
    """The programs of slurm and munge that this machine does not have."""
    return [name for name in PROGRAMS if shutil.which(name, path=WHERE) is None]


class Cluster:
    """Slurm's commands, for one that is running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=WHERE)

    def ask(self, *command: str) -> str:
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert ended.returncode == 0, (command, ended.stderr)
        return ended.stdout

    def job(self, number: str) -> dict[str, str]:
        """What slurm knows of a job, or of a member (`number_index`) of an array."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str) -> dict[str, str]:
        """The same once it has ended for good."""
        running = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED")
        until(lambda: self.job(number)["JobState"] not in running, f"the end of job {number}")
        return self.job(number)


def until(condition: Callable[[], object], what: str, daemons: list[subprocess.Popen[bytes]] | None = None) -> None:
    """Wait for it, a while. Fails at once when a daemon has ended."""
    last = time.monotonic() + PATIENCE
    while not condition():
        gone = [daemon.args for daemon in daemons or [] if daemon.poll() is not None]
        assert not gone, f"{gone} ended before {what}"
        assert time.monotonic() < last, f"waited in vain for {what}"
        time.sleep(0.1)


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd; end them, and all that they have started."""
    # Not pytest's folder: a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = [free_port() for _ in range(3)]
    values = {"host": socket.gethostname().split(".")[0], "user": getuser(), "folder": folder, "nodes": NODES}
    (folder / "slurm.conf").write_text(CONF.format(**values, ports=ports))
    cluster, daemons = Cluster(folder), []

    def start(*command: str) -> None:
        log = (folder / f"{command[0]}-{len(daemons)}.out").open("wb")
        daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))

    try:
        files = [f"--{kind}={folder}/munge.{end}" for kind, end in (("key-file", "key"), ("socket", "socket"))]
        logs = [f"--{kind}={folder}/munge.{kind}" for kind in ("pid-file", "log-file", "seed-file")]
        start("munged", "--foreground", "--force", *files, *logs)
        until((folder / "munge.socket").exists, "munge's socket", daemons)
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        until(lambda: _states(cluster) == ["idle"] * len(NODES), "two idle nodes", daemons)
        yield cluster
        cluster.ask("scancel", "--user", getuser())
        until(lambda: _states(cluster) == ["idle"] * len(NODES), "the end of all jobs", daemons)
    except BaseException:
        for file in sorted(folder.glob("*.out")):
            print(f"---- {file.name}\n{file.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _states(cluster: Cluster) -> list[str]:
    ended = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.environment, capture_output=True, text=True
    )
    return ended.stdout.split()
