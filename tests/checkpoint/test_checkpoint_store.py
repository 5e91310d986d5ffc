"""The directory of a run's checkpoints: names, the order of what becomes durable, what is kept, and kills anywhere."""

from __future__ import annotations

import itertools
import pickle
import shutil

import pytest

from megabus.checkpoint.manifest import DamagedError, Entry, check_file, read_manifest, settle, write_manifest
from megabus.checkpoint.store import (
    begin,
    complete,
    folder_of,
    latest_of,
    partial_of,
    point_latest,
    prune,
    publish,
    remove,
    set_aside,
    step_of,
    sweep,
)
from megabus.errors import UserError
from tests.support.disk_faults import cut_power, kill, log_of, struck

RANKS = 2


def contents(step, rank):
    return f"{step}.{rank} ".encode() * 50


def write_parts(root, step):
    """A directory as it is before it is published."""
    partial, entries = begin(root, step), []
    for rank in range(RANKS):
        path = partial / f"shard-{rank}"
        path.write_bytes(contents(step, rank))
        entries.append(settle(path, rank))
    return partial, entries


def put(root, step, keep_last=9, keep_every=None):
    folder = publish(*write_parts(root, step))
    prune(root, keep_last, keep_every)
    return folder


def check(folder):
    """The checkpoint is whole, and is the one that its name says."""
    entries = read_manifest(folder)
    for entry in entries:
        check_file(folder, entry)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "shard-0", "shard-1"]
    assert [(folder / f"shard-{rank}").read_bytes() for rank in range(RANKS)] == [
        contents(step_of(folder), rank) for rank in range(RANKS)
    ]


def steps(root):
    return [step_of(folder) for folder in complete(root)]


def names(root):
    return sorted(path.name for path in root.iterdir())


# ---- names


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000000", 0),
        ("step-00000120", 120),
        ("step-123456789", 123456789),
        ("step-0000120", None),
        ("step-00000120.partial", None),
        ("step-00000120.damaged", None),
        ("step-00000120.damaged-1", None),
        ("step-00000120.deleted", None),
        ("a-step-00000120", None),
        ("latest", None),
        ("step-000000120", None),  # a step has one name
        ("step-\u0660\u0660\u0660\u0660\u0660\u0661\u0662\u0660", None),  # digits too, elsewhere
        ("step-00000120\n", None),
    ],
)
def test_only_complete_ones_have_a_checkpoints_name(tmp_path, name, step):
    (tmp_path / name).mkdir()
    assert step_of(tmp_path / name) == step
    assert steps(tmp_path) == ([] if step is None else [step])
    if step is not None:
        assert folder_of(tmp_path, step).name == name


def test_the_newest_is_the_one_with_the_largest_step(tmp_path):
    assert steps(tmp_path / "nowhere") == []
    for step in (99999999, 5, 100000000, 40):  # nine digits, which sort before eight as text
        put(tmp_path, step)
    assert steps(tmp_path) == [100000000, 99999999, 40, 5]


# ---- publish, latest


def test_a_published_checkpoint(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    partial, entries = write_parts(root, 3)
    assert steps(root) == []
    folder = publish(partial, entries)
    assert folder == folder_of(root, 3) == latest_of(root)
    check(folder)
    assert read_manifest(folder) == entries
    assert names(root) == ["latest", "step-00000003"]
    assert (root / "latest").read_text().split()[0] == "step-00000003"


def test_begin_gives_an_empty_directory(tmp_path):
    (partial_of(tmp_path, 3) / "deep").mkdir(parents=True)
    (partial_of(tmp_path, 3) / "shard-9").write_text("of a killed run")
    assert list(begin(tmp_path, 3).iterdir()) == []


@pytest.mark.parametrize("other", [None, b"", contents(3, 1)[:-1], contents(3, 1) + b" "])
def test_no_checkpoint_appears_where_rank_0_sees_other_files(tmp_path, other):
    old = put(tmp_path, 2)
    partial, entries = write_parts(tmp_path, 3)
    if other is None:
        (partial / "shard-1").unlink()
    else:
        (partial / "shard-1").write_bytes(other)
    with pytest.raises(OSError, match=r"shard-1(.*where rank 1 wrote it|')"):
        publish(partial, entries)
    assert complete(tmp_path) == [old]
    assert latest_of(tmp_path) == old


def test_a_manifest_is_the_same_in_whatever_order_ranks_answer(tmp_path):
    _, entries = write_parts(tmp_path, 1)
    texts = {write_manifest(tmp_path, order).read_bytes() for order in itertools.permutations(entries)}
    assert len(texts) == 1
    assert read_manifest(tmp_path) == entries
    write_manifest(tmp_path, [])
    assert read_manifest(tmp_path) == []


def test_settle_measures(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert settle(tmp_path / "a", 7) == Entry("a", 3, digest, 7)


LATEST = [
    None,
    "",
    "step-00000001",
    "step-00000001 {}",
    "step-00000001 {}\n\n",
    "step-00000001  {}\n",
    "{}\n",
    "\0 {}\n",
]
LATEST += ["step-00000009 {}\n", "step-00000001.partial {}\n", "step-00000002 {}\n", "../x/step-00000001 {}\n"]


@pytest.mark.parametrize("text", LATEST)
def test_a_latest_that_names_no_good_one_is_damaged(tmp_path, text):
    put(tmp_path, 2)
    put(tmp_path, 1)
    good = (tmp_path / "latest").read_text()
    assert latest_of(tmp_path) == folder_of(tmp_path, 1)  # control
    if text is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(text.format(good.split()[1]))
    with pytest.raises(DamagedError, match="latest: is missing, damaged, or names a checkpoint that is"):
        latest_of(tmp_path)
    point_latest(folder_of(tmp_path, 1))
    assert (tmp_path / "latest").read_text() == good


def test_a_latest_that_is_right_is_not_written_again(tmp_path):
    folder = put(tmp_path, 2)
    before = (tmp_path / "latest").stat()
    point_latest(folder)
    assert (tmp_path / "latest").stat().st_ino == before.st_ino


def test_damage_that_another_rank_tells_has_the_same_text(tmp_path):
    for error in (DamagedError(tmp_path / "a"), DamagedError(tmp_path / "a", "is missing", "look for it")):
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), str(twin), twin.remedy) == (DamagedError, str(error), error.remedy)
        assert isinstance(twin, UserError)


# ---- what is kept


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [9]),
        (2, None, [9, 8]),
        (3, None, [9, 8, 6]),
        (99, None, [9, 8, 6, 5, 4, 3, 0]),
        (1, 3, [9, 6, 3, 0]),
        (2, 4, [9, 8, 4, 0]),
        (1, 1, [9, 8, 6, 5, 4, 3, 0]),
    ],
)
def test_prune_keeps_the_last_and_every_nth(tmp_path, keep_last, keep_every, kept):
    for step in (5, 3, 0, 4, 8, 6, 9):
        put(tmp_path, step)
    for other in ("step-00000001.damaged", "step-00000007.partial", "notes"):
        (tmp_path / other).mkdir()
    prune(tmp_path, keep_last, keep_every)
    assert steps(tmp_path) == kept
    for folder in complete(tmp_path):
        check(folder)
    expected = ["latest", "notes", "step-00000001.damaged", "step-00000007.partial"]
    assert names(tmp_path) == sorted(expected + [folder.name for folder in complete(tmp_path)])


def test_prune_tells_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    """The checkpoint that was just published is good whatever becomes of older ones."""

    def failing(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", failing)
    prune(tmp_path, 1, None)
    assert capsys.readouterr().err.startswith(f"warning: checkpoint = {tmp_path}: cannot be read (Permission denied)")


def test_remove_clears_what_an_earlier_one_left(tmp_path):
    (tmp_path / "step-00000003.deleted").mkdir()
    (tmp_path / "step-00000003.deleted/shard-0").write_text("half deleted")
    remove(put(tmp_path, 3))
    assert names(tmp_path) == ["latest"]


def test_sweep_deletes_halves_and_nothing_else(tmp_path):
    assert sweep(tmp_path / "nowhere") == []
    folder = put(tmp_path, 3)
    set_aside(put(tmp_path, 4))
    before = names(tmp_path)
    begin(tmp_path, 5)
    (partial_of(tmp_path, 5) / "shard-0").write_text("half")
    shutil.copytree(folder, tmp_path / "step-00000002.deleted")
    (tmp_path / "latest.partial").write_text("half")
    swept = sweep(tmp_path)
    assert sorted(path.name for path in swept) == ["latest.partial", "step-00000002.deleted", "step-00000005.partial"]
    assert names(tmp_path) == before


def test_of_a_link_only_the_link_is_deleted(tmp_path, capfd):
    """A checkpoint may have been moved elsewhere, for room."""
    root, kept = tmp_path / "checkpoints", tmp_path / "kept"
    put(root, 4).rename(kept)
    (root / "step-00000004").symlink_to(kept)
    (root / "step-00000004.deleted").symlink_to("nowhere")
    put(root, 5, keep_last=1)
    assert names(root) == ["latest", "step-00000005"]
    for name in ("step-00000006.partial", "step-00000004.deleted"):
        (root / name).symlink_to(kept)
    assert len(sweep(root)) == 2
    assert names(root) == ["latest", "step-00000005"]
    assert sorted(path.name for path in kept.iterdir()) == ["manifest.json", "shard-0", "shard-1"]
    assert capfd.readouterr().err == ""


def test_what_is_set_aside_is_never_overwritten(tmp_path):
    for round_, name in enumerate(["step-00000003.damaged", "step-00000003.damaged-1", "step-00000003.damaged-2"]):
        (put(tmp_path, 3) / "shard-0").write_text(f"damage {round_}")
        assert set_aside(folder_of(tmp_path, 3)) == tmp_path / name
        assert complete(tmp_path) == []
        assert sweep(tmp_path) == []
        prune(tmp_path, 1, None)
    assert [(path / "shard-0").read_text() for path in sorted(tmp_path.glob("*.damaged*"))] == [
        f"damage {round_}" for round_ in range(3)
    ]


# ---- killed anywhere


def test_everything_is_durable_before_it_is_relied_on(tmp_path):
    root = tmp_path / "root"
    for step in (1, 2):
        put(root, step)
    log = log_of(root, lambda: put(root, 3, keep_last=1), tmp_path / "log")
    appears, points = log.index("rename step-00000003.partial"), log.index("rename latest.partial")
    deletes = next(place for place, line in enumerate(log) if "step-00000001" in line or "step-00000002" in line)
    files = [line.split()[1] for line in log[:appears] if line.startswith("write")]
    assert len(files) == RANKS + 1
    for file in [*files, "step-00000003.partial"]:
        assert f"fsync {file}" in log[:appears]
    for file in files:
        assert log.index(f"write {file}") < log.index(f"fsync {file}") < log.index("fsync step-00000003.partial")
    assert appears < points < deletes
    assert "fsync ." in log[appears:points]  # the new name, before `latest` says it
    assert "fsync latest.partial" in log[:points]
    assert "fsync ." in log[points:deletes]  # and `latest`, before what it said before is deleted


@pytest.mark.parametrize("strike", [kill, cut_power])
@pytest.mark.parametrize("old", [[], [1, 2]], ids=str)
def test_a_save_killed_anywhere_leaves_the_old_or_the_new_one(tmp_path, strike, old):
    model = tmp_path / "model"
    for step in old:
        put(model, step)
    write_parts(model, 4)  # a killed run has tried before
    seen = set()
    for at in itertools.count():
        root = tmp_path / str(at)
        shutil.copytree(model, root)
        if not struck(root, strike, at, lambda root=root: put(root, 4, keep_last=1)):
            break
        for folder in complete(root):
            check(folder)
        newest = steps(root)[0] if steps(root) else None
        assert newest in (4, max(old, default=None)), f"at operation {at}"
        seen.add(newest)
        if old:
            assert step_of(latest_of(root)) in (4, old[-1])
        elif newest == 4:
            point_latest(folder_of(root, 4))  # as a resume does
        sweep(root)
        assert set(names(root)) - {"latest"} == {folder.name for folder in complete(root)}
        for step in (4, 5) if newest != 4 else (5,):  # the run goes on, and saves that step again
            put(root, step, keep_last=1)
            assert steps(root)[0] == step
            assert latest_of(root) == folder_of(root, step)
        check(folder_of(root, 5))
        assert names(root) == ["latest", "step-00000005"]
    assert names(root) == ["latest", "step-00000004"]  # not struck: there are no more operations
    assert seen == {4, max(old, default=None)}
    assert at > 15 + 4 * len(old)


@pytest.mark.parametrize("strike", [kill, cut_power])
def test_a_save_made_again_and_killed_anywhere_leaves_a_whole_one(tmp_path, strike):
    """The only checkpoint had appeared, but its save failed after that, and the same step is saved again."""
    model = tmp_path / "model"
    put(model, 4)
    for at in itertools.count():
        root = tmp_path / str(at)
        shutil.copytree(model, root)
        was_struck = struck(root, strike, at, lambda root=root: put(root, 4, keep_last=1))
        assert steps(root) == [4], f"at operation {at}"
        check(folder_of(root, 4))
        sweep(root)
        put(root, 5, keep_last=1)
        assert names(root) == ["latest", "step-00000005"]
        if not was_struck:
            break
    assert at > 8


@pytest.mark.parametrize("strike", [kill, cut_power])
def test_a_resume_killed_while_it_sets_aside_loses_nothing(tmp_path, strike):
    model = tmp_path / "model"
    for step in (1, 2, 3):
        put(model, step)
    (model / "step-00000003/shard-0").write_text("damaged")

    def resume(root):
        if step_of(complete(root)[0]) == 3:
            set_aside(complete(root)[0])
        point_latest(complete(root)[0])

    for at in itertools.count():
        root = tmp_path / str(at)
        shutil.copytree(model, root)
        was_struck = struck(root, strike, at, lambda root=root: resume(root))
        resume(root)
        assert latest_of(root) == folder_of(root, 2)
        assert steps(root) == [2, 1]
        check(folder_of(root, 2))
        assert (root / "step-00000003.damaged/shard-0").read_text() == "damaged"
        sweep(root)
        assert names(root) == ["latest", "step-00000001", "step-00000002", "step-00000003.damaged"]
        if not was_struck:
            break
    assert at >= 4


def test_a_sweep_killed_anywhere_is_done_by_the_next(tmp_path):
    model = tmp_path / "model"
    put(model, 3)
    write_parts(model, 4)
    shutil.copytree(folder_of(model, 3), model / "step-00000002.deleted")
    (model / "latest.partial").write_text("half")
    for at in itertools.count():
        root = tmp_path / str(at)
        shutil.copytree(model, root)
        was_struck = struck(root, kill, at, lambda root=root: sweep(root))
        check(latest_of(root))
        sweep(root)
        assert names(root) == ["latest", "step-00000003"]
        if not was_struck:
            break
    assert at > 6
