"""The command as a whole: what it lists, what it refuses, and that it is quick to do so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib import invalidate_caches
from pathlib import Path

import pytest
import yaml

from megabus import extras
from megabus.checkpoint import tensor_file
from megabus.cli import COMMANDS, GROUPS, main, overview, ranks, train
from megabus.command import Parser
from megabus.errors import UserError
from megabus.estimate.devices import DEVICES
from megabus.extras import EXTRAS
from tests.support.command import run_command
from tests.support.launching import ROOT, environment
from tests.support.tiny_config import tiny_config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIG = tiny_config(run_dir="run", data={"train": "nowhere", "valid": "nowhere"})


@pytest.mark.parametrize(
    ("command", "needed"),
    [("coord-check", "--config"), ("plan", "--config"), ("estimate", "--config, --world"), ("train", "--config")],
)
def test_only_what_is_needed_is_asked_for(command, needed):
    """No overrides, of which there may be none."""
    told = f"error: command line = : the following arguments are required: {needed}; see --help\n"
    assert run_command(command) == (2, "", told)


def test_every_command_has_a_line_and_a_module():
    assert run_command("--help") == (0, overview() + "\n", "")
    assert run_command().returncode == 2
    lines = overview().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert all(f"{title}:" in lines for title in GROUPS)
    assert max(map(len, lines)) <= 100
    modules = {path.stem for path in (ROOT / "megabus/cli").glob("*.py")} - {"__init__", "ranks"}
    assert modules == {name.replace("-", "_") for name in COMMANDS}
    assert run_command("--version").stdout == f"megabus {PROJECT['version']}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: megabus {name} ")
    assert re.search(rf"^  megabus {name}( |$)", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_alike_what_is_alike(name, monkeypatch):
    """A run's file is --config, what is written where nothing is turned into something is --out, and all have help."""
    shown = []
    monkeypatch.setattr(Parser, "print_help", lambda parser: shown.append(parser))
    with pytest.raises(SystemExit):
        main([name, "--help"])
    actions = {word: each for each in shown[0]._actions for word in each.option_strings or [each.dest]}
    assert all(each.help for each in actions.values())
    assert "--output" not in actions
    assert "config" not in actions
    assert actions["--config"].required if "overrides" in actions else "--config" not in actions
    assert "--gpu" not in actions or actions["--gpu"].nargs != 0  # a switch elsewhere is --device


def test_help_of_a_command_is_its_own(capsys):
    told = []
    for words in (["train", "--help"], ["help", "train"], ["help", "train", "--config"]):
        with pytest.raises(SystemExit):
            main(words)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] != overview()


@pytest.mark.parametrize("words", [["--help"], ["trian"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_quick(words):
    """Neither torch nor what takes long beside it is imported; for the overview nothing but the standard library is."""
    command = [sys.executable, "-X", "importtime", "-m", "megabus", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    imported = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines() if "|" in line}
    assert "megabus" in imported
    heavy = {"torch", "deepspeed", "matplotlib", "datasets", "transformers"}
    assert not imported & (heavy if len(words) > 1 else heavy | {"numpy", "pydantic", "yaml"})


@pytest.mark.parametrize(
    ("name", "words"),
    [("estimate", f"one of {', '.join(DEVICES)} "), ("convert", f"{{{','.join(tensor_file.DTYPES)}}}")],
)
def test_help_names_what_there_is(capsys, name, words):
    """Every device of the table, and every type that the writer has."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert words in " ".join(capsys.readouterr().out.split())


def test_unknown_commands():
    for name, remedy in (("trian", "did you mean train?"), ("evaluate_nli", "did you mean evaluate-nli?")):
        assert run_command(name) == (2, "", f"error: command = {name}: is no command; {remedy}\n")
    assert run_command("xyzzy").stderr == "error: command = xyzzy: is no command; see megabus --help\n"


def test_a_wrong_command_line_shows_the_words_of_the_command():
    done = run_command("plot", "--x", "miles", "two words")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: command line = --x miles 'two words': argument --x: invalid choice.*\n", done.stderr)


# ---- what is not installed ------------------------------------------------------------------------------------


def test_the_extras_are_those_of_the_project():
    for extra, modules in EXTRAS.items():
        listed = {re.match(r"[\w-]+", each)[0] for each in PROJECT["optional-dependencies"][extra]}
        assert set(modules.values()) <= listed


@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        ("wandb", ["train", "log.wandb=true"], "log.wandb = true: needs wandb: pip install megabus[wandb]; or set"),
        ("tensorboard", ["train", "log.tensorboard=true"], "log.tensorboard = true: needs tensorboard: pip install"),
        ("matplotlib", ["plot", "run"], "command = plot: needs matplotlib: pip install megabus[report]; "),
        ("jinja2", ["report", "run"], "command = report: needs jinja2: pip install megabus[report]; "),
        ("lm_eval", ["evaluate-nli", "run"], "command = evaluate-nli: needs lm_eval: pip install megabus[eval]; "),
        ("sklearn", ["evaluate-nli", "run"], "command = evaluate-nli: needs scikit-learn: pip install megabus[eval]; "),
        (
            "matplotlib",
            ["evaluate-nli", "run", "--out", "a"],
            "--out = a: needs matplotlib: pip install megabus[report]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_missing_extra_is_told_before_anything_is_written(tmp_path, monkeypatch, module, words, told):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("pairs.jsonl").write_text("")
    words = [words[0], *(["--config", "config.yaml"] if words[0] == "train" else []), *words[1:]]
    if words[0] == "evaluate-nli":
        words += ["--valid", "pairs.jsonl"]
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == module else find(name))
    monkeypatch.setattr("megabus.command.PATIENCE", 0)
    done = run_command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {told}")
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir()) == ["config.yaml", "pairs.jsonl"]


def test_only_the_rank_that_writes_needs_the_extras(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setattr("megabus.command.PATIENCE", 0)

    def reached(deterministic: bool) -> None:
        raise UserError("environment", "-", "was prepared", "-")

    monkeypatch.setattr("megabus.cli.train.prepare_environment", reached)
    monkeypatch.setenv("RANK", "1")
    words = ["--config", str(tmp_path / "config.yaml"), "log.wandb=true"]
    with pytest.raises(UserError, match="was prepared"):
        train.main(words)
    with pytest.raises(UserError, match="needs wandb"):
        train.main(["--nproc-per-node", "1", *words])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="needs wandb"):
        train.main(words)


def test_a_folder_is_no_extra(tmp_path, monkeypatch):
    """./wandb, which wandb itself writes runs to."""
    (tmp_path / "lonely").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(EXTRAS, "lonely", {"lonely": "lonely"})
    with pytest.raises(UserError, match="needs lonely"):
        extras.need("lonely", "log.lonely", "true")
    (tmp_path / "lonely/__init__.py").write_text("")
    invalidate_caches()
    extras.need("lonely", "log.lonely", "true")


def test_a_run_that_has_ended_is_not_to_be_started_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setattr("megabus.report.plots.summary_table", lambda run_dir: "the table")
    with pytest.raises(UserError) as told:
        train._show(str(tmp_path))
    assert str(told.value).endswith("pip install megabus[report]; the run is complete without it")
    assert "the table" in capsys.readouterr().out


# ---- the doors that clusters call -----------------------------------------------------------------------------

DOORS = ["launcher/train.py", "launcher/submit.py", "tools/convert.py", "tools/evaluate_nli.py", "tools/preprocess.py"]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_leads_to_its_command(door, monkeypatch):
    called = []
    monkeypatch.setattr("megabus.cli.entry", called.append)
    exec(compile((ROOT / door).read_text(), door, "exec"), {"__name__": "__main__"})
    assert called == [Path(door).stem.replace("_", "-")]
    assert set(called) <= COMMANDS.keys()
    assert len((ROOT / door).read_text().splitlines()) < 20


@pytest.mark.parametrize("door", DOORS)
def test_a_door_says_that_megabus_is_not_installed(door):
    command = [sys.executable, "-I", "-S", str(ROOT / door)]  # without site-packages
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: megabus is not installed: pip install -e .\n"


def test_no_program_changes_where_python_looks():
    folders = ("megabus", "launcher", "tools", "benchmarks", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [str(file) for file in files if re.search(r"\bsys\.path\b", file.read_text())] == []


# ---- ranks on this machine ------------------------------------------------------------------------------------

OF_LAUNCHERS = ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID")
HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def test_ranks_that_cannot_be_started(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ["train", "--config", tmp_path / "config.yaml", "--nproc-per-node"]
    for number in (0, -1):  # before the layout is held against it
        done = run_command(*words, str(number), "layout.tp=2")
        assert done.stderr.startswith(f"error: --nproc-per-node = {number}: is no number of processes")
    assert run_command(*words, "3", "layout.tp=2").stderr.startswith(
        "error: layout = tp 2 x pp 1: cannot fill the world of 3"
    )
    told = "error: --nproc-per-node = 1: is given to a rank that a launcher has started; leave it out\n"
    for name in OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(OF_LAUNCHERS, ("2", "0", "1f"), strict=True):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert run_command(*words, "1").stderr == told
    # Overrides may stand before flags.
    assert run_command("train", "layout.tp=2", *words[1:], "3").stderr.startswith("error: layout = tp 2 x pp 1: ")
    # An abbreviation would reach the ranks, and they would start ranks of their own.
    assert "unrecognized arguments: --nproc-per" in run_command(*words[:-1], "--nproc-per", "1").stderr


def launched(monkeypatch, launch) -> int:
    """The exit code of a launch that is `launch()`. All handlers are as before."""
    for name in OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_started", lambda *_: launch() or 0)
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        code = ranks.start_ranks(2, "train", [], "megabus")
        assert before == {number: signal.getsignal(number) for number in HANDLED}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_before_there_is_a_rank_ends_the_launch(monkeypatch, number):
    monkeypatch.setattr("psutil.Process.children", lambda self: [])
    assert launched(monkeypatch, lambda: signal.raise_signal(number)) == 128 + number


def test_a_second_signal_after_the_ranks_have_saved_changes_nothing(monkeypatch):
    told: list[int] = []
    here = [type("Rank", (), {"send_signal": lambda self, number: told.append(number)})()]
    monkeypatch.setattr("psutil.Process.children", lambda self: here)

    def launch() -> None:
        signal.raise_signal(signal.SIGINT)
        here.clear()
        signal.raise_signal(signal.SIGTERM)

    assert launched(monkeypatch, launch) == 0
    assert told == [signal.SIGINT]


def test_hanging_up(monkeypatch):
    """Ends the ranks, unless nohup has said that it should not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert launched(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP)) == 128 + signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert launched(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


RANKS = """
import os, signal, sys, time
from megabus.cli import ranks
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # shells let what they start in the background ignore it
def entry():
    out = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
    os.write(out, f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} in {os.getsid(0) == os.getpid()}\\n".encode())
    while len(open(sys.argv[2]).readlines()) < 3:
        time.sleep(0.05)
    {doing}
    os._exit(0)
ranks.entry = entry
print(ranks.start_ranks(3, "train", sys.argv[1:], "megabus.train.loop"))
"""


@pytest.mark.parametrize(
    ("doing", "code"),
    [
        ("pass", 0),
        ("os._exit(int(os.environ['RANK']) * 7) if os.environ['RANK'] == '2' else time.sleep(60)", 14),
        ("os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(60)", 128 + 9),
        ("os.kill(os.getppid(), signal.SIGQUIT) if os.environ['RANK'] == '0' else None; time.sleep(60)", 128 + 3),
        ("os.kill(os.getppid(), signal.SIGUSR1) if os.environ['RANK'] == '0' else None; time.sleep(60)", 128 + 10),
    ],
    ids=["all is well", "one ends", "one is killed", "ended at once", "asked, with none that listens"],
)
def test_how_ranks_end(tmp_path, doing, code):
    """Each in a session of its own; none is left, nor waited for longer than those that are asked may take."""
    (tmp_path / "program.py").write_text(RANKS.replace("{doing}", doing))
    (tmp_path / "out").write_text("")
    env = {name: value for name, value in environment().items() if name not in OF_LAUNCHERS}
    command = [sys.executable, tmp_path / "program.py", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{code}\n", "")
    assert sorted((tmp_path / "out").read_text().splitlines()) == [f"{rank} of 3 in True" for rank in range(3)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["preprocess", "README.md", "--tokenizer", "", "--out", "x"], "--tokenizer = '': names none"),
        (["preprocess", "README.md", "--train-tokenizer", "99999999999", "--out", "x"], "--train-tokenizer = 999"),
        (["preprocess", "README.md", "--train-tokenizer", "0", "--out", "x"], "--train-tokenizer = 0: is no number"),
        (["convert", "run", "x", "--to", "checkpoint", "--tp", "0"], "--tp = 0: is no number of ranks"),
        (["convert", "run", "x", "--to", "checkpoint", "--dp", "-1"], "--dp = -1: is no number of ranks"),
    ],
)
def test_a_number_that_is_none_is_refused_before_anything_is_read(capsys, words, told):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
