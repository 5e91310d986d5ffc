"""Every form of weights converts to every other, bit for bit, streamed, whole or not at all."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import megabus
from megabus.checkpoint.manifest import MANIFEST, settle, write_manifest
from megabus.checkpoint.state import Progress
from megabus.checkpoint.store import checkpoints_of
from megabus.config import Layout
from megabus.convert import shard_files
from megabus.convert.changed import RowsMadeUnit, Untied
from megabus.convert.checks import Checks
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.convert.verify import verify
from megabus.errors import UserError
from megabus.model.params import shard_rows
from megabus.parallel.placement import Placement
from tests.support import altered
from tests.support.command import run_command
from tests.support.sources import MemorySource, model_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["ngpt", "gpt"])
def source(request):
    return MemorySource(model_config(request.param))


def same(a, b):
    return a.view(torch.int32).equal(b.view(torch.int32))


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 3, 1), (2, 1, 3), (1, 2, 5)], ids=str)
def test_a_checkpoint_of_any_layout(source, tmp_path, layout):
    """The shards are those that the layout's ranks would have written, and hold every bit, moments included."""
    convert(source, tmp_path / "out", "checkpoint", layout)
    with OpenFiles() as files:
        back = open_source(tmp_path / "out", files)
        assert back.state.layout == Layout(*layout)
        assert back.state.progress == source.state.progress
        assert (back.state.kinds, back.state.optimizer_step) == (source.state.kinds, 5)
        placement = Placement(source.state.model, source.state.layout)
        total = sum(placement.numel(name) for name in placement.specs)
        assert verify(source, back) == 3 * 4 * total
    loaded = dict(megabus.load(tmp_path / "out").state_dict())
    assert all(same(loaded[name], values) for name, values in source.weights().items())


def test_a_checkpoint_is_read_at_any_interval(source, tmp_path):
    """One that begins or ends inside of what a rank wrote too: large tensors are read in blocks."""
    convert(source, tmp_path / "out", "checkpoint", (2, 1, 3))
    with OpenFiles() as files:
        back = open_source(tmp_path / "out", files)
        for (kind, name), values in source.tensors.items():
            n = values.numel()
            for start, stop in ((0, n), (1, n), (n // 3, n // 3 + 1), (n // 2, n - 1)):
                assert same(back.read(kind, name, start, stop), source.read(kind, name, start, stop))


def test_torch_reads_a_converted_checkpoint_by_itself(source, tmp_path):
    """torch.distributed.checkpoint finds every interval by what is written in the files, and needs nothing of us."""
    convert(source, tmp_path / "out", "checkpoint", (2, 2, 2))
    (folder,) = checkpoints_of(tmp_path / "out").glob("step-*")
    state = {f"{kind}/{name}": torch.zeros(values.numel()) for (kind, name), values in source.tensors.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(same(state[f"{kind}/{name}"], t.reshape(-1)) for (kind, name), t in source.tensors.items())


def settled(folder):
    """After a change that was meant."""
    write_manifest(folder, [settle(file, 0) for file in folder.iterdir() if file.name != MANIFEST])


def test_verify_sees_one_bit(source, tmp_path):
    convert(source, tmp_path / "out", "shards", (2, 1, 1))
    path = tmp_path / "out" / shard_files.file_name(1, 0)
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("exp_avg_sq/"))
    tensors[key].view(torch.int32).view(-1)[3] ^= 1
    save_file(tensors, path)
    settled(tmp_path / "out")
    with OpenFiles() as files, pytest.raises(UserError, match=r"--verify = .*exp_avg_sq differs from the original"):
        verify(source, open_source(tmp_path / "out", files))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_shard_files_hold_what_each_rank_computes_with(source, tmp_path, tp, pp):
    model = source.state.model
    placement = Placement(model, Layout(tp, pp, 1))
    convert(source, tmp_path / "out", "shards", (tp, pp, 1))
    index = json.loads((tmp_path / "out/index.json").read_text())
    seen = set()
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            with safe_open(tmp_path / f"out/mp_rank_{tp_rank:02d}_{pp_rank:03d}.safetensors", framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    kind, name = key.split("/")
                    first, last = shard_rows(placement.specs[name], model, tp, tp_rank)
                    assert same(file.get_tensor(key), source.tensors[kind, name][first:last])
                    assert placement.pp_rank(name) == pp_rank
                    assert index["tensors"][key]["axes"] == list(placement.specs[name].axes)
                    seen.add(key)
    assert seen == {f"{kind}/{name}" for kind, name in source.tensors} == set(index["tensors"])


def test_there_and_back_through_every_form(source, tmp_path):
    """checkpoint -> shards -> checkpoint -> Hugging Face -> checkpoint: the weights' bits, and the run's numbers."""
    with OpenFiles() as files:
        convert(source, tmp_path / "a", "checkpoint", (2, 2, 1))
        convert(open_source(tmp_path / "a", files), tmp_path / "b", "shards", (1, 3, 1))
        convert(open_source(tmp_path / "b", files), tmp_path / "c", "checkpoint", (2, 1, 2))
        assert verify(source, open_source(tmp_path / "c", files)) > 0
        assert open_source(tmp_path / "c", files).state.progress == source.state.progress
        convert(open_source(tmp_path / "c", files), tmp_path / "d", "hf")
        convert(open_source(tmp_path / "d", files), tmp_path / "e", "checkpoint")
        back = open_source(tmp_path / "e", files)
        assert (back.state.kinds, back.state.model) == (("weight",), source.state.model)
        assert verify(source, back, kinds=("weight",)) > 0
        with pytest.raises(UserError, match="are not all tensors of the original"):
            verify(source, back)


def test_weights_only(source, tmp_path):
    convert(source, tmp_path / "a", "checkpoint")
    with OpenFiles() as files:
        convert(open_source(tmp_path / "a", files, weights_only=True), tmp_path / "b", "checkpoint", (2, 1, 1))
        state = open_source(tmp_path / "b", files).state
    assert (state.kinds, state.optimizer_step) == (("weight",), 0)


# What is changed of a run: the model that it is, and --weights-only beside it or not.
CHANGED = [(Untied, "gpt", {"tie_embeddings": True}), (RowsMadeUnit, "ngpt", {}), (None, "ngpt", {})]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(("change", "kind", "sizes"), CHANGED, ids=["untied", "unit rows", "as it is"])
def test_what_is_changed_of_a_run_is_read_back(tmp_path, change, kind, sizes, weights_only):
    """Untied it is a model that no run has had; else it stays the run's, and Adam counts anew."""
    altered.write_run(tmp_path / "run", kind, **sizes)
    with OpenFiles() as files:
        given = open_source(tmp_path / "run", files)
        longest, run = given.state.longest_sequence(), given.state.monitor
        source = open_source(tmp_path / "run", files, weights_only)
        source = source if change is None else change(source)
        for form, layout in (("checkpoint", (2, 1, 1)), ("shards", (1, 3, 1))):
            convert(source, tmp_path / form, form, layout)
            back = open_source(tmp_path / form, files)
            assert verify(source, back) > 0
            state, alone = back.state, weights_only or change is not None
            assert (state.kinds == ("weight",), state.optimizer_step == 0) == (alone, alone)
            assert state.longest_sequence() == longest
            if change is Untied:
                assert (state.progress, state.stage, state.monitor, state.data) == (Progress(), 0, {}, {})
            else:
                assert state.monitor == run
                assert state.progress.step == given.state.progress.step
                assert state.progress.since.optimizer_step == (0 if alone else altered.GROWN)


def test_bfloat16_rounds_once_and_verifies(source, tmp_path):
    with OpenFiles() as files:
        convert(source, tmp_path / "out", "hf", dtype="bfloat16")
        back = open_source(tmp_path / "out", files)
        assert verify(source, back, "bfloat16", ("weight",)) > 0
        with pytest.raises(UserError, match="differs"):
            verify(source, back, kinds=("weight",))


def test_errors_leave_nothing(source, tmp_path):
    (tmp_path / "there").mkdir()
    cases = [
        ({"out": tmp_path / "there"}, "out = .*exists"),
        ({"layout": (3, 1, 1)}, "--tp = 3: does not divide heads = 4|--tp = 3: does not divide ffn = 62"),
        ({"layout": (1, 4, 1)}, "--pp = 4: exceeds n_layers = 3"),
        ({"layout": (1, 1, 0)}, "--dp = 0: is below 1"),
    ]
    for options, told in cases:
        options = {"out": tmp_path / "out", "layout": (1, 1, 1)} | options
        with pytest.raises(UserError, match=told):
            convert(source, options["out"], "checkpoint", options["layout"])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with OpenFiles() as files:
        with pytest.raises(UserError, match=r"source = .*does not exist"):
            open_source(tmp_path / "nowhere", files)
        with pytest.raises(UserError, match=r"checkpoint = .*holds none"):
            open_source(tmp_path / "there", files)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / name).write_text("{}")
            told = "holds an adapter and no whole model; merge it into its model first"
            for call in (partial(open_source, folder, files), partial(megabus.load, folder)):
                with pytest.raises(UserError, match=told):
                    call()


def test_a_full_disk_leaves_nothing(source, tmp_path):
    class Breaks(MemorySource):
        def read(self, kind, name, start, stop):
            if name.startswith("layers.1."):
                raise OSError(28, "No space left on device")
            return super().read(kind, name, start, stop)

    (tmp_path / "out.partial").mkdir()  # somebody else's
    for form in ("checkpoint", "shards", "hf"):
        with pytest.raises(UserError, match="No space left on device"):
            convert(Breaks(source.state.model), tmp_path / "out", form)
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("form", ["checkpoint", "shards", "hf"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_source_is_named(source, tmp_path, form, damage):
    convert(source, tmp_path / "a", form, (2, 1, 1) if form != "hf" else (1, 1, 1))
    victim = max((tmp_path / "a").rglob("*.safetensors"))
    if damage == "missing":
        victim.unlink()
        if form == "hf":
            (victim.parent / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    else:
        os.truncate(victim, victim.stat().st_size - 1)
    with OpenFiles() as files, pytest.raises(UserError) as told:
        convert(open_source(tmp_path / "a", files), tmp_path / "out", "checkpoint")
    assert told.value.key in ("source", "weights", "checkpoint")
    assert told.value.value == (tmp_path / "a" if told.value.key == "weights" else victim)
    assert not (tmp_path / "out").exists()


def test_a_changed_shard_file_is_told(source, tmp_path):
    """Also a replica that no reading of the tensors would need, and a state of another model."""
    convert(source, tmp_path / "out", "shards", (2, 1, 1))
    for victim in ("mp_rank_00_000.safetensors", "mp_rank_01_000.safetensors", "state.json", "index.json"):
        path = tmp_path / "out" / victim
        good = path.read_bytes()
        path.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
        with OpenFiles() as files, pytest.raises(UserError, match=f"{victim}: is damaged"):
            open_source(tmp_path / "out", files)
        path.write_bytes(good)


def unnamed(path):
    """One tensor has another name, so that reading it fails before its file has been hashed."""
    path.write_bytes(re.sub(rb'("weight/[^"]*).":{', rb'\1?":{', path.read_bytes(), count=1))


def flipped(path):
    good = path.read_bytes()
    path.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])


@pytest.mark.parametrize("damage", [flipped, unnamed])
@pytest.mark.parametrize("form", ["checkpoint", "shards"])
def test_damage_that_is_found_while_its_file_is_converted(source, tmp_path, form, damage):
    convert(source, tmp_path / "a", form, (2, 1, 1))
    victim = min((tmp_path / "a").rglob("*.safetensors"))
    damage(victim)
    said = f"{victim.name}: is damaged \\(its BLAKE3"
    checks = Checks()
    with OpenFiles() as files:
        given = open_source(tmp_path / "a", files, checks=checks)
        with pytest.raises(UserError, match=said):
            convert(given, tmp_path / "out", "shards", checks=checks)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UserError, match=said):
        checks.wait()
    with pytest.raises(UserError, match=said), OpenFiles() as files:  # as without them
        open_source(tmp_path / "a", files)


def test_options_of_other_forms_are_refused(tmp_path):
    ended = run_command("convert", tmp_path, tmp_path / "b", "--to", "hf", "--tp", "2")
    assert (ended.returncode, ended.stderr) == (2, "error: --tp = 2: says nothing to --to hf; leave it out\n")


def test_an_index_with_gaps_is_told(source, tmp_path):
    convert(source, tmp_path / "out", "shards", (2, 1, 1))
    path = tmp_path / "out/index.json"
    tree = json.loads(path.read_text())
    key = next(key for key, entry in tree["tensors"].items() if len({str(s["rows"]) for s in entry["shards"]}) == 2)
    tree["tensors"][key]["shards"].pop()
    path.write_text(json.dumps(tree))
    write_manifest(
        tmp_path / "out", [settle(file, 0) for file in (tmp_path / "out").iterdir() if file.name != MANIFEST]
    )
    with OpenFiles() as files, pytest.raises(UserError, match=f"has gaps or overlaps in {key}"):
        verify(source, open_source(tmp_path / "out", files))


def test_the_command(tmp_path):
    convert(MemorySource(model_config("ngpt")), tmp_path / "a", "checkpoint")
    command = ["convert", tmp_path / "a", tmp_path / "b", "--to", "shards", "--tp", "2"]
    ended = run_command(*command, "--verify")
    assert ended.returncode == 0, ended.stderr
    assert re.match(r".*b: 401 kB in \S+ s, \S+ [kM]B/s\n", ended.stdout)
    assert "verified: 401 kB equal bit for bit, " in ended.stdout
    again = run_command(*command)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert again.stderr.startswith(f"error: out = {tmp_path / 'b'}: exists")
    assert checkpoints_of(tmp_path / "a").is_dir()
