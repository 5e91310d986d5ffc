"""A saved model is the masters, bit for bit, from any layout; it is there whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import megabus
import megabus.checkpoint.save as saving
from megabus.checkpoint.load import load_model_config
from megabus.config import RunConfig, parse_config, resolve_stages
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape
from megabus.testing.ranks import run_ranks
from megabus.train.run import initial_fragments

V, T = 67, 12
PROGRESS = {"step": 1, "tokens": 96, "flops": 1e6, "stage": 0}

Slices = list[tuple[str, int, np.ndarray]]  # of a rank: parameter, first entry, entries


def run_config(layout: dict[str, int], kind: str = "ngpt", **options: Any) -> RunConfig:
    """Odd sizes, so that ZeRO's partitions cut rows and vocabulary shards differ; grouped query heads."""
    model = {"kind": kind, "vocab_size": V, "d_model": 37, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    model |= {"head_dim": 6, "d_ff": 62}
    train = {"seq_len": T, "micro_batch_size": 2, "global_batch_size": 8, "max_steps": 2}
    return parse_config(
        {
            "run_dir": "unused",
            "model": model,
            "layout": layout,
            "train": train | options.pop("train", {}),
            "optimizer": {"lr": 3e-2},
            "data": {"train": "unused", "valid": "unused"} | options,
        }
    )


def trained(config: RunConfig, world: int, steps: int = 1) -> Engine:
    """An engine whose masters are no round numbers, nor the initial ones."""
    engine = Engine(config, resolve_stages(config, world)[0])
    engine.write(initial_fragments(engine, seed=3))
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        samples = torch.randint(V, (8, T + 1), generator=draw)
        rows = [samples[engine.micro_rows(micro)] for micro in range(engine.stage.grad_accum)]
        engine.train_step([(row[:, :-1], row[:, 1:]) for row in rows] if engine.needs_data else [], lr=3e-2)
    return engine


def save_and_tell(config: RunConfig, world: int, folder: Path) -> Slices:
    """On every rank: train, save, and say which entries of the masters this rank holds."""
    engine = trained(config, world)
    saving.save_model(engine, config, folder, PROGRESS)
    return [(p.name, p.start, t["weight"].cpu().numpy().copy()) for p, t in engine.read().items()]


def assemble(config: RunConfig, ranks: list[Slices]) -> dict[str, torch.Tensor]:
    """The whole masters put together from what the ranks hold, without the code under test."""
    whole = {}
    for name, spec in param_specs(config.model).items():
        flat = np.full(np.prod(global_shape(spec, config.model)), np.nan, dtype=np.float32)
        for held, start, values in (piece for rank in ranks for piece in rank):
            if held == name:
                there = flat[start : start + len(values)]
                assert (np.isnan(there) | (there == values)).all()  # replicas agree
                there[:] = values
        assert not np.isnan(flat).any()
        whole[name] = torch.from_numpy(flat).view(global_shape(spec, config.model))
    return whole


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = torch.int32
    return a.keys() == b.keys() and all(a[k].view(bits).equal(b[k].view(bits)) for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good checkpoint of a single rank."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    run_ranks(1, save_and_tell, run_config({}), 1, folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


# ---- what is saved is what is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("ngpt", {"dp": 1}),
        ("ngpt", {"tp": 2, "pp": 2}),
        ("ngpt", {"tp": 2, "dp": 2}),
        ("ngpt", {"pp": 2, "dp": 2}),
        ("gpt", {"tp": 2, "dp": 2}),
    ],
    ids=str,
)
def test_loaded_weights_are_the_masters(tmp_path: Path, kind: str, layout: dict[str, int]) -> None:
    config, folder = run_config(layout, kind), tmp_path / "runs" / "checkpoint"
    world = int(np.prod(list(layout.values())))
    masters = assemble(config, run_ranks(world, save_and_tell, config, world, folder))
    model = megabus.load(folder)
    assert model.config == config.model
    assert not model.training
    assert same_bits(dict(model.state_dict()), masters)
    assert not same_bits(dict(megabus.build_model(config.model, seed=3).state_dict()), masters)  # control
    logits = model(torch.arange(2 * T).view(2, T))
    assert logits.shape == (2, T, V)
    assert logits.isfinite().all()
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_bf16_runs_save_their_fp32_masters(tmp_path: Path) -> None:
    config = run_config({"dp": 2}, train={"precision": "bf16"})
    masters = assemble(config, run_ranks(2, save_and_tell, config, 2, tmp_path / "checkpoint"))
    state = dict(megabus.load(tmp_path / "checkpoint").state_dict())
    assert same_bits(state, masters)
    assert not same_bits(state, {k: v.bfloat16().float() for k, v in state.items()})  # control: not rounded


def test_a_checkpoint_tells_its_run(saved: Path) -> None:
    tree = yaml.safe_load((saved / "config.yaml").read_text())
    assert tree["progress"] == PROGRESS
    assert parse_config(tree["run"]) == run_config({})


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    tokenizer = tmp_path / "a.model"
    tokenizer.write_bytes(b"pieces")
    run_ranks(1, save_and_tell, run_config({}, tokenizer=str(tokenizer)), 1, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint/tokenizer.model").read_bytes() == b"pieces"


# ---- whole or not at all -----------------------------------------------------------------------------------


def save_three_times(config: RunConfig, folder: Path, scratch: Path) -> list[dict[str, np.ndarray]]:
    """Save; train on and be killed in the middle of a second save; then save again. The masters each time."""
    engine, told = trained(config, 1), []

    def masters() -> dict[str, np.ndarray]:
        return {piece.name: t["weight"].numpy().copy() for piece, t in engine.read().items()}

    def killed(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == "layer-0001.safetensors":
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path)

    saving.save_model(engine, config, folder, PROGRESS)
    (folder / "stray").write_text("of the first")
    told.append(masters())
    train_on(engine)
    told.append(masters())
    saving.save_file = killed
    with pytest.raises(KeyboardInterrupt):
        saving.save_model(engine, config, folder, PROGRESS)
    shutil.copytree(folder.parent, scratch)
    saving.save_file = save_file
    saving.save_model(engine, config, folder, PROGRESS)
    return told


def train_on(engine: Engine) -> None:
    samples = torch.randint(V, (8, T + 1), generator=torch.Generator().manual_seed(9))
    engine.train_step([(s[:, :-1], s[:, 1:]) for s in samples.split(2)], lr=3e-2)


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value).reshape(-1) for name, value in state.items()}


def test_a_killed_save_leaves_the_last_one(tmp_path: Path) -> None:
    run, after_kill = tmp_path / "run", tmp_path / "after_kill"
    ((first, second),) = run_ranks(1, save_three_times, run_config({}), run / "checkpoint", after_kill)
    assert not same_bits(flat(first), flat(second))
    assert same_bits(flat(dict(megabus.load(after_kill / "checkpoint").state_dict())), flat(first))
    assert (after_kill / "checkpoint/stray").exists()  # not touched at all
    assert same_bits(flat(dict(megabus.load(run / "checkpoint").state_dict())), flat(second))
    assert not (run / "checkpoint/stray").exists()  # replaced whole, not written over
    assert [path.name for path in run.iterdir()] == ["checkpoint"]  # and nothing of the killed one is left


def test_a_first_save_that_is_killed_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", killed)  # the forked rank inherits it
    with pytest.raises(RuntimeError, match="No space left"):
        run_ranks(1, save_and_tell, run_config({}), 1, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


# ---- damage ------------------------------------------------------------------------------------------------

LAYER = "layer-0001.safetensors"
NAME = "layers.1.attn.q"


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / saving.INDEX).read_text())
    change(index)
    (folder / saving.INDEX).write_text(json.dumps(index))


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / LAYER)
    change(tensors)
    save_file(tensors, folder / LAYER)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda f: (f / "config.yaml").unlink(), "", "holds no config.yaml"),
    "config is no YAML": (lambda f: (f / "config.yaml").write_text("a: [1"), "config.yaml", "is damaged"),
    "config is binary": (lambda f: (f / "config.yaml").write_bytes(b"\xff\x00"), "config.yaml", "is damaged"),
    "config is empty": (lambda f: (f / "config.yaml").write_text(""), "config.yaml", "is damaged"),
    "config lacks the model": (
        lambda f: (f / "config.yaml").write_text("run: 1"),
        "config.yaml",
        "is damaged",
    ),
    "config has a wrong model": (
        lambda f: (f / "config.yaml").write_text("model: {d_model: x}"),
        "config.yaml",
        "is damaged",
    ),
    "no index": (lambda f: (f / saving.INDEX).unlink(), "", f"holds no {saving.INDEX}"),
    "index is cut": (lambda f: cut(f / saving.INDEX), saving.INDEX, "is damaged"),
    "index is binary": (lambda f: (f / saving.INDEX).write_bytes(b"\xff\xfe"), saving.INDEX, "is damaged"),
    "index is another's": (lambda f: edit_index(f, dict.clear), saving.INDEX, "is damaged"),
    "index is a list": (lambda f: (f / saving.INDEX).write_text("[]"), saving.INDEX, "is damaged"),
    "index lacks a name": (
        lambda f: edit_index(f, lambda index: index["weight_map"].pop(NAME)),
        saving.INDEX,
        f"lacks {NAME}",
    ),
    "no file": (lambda f: (f / LAYER).unlink(), LAYER, "is damaged"),
    "file is cut": (lambda f: cut(f / LAYER), LAYER, "is damaged"),
    "file is empty": (lambda f: (f / LAYER).write_bytes(b""), LAYER, "is damaged"),
    "file is another's": (lambda f: (f / LAYER).write_bytes(b"\x80\x04" * 99), LAYER, "is damaged"),
    "file lacks a name": (lambda f: edit_tensors(f, lambda t: t.pop(NAME)), LAYER, "is damaged"),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({NAME: torch.zeros(2, 2)})),
        LAYER,
        f"{NAME} has shape (2, 2), config.yaml says (24, 37)",
    ),
}


@pytest.mark.parametrize(("damage", "file", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told_in_one_line(
    checkpoint: Path, damage: Callable[[Path], object], file: str, problem: str
) -> None:
    megabus.load(checkpoint)  # control: it is good before
    damage(checkpoint)
    with pytest.raises(UserError) as caught:
        megabus.load(checkpoint)
    assert str(caught.value).startswith(f"checkpoint = {checkpoint / file}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml; give a directory that a run has saved"):
        load_model_config(tmp_path / "nowhere")


def test_loading_runs_no_pickle(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles can run code, so checkpoints hold none and loading reads none."""
    assert {path.suffix for path in checkpoint.iterdir()} == {".yaml", ".json", ".safetensors"}

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    with pytest.raises(AssertionError, match="unpickled"):
        torch.load(checkpoint / LAYER)  # control
    megabus.load(checkpoint)
    # A YAML tag that would build any Python object is damage, not an instruction.
    (checkpoint / "config.yaml").write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="is damaged"):
        megabus.load(checkpoint)
