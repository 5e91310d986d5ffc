"""`make gpu-check` on a CPU with tiny sizes, and what it makes of parts that fail or are late.

With `--gpu` (make test GPU=1) the same parts run on this machine's GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import attention, kernels, runs, software, speed, wheels
from benchmarks.gpu_check.part import DONE, Check, Part, PartResult, run_part
from benchmarks.kernels import Clock
from megabus.kernels import checked
from megabus.kernels.form import EAGER
from megabus.train import loop
from tests.support.forked import run_python

ROOT = Path(__file__).resolve().parents[2]
NEED_A_GPU = {
    "software": 1,
    "kernels": 1,
    "compiled": 1,
    "steps": 2,
    "growth": 1,
    "step_times": 1,
    "profile": 1,
    "attention": 2,
    "stall": 1,
}


def told_in(out):
    return {part.name: PartResult.read(out / f"{part.name}.json") for part in command.parts()}


def test_every_part_runs_on_a_cpu_and_says_what_it_cannot_see_there(tmp_path):
    done = run_python(["-m", "benchmarks.gpu_check", "--small", "--out", tmp_path / "out"], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = told_in(tmp_path / "out")
    for name, result in found.items():
        assert result.state == DONE
        assert result.rows
        needing = [row for row in result.rows if "need" in row[1] + row[0] and "GPU" in row[1] + row[0]]
        assert len(needing) == NEED_A_GPU.get(name, 0), name
        assert all(what in done.stdout and text in done.stdout for what, text, _ in result.rows)
    right = {name: sum(ok is True for *_, ok in result.rows) for name, result in found.items()}
    assert min(right[part.name] for part in command.parts() if part.decides) >= 3
    assert ("resumed", "every loss has the bits of the run that was left alone", True) in found["resume"].rows
    assert done.stdout.endswith("passed; nothing is recorded of tiny sizes\n")
    assert checked.RECORDS.read_text() == (ROOT / "megabus/kernels/checked_devices.json").read_text()
    for words, problem in ((["--only", "nothing"], "'nothing' is none of"), ([], "there is no GPU that torch can use")):
        wrong = run_python(["-m", "benchmarks.gpu_check", "--out", tmp_path, *words], cwd=ROOT)
        assert (wrong.returncode, problem in wrong.stderr) == (2, True)


@pytest.mark.gpu
def test_every_part_runs_on_a_gpu(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    env.pop("TRITON_INTERPRET")
    asked = [sys.executable, "-m", "benchmarks.gpu_check", "--small", "--out", str(tmp_path / "out")]
    done = subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any("needs a GPU" in text for result in told_in(tmp_path / "out").values() for _, text, _ in result.rows)


def fails(check):
    check.tell("first", 1, True)
    raise ValueError("this part\nis unwell")


def is_late(check):
    check.tell("first", 1, True)
    child = os.fork()
    (check.folder / "pid").write_text(str(child or os.getpid()))
    time.sleep(60)


def goes_on(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_killed(check):
    check.tell("first", 1, True)
    os.kill(os.getpid(), signal.SIGKILL)


def is_wrong(check):
    check.tell("first", "wrong", False)


def is_right(check):
    check.tell("first", "right", True)
    check.tell.facts["device"] = {"device": "NVIDIA X1", "torch": "2", "triton": "3", "kernels": "k"}


@pytest.mark.parametrize(
    ("job", "seconds", "state", "passes"),
    [
        (fails, 60, "failed: ValueError: this part is unwell", False),
        (is_late, 0.5, "out of time after 0 s", False),
        (is_killed, 60, "ended with exit code -9", False),
        (is_wrong, 60, DONE, False),
        (is_right, 60, DONE, True),
    ],
)
def test_what_a_part_told_counts_however_it_ends(tmp_path, job, seconds, state, passes):
    part = Part("one", job, seconds, decides=True)
    result = run_part(part, tmp_path, True, seconds)
    assert (result.state, part.passed(result)) == (state, passes)
    assert result.rows[0][0] == "first"
    assert PartResult.read(tmp_path / "one.json").state == state
    if job is fails:
        assert "in fails" in (tmp_path / "one.log").read_text()
    if job is is_late:  # what it has started is gone too
        deadline = time.monotonic() + 20
        while goes_on(int((tmp_path / "one/pid").read_text())):  # once killed, on a busy machine for a little longer
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_kernel_that_is_off_is_told(tmp_path):
    """By two percent: more than rounding to bf16 gives, less than a loss would show."""

    def gate(u, v, gain_u, gain_v):
        return EAGER.gate(u * 1.02, v, gain_u, gain_v)

    def cross_entropy_(raw, gain, *rest):
        return EAGER.cross_entropy_(raw, gain * 1.02, *rest)

    gates = {f"eager {name}, 64 x 96" for name in ("gate", "gate, gains")}
    for changes, wrong in (
        ({}, set()),
        ({"gate": gate}, gates),
        ({"cross_entropy_": cross_entropy_}, {"eager cross_entropy_, 64 x 67"}),
    ):
        form = replace(EAGER, **changes)
        result = PartResult(tmp_path / "kernels.json")
        check, device = Check(True, tmp_path, result), torch.device("cpu")
        kernels._one_size(check, form, device, kernels.SMALL[0], Clock(device), None)
        off = {what for what, _, ok in result.rows if ok is False}
        assert off == wrong


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_has_its_settings_before_it_touches_the_device(tmp_path, monkeypatch, deterministic):
    """cuBLAS reads its own when it is first used, and a deterministic run would then end at its first product."""
    check = Check(True, tmp_path, PartResult(tmp_path / "resume.json"))
    config = runs._config(check, runs.SMALL, "whole", deterministic)
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config))
    environ, found = {}, []
    monkeypatch.setattr("megabus.engine.startup.os.environ", environ)
    monkeypatch.setattr(runs, "start_distributed", lambda: found.append("CUBLAS_WORKSPACE_CONFIG" in environ))
    monkeypatch.setattr(loop, "train", lambda config: found.append(config.train.deterministic))
    monkeypatch.setattr(runs, "stop_distributed", lambda: None)
    runs._train(str(tmp_path / "whole.yaml"))
    assert found == [deterministic, deterministic]


@pytest.mark.parametrize("decides", [True, False])
@pytest.mark.parametrize(
    ("state", "ok", "bad"),
    [
        ("out of time after 45 s", None, False),
        ("left out: x", True, False),
        ("failed: x", True, True),
        (DONE, False, True),
    ],
)
def test_a_measurement_may_be_late_and_a_decision_may_not(tmp_path, decides, state, ok, bad):
    part = Part("one", is_right, 60, decides)
    found = {part: PartResult(tmp_path / "one.json", state, [("what", "text", ok)])}
    assert command._bad(found) == ["one"] * (bad or decides)
    assert ("NOT DONE" in command.table(found)) == (state != DONE and (bad or decides))
    wrong = PartResult(tmp_path / "one.json", state, [("what", "text", False)])
    assert command._bad({part: wrong}) == ["one"]


def test_an_attention_that_breaks_is_no_refusal(tmp_path, monkeypatch):
    check = Check(True, tmp_path, PartResult(tmp_path / "attention.json"))
    for text, refuses in (
        ("No available kernel. Aborting execution.", True),
        ("CUDA error: misaligned address", False),
    ):

        def fail(*_, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(attention, "_error", fail)
        if refuses:
            attention.attention(check)
            assert [row[1] for row in check.tell.rows if "need" not in row[1]] == [f"does not run: {text}"] * 2
        else:
            with pytest.raises(RuntimeError, match="misaligned"):
                attention.attention(check)


def test_a_command_that_hangs_is_told():
    assert software._answer(["echo", "H200"]) == "H200"
    assert "timed out" in software._answer(["sleep", "60"], 0.1)
    assert software._answer(["false"]).startswith("ends with 1")


def test_names_of_kernels_differ_where_the_kernels_do():
    names = ["void at::native::" + "elementwise" * 20 + end for end in ("<float>", "<double>")]
    assert len({speed.short(name) for name in names}) == 2
    assert all(len(speed.short(name)) <= 100 for name in names)
    assert speed.short("gemm") == "gemm"


def test_only_what_a_part_has_left_goes_before_it_runs_again(tmp_path):
    out = tmp_path / "out"
    for name in ("one", "other", "mine"):
        (out / name).mkdir(parents=True)
        for ending in (".json", ".new", ".log", ".txt"):
            (out / name / f"of{ending}").touch()
            (out / f"{name}{ending}").touch()
    kept = {path for path in out.rglob("*") if not path.is_relative_to(out / "one") and path.stem != "one"}
    for _ in range(2):  # the second time nothing of it is there
        command.clear(out, Part("one", is_right, 60, decides=True))
        assert set(out.rglob("*")) == kept | {out / "one.txt"}


def test_kinds_are_compared_in_the_same_micro_batches(tmp_path, monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", total_memory=48 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    check = Check(False, tmp_path, PartResult(tmp_path / "step_times.json"))
    arms = [speed._arm(check, "0.5b", kind, "eager") for kind in speed.KINDS]
    assert [arm.stage.model.kind for arm in arms] == ["ngpt", "gpt"]
    ngpt, gpt = ((arm.train.recompute, arm.stage.micro_batch_size, arm.stage.global_batch_size) for arm in arms)
    assert ngpt == gpt
    monkeypatch.setattr(speed, "_timed", lambda arm: (arm.stage.tokens_per_step * 2.0, None))
    assert speed._one_arm(check, "0.5b", "gpt", "eager") == 2.0


def test_a_part_without_time_is_left_out(tmp_path):
    result = run_part(Part("one", is_right, 60, decides=True), tmp_path, True, -1.0)
    assert result.state.startswith("left out")
    assert "left out" in command.table({Part("one", is_right, 60, decides=True): result})


def test_only_a_check_whose_deciding_parts_pass_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(checked, "RECORDS", tmp_path / "checked.json")
    checked.RECORDS.write_text("[]")
    right, slow = Part("right", is_right, 60, decides=True), Part("slow", is_wrong, 60, decides=False)
    wrong = Part("wrong", is_wrong, 60, decides=True)
    found = {part: run_part(part, tmp_path, True, 60) for part in (right, slow, wrong)}
    without = {part: found[part] for part in (right, slow)}

    def verdict(parts, found, counts=True):
        return command.verdict(parts, found, tmp_path, counts)

    assert verdict([right, slow, wrong], found).endswith("did not pass or did not run: wrong")
    assert verdict([right, slow, wrong], without).endswith("did not pass or did not run: wrong")
    assert "nothing is recorded" in verdict([right, slow], without, counts=False)
    assert json.loads(checked.RECORDS.read_text()) == []
    assert "recorded in" in verdict([right, slow], without)
    (entry,) = json.loads(checked.RECORDS.read_text())
    assert entry.pop("date")
    assert entry == found[right].facts["device"]
    monkeypatch.setattr(checked, "RECORDS", tmp_path / "none" / "checked.json")
    (tmp_path / "none").write_text("")  # as where the package lies in a folder that is not ours
    assert "cannot be written" in verdict([right, slow], without)
    assert json.loads((tmp_path / "record.json").read_text()) == entry


def test_wheels_are_all_that_the_check_needs_beside_torch():
    pinned = dict(wheels._pins())
    known = {wheels._plain(name) for name in (*wheels.PACKAGES, *wheels.BUILT)}
    assert known <= pinned.keys()
    for package in known:
        for requirement in requires(package) or []:
            if "extra ==" not in requirement:
                name = wheels._plain(re.match(r"[\w.-]+", requirement).group())
                assert name in known | {"torch", "colorama"}, f"{package} needs {requirement}"  # the last on Windows


def test_what_is_lacking_or_older_is_installed(tmp_path):
    for name in ("numpy-0.1", "numpy-99.0", "none_such-1.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    asked = ["-m", "benchmarks.gpu_check.wheels", "install", tmp_path, tmp_path / "site", "--dry-run"]
    done = run_python(asked, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "lacking here: none_such, numpy\n")
    assert not (tmp_path / "site").exists()
    (tmp_path / "numpy-99.0-py3-none-any.whl").unlink()
    (tmp_path / "none_such-1.0-py3-none-any.whl").unlink()
    assert run_python(asked, cwd=ROOT).stdout == "lacking here: nothing\n"
