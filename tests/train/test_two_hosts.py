"""Runs over two machines: the link between them goes down, one of them dies, one never comes."""

from __future__ import annotations

import json
import os
import re
import time
from functools import partial

import pytest
import torch.distributed as dist

import megabus.train.loop as loop
from megabus.checkpoint import shards
from megabus.checkpoint.store import complete
from megabus.cli import train as train_command
from megabus.growth import transition
from megabus.preflight import flight
from tests.support.forked import Begun
from tests.support.small_runs import rows_of, run_config, untimed, write_corpus
from tests.support.two_hosts import end, kill, launch, torchruns, two_hosts, why_no_namespaces

pytestmark = pytest.mark.skipif(bool(why := why_no_namespaces()), reason=str(why))
TIMEOUT = 9.0  # faults.hang_timeout
LATE = 2 * TIMEOUT  # one time-out and not a second one: the rest is load, for the cases go on at once
WORLD, STEPS = 4, 6
LAYOUTS = [{"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}, {"tp": 2, "pp": 2}]  # tensor parallelism within a machine
STAGES = [{"d_model": 52, "n_heads": 4, "d_ff": 90, "max_tokens": 256}, {"n_layers": 5}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, folder, layouts=LAYOUTS, **changes):
    """A configuration that grows after steps 2 and 4 of 6 and saves after each."""
    config = run_config(
        corpus,
        folder / "run",
        [{}] * 3,
        train__max_tokens=768,
        train__micro_batch_size=4,
        checkpoint__every=1,
        eval__every=2,
        growth__max_tokens=256,
        faults__hang_timeout=TIMEOUT,
        layout=layouts[0],
        **changes,
    )
    tree = config.model_dump(mode="json", exclude_none=True)
    tree["growth"]["stages"] = [stage | {"layout": layout} for stage, layout in zip(STAGES, layouts[1:], strict=True)]
    (folder / "run.json").write_text(json.dumps(tree))
    return config, ["--config", str(folder / "run.json")]


def on_both(a, b):
    return [a, a, b, b]


def without_pictures():
    """They take as long as the run."""
    train_command._show = lambda run_dir: None


def goes_on_alone(config, argv, folder, a):
    """The newest checkpoint is whole, and one machine goes on from it with a layout of its own."""
    newest = complete(folder / "run/checkpoints")[0]
    alone = [
        *argv,
        "layout.tp=2",
        "layout.pp=1",
        "growth.stages=" + json.dumps([s | {"layout": {"tp": 2}} for s in STAGES]),
    ]
    ranks = launch([a, a], 2, folder, alone, without_pictures)
    assert end(ranks, 60) == [0, 0], ranks[0].said
    assert f"from {newest}" in ranks[0].said
    assert rows_of(config, "step")[-1]["step"] == STEPS


MOMENTS = {
    "a step": (loop, "train_step", 3),
    "a save": (shards, "write_shards", 2),
    "a growth": (transition, "redistribute", 1),
}


def link_goes_down(corpus, folder, moment):
    config, argv = configured(corpus, folder)
    room, name, after = MOMENTS[moment]
    with two_hosts() as (a, b):

        def change():
            true, calls = getattr(room, name), []

            def unplugging(*args, **options):
                calls.append(0)
                if len(calls) == after and dist.get_rank() == 0:
                    b.unplug()
                    note_outage(folder)
                return true(*args, **options)

            setattr(room, name, unplugging)

        ranks = launch(on_both(a, b), WORLD, folder, argv, change)
        codes = end(ranks, 60)
        assert since_outage(folder) < LATE
        assert None not in codes
        assert 0 not in codes
        said = ranks[0].said + ranks[1].said
        assert f"no answer from {b.name} (ranks 2-3), last heard of in " in said
        b.plug()
        goes_on_alone(config, argv, folder, a)


def machine_dies(corpus, folder):
    config, argv = configured(corpus, folder)
    with two_hosts() as (a, b):
        ranks = launch(on_both(a, b), WORLD, folder, argv)
        while "step     4 | validation" not in ranks[0].said:
            assert ranks[0].process.is_alive(), ranks[0].said
            time.sleep(0.01)
        kill(ranks[2:])
        note_outage(folder)
        assert end(ranks, 60)[:2] == [1, 1]
        assert since_outage(folder) < LATE
        assert f"no answer from {b.name} (ranks 2-3), last heard of in " in ranks[0].said
        assert "lost the connection to another rank" in ranks[0].said
        goes_on_alone(config, argv, folder, a)


def machine_never_comes(corpus, folder):
    _, argv = configured(corpus, folder)
    with two_hosts() as (a, _):
        note_outage(folder)
        ranks = launch([a, a], WORLD, folder, argv)
        assert end(ranks, 60) == [2, 2]
        assert since_outage(folder) < LATE  # of which rank 1 leaves rank 0 five seconds to tell
        assert ranks[0].said.splitlines()[-1].startswith(f"error: WORLD_SIZE = {WORLD}: ")
        assert not (folder / "run").exists()


def slow_link(corpus, folder):
    """A 500th of the 10 Gbit/s that the devices of the pair say they carry."""
    _, argv = configured(corpus, folder, preflight__enabled=True)
    with two_hosts() as (a, b):
        for host in (a, b):
            host.send_at_most(megabits=20)
        note_outage(folder)
        ranks = launch(on_both(a, b), WORLD, folder, [*argv, "--preflight-only", "faults.hang_timeout=100"])
        assert end(ranks, 60) == [0] * WORLD, ranks[0].said
        row = next(line for line in ranks[0].said.splitlines() if line.startswith("links between machines"))
        names = f"the network between {a.name} (ranks 0-1) and {b.name} (ranks 2-3)"
        assert re.search(
            rf" warning +{re.escape(names)} slow, 0\.00\S+ to 0\.00\S+ GB/s, .*; the network devices are", row
        )
        assert row.endswith(" said to carry 1.2 GB/s")


def link_goes_down_in_the_preflight(corpus, folder):
    _, argv = configured(corpus, folder, preflight__enabled=True)
    with two_hosts() as (a, b):

        def change():
            measure = flight.measure

            def unplugging(*args):
                if dist.get_rank() == 0:
                    b.unplug()
                    note_outage(folder)
                return measure(*args)

            flight.measure = unplugging

        ranks = launch(on_both(a, b), WORLD, folder, [*argv, "preflight.measure=always"], change)
        codes = end(ranks, 60)
        assert since_outage(folder) < LATE
        assert codes[0] == 2, ranks[0].said
        assert not {0, None} & set(codes)
        # Rank 1 may be among them: it waits for the other machine itself, at times for longer than rank 0 waits for it.
        who = rf"ranks (2-3 \({re.escape(b.name)}\)|1-3 \({re.escape(a.name)}, {re.escape(b.name)}\))"
        problem = rf"error: ranks = 4: {who} did not come through the measurement of links within "
        assert re.match(problem, ranks[0].said.splitlines()[-1]), ranks[0].said
        assert not (folder / "run").exists()


CASES = {
    "a machine never comes": machine_never_comes,
    "a slow link": slow_link,
    "a preflight": link_goes_down_in_the_preflight,
    **{moment: partial(link_goes_down, moment=moment) for moment in MOMENTS},
    "a machine dies": machine_dies,
}


def note_outage(folder):
    (folder / "down").write_text(f"{time.monotonic()}")


def since_outage(folder):
    return time.monotonic() - float((folder / "down").read_text())


@pytest.fixture(scope="module", autouse=True)
def outages(corpus, tmp_path_factory):
    """All cases, begun one after the other: while one waits for its time-out, the next trains up to its own outage."""
    begun = {}
    try:
        for name, case in CASES.items():
            folder = tmp_path_factory.mktemp("outage")
            begun[name] = Begun(partial(case, corpus, folder))
            while begun[name].goes_on and not (folder / "down").exists():
                time.sleep(0.01)
        yield begun
    finally:
        for case in begun.values():
            case.kill()


def test_a_run_over_two_machines_is_that_of_one(corpus, tmp_path):
    told = []
    with two_hosts() as (a, b):
        for name, hosts in (("two", on_both(a, b)), ("one", [a] * WORLD)):
            folder = tmp_path / name
            folder.mkdir()
            config, argv = configured(corpus, folder, preflight__enabled=True)
            ranks = launch(hosts, WORLD, folder, [*argv, "preflight.measure=always"], without_pictures)
            assert end(ranks, 60) == [0] * WORLD, ranks[0].said
            told.append(untimed(rows_of(config, "step")))
            assert ("links between machines" in ranks[0].said) == (name == "two")
    assert told[0] == told[1]
    assert [row["stage"] for row in told[0]] == [0, 0, 1, 1, 2, 2]


def test_torchrun_brings_two_machines_together(corpus, tmp_path):
    """By its own rendezvous: a run that grows between pipeline and data parallelism; then one machine's processes are
    killed, and the other's end and name it."""
    config, argv = configured(corpus, tmp_path, [{"pp": 2}, {"dp": 2}, {"pp": 2}])
    with two_hosts() as (a, b):
        with torchruns([a, b], tmp_path, [*argv, "train.max_tokens=76800"]) as both:
            while "step     8 | validation" not in (tmp_path / "0.log").read_text():
                assert both[0].poll() is None, (tmp_path / "0.log").read_text()
                time.sleep(0.05)
            b.kill_all()
            note_outage(tmp_path)
            assert both[0].wait(60) != 0
            assert since_outage(tmp_path) < LATE
        assert [row["stage"] for row in rows_of(config, "step")][:6] == [0, 0, 1, 1, 2, 2]
        assert "no answer from" in (tmp_path / "0.log").read_text()
        assert complete(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_link_goes_down(outages, moment):
    outages[moment].wait(120)


def test_a_machine_dies(outages):
    outages["a machine dies"].wait(120)


def test_a_machine_never_comes(outages):
    outages["a machine never comes"].wait(120)


def test_a_link_that_is_missing_is_named_before_training(corpus, tmp_path):
    """As behind a firewall that lets ranks meet and not talk."""
    _, argv = configured(corpus, tmp_path)
    with two_hosts(meet_elsewhere=True) as (a, b):
        b.unplug()
        note_outage(tmp_path)
        ranks = launch(on_both(a, b), WORLD, tmp_path, argv)
        assert end(ranks, 60) == [2] * WORLD
        assert since_outage(tmp_path) < LATE  # gloo itself would take five time-outs
        line = (
            f"error: link = {a.name} (ranks 0-1) - {b.name} (ranks 2-3): carries nothing: {a.name} cannot connect to "
        )
        assert ranks[0].said.startswith(line), ranks[0].said
        assert ranks[0].said.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_an_address_that_leads_nowhere_is_named(corpus, tmp_path):
    """Debian's /etc/hosts leads a machine's own name to 127.0.1.1."""
    _, argv = configured(corpus, tmp_path)

    def change():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    with two_hosts() as (a, b):
        ranks = launch(on_both(a, b), WORLD, tmp_path, argv, change)
        assert end(ranks, 60) == [2] * WORLD
        assert ranks[0].said.startswith(
            f"error: GLOO_SOCKET_IFNAME = lo: leaves {a.name} (ranks 0-1) to be reached at 127"
        )


def test_a_slow_link_is_named_before_training(outages):
    outages["a slow link"].wait(120)


def test_the_link_goes_down_in_the_preflight(outages):
    outages["a preflight"].wait(120)
