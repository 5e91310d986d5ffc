"""Jobs for slurm, without slurm: what is refused, quoting, and the job script in a real bash.

The script runs here with stand-ins for srun and scontrol; test_slurm_jobs.py runs it under slurm itself.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from megabus.cli import main
from megabus.config import load_config
from megabus.slurm.render import fill
from tests.support.tiny_config import tiny_config

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(run_dir="runs/x", data={"train": "text", "valid": "text"}, train__global_batch_size=24)
ODD = 'it\'s a "run" \\o/ $1 `id` #1; 50% *?é'
CPU = ["--gpus-per-node", "0", "--ranks-per-node", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))


def in_yaml(text):
    return "'" + text.replace("'", "''") + "'"


def command(*arguments):
    return main(["submit", "--config", "config.yaml", *arguments])


@pytest.fixture
def rendered(capsys):
    def make(*arguments):
        assert command("--dry-run", *arguments) == 0
        return capsys.readouterr().out

    return make


# ---- what is refused, in one line, with nothing left behind --------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "5", *CPU], "train.global_batch_size = 24: is not divisible by micro_batch_size*dp = 20"),
        (["--nodes", "5", *CPU, "layout.tp=4"], "layout = tp 4 x pp 1: cannot fill the world of 10"),
        ([*CPU, "modle.x=1"], "modle = {'x': 1}: unknown key"),
        ([*CPU, "--array", "train.micro_batch_size=2,5"], "train.global_batch_size = 24: is not divisible by"),
        ([*CPU, "--array", "optimizer.lr=1e-3,-1"], "optimizer.lr = -1"),
        ([*CPU, "--array", "run_dir=a,b"], "--array = run_dir=a: gives run_dir"),
        ([*CPU, "--array", "nowhere"], "--array = nowhere: cannot be read (No such file"),
        ([*CPU, "--array", "optimizer.lr=1,,2"], "--array = optimizer.lr=1,,2: is not of the form"),
        ([*CPU, "--array", "train.seed=1,2", "--array", "train.seed=3"], "--array = train.seed=1 train.seed=3: gives"),
        ([*CPU, "--at-once", "2"], "--at-once = 2: is of a sweep"),
        ([*CPU, "--time", "5"], "--time = 5: is not longer than the 300 s before it"),
        ([*CPU, "--time", "a day"], "--time = a day: is no time limit"),
        ([*CPU, "--sbatch=--signal=B:TERM@9"], "--sbatch = --signal=B:TERM@9: is written by this program itself"),
        ([*CPU, "--sbatch=-t5"], "--sbatch = -t5: is written by this program itself"),
        ([*CPU, "--sbatch=exclusive"], "--sbatch = exclusive: does not begin with a dash"),
        ([*CPU, "--grace", "65536"], "--grace = 65536: is more than slurm takes"),
        ([*CPU, "--array", "train.seed=1,1"], "--array = train.seed=1: is given twice"),
        ([*CPU, "resume=never"], "resume = never: refuses to go on when the job is queued again"),
        ([*CPU, "--job-name", "a\nb"], "sbatch option = '--job-name=a\\nb': has a line break"),
        ([*CPU, "run_dir=a\\b"], "run_dir = {here}/a\\b: has a backslash"),
        (["--gpus-per-node", "0"], "--gpus-per-node = 0: leaves open how many ranks"),
        (["--gpus-per-node", "2", "--ranks-per-node", "4"], "--ranks-per-node = 4: exceeds the 2 GPU(s)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(monkeypatch, capsys, tmp_path, arguments, told):
    """Before sbatch, which is not even there to be found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {told.replace('{here}', str(tmp_path))}")
    assert err.count("\n") == 1
    assert os.listdir() == ["config.yaml"]


def test_what_was_refused_is_right_otherwise(rendered):
    """The nearest to what is refused above."""
    for arguments in (["--nodes", "6", *CPU], [*CPU, "--time", "6"], [*CPU, "resume=never", "--no-requeue"]):
        rendered(*arguments)
    rendered(*CPU, "--array", "train.micro_batch_size=2,4", "--array", "optimizer.lr=1e-3,1", "--at-once", "2")


# ---- quoting ------------------------------------------------------------------------------------------------


def read_by_sbatch(line: str) -> list[str]:
    """The options of a #SBATCH line, read as _get_argument of slurm's src/sbatch/opt.c does."""
    options, text, i = [], line.removeprefix("#SBATCH"), 0
    while i < len(text):
        if text[i].isspace():
            i += 1
            continue
        if text[i] == "#":
            break
        option, quote, escaped = "", "", False
        while i < len(text) and (quote or escaped or not text[i].isspace()):
            char = text[i]
            i += 1
            if escaped:
                option, escaped = option + char, False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
            elif not quote and char in "\"'":
                quote = char
            elif not quote and char == "#":
                i = len(text)
            else:
                option += char
        options.append(option)
    return options


def directives(script: str) -> list[str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert script.splitlines()[2 : 2 + len(lines)] == lines  # sbatch reads none below the first command
    return [option for line in lines for option in read_by_sbatch(line)]


def test_options_for_sbatch(rendered, tmp_path):
    plain = directives(rendered("--nodes", "2", "--gpus-per-node", "2"))
    assert plain == [
        "--job-name=config",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--gres=gpu:2",
        f"--output={tmp_path}/runs/x/slurm/%j.log",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--requeue",
    ]
    run_dir = ODD.replace("\\", "")
    odd = directives(
        rendered(
            *CPU,
            f"run_dir={in_yaml(run_dir)}",
            "--no-requeue",
            *("--array", "train.seed=1,2,3", "--at-once", "2", "--grace", "60", "--time", "1-0"),
            *(
                "--partition",
                "a,b",
                "--account",
                ODD,
                "--mem",
                "4G",
                "--sbatch=--exclusive",
                f"--sbatch=--comment={ODD}",
            ),
        )
    )
    assert odd == [
        "--job-name=config",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        f"--output={tmp_path}/{run_dir.replace('%', '%%')}/slurm/%A_%a.log",
        "--open-mode=append",
        "--signal=B:USR1@60",
        "--no-requeue",
        "--array=0-2%2",
        "--time=1-0",
        "--partition=a,b",
        f"--account={ODD}",
        "--mem=4G",
        "--exclusive",
        f"--comment={ODD}",
    ]


def test_the_template_and_its_values_agree():
    assert fill('@{a} "${x[@]}" @{b}', {"a": "1", "b": "@{a}"}) == '1 "${x[@]}" @{a}'
    with pytest.raises(KeyError, match="b"):
        fill("@{a}@{b}", {"a": "1"})
    with pytest.raises(ValueError, match="no place for \\['b'\\]"):
        fill("@{a}", {"a": "1", "b": "2"})


# ---- the script in bash, on one make-believe node -----------------------------------------------------------

SRUN = """#!/bin/bash
printf '%s\\n' "$@" >>srun.txt
while [[ $1 == --* ]]; do shift; done
exec env SLURM_NODEID=0 "$@"
"""
SQUEUE = """#!/bin/bash
[[ $* == *--jobs=29* ]] && echo 29 || exit 1
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo node-a; echo node-b; else echo "$@" >>requeued.txt; fi
"""
# What would be python: writes down how it was started, and ends as told.
PYTHON = """#!/bin/bash
printf '%s\\0' "$PWD" "$OMP_NUM_THREADS" "$DS_ACCELERATOR" "$MASTER_ADDR" "$MASTER_PORT" "$@" >>"$HERE/started"
cat -- "$HERE/hosts" "$hostfile" >/dev/null 2>&1
"""


@pytest.fixture
def in_bash(tmp_path):
    """Run a script as slurm would; the finished process."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def go(script, trainer="", **job):
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("py thon", PYTHON + trainer)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "HERE": str(tmp_path),
            "SLURM_JOB_ID": "31",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "MASTER_ADDR": "left-by-a-shell",
        }
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True).stderr == ""
        return subprocess.run(
            ["bash"], input=script, text=True, capture_output=True, timeout=60, env=environment | job, cwd="/"
        )

    return go


@pytest.fixture
def job(rendered, tmp_path):
    (tmp_path / "runs/x/slurm").mkdir(parents=True)
    return lambda *arguments: rendered(*CPU, "--nodes", "2", "--python", str(tmp_path / "tools/py thon"), *arguments)


def started(tmp_path):
    return (tmp_path / "started").read_text().split("\0")[:-1]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_every_character_arrives(job, in_bash, tmp_path, launcher):
    """Arguments are what they were, through the script, srun and the shell on the node, and give the same config."""
    run_dir = ODD.replace("\\", "").replace("/", "")
    overrides = [f"data.valid={in_yaml(ODD)}", "train.seed=3", f"run_dir={in_yaml(run_dir)}"]
    Path(run_dir, "slurm").mkdir(parents=True)
    ended = in_bash(job("--launcher", launcher, *overrides))
    assert f"start 1 of {run_dir} on node-a node-b" in ended.stdout
    directory, *environment, port = started(tmp_path)[:5]
    assert (directory, environment, port) == (str(tmp_path), ["1", "cpu", "node-a"], "10031")
    arguments = started(tmp_path)[5:]
    at = arguments.index("megabus")
    assert arguments[at + 1 : -1] == ["train", "--config", "config.yaml", *overrides]
    config = load_config("config.yaml", arguments[at + 4 :])
    assert (config.data.valid, config.run_dir) == (ODD, run_dir)
    if launcher == "torchrun":
        assert arguments[:at] == [
            *("-m", "torch.distributed.run", "--nnodes=2", "--node-rank=0", "--nproc-per-node=2"),
            *("--rdzv-backend=static", "--master-addr=node-a", "--master-port=10031", "-m"),
        ]
    else:
        hosts = tmp_path / run_dir / "slurm/31.hosts"
        assert hosts.read_text() == "node-a slots=2\nnode-b slots=2\n"
        assert arguments[:at] == [
            *("-m", "deepspeed.launcher.runner", f"--hostfile={hosts}", "--no_ssh", "--node_rank=0"),
            *("--master_addr=node-a", "--master_port=10031", "--module", "--no_local_rank"),
        ]
    assert (tmp_path / "srun.txt").read_text().splitlines()[:4] == [
        *("--export=ALL", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"),
    ]


def test_every_member_gets_its_own(job, in_bash, tmp_path):
    script = job(f"--array=data.valid=a,{in_yaml(ODD)}", "faults.stop_exit_code=75")
    in_bash(script, SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT="2")
    arguments = started(tmp_path)[4:]
    assert arguments[0] == "10233"
    config = load_config("config.yaml", arguments[arguments.index("config.yaml") + 1 :])
    assert config.data.valid == ODD
    assert config.run_dir == "runs/x/1_data.valid=_it_s_a_run_o_1_id_1_50_"
    assert config.faults.stop_exit_code == 0  # launchers take another for a failure
    ended = in_bash(script, SLURM_ARRAY_TASK_ID="2")
    assert (ended.returncode, ended.stderr) == (2, "slurm: no member 2 in this sweep\n")


def test_setup_comes_before(job, in_bash, tmp_path):
    script = job("--setup", "export MASTER_ADDR='ib0 of node a'", "--setup", ': "$UNSET"', "--gpus-per-node", "2")
    in_bash(script)
    assert started(tmp_path)[2:4] == ["", "ib0 of node a"]


SAVED = "mkdir -p runs/x/checkpoints; echo step-1 >runs/x/checkpoints/latest;"
TELL = 'echo {} >"$MEGABUS_OUTCOME"; exit {}'


@pytest.mark.parametrize(
    ("trainer", "code", "requeued"),
    [
        (TELL.format("finished", 0), 0, False),
        (TELL.format("finished", 1), 0, False),  # a rank that came to harm after the end
        (TELL.format("refused", 1), 2, False),
        (TELL.format("stopped", 0), 75, False),  # by a user
        ("exit 1", 0, True),
        ("exit 0", 0, True),  # deepspeed's runner, when its launcher is killed
        (
            'echo >runs/x/stop "slurm job 31"; kill -USR1 $(cat pid); sleep 1;' + SAVED + TELL.format("stopped", 0),
            0,
            True,
        ),
        ("kill -USR1 $(cat pid); sleep 1;" + TELL.format("finished", 0), 0, False),
        ("kill -TERM $(cat pid); sleep 1;" + TELL.format("stopped", 0), 75, False),
        ("kill -TERM $(cat pid); sleep 1; exit 3", 3, False),
    ],
)
def test_what_comes_after(job, in_bash, tmp_path, trainer, code, requeued):
    ended = in_bash(job("--setup", 'echo $$ >"$HERE/pid"'), trainer)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert (tmp_path / "requeued.txt").exists() == requeued
    assert not (tmp_path / "runs/x/stop").exists()
    if requeued:
        assert (tmp_path / "requeued.txt").read_text() == "requeue 31\n"


def test_no_requeue(job, in_bash, tmp_path):
    script = job("--no-requeue", "--setup", 'echo $$ >"$HERE/pid"')
    assert in_bash(script, "exit 3").returncode == 3
    assert in_bash(script, "exit 0").returncode == 1  # nothing says that it is finished
    assert in_bash(script, "kill -USR1 $(cat pid); sleep 1;" + TELL.format("stopped", 0)).returncode == 75
    assert not (tmp_path / "requeued.txt").exists()


def test_failures_are_counted_until_a_new_checkpoint(job, in_bash, tmp_path):
    script, latest = job("--max-restarts", "2"), tmp_path / "runs/x/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    codes = [in_bash(script, "exit 3").returncode for _ in range(2)]
    codes.append(in_bash(script, "echo step-1 >runs/x/checkpoints/latest; exit 3").returncode)
    codes += [in_bash(script, "exit 3").returncode for _ in range(2)]
    assert codes == [0, 0, 0, 0, 3]
    assert (tmp_path / "requeued.txt").read_text() == "requeue 31\n" * 4


def test_starts_that_the_time_limit_ends_before_they_save_are_counted_too(job, in_bash, tmp_path):
    """With failures, until a new checkpoint: each would only begin again where the one before it did."""
    script = job("--max-restarts", "2", "--setup", 'echo $$ >"$HERE/pid"')
    stopped = "kill -USR1 $(cat pid); sleep 0.2; {}" + TELL.format("stopped", 0)
    ended = [in_bash(script, trainer) for trainer in (stopped.format(""), "exit 3", stopped.format(SAVED))]
    ended += [in_bash(script, stopped.format("")) for _ in range(3)]
    assert [one.returncode for one in ended] == [0, 0, 0, 0, 0, 1]
    assert "slurm: saved before the time limit: queued again" in ended[2].stdout
    told = (
        "anything new was saved, for the 3. time in a row\nslurm: give it more --time, and submit it again to go on\n"
    )
    assert ended[-1].stdout.endswith(told)
    assert (tmp_path / "requeued.txt").read_text() == "requeue 31\n" * 5


@pytest.mark.parametrize("asked", ["USR1", "TERM"])
def test_a_user_s_stop_is_not_taken_over(job, in_bash, tmp_path, asked):
    """Not even when slurm asks for the same: whoever wants the run to end does not want it queued again."""
    trainer = f"touch runs/x/stop; kill -{asked} $(cat pid); sleep 1; " + TELL.format("stopped", 0)
    ended = in_bash(job("--setup", 'echo $$ >"$HERE/pid"'), trainer)
    assert ended.returncode == 75
    assert not (tmp_path / "requeued.txt").exists()
    assert (tmp_path / "runs/x/stop").read_text() == ""


@pytest.mark.parametrize(
    ("written", "stays"), [("slurm job 30\n", False), ("slurm job 31", False), ("slurm job 29", True), ("", True)]
)
def test_a_stop_file_left_behind(job, in_bash, tmp_path, written, stays):
    """One of a job that is gone, or of this one, goes before the run starts; a user's and a running job's stay."""
    (tmp_path / "runs/x/stop").write_text(written)
    in_bash(job(), '[[ -e runs/x/stop ]] && touch "$HERE/seen";' + TELL.format("finished", 0))
    assert (tmp_path / "seen").exists() == stays
    assert (tmp_path / "runs/x/stop").exists() == stays


# ---- handing it over ----------------------------------------------------------------------------------------


def sbatch(tmp_path, monkeypatch, text):
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{text}\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_what_sbatch_gets(rendered, monkeypatch, capsys, tmp_path):
    sbatch(tmp_path, monkeypatch, '[[ -d runs/x/slurm && $* == --parsable ]] && cat >got && echo "17;cluster"')
    assert command(*CPU) == 0
    assert capsys.readouterr().out == f"job 17: runs/x; logs in {tmp_path}/runs/x/slurm\n"
    assert Path("got").read_text() == rendered(*CPU)


@pytest.mark.parametrize("there", [True, False])
def test_what_sbatch_refuses(monkeypatch, capsys, tmp_path, there):
    sbatch(tmp_path, monkeypatch, "cat >/dev/null; echo 'sbatch: error: no such partition' >&2; exit 1")
    told = "error: sbatch = 1: sbatch: error: no such partition; change the options, or submit where slurm"
    if not there:
        monkeypatch.setenv("PATH", "/nowhere")
        told = "error: sbatch = sbatch: cannot be run (No such file or directory); submit where slurm is installed"
    assert command(*CPU) == 2
    assert capsys.readouterr().err.startswith(told)
    assert sorted(os.listdir()) == ["config.yaml", "sbatch"]  # a run's directory would be a run
