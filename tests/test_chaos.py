"""Kills, damage and full disks lose nothing, in short (`make chaos` is the long version); and the verdicts can fail."""

from __future__ import annotations

import json
import random
import shutil
import time

import pytest
from safetensors.numpy import load_file, save_file

from megabus.checkpoint.manifest import Entry, digest_of, read_manifest, settle, write_manifest
from megabus.testing import chaos, chaos_faults, chaos_runs
from megabus.testing.chaos_faults import NoFiles
from megabus.testing.chaos_ranks import Aim, Phase, attempt, prepare_parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    prepare_parent()
    folder = tmp_path_factory.mktemp("chaos")
    chaos_runs.make_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def workloads(folder):
    return {schedule: chaos.undisturbed(folder, schedule) for schedule in KILLS}


@pytest.fixture
def finished(workloads, tmp_path):
    """A copy of a finished run to tamper with, and its newest checkpoint."""
    run_dir = shutil.copytree(workloads["C"].run_dir, tmp_path / "run")
    return run_dir, sorted(run_dir.glob("checkpoints/step-*"))[-1]


# ---- nothing is lost

# Each ends with a kill in the last save, when older ones are to be deleted: the next start, which trains no step, does
# that. In C one of them has lost its name already.
KILLS = {
    "C": [
        Aim(Phase.SHARDS, 5, 0.5, (2,)),
        Aim(Phase.RESTORE, 0, 0.5, (1, 3)),
        Aim(Phase.BUILD, 10, 0.5, (3,)),
        Aim(Phase.LATEST, 11, 0.6, (0,)),
        Aim(Phase.PRUNE, 16, 0.9, (0, 1, 2, 3)),
    ],
    "B": [
        Aim(Phase.STEP, 2, 0.5, (1,)),
        Aim(Phase.START, 0, 0.7, (0, 1, 2, 3)),
        Aim(Phase.GROWN, 5, 0.5, (0, 2)),
        Aim(Phase.VALIDATE, 7, 0.5, (3,)),
        Aim(Phase.PRUNE, 16, 0.05, (0, 1, 2, 3)),
    ],
}


@pytest.mark.parametrize("schedule", KILLS)
def test_a_killed_run_ends_as_if_it_had_not_been(workloads, tmp_path, schedule):
    """Over all phases: it goes on from its newest checkpoint, and its weights, moments and losses are the same bits."""
    kills, missed = chaos.trial(workloads[schedule], 0, tmp_path, KILLS[schedule])
    assert [problem for kill in kills for problem in kill.problems] == []
    assert not missed
    assert sum(kill.hit for kill in kills) >= len(kills) // 2  # on a busy machine a kill may come a little late
    assert kills[-1].newest == kills[-1].resumed > 0


def test_damage_is_found_and_named(workloads, tmp_path):
    """One case of every kind of file with every kind of damage, and no alarm where there is none."""
    root = workloads["B"].run_dir / "checkpoints"
    count = len(chaos_faults.FILES) * len(chaos_faults.HOW)
    cases = chaos_faults.damages(root, count, random.Random(0))
    assert len({(case.kind, case.how) for case in cases}) == count
    untouched = [chaos_faults.Damage("latest", case.file, "nothing", 0) for case in cases[:3]]
    findings = chaos_faults.find_damages(root, tmp_path / "scratch", cases + untouched)
    assert [finding for finding in findings[:count] if not finding.detected] == []
    assert not any(finding.named or finding.refused for finding in findings[count:])  # control: the verdict can fail
    assert all(finding.right for finding in findings[count:])


@pytest.mark.parametrize(
    ("case", "schedule", "victim"), list(zip(chaos_faults.FULL_DISK_CASES, "CBC", (0, 3, 2), strict=True))
)
def test_a_full_disk_costs_no_checkpoint(workloads, tmp_path, case, schedule, victim):
    row = case(workloads[schedule], NoFiles(tmp_path / "disk", victim))
    assert row.problems == []


# ---- negative controls: each way to lose something is seen


def test_a_tampered_weight_with_a_valid_manifest_is_seen(workloads, finished):
    run_dir, newest = finished
    assert chaos.differences(workloads["C"].remains, chaos.remains(run_dir)) == []
    shard = sorted(newest.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view("uint32").reshape(-1)[0] ^= 1  # the last bit of one number
    save_file(tensors, shard)
    entries = [settle(newest / entry.name, entry.rank) for entry in read_manifest(newest)]
    write_manifest(newest, entries)
    (newest.parent / "latest").write_text(f"{newest.name} {digest_of(newest)}\n")
    assert chaos.newest_whole(newest.parent) == (16, [])
    assert chaos.differences(workloads["C"].remains, chaos.remains(run_dir)) == [
        f"1 of {len(workloads['C'].remains.tensors)} tensors differ: {shard.name}/{name}"
    ]


def test_another_logged_loss_is_seen(workloads, finished):
    metrics = finished[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    row = next(row for row in rows if row["event"] == "step" and row["step"] == 7)
    row["loss"] *= 1 + 2e-16
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert chaos.differences(workloads["C"].remains, chaos.remains(finished[0])) == [
        "1 logged values differ: loss of step 7"
    ]
    rows.remove(row)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "logged rows" in chaos.differences(workloads["C"].remains, chaos.remains(finished[0]))[0]


def test_rubbish_and_lost_moments_are_seen(workloads, finished):
    """So are a checkpoint that lacks a file of its manifest, and a run that has left none."""
    run_dir, newest = finished
    (newest.parent / "step-00000012.deleted").mkdir()
    sorted(newest.glob("shard-*-00003-of-*"))[0].unlink()
    assert chaos.newest_whole(newest.parent) == (15, [newest.name])
    entries: list[Entry] = [entry for entry in read_manifest(newest) if (newest / entry.name).exists()]
    write_manifest(newest, entries)
    found = chaos.differences(workloads["C"].remains, chaos.remains(run_dir))
    assert [text.split()[0] for text in found] == ["other", "checkpoints"]
    shutil.rmtree(newest.parent)
    assert "cannot be compared" in chaos.losses(workloads["C"].remains, run_dir)[0]


def test_a_run_that_goes_on_from_an_older_checkpoint_is_seen(workloads, finished, tmp_path):
    """It would end with the same bits, so the step that it goes on from is looked at too."""
    run_dir, newest = finished
    aim = Aim(Phase.FINISH, 0, 0.5, (0,))
    kills = [chaos.Kill("C", 0, aim, "finish", True, 16, 0.1, newest=16) for _ in range(2)]
    for kill in kills:
        run = attempt(workloads["C"].config(run_dir), tmp_path / "log")
        assert run.done
        chaos.judge_resume(kill, run)
        shutil.rmtree(newest)
    assert [kill.resumed for kill in kills] == [16, 15]
    assert kills[0].problems == []
    assert kills[1].problems == ["went on from [15], the checkpoint of step 16 was there"]


def test_a_rank_that_does_not_end_is_seen(workloads, tmp_path):
    def stubborn(rank, board):
        import megabus.train.loop as loop

        train = loop.train

        def stay(config):
            try:
                return train(config)
            except RuntimeError:
                time.sleep(100)

        if rank == 2:
            loop.train = stay

    config = workloads["B"].config(tmp_path / "run")
    run = attempt(config, tmp_path / "log", Aim(Phase.STEP, 2, 0.5, (0,)), workloads["B"].spans, 1.0, stubborn)
    assert (run.ends[0].how, run.ends[2].how) == ("killed", "hung")
    assert {run.ends[1].how, run.ends[3].how} <= {"failed", "hung"}  # one that waits for rank 2 alone waits on
    assert run.blow.seconds >= 1
