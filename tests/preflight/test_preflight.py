"""The preflight names what is wrong before a run begins, passes what is sound, and never hangs."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from megabus.config.stages import Layout, resolve_stages
from megabus.errors import UserError
from megabus.estimate.memory import rank_memory
from megabus.parallel.placement import Placement
from megabus.parallel.topology import ranks_text
from megabus.preflight import files, flight
from megabus.preflight.findings import odd_ones, size_text
from megabus.preflight.identity import pinned
from megabus.preflight.links import (
    MeasuredLink,
    Yardstick,
    best_of,
    by_kind,
    links_rows,
    neighbours,
    silence_of,
    slow_links,
)
from megabus.preflight.machine import (
    Machine,
    compute_row,
    expected_bytes,
    least_bytes,
    machine_rows,
    slow_ranks,
)
from megabus.preflight.slow import blame
from megabus.testing.preflight_faults import FAULTS, NONE, check, problems, row_of, run_config, write_corpora
from megabus.testing.ranks import run_ranks
from megabus.train.loop import train
from megabus.train.run import check_only
from tests.support.launching import launch_forked, the_error, tree

# ---- whole preflights on 4 ranks

CHECKS = ["ranks", "versions", "code", "configuration", "software", "data", "run_dir", "disk", "devices", "memory"]
TIMED = ["compute", "links within machines"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault, tmp_path):
    assert problems(fault, check(fault, tmp_path)) == []


def test_a_sound_run_is_passed_and_leaves_nothing(tmp_path):
    write_corpora(tmp_path)
    before = tree(tmp_path)
    ranks = check(NONE, tmp_path)
    assert [rank.error for rank in ranks] == [None] * 4
    assert [rank.out for rank in ranks[1:]] == [""] * 3
    assert all(" ok " in row_of(ranks[0].out, name) for name in CHECKS), ranks[0].out
    # Other work on the machine may slow a rank down: a warning then is right.
    assert all(re.search(" (ok|warning) ", row_of(ranks[0].out, name)) for name in TIMED), ranks[0].out
    assert "12 checks" in ranks[0].out
    assert "nothing refused" in ranks[0].out
    assert tree(tmp_path) == before
    # Control: what the faults' tests look for is not there without the fault.
    assert all(problems(fault, ranks) for fault in FAULTS if fault.refused or fault.check not in TIMED)


def test_which_ranks_a_fault_is_said_to_be_on():
    fault = UserError("data.train", "x", "is bad", "mend it")
    for faulty, looked, told in (
        ([0, 1, 2, 3], None, ""),
        ([1], None, " (on rank 1 only)"),
        ([0, 2], [0, 2], ""),  # the others leave it to these
        ([0], [0, 2], " (on rank 0 only)"),
    ):
        row = flight._first("data", [fault if rank in faulty else None for rank in range(4)], looked)
        assert row.text == f"data.train = x: is bad{told}"


def test_several_faults_are_all_told_and_the_first_is_raised(tmp_path):
    missing, full = (next(fault for fault in FAULTS if fault.check == name) for name in ("data", "disk"))
    both = replace(missing, plant=lambda folder: missing.plant(folder) | full.plant(folder))
    ranks = check(both, tmp_path)
    assert problems(both, ranks) == []
    assert full.words in row_of(ranks[0].out, "disk")
    assert ranks[0].error.startswith("data.valid = ")


def test_nothing_is_assumed_of_ranks_that_disagree(tmp_path):
    ranks = check(FAULTS[0], tmp_path)
    assert "not checked" in row_of(ranks[0].out, "all else")
    assert not row_of(ranks[0].out, "data")


PATIENCE = 4.0


def _absent(folder):
    config = run_config(folder, {"faults.hang_timeout": PATIENCE / 0.6})
    if dist.get_rank() == 2:
        time.sleep(PATIENCE + 3)
        return None
    try:
        check_only(config)
    except (UserError, RuntimeError) as error:
        told = str(error)
        if dist.get_rank() == 0:
            time.sleep(1)  # the others still wait for it
        return told
    return "passed"


def test_a_rank_that_does_not_come_is_named(tmp_path):
    write_corpora(tmp_path)
    told = run_ranks(4, _absent, tmp_path)
    assert told[0].startswith(
        f"ranks = 4: rank 2 ({socket.gethostname()}) did not come to the preflight within 4 s, or ended before; look at"
    )
    assert all(text != "passed" for text in told)


def _silent(folder, changes):
    """The last rank never answers: no message of the links reaches it."""
    flight.ABSENT = PATIENCE
    if dist.get_rank() == dist.get_world_size() - 1:
        flight.measure = lambda *_: time.sleep(0.5 * PATIENCE) or ([], None)
    try:
        check_only(run_config(folder, changes))
    except (UserError, RuntimeError) as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize(
    ("world", "changes", "link", "silent"),
    [(2, {"layout": {"dp": 2}, "growth": {}}, "0-1", 1), (4, {"layout": {"tp": 2, "pp": 2}, "growth": {}}, "1-3", 3)],
)
def test_a_silent_neighbour_is_named(tmp_path, world, changes, link, silent):
    """By every rank, and by rank 0 too where it is no end of the link."""
    write_corpora(tmp_path)
    told = run_ranks(world, _silent, tmp_path, changes)
    begin = f"link = {link}: carries nothing: rank {silent} has not answered for 1 s; look at"
    assert [text[: len(begin)] for text in told] == [begin] * world


def test_who_is_silent():
    one, two = ["a"] * 4, ["a", "a", "b", "b"]
    assert silence_of([None] * 4, 4.0, one) is None
    assert "link = 0-1: carries nothing: rank 1 has" in str(silence_of([1, None], 4.0, one))
    assert "link = 1-3 (a - b): carries nothing: rank 3 has" in str(silence_of([2, 3, 3, None], 4.0, two))
    assert "link = 1-3: carries nothing: rank 3 has" in str(silence_of([2, 3, 3, 1], 4.0, one))  # late for all


@pytest.fixture
def config_file(tmp_path):
    write_corpora(tmp_path)
    config = run_config(tmp_path, {"layout": {"dp": 2}, "growth": {}, "train.max_steps": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return tmp_path / "config.yaml"


@pytest.mark.usefixtures("without_pictures")
def test_the_launcher_checks_before_it_trains(config_file, tmp_path):
    """With --preflight-only it stops there; switched off, a start shows no table and still compares configurations."""
    before = tree(tmp_path)
    only = launch_forked("--config", config_file, "--preflight-only")
    assert [rank.code for rank in only] == [0, 0]
    assert "preflight: " in only[0].out
    assert "validation loss" not in only[0].out
    assert tree(tmp_path) == before
    refused = launch_forked("--config", config_file, "--preflight-only", "checkpoint.keep_last=100000000")
    assert "100000001" not in the_error(refused)
    assert the_error(refused).startswith("error: run_dir = ")
    whole = launch_forked("--config", config_file)
    assert whole[0].out.index("preflight: ") < whole[0].out.index("validation loss")
    off = launch_forked("--config", config_file, "preflight.enabled=false", "checkpoint.keep_last=100000000")
    assert [rank.code for rank in off] == [0, 0]
    assert "preflight" not in off[0].out


def test_what_is_no_check_is_among_the_refusals(config_file, tmp_path):
    """A callback here, as a prompt and a task: a table that refuses nothing must not stand above its refusal."""
    named = f"callbacks=[{{name: {tmp_path}/none.py:Missing}}]"
    ranks = launch_forked("--config", config_file, "--preflight-only", "layout.dp=1", named, world=1)
    assert row_of(ranks[0].out, "run").split()[1] == "refused"
    assert row_of(ranks[0].out, "all else").split()[2] == "skipped"
    assert ", 1 refused, no warning(s)" in ranks[0].out
    assert ranks[0].err.startswith("error: callbacks.0 = ")


@pytest.mark.parametrize(
    ("changes", "hosts", "measures"),
    [
        ({}, "aa", False),
        ({}, "ab", True),
        ({"preflight.min_bandwidth": 1e-6}, "aa", True),
        ({"preflight.measure": "always"}, "aa", True),
        ({"preflight.measure": "never"}, "ab", False),
    ],
)
def test_what_asks_for_measurements(tmp_path, changes, hosts, measures):
    assert flight._asks_to_measure(run_config(tmp_path, changes), hosts) == measures


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("measure", "links"), [("auto", False), ("always", True)])
def test_a_start_measures_only_what_was_asked_for(config_file, measure, links):
    ranks = launch_forked("--config", config_file, f"preflight.measure={measure}")
    assert [rank.code for rank in ranks] == [0, 0]
    assert bool(row_of(ranks[0].out, "links within machines")) == links
    assert ("compute, links" in ranks[0].out) != links


def _train_apart(folder):
    changes = {"preflight.enabled": dist.get_rank() == 0, "layout": {"dp": 2}, "growth": {}}
    try:
        train(run_config(folder, changes))
    except UserError as error:
        return str(error)
    return None


def test_ranks_that_disagree_on_the_preflight_itself(tmp_path):
    write_corpora(tmp_path)
    told = run_ranks(2, _train_apart, tmp_path)
    assert told[0].startswith("preflight.enabled = False: on rank 1 is True on most ranks")
    assert told[1] == told[0]
    assert not (tmp_path / "run").exists()


# ---- what is pure


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 1, 3), (3, 2, 5), (2, 4, 4), (8, 8, 16)], ids=str)
def test_rounds_hold_every_two_neighbours_once(layout):
    tp, pp, dp = layout
    rounds = neighbours([Layout(tp, pp, dp), Layout(tp, pp, dp)])
    assert len(rounds) <= 9
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    flat = [pair for pairs in rounds for pair in pairs]
    assert len(flat) == len(set(flat))

    def ring(n):
        return {1: 0, 2: 1}.get(n, n)

    assert len(flat) == ring(tp) * pp * dp + (pp - 1) * tp * dp + ring(dp) * tp * pp
    assert all(a < b for a, b in flat)


def made(pairs, slow=(), factor=10.0):
    """Links of 1 GB/s and 100 µs, but for slow ones."""
    return [MeasuredLink(pair, 1e-4, 1e9 / (factor if pair in slow else 1)) for pair in pairs]


@pytest.mark.parametrize(
    ("layouts", "slow", "ranks", "left"),
    [
        ([(1, 1, 3)], {(0, 2), (1, 2)}, [2], []),
        ([(2, 2, 1)], {(1, 3), (2, 3)}, [3], []),
        ([(2, 2, 1)], {(2, 3)}, [], [(2, 3)]),
        ([(1, 4, 1)], {(2, 3)}, [3], []),  # the last of a pipeline has one link only
        ([(1, 4, 1)], {(1, 2)}, [], [(1, 2)]),
        ([(1, 1, 7)], {(0, 1), (0, 6), (3, 4)}, [0], [(3, 4)]),
        ([(1, 1, 2)], {(0, 1)}, [], [(0, 1)]),
    ],
)
def test_the_rank_behind_slow_links(layouts, slow, ranks, left):
    pairs = [pair for pairs in neighbours([Layout(*layout) for layout in layouts]) for pair in pairs]
    assert blame(slow, pairs) == (ranks, left)
    if len(pairs) > 1:
        assert set(slow_links(made(pairs, slow), 1e-3)) == slow
        assert not slow_links(made(pairs, slow, factor=3.0), 1e-3)
    assert not slow_links(made(pairs), 1e-3)


def test_links_are_compared_with_their_own_kind():
    """Links between machines may be ten times slower than those within; one of them may not."""
    hosts = ["a", "a", "b", "b", "c", "c"]
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5)]
    between = [(1, 2), (3, 4), (0, 5)]
    yardstick = Yardstick(hosts, 1e-3, None, [0.0] * 6)
    rows = links_rows(made(pairs, between), yardstick)
    assert [row.state for row in rows] == ["ok", "ok"]
    links = made(pairs, between)
    links[3] = replace(links[3], bandwidth=1e7)
    rows = links_rows(links, yardstick)
    assert [row.state for row in rows] == ["ok", "warning"]
    assert rows[1].text.startswith(
        "the network between b (ranks 2-3) and c (ranks 4-5) slow, 0.01 GB/s, 100 µs; of all 3"
    )
    assert {kind: len(found) for kind, found in by_kind(links, hosts).items()} == {
        "within machines": 3,
        "between machines": 3,
    }


def test_two_machines_are_held_against_what_their_devices_are_said_to_carry():
    """All links between them are alike: by themselves they are no slower than usual."""
    pairs, hosts = [(0, 1), (0, 2), (1, 3)], ["a", "a", "b", "b"]
    links = made(pairs, pairs[1:])

    def row(said):
        return links_rows(links, Yardstick(hosts, 1e-3, None, said))[1]

    assert row([0.0] * 4).state == row([1e10, 1e10, 0.0, 0.0]).state == "ok"  # where one end's is not known
    assert row([4.9e9] * 4).state == "ok"  # a 24th of what is said, for two ranks that share it
    slow = row([5.1e9] * 4)
    assert slow.state == "warning"
    assert slow.text.startswith("the network between a (ranks 0-1) and b (ranks 2-3) slow, 0.1 to 0.1 GB/s")
    assert slow.text.endswith("; the network devices are said to carry 5.1 GB/s")


def test_the_machine_behind_slow_links():
    """c's links to both others are slow."""
    hosts = ["a", "b", "c", "d"]
    pairs = [(0, 1), (1, 2), (2, 3), (0, 3)]
    rows = links_rows(made(pairs, {(1, 2), (2, 3)}), Yardstick(hosts, 1e-3, None, [0.0] * 4))
    assert rows[0].text.startswith("c (rank 2) slow, ")


def test_late_answers_are_slow_only_beyond_the_slack():
    links = made([(0, 1), (1, 2), (2, 3), (0, 3)])
    links[1] = replace(links[1], latency=8e-4)
    assert not slow_links(links, 1e-3)
    assert set(slow_links(links, 1e-4)) == {(1, 2)}
    assert not slow_links(best_of(links, made([(2, 3), (0, 1), (0, 3), (1, 2)])), 1e-4)


def test_snapshots_share_the_main_memory_of_a_machine_with_gpus():
    on_gpus = [machine_of(host, on_gpu=True, snapshot=size) for host, size in (("a", 50), ("a", 50), ("b", 90))]
    *_, fits = machine_rows(on_gpus, [60] * 3)
    assert (fits.state, "ranks 0-1 (a) take 100 B" in fits.text) == ("ok", True), fits.text
    *_, short = machine_rows([*on_gpus[:2], replace(on_gpus[2], snapshot=101)], [60] * 3)
    assert (short.state, "rank 2 (b) take 101 B" in short.text) == ("warning", True), short.text


def test_slow_ranks_are_compared_with_their_own_kind():
    assert slow_ranks([10.0, 9.0, 4.0, 11.0], ["x"] * 4) == [2]
    assert slow_ranks([10.0, 9.0, 6.0, 11.0], ["x"] * 4) == []
    assert slow_ranks([10.0, 9.0, 4.0, 3.9], ["x", "x", "y", "y"]) == []


def machine_of(host, device="x", free=100, need=60, on_gpu=False, main_free=100, snapshot=50):
    return Machine(host, device, 8, free, need, 0, on_gpu, main_free, snapshot)


def test_ranks_share_a_machine_s_memory_but_no_gpu_s():
    states = {
        (on_gpu, same): [
            row.state
            for row in machine_rows(
                [machine_of("a", on_gpu=on_gpu), machine_of("a" if same else "b", on_gpu=on_gpu)], [60, 60]
            )
        ]
        for on_gpu in (False, True)
        for same in (False, True)
    }
    assert states.pop((False, True)) == ["ok", "refused"]
    assert states.pop((False, False)) == ["ok", "ok"]
    assert set(map(tuple, states.values())) == {("ok", "ok", "ok")}  # the last of main memory
    _, tight, _ = machine_rows([machine_of("a", on_gpu=True), machine_of("b", on_gpu=True, free=59)], [60, 60])
    assert "on rank 1 (b) take 60 B at least, and 59 B are free" in tight.text


def test_memory_that_is_only_estimated_to_be_short_is_a_warning():
    both = [machine_of("a", on_gpu=True), machine_of("b", on_gpu=True)]
    _, enough, _ = machine_rows(both, [80, 100])
    assert enough.state == "ok"
    assert "on rank 1 (b) take 60 B at least, some 100 B with activations and buffers; 100 B are free" in enough.text
    _, short, _ = machine_rows(both, [101, 100])
    assert short.state == "warning"
    assert "on rank 0 (a)" in short.text


def test_expected_memory_is_each_rank_s_largest_stage_s(tmp_path):
    changes = {"layout": {"tp": 1, "pp": 2}, "growth": {"stages": [{"layout": {"tp": 1, "pp": 1}}]}}
    config = run_config(tmp_path, changes)
    first, second = resolve_stages(config, 2)
    each = [[rank_memory(config.train, stage, rank).total for rank in range(2)] for stage in (first, second)]
    assert expected_bytes(config, [first, second], False) == [max(pair) for pair in zip(*each, strict=True)]
    assert expected_bytes(config, [first], False)[0] != expected_bytes(config, [first], False)[1]
    assert all(least_bytes(config, first, rank) < each[0][rank] for rank in range(2))


def test_another_device_is_a_warning():
    devices, _ = machine_rows([machine_of("a"), machine_of("b"), machine_of("c", device="y")], [60] * 3)
    assert devices.state == "warning"
    assert "8 x y on rank 2 (c)" in devices.text
    assert compute_row([1e9, 1e9, 1e8], [machine_of("a"), machine_of("b"), machine_of("c")]).state == "warning"


BYTES = [("fp32", 1, 8, 12), ("fp32", 2, 4, 16), ("bf16", 2, 2, 16)]


@pytest.mark.parametrize(("precision", "zero", "of_shard", "of_owned"), BYTES)
def test_least_memory(tmp_path, precision, zero, of_shard, of_owned):
    changes = {"train.precision": precision, "train.zero_stage": zero, "layout": {"tp": 2, "pp": 1}, "growth": {}}
    config = run_config(tmp_path, changes)
    (stage,) = resolve_stages(config, 4)
    placement = Placement(stage.model, stage.layout)
    total = sum(least_bytes(config, stage, rank) for rank in range(4))
    shards = sum(len(placement.shard(name, rank)) for name in placement.specs for rank in range(4))
    owned = sum(len(piece) for rank in range(4) for piece in placement.owned(rank))
    exact = of_shard * shards + of_owned * owned
    # ZeRO pads each group, and under ZeRO-2 in fp32 sums gradients of parameters that are owned in part.
    slack = 0.02 * exact if (precision, zero) == ("fp32", 2) else 200
    assert exact <= total < exact + slack


def test_large_files_are_sampled_at_both_ends_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE", 100_000)
    monkeypatch.setattr(files, "BLOCK", 1000)
    monkeypatch.setattr(files, "BLOCKS", 7)
    data = np.random.default_rng(0).integers(0, 256, 150_002, dtype=np.uint8)
    path = tmp_path / "file"

    def digest():
        path.write_bytes(data.tobytes())
        return files.read_spans(path)[0]

    sound, spans = digest(), files.spans(len(data))
    assert len(spans) == 7
    assert spans[0][0] == 0
    assert spans[-1][1] == len(data)
    assert all(start % 8 == 0 for start, _ in spans)
    for where, seen in ((0, True), (len(data) - 1, True), (spans[3][0], True), (spans[3][0] - 1, False)):
        data[where] ^= 1
        assert (digest() != sound) == seen
        data[where] ^= 1
    data = data[:-2]
    assert digest() != sound


def test_what_the_system_refuses_to_read_is_the_user_s_to_mend(tmp_path):
    with (
        pytest.raises(UserError, match=r"^data = .*: cannot be read \(Is a directory\); mend the file"),
        files.readable(),
    ):
        tmp_path.read_bytes()


def test_words():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([5, 0, 6, 7, 2]) == "ranks 0, 2, 5-7"
    assert [size_text(n) for n in (0, 1023, 1536, 3 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "1024.0 TiB",
    ]
    assert odd_ones("abab") == ("a", [1, 3])
    assert odd_ones("baab" + "b") == ("b", [1, 2])
    assert pinned("deepspeed") is not None
    assert pinned("no-such-package") is None
