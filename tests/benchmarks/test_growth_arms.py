"""The arms of the experiments that come along are what their names say, and no two are the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.growth.__main__ import main
from benchmarks.growth.experiment import Arm, Experiment, fingerprint, jobs, load_experiment, make_job
from benchmarks.growth.results import Results
from megabus.errors import UserError
from tests.support.growth_experiments import TWICE, arm, load, new_runner, result, spec, write

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/growth"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_hypercloning_is_hypercloning(name):
    """Clones of all rows, Adam's moments reset (Samragh et al. 2024); plain clones are plain on both sides."""
    experiment = load_experiment(FOLDER / f"{name}.yaml")
    for label, spec_ in experiment.arms.items():
        growth = make_job(experiment, label, 0, 1e-3, 1.0).config(Path("unused")).growth
        if "HyperCloning" in spec_.about:
            assert (growth.write, growth.read, growth.moments) == ("clone", "clone", "reset"), label
        elif "plain clones" in spec_.about:
            assert (growth.write, growth.read) == ("clone", "clone"), label
        if "read rows tilted" in spec_.about:
            assert growth.read == "tilt", label


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_two_arms_are_the_same(name):
    """But for their learning rates and budgets, which some differ in alone."""
    experiment = load_experiment(FOLDER / f"{name}.yaml")
    alike = {"scratch_slow"}
    digests = [make_job(experiment, label, 0, 1e-3, 1.0).digest for label in experiment.arms if label not in alike]
    assert len(set(digests)) == len(digests)


def test_an_arm_may_grow_by_auto(tmp_path):
    experiment = load(tmp_path, spec(arms={"scratch": arm(), "auto": arm(set={"growth": "auto"})}))
    assert len(make_job(experiment, "auto", 0, 1e-2, 1.0).config(tmp_path).growth.stages) > 0


@pytest.mark.parametrize("growth", [5, [1], {"stages": 5}, {"stages": [1, 2]}, {"stages": {"d_model": 3}}])
def test_a_growth_that_is_none_is_refused_in_words(tmp_path, growth):
    with pytest.raises(UserError, match=r"arms\.odd: (growth|model)"):
        load(tmp_path, spec(arms={"scratch": arm(), "odd": arm(set={"growth": growth}, caps=[0.5])}))


def test_a_result_is_of_its_token_files(tmp_path):
    """Of their contents, that is: a digest has their names only."""
    metas = {name: tmp_path / f"{name}.meta.json" for name in ("train", "valid")}

    def at_hand(**sha):
        for name, path in metas.items():
            path.write_text(json.dumps({"vocab_size": 67, "tokenizer_sha256": "", "n_tokens": 9} | sha.get(name, {})))
        fingerprint.cache_clear()
        return next(jobs(experiment, lambda _: None))

    experiment = load(tmp_path, spec(tmp_path))
    results = Results(tmp_path / "results.jsonl")
    job = at_hand(train={"bin_sha256": "a"}, valid={"bin_sha256": "b"})
    results.add(result(experiment, "scratch"))
    assert Results(results.path).get(job).data == job.data != ""
    other = at_hand(train={"bin_sha256": "a"}, valid={"bin_sha256": "c"})
    with pytest.raises(UserError, match="other token files"):
        Results(results.path).check(other)
    runner = new_runner(experiment, tmp_path)
    with pytest.raises(UserError, match="other token files"):  # before anything is started
        runner.run(1)
    assert runner.folder(job) != runner.folder(other)  # or what was trained on other text would go on
    unknown = at_hand(train={"bin_sha256": "a"})  # what cannot be known is not refused
    assert unknown.data == ""
    Results(results.path).check(unknown)


def test_every_key_of_an_experiment_is_explained():
    text = (FOLDER.parents[1] / "docs/growth_experiments.md").read_text()
    for key in {*Experiment.model_fields, *Arm.model_fields} - {"arms"}:
        assert re.search(rf"`(arms\.NAME\.)?{key}`", text), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"scratch": arm(seeds=[])}}, ["arms.scratch.seeds", "at least 1 item"]),
        ({"arms": {"scratch": arm(), "a,b": arm()}}, ["arms.a,b = a,b: is no name; use up to 64 letters"]),
        ({"arms": {"scratch": arm(caps=[0.2])}}, ["arms.scratch.caps", "does not grow"]),
        ({"arms": {"scratch": arm(set={"optimizer": {"lr": 5}})}}, ["arms.scratch: optimizer.lr = 5", "do nothing"]),
        ({"arms": {"scratch": arm(set={"train": {"seed": 5}})}}, ["arms.scratch: train.seed = 5", "do nothing"]),
        ({"name": "../x"}, ["name = ../x: is no name; use up to 64 letters"]),
        ({"arms": {"scratch": arm(lr=None)}}, ["arms.scratch.lr = {}: is not one rate; give a number"]),
        ({"arms": {"scratch": arm(lr={"tune": [1, 1]})}}, ["arms.scratch.lr.tune = [1.0, 1.0]: names one twice"]),
        ({"arms": {}}, ["arms = {}", "at least 1 item"]),
        ({"seeds": [0, -1]}, ["seeds.1 = -1", "greater than or equal to 0"]),
        ({"base": spec()["base"] | {"optimizer": "cosine"}}, ["optimizer = cosine: is no section of keys"]),
        ({"arms": {"scratch": arm(set={"train": 1})}}, ["arms.scratch: train = 1: is no section of keys"]),
        (
            {"arms": {"scratch": arm(set={"growth": {**TWICE, "max_flops": 9}}, caps=[0.2])}},
            ["arms.scratch: growth.max_flops = 9: would do nothing beside caps"],
        ),
        ({"extend": "x.yaml"}, ["extend = x.yaml: unknown key; did you mean extends?"]),
        ({"extends": 5}, ["extends = 5", "is no other file"]),
        ({"extends": "tiny.yaml"}, ["extends = tiny.yaml", "is no other file"]),
    ],
)
def test_what_is_odd_is_named(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, spec(**changes))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["report", "--results", "."], "--results = .*is no file of results"),
        (["report", "--results", "absent.jsonl"], "--results = .*holds no run"),
        (["report", "--out", __file__], "--out = .*File exists"),
        (["report", "--out", f"{__file__}/x"], "--out = .*Not a directory"),
        (["run", "--work", f"{__file__}/x"], "--work = .*Not a directory"),
        (["report"], "--results = .*holds no run that .*tiny.yaml asks for"),
        (["instants", "--only", "scratch"], "--results = .*holds no run that .*tiny.yaml asks for of scratch"),
        (["report", "--only", "scratch"], "--only"),
        (["list", "--only", "nobody"], "--only"),
        (["list", "--only", ""], "--only"),
        (["run", "--hours", "-1"], "--hours"),
        (["run", "--hours", "nan"], "--hours"),
    ],
)
def test_a_command_that_cannot_be_is_refused(tmp_path, monkeypatch, words, key):
    path, results = write(tmp_path, spec()), tmp_path / "results.jsonl"
    results.touch()
    given = [] if "--results" in words else ["--results", str(results)]
    monkeypatch.setattr("sys.argv", ["growth", words[0], str(path), *words[1:], *given])
    with pytest.raises(UserError, match=key):
        main()
