"""What is read of YAML files, and what is said of keys that are wrong in them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import AfterValidator, BaseModel, ValidationError

from megabus.config import load_config
from megabus.config.read import described, read_tree
from megabus.errors import UserError
from tests.support.tiny_config import BASE


def write(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def read(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return read_tree(path, "--config", "y.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", "a = 3"),
        ("a: {x: 1, y: 2, x: 1}\n", "a.x = 1"),
        ("a:\n- {x: 1}\n- x: 1\n  x: {y: 2}\n", "a.1.x = (a section)"),
        ("1: a\n1: b\n", "1 = b"),
        ("b: &b {x: 1}\nc: {<<: *b, <<: *b}\n", "c.<< = (a section)"),
        ("b: {z: 1, z: 1}\na: 0100\n", "b.z = 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, told: str) -> None:
    """PyYAML alone takes the last and says nothing."""
    with pytest.raises(UserError, match=f"^{re.escape(told)}: stands twice; delete one of the two$"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("? [1]\n: a\n", "line 1, column 3: while constructing a mapping, found unhashable key"),
        ("a: [1\nb: 2", "line 2, column 2: "),
        ("a: 2024-13-45\n", "month must be"),
        ("[" * 9000, "recursion"),
        ("a: \x00", "special characters"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=r"^--config = .*x\.yaml: not valid YAML") as refused:
        read(tmp_path, text)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "was"),
    [
        ("0100", "64"),
        ("-017", "-15"),
        ("0_17", "15"),
        ("1:30", "90"),
        ("12:30:45", "45045"),
        ("-1:30", "-90"),
        ("1:30.5", "90.5"),
        ("+0100", "64"),
    ],
)
def test_numbers_that_yaml_1_1_reads_otherwise_are_refused(tmp_path: Path, text: str, was: str) -> None:
    told = f" = {text}: is {was} in YAML 1.1; write the number that is meant, or quote it"
    for given, key in (
        (f"a: {text}\n", "a"),
        (f"a: {{b: [1, {text}]}}\n", "a.b.1"),
        (f"x: {{{text}: 1}}", f"x.{text}"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(key + told)}$"):
            read(tmp_path, given)
    for override, key in ((f"train.max_steps={text}", "train.max_steps"), (f"model={{d_ff: {text}}}", "model.d_ff")):
        with pytest.raises(UserError, match=f"^{re.escape(key + told)}$"):
            load_config(write(tmp_path), [override])


def test_numbers_that_mean_one_thing_are_read(tmp_path: Path) -> None:
    texts = {"100": 100, "0": 0, "-0": 0, "0x10": 16, "1_000": 1000, "0.10": 0.1, "00.5": 0.5, "'0100'": "0100"}
    for text, value in texts.items():
        assert read(tmp_path, f"a: {text}\n") == {"a": value}


PATHS = ("run_dir", "init_from", "data.valid", "data.tokenizer", "data.train.0.path")


def test_no_path_holds_a_nul(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    with pytest.raises(UserError, match=r"run_dir = .*: holds a NUL"):
        load_config(path, [r'run_dir="a\0b"'])


@pytest.mark.parametrize("key", PATHS)
def test_homes_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("LATIN", os.fsdecode(b"/caf\xe9"))
    path = write(tmp_path)

    def value(given: str) -> str:
        found: Any = load_config(path, ["data.train=[{path: a}]", f"{key}={given}"]).model_dump()
        for part in key.split("."):
            found = found[int(part) if part.isdecimal() else part]
        return found

    written = {"~/x": "/home/me/x", "'~'": "/home/me", "$SCRATCH/x": "/scratch/x", "a/${SCRATCH}b": "a//scratchb"}
    for given, read_as in (written | {same: same for same in ("a~/x", "./~", "a$/b", "5$", "x y")}).items():
        assert value(given) == read_as
    for given, told in (
        ("$NOWHERE/x", "names the variable NOWHERE, which is not set; set it, or write the path out"),
        ("${NOWHERE}", "names the variable NOWHERE"),
        ("$EMPTY/x", "names the variable EMPTY"),  # or a path would begin at the root
        ("~no-one/x", "begins with a home that is not known; write the path out"),
        ("$LATIN/x", "is '/caf\\udce9/x', which is not UTF-8; give the directory another name"),
    ):
        with pytest.raises(UserError) as refused:
            value(given)
        assert str(refused.value).startswith(f"{key} = {given}: {told}")


def test_the_first_corpus_is_a_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(write(tmp_path), ["data.train=~/x"]).data.train_corpora == [(["/home/me/x"], 1.0)]


@pytest.mark.parametrize(
    "text",
    [
        "a: {x: 1}\nb: {x: 1}\n",
        "base: &b {x: 1, y: 2}\nc: {<<: *b, x: 3}\n",
        "one: &1 {x: 1}\ntwo: &2 {y: 1}\nc: {<<: [*1, *2]}\n",
        "a: [{x: 1}, {x: 2}]\n",
        "a: &a {x: 1}\nfirst:\n  inner: &b {<<: *a, x: 3}\nsecond: {<<: *b, y: 1}\n",
    ],
)
def test_what_is_read_is_what_pyyaml_reads(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == yaml.safe_load(text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, told in ((tmp_path, "is no regular file"), (tmp_path / "none", "no such file")):
        with pytest.raises(UserError, match=r"^--config = ") as refused:
            read_tree(path, "--config", "y.yaml")
        assert told in str(refused.value)


class Leaf(BaseModel, extra="forbid"):
    size: int = 1
    about: str


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("is odd; give an even number")
    return value


def _bad(_: int) -> int:
    raise ValueError("is bad")


class Root(BaseModel, extra="forbid"):
    leaves: dict[str, Leaf] = {}
    rows: list[Leaf] = []
    leaf: Leaf | int = 1
    even: Annotated[int, AfterValidator(_even)] = 2
    either: int | str = 1
    lists: int | list[int] = 1
    bad: Annotated[int, AfterValidator(_bad)] = 2


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"leaves": {"size": {"about": "x", "sizes": 2}}}, "leaves.size.sizes = 2: unknown key; did you mean size?"),
        ({"leaves": {"b": {"about": "x", "zz": 2}}}, "leaves.b.zz = 2: unknown key; known keys here: about, size"),
        ({"leaves": {"b": {}}}, "leaves.b.about = (missing): this key is needed; add it"),
        ({"leaves": {"b": 3}}, "leaves.b = 3: is no section of keys; give its keys (about, size)"),
        ({"leaves": 3}, "leaves = 3: is no section of keys; give names and values"),
        (
            {"leaf": "x"},
            "leaf = x: Input should be a valid dictionary or instance of Leaf, or: Input should be a valid int",
        ),
        ({"lists": [1, "x"]}, "lists.1 = x: Input should be a valid integer"),
        ({"leaves": {"b": {"abuot": 1}}}, "leaves.b.abuot = 1: unknown key; did you mean about?"),
        ({"leafs": {}}, "leafs = {}: unknown key; did you mean leaf?"),
        ({"rows": [{"about": "x"}, {"about": "x", "size": "y"}]}, "rows.1.size = y: "),
        ({"leaf": {"about": "x", "size": "y"}}, "leaf.size = y: "),
        ({"bad": 3}, "bad = 3: is bad; give another value"),
        ({"even": 3}, "even = 3: is odd; give an even number"),
        (
            {"either": []},
            "either = []: Input should be a valid integer, or: Input should be a valid string; give a value",
        ),
    ],
)
def test_the_key_is_named_as_it_stands_in_the_file(tree: dict, told: str) -> None:
    with pytest.raises(ValidationError) as error:
        Root.model_validate(tree)
    assert str(described(error.value, Root)).startswith(told)


DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


@pytest.mark.parametrize(
    ("overrides", "undone"),
    [
        (["growth.write=clone", "growth={}"], "growth = {}: would undo growth.write=clone, which comes before; leave"),
        (["growth.write=clone", "growth=auto"], "growth = auto: would undo growth.write=clone"),
        (["growth.stages.0.lr=1", "growth.stages=[]"], "growth.stages = []: would undo growth.stages.0.lr=1"),
        (["growth.stages.0.lr=1", "growth={}", "growth={stages: []}"], "growth = {stages: []}: would undo"),
        (["train.seed=1", "train=3"], "train = 3: would undo train.seed=1"),
        (["train.seed=1", "train=[3]"], "train = [3]: would undo train.seed=1"),
    ],
)
def test_a_section_does_not_undo_a_key_of_its_own(overrides: list[str], undone: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(DEMO, overrides)
    assert str(refused.value).startswith(undone)


def test_a_section_that_leaves_a_key_as_it_was_undoes_nothing() -> None:
    assert load_config(DEMO, ["growth={}", "growth.write=clone"]).growth.write == "clone"
    assert load_config(DEMO, ["growth.write=clone", "growth={write: clone}"]).growth.write == "clone"
    assert load_config(DEMO, ["growth.write=clone", "growth={}", "growth.write=clone"]).growth.write == "clone"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.train=[a, b]", "data.train.0.weight=2"], "data.train.0 = a: is a value, not a section"),
        (["growth.stages=[1]", "growth.stages.0.lr=5"], "growth.stages.0 = 1: is a value, not a section"),
        (["growth.stages.².lr=3"], "growth.stages.².lr = ²: is no index"),
        (["train.seed=!!bool x"], "train.seed = !!bool x: is not a YAML value"),
        (["train.seed=!!int ''"], "train.seed = !!int '': is not a YAML value"),
        (["train.seed=!!timestamp x"], "train.seed = !!timestamp x: is not a YAML value"),
    ],
)
def test_an_override_that_leads_nowhere(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(DEMO, overrides)
    assert str(refused.value).startswith(told)


def test_an_entry_that_is_null_becomes_a_section() -> None:
    config = load_config(DEMO, ["growth.stages=[null]", "growth.stages.0.n_layers=9"])
    assert config.growth.stages[0].n_layers == 9


def test_a_path_that_none_can_have() -> None:
    with pytest.raises(UserError, match="is no path"):
        load_config("a\0b")


def test_aliases_do_not_grow_in_what_is_told(tmp_path: Path) -> None:
    """Nine lists of nine of the one before: 9^9 texts, were they written out."""
    lines = ["- &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"- &{after} [{', '.join([f'*{before}'] * 9)}]" for before, after in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    text = BASE.replace("run_dir: runs/test", "run_dir:\n" + "\n".join(lines))
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^run_dir = \[.*: Input should be a valid string") as caught:
        load_config(tmp_path / "run.yaml")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ('run_dir="\\ud800"', "cannot be a file's name here"),
        ("data.train=[]", "List should have at least 1 item"),
        ("model.rope_theta=1e-320", "greater than or equal to 1"),
        ("model.rope_scaling={kind: linear, factor: 1e-320}", "greater than or equal to 1"),
        ("model.rope_scaling={kind: llama3, factor: 2, low_freq_factor: 4}", "has no ramp between its factors; set"),
        ("model.rope_scaling={kind: yarn, factor: 2, beta_fast: 1}", "has no ramp between its turns; set beta_fast"),
    ],
)
def test_what_nothing_can_be_made_of_is_refused(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(write(tmp_path), [override])
