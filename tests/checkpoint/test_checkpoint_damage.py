"""Any damage of any file is seen, named and kept; a run goes on from the newest checkpoint that has none."""

from __future__ import annotations

import random
import shutil

import pytest
import torch.distributed as dist

import megabus
from megabus.checkpoint.manifest import DamagedError, read_manifest
from megabus.checkpoint.restore import find_checkpoint
from megabus.checkpoint.store import checkpoints_of, complete, folder_of, latest_of, step_of
from megabus.data.tokenizer import train_tokenizer
from megabus.testing.ranks import run_ranks
from tests.support import checkpoints as ck

SHARDS = [f"shard-{rank:05d}-model-{kind:05d}-of-00003.safetensors" for rank in (1, 2) for kind in (1, 2, 3)]
FILES = [*SHARDS, "state.json", "tokenizer.model", "manifest.json"]
NEWEST = "step-00000003"


@pytest.fixture(scope="module")
def run_and_states(tmp_path_factory):
    """A run's directory with checkpoints of steps 1, 2 and 3 by two ranks, and the whole state at each."""
    run = tmp_path_factory.mktemp("run")
    train_tokenizer(["the cat sees the dog"] * 9, 270, run / "a", model_type="bpe")
    config = ck.run_config({"tp": 2}, tokenizer=str(run / "a.model"))
    ranks = run_ranks(2, ck.saved_steps, checkpoints_of(run), config, 3, str(run / "a.model"))
    assert sorted(path.name for path in folder_of(checkpoints_of(run), 3).iterdir()) == sorted(FILES)
    return run, [ck.assembled(config, part) for part in zip(*ranks, strict=True)]


@pytest.fixture
def run(run_and_states, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(run_and_states[0], tmp_path / "run")


# ---- what may happen to a file: each is a change of the file's bytes, None being no file


def flip(data, place, bit):
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def flipped(places):
    """One random bit at each of these places, which are shares of the length, or counted from either end."""

    def damages(data, seed):
        draw = random.Random(seed)
        for place in places:
            at = int(place * len(data)) if isinstance(place, float) else place % len(data)
            yield f"bit of byte {at} flipped", flip(data, at, draw.randrange(8))

    return damages


def damages_of(root, file, seed):
    """(what, new bytes or None) of many damages of a file of the newest checkpoint."""
    data, draw = (root / NEWEST / file).read_bytes(), random.Random(seed)
    places = [0, 1, 7, 8, 9, 100, -1, 0.5, *(draw.random() for _ in range(4))]  # a shard's header begins at byte 8
    yield from flipped(places)(data, seed)
    yield "cut by a byte", data[:-1]
    yield "cut to half", data[: len(data) // 2]
    yield "emptied", b""
    yield "longer by a zero", data + b"\0"
    yield "longer by a line", data + b"\n"
    yield "all zeros", bytes(len(data))
    yield "deleted", None
    for other in (root / "step-00000002" / file, root / NEWEST / FILES[FILES.index(file) - 1]):
        if other.read_bytes() != data:  # the tokenizer is the same in all
            yield f"replaced by {other.relative_to(root)}", other.read_bytes()


def put(path, data):
    path.unlink() if data is None else path.write_bytes(data)


def names_it(text, path, what):
    """The message is about the file; or, where that has become another good manifest, about a file that is not its."""
    about = path.parent if what == "replaced by step-00000002/manifest.json" else path
    return text.startswith((f"checkpoint = {path}: is ", f"checkpoint = {about}")) and "\n" not in text


@pytest.mark.parametrize("file", FILES)
def test_a_plain_process_sees_any_damage(run, file):
    root = checkpoints_of(run)
    path, good = root / NEWEST / file, (root / NEWEST / file).read_bytes()
    megabus.load(run)  # control
    for what, new in damages_of(root, file, seed=1):
        put(path, new)
        for folder in (run, root / NEWEST):
            with pytest.raises(DamagedError) as caught:
                megabus.load(folder)
            assert names_it(str(caught.value), path, what), what
        path.write_bytes(good)
    megabus.load(run)


def test_any_bit_of_the_manifest_counts(run):
    folder = checkpoints_of(run) / NEWEST
    path, draw = folder / "manifest.json", random.Random(2)
    good, entries = path.read_bytes(), read_manifest(folder)
    for place in range(len(good)):
        path.write_bytes(flip(good, place, draw.randrange(8)))
        with pytest.raises(DamagedError, match=r"manifest\.json: is damaged"):
            read_manifest(folder)
    path.write_bytes(good)
    assert read_manifest(folder) == entries


def test_any_bit_of_latest_counts(run):
    root = checkpoints_of(run)
    good = (root / "latest").read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            (root / "latest").write_bytes(flip(good, place, bit))
            with pytest.raises(DamagedError, match="latest"):
                latest_of(root)
    (root / "latest").write_bytes(good)
    assert latest_of(root).name == NEWEST


def test_the_state_is_verified_before_it_is_read(run):
    """Else a damaged size, layout or format number would be believed."""
    path = checkpoints_of(run) / NEWEST / "state.json"
    good, draw = path.read_bytes(), random.Random(3)
    for place in [good.index(b'"format": ') + 10, *range(0, len(good), 5)]:
        path.write_bytes(flip(good, place, draw.randrange(8)))
        with pytest.raises(DamagedError, match=r"state\.json: is damaged"):
            megabus.load(run)


# ---- on ranks


def look(root, strict):
    """`find_checkpoint` on this rank: (its error, its stderr, what it found), and the disk before and after it."""
    before = ck.tree_of(root)
    dist.barrier()
    error, stderr, found = ck.outcome(find_checkpoint, root, strict)
    dist.barrier()
    return (error, stderr, found and (found.folder.name, found.state.progress.step)), before, ck.tree_of(root)


def look_at_each(root, strict, damages):
    """Every rank's `look` at each of the damages (path, bytes), each made alone."""
    told, latest = [], (root / "latest").read_bytes()
    for path, new in damages:
        dist.barrier()
        if dist.get_rank() == 0:
            good = path.read_bytes()
            put(path, new)
        dist.barrier()
        told.append(look(root, strict))
        dist.barrier()
        if dist.get_rank() == 0:
            for aside in root.glob("*.damaged"):
                aside.rename(aside.with_suffix(""))
            path.write_bytes(good)
            (root / "latest").write_bytes(latest)
    return told


def test_strict_ranks_refuse_any_damage_alike_and_change_nothing(run):
    root = checkpoints_of(run)
    damages = [(file, *damage) for file in FILES for damage in damages_of(root, file, seed=5)]
    assert len(damages) > 150
    ranks = run_ranks(2, look_at_each, root, True, [(root / NEWEST / file, new) for file, _, new in damages])
    for (file, what, _), first, second in zip(damages, *ranks, strict=True):
        ((kind, text), stderr, found), before, after = first
        assert kind == "DamagedError", (file, what)
        # Another checkpoint's manifest is whole: only `latest`, which holds this one's hash, tells them apart.
        swapped = file == "manifest.json" and what.startswith("replaced") and what.endswith("manifest.json")
        named = "latest" if swapped else f"{NEWEST}/{file}"
        assert names_it(text, root / named, what), (file, what)
        assert second[0] == ((kind, text), "", None), (file, what)
        assert (stderr, found) == ("", None)
        assert after == before, (file, what)


def test_other_ranks_go_on_from_the_checkpoint_before_and_keep_the_damaged_one(run):
    root = checkpoints_of(run)
    damages = [(file, *damage) for file in FILES for damage in list(damages_of(root, file, seed=6))[::2]]
    assert len({what for _, what, _ in damages if "byte" not in what}) >= 4
    ranks = run_ranks(2, look_at_each, root, False, [(root / NEWEST / file, new) for file, _, new in damages])
    for (file, what, _), (seen, before, after), *others in zip(damages, *ranks, strict=True):
        error, warned, found = seen
        assert (error, found) == (None, ("step-00000002", 2)), (file, what)
        *_, told, aside = warned.splitlines()
        assert all(line.startswith("warning: ") for line in warned.splitlines())
        assert names_it(told.removeprefix("warning: "), root / NEWEST / file, what), (file, what)
        assert aside == f"warning: {root / NEWEST} is set aside as {NEWEST}.damaged; step-00000002 is used instead"
        moved = {name.replace(NEWEST, f"{NEWEST}.damaged"): stat for name, stat in before.items()}
        assert after.pop("latest") != moved.pop("latest")
        assert after == moved, (file, what)  # all that was there is there, the damaged file as it was
        for other, *_ in others:
            assert other == (None, "", found)  # rank 0 alone tells


@pytest.mark.parametrize("strict", [True, False])
def test_ranks_see_any_damage_of_latest_and_mend_it(run, strict):
    root = checkpoints_of(run)
    good = (root / "latest").read_bytes()
    older = good.replace(b"step-00000003", b"step-00000002")
    bad = [*(new for _, new in flipped(range(0, len(good), 5))(good, 7)), b"", good[:-1], good + b"\n", None, older]
    ranks = run_ranks(2, look_at_each, root, strict, [(root / "latest", new) for new in bad])
    problem = f"checkpoint = {root / 'latest'}: is missing, damaged, or names a checkpoint that is; "
    for (seen, before, after), (other, *_) in zip(*ranks, strict=True):
        error, warned, found = seen
        if strict:
            assert error[0] == "DamagedError"
            assert error[1].startswith(problem)
            assert (warned, found) == ("", None)
            assert after == before
        else:
            assert (error, found) == (None, (NEWEST, 3))
            assert warned.startswith(f"warning: {problem}")
            assert after.pop("latest")[1] == len(good)
            assert after.items() <= before.items()
        assert other == (error, "", found)
    assert latest_of(root).name == NEWEST


@pytest.mark.parametrize("strict", [True, False])
def test_a_good_directory_is_left_as_it_is(run, strict):
    """The control for the tests above."""
    for seen, before, after in run_ranks(2, look, checkpoints_of(run), strict):
        assert seen == (None, "", (NEWEST, 3))
        assert before == after


@pytest.mark.parametrize("good", [1, 2])
def test_what_is_loaded_instead_is_what_was_saved_then(run_and_states, run, good):
    root, config = checkpoints_of(run), ck.run_config({"dp": 3})
    for step in range(good + 1, 4):
        put(folder_of(root, step) / SHARDS[step], b"not a shard")
    ranks = run_ranks(3, ck.loaded, root, config)
    state = ck.assembled(config, [told for told, _ in ranks])
    assert ck.same(state, run_and_states[1][good - 1])
    assert {step for _, step in ranks} == {good}
    assert [step_of(folder) for folder in complete(root)] == list(range(good, 0, -1))
    assert latest_of(root) == folder_of(root, good)
    aside = sorted(path.name for path in root.glob("*.damaged"))
    assert aside == [f"{folder_of(root, step).name}.damaged" for step in range(good + 1, 4)]


def test_the_same_step_damaged_again_is_set_aside_beside_the_first(run):
    root = checkpoints_of(run)
    shutil.copytree(root / NEWEST, root / f"{NEWEST}.damaged")
    put(root / NEWEST / "state.json", b"{}")
    for rank, ((error, warned, found), _, _) in enumerate(run_ranks(2, look, root, False)):
        assert (error, found) == (None, ("step-00000002", 2))
        assert (f"set aside as {NEWEST}.damaged-1;" in warned) if rank == 0 else (warned == "")
    assert (root / f"{NEWEST}.damaged-1/state.json").read_bytes() == b"{}"
    assert len((root / f"{NEWEST}.damaged/state.json").read_bytes()) > 1000


def test_a_checkpoint_that_is_gone_altogether(run):
    root = checkpoints_of(run)
    shutil.rmtree(root / NEWEST)
    for (error, _, _), before, after in run_ranks(2, look, root, True):
        assert error[0] == "DamagedError"
        assert error[1].startswith(f"checkpoint = {root / 'latest'}: ")
        assert before == after
    for seen, _, _ in run_ranks(2, look, root, False):
        assert seen[2] == ("step-00000002", 2)
    assert latest_of(root).name == "step-00000002"


def test_all_gone_but_latest(run):
    root = checkpoints_of(run)
    for folder in complete(root):
        shutil.rmtree(folder)
    for (error, _, _), _, _ in run_ranks(2, look, root, True):
        assert error[0] == "DamagedError"
        assert error[1].startswith(f"checkpoint = {root / 'latest'}: ")


@pytest.mark.parametrize("strict", [True, False])
def test_where_all_are_damaged_nothing_is_touched(run, strict):
    root = checkpoints_of(run)
    for step, file in ((1, SHARDS[0]), (2, "manifest.json"), (3, "state.json")):
        put(folder_of(root, step) / file, b"?")
    for number, ((error, warned, _), before, after) in enumerate(run_ranks(2, look, root, strict)):
        if strict:
            assert error[0] == "DamagedError"
            assert error[1].startswith(f"checkpoint = {root / NEWEST / 'state.json'}: is damaged")
        else:
            remedy = "restore one, or start anew in another run_dir"
            assert error == ("UserError", f"checkpoint = {root}: holds no good one (3 damaged); {remedy}")
        assert before == after
        assert len(warned.splitlines()) == (0 if strict or number else 3)


def test_a_checkpoint_under_anothers_name(run):
    """Every file is what its manifest says, and yet step 2 is not step 3: later saves would be taken for older."""
    root = checkpoints_of(run)
    shutil.rmtree(root / NEWEST)
    folder_of(root, 1).rename(root / NEWEST)
    for (error, _, found), _, _ in run_ranks(2, look, root, False):
        assert (error, found) == (None, ("step-00000002", 2))
