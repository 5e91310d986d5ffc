"""Pipelines and growths end even where all messages of a rank wait for each other."""

from __future__ import annotations

from collections import Counter

import pytest
from deepspeed.runtime.pipe.schedule import InferenceSchedule, TrainSchedule

from megabus.config import resolve_stages
from megabus.growth.plan import plan_between, schedule_of
from tests.device.cases import Case
from tests.device.one_stream import program, stuck

GROWTHS = [((1, 2, 2), (4, 1, 1)), ((2, 2, 1), (1, 2, 2)), ((1, 1, 4), (2, 2, 1)), ((1, 4, 1), (4, 1, 1))]


@pytest.mark.parametrize("schedule", [TrainSchedule, InferenceSchedule])
def test_pipelines_end(schedule):
    for pp in range(2, 7):
        for micro_batches in range(1, 11):
            programs = [program(schedule(micro_batches, pp, stage), stage) for stage in range(pp)]
            assert stuck([[Counter([message]) for message in each] for each in programs]) == []


def test_a_pipeline_that_begins_with_the_wrong_message_does_not():
    programs = [program(TrainSchedule(4, 3, stage), stage) for stage in range(3)]
    programs[0].reverse()
    assert stuck([[Counter([message]) for message in each] for each in programs]) == [0, 1, 2]


def waves(case):
    """Of each rank, what the waves of a growth send and receive; a wave is one group of NCCL's."""
    config = case.config()
    config = config.model_copy(update={"growth": config.growth.model_copy(update={"buffer_mb": 1})})  # for more waves
    before, after = resolve_stages(config, case.world)
    plan = plan_between(config, before, after)
    programs = []
    for rank in range(case.world):
        transfers = [
            [each for _, _, each in wave.transfers if each.src != each.dst] for wave in schedule_of(config, plan, rank)
        ]
        groups = [
            Counter(("send", each.dst) if each.src == rank else ("recv", each.src) for each in wave)
            for wave in transfers
        ]
        programs.append([group for group in groups if group])
    return programs


@pytest.mark.parametrize(("before", "after"), GROWTHS)
def test_growths_end(before, after):
    programs = waves(Case(before, grows_to=after))
    assert sum(map(len, programs)) > 0
    assert stuck(programs) == []
    longest = max(range(len(programs)), key=lambda rank: len(programs[rank]))
    programs[longest].pop()
    assert stuck(programs) != []
