"""What a run asks of a GPU, seen without one: nothing lies on the wrong device, little waits, nothing piles up.

`python -m tests.device` prints all of it for many more layouts. What cannot be seen so stands in docs/gpu.md.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from megabus.testing.simulate import in_child
from tests.device.allowed import ALLOWED
from tests.device.cases import CASES, MICRO_BATCHES, Case, look_at
from tests.device.judge import STEPS, held_scores, kept, missed_beats, out_of_order, problems, unknown_waits
from tests.device.step_table import BOUNDS, summary


@pytest.fixture(scope="module")
def seen():
    return dict(zip(CASES, look_at([(case,) for case in CASES]), strict=True))


@pytest.fixture(params=CASES, ids=str)
def found(request, seen):
    return request.param, seen[request.param]


def test_all_that_waits_for_the_device_is_known(found):
    assert list(unknown_waits(found[1])) == []


def test_no_timer_or_event_is_kept_and_no_peak_is_set_back(found):
    assert list(kept(found[1])) == []


def test_a_step_launches_no_more_kernels_than_it_did(found):
    case, seen = found
    bounds = yaml.safe_load(BOUNDS.read_text())[str(case)]
    for what in STEPS:
        if what in seen.asked:
            asked = seen.asked[what]
            assert asked.kernels <= bounds[what]["kernels"]
            assert asked.bytes <= bounds[what]["bytes"]


def test_every_micro_batch_is_a_heartbeat_on_every_pipeline_rank(found):
    assert list(missed_beats(found[1])) == []


def test_attention_never_holds_the_scores(found):
    assert list(held_scores(found[1])) == []


def test_no_step_takes_an_operation_without_a_deterministic_form(found):
    """Those of torch.use_deterministic_algorithms's documentation that a transformer could take."""
    without = {"put_", "histc", "bincount", "median", "cumsum", "nll_loss_forward", "nll_loss2d_forward", "kthvalue"}
    for what in STEPS:
        if what in found[1].asked:
            assert not without & found[1].asked[what].names


def test_a_pipeline_sends_and_receives_in_the_order_of_its_schedule(found):
    assert list(out_of_order(*found)) == []


def test_the_table_has_the_worst_rank_of_each_layout(seen):
    rows = list(summary(seen))[2:]
    assert [row.count("|") for row in rows] == [9] * len(rows)
    assert [row.split(" | ")[0] for row in rows] == [
        "| TP1/PP1/DP1 fp32, ZeRO-1",
        "| TP2/PP2/DP1 bf16, ZeRO-1, recompute",
        "| TP2/PP2/DP1 fp32, ZeRO-1",
        "| TP2/PP2/DP1 bf16, ZeRO-1, sequence parallel",
        "| TP1/PP1/DP2 bf16, ZeRO-2",
    ]
    assert rows[0].split(" | ")[1:4] == ["6, 1", "725", "99.2"]


# ---- negative controls


def _spoil():
    """As it was: DeepSpeed's timers and resets, copies from pageable memory, grouped heads for attention in fp32."""
    import deepspeed.runtime.utils
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.utils.timer import SynchronizedWallClockTimer

    from megabus.engine import engine
    from megabus.kernels import eager

    config = engine.deepspeed_config
    engine.deepspeed_config = lambda *args: config(*args) | {"timers": {}}
    engine.upload = lambda values, device: values.to(device)
    engine._read = lambda *numbers: engine.StepResult(*(float(x) for x in numbers))
    eager._flash_runs = lambda *_: True
    stage_1_and_2.empty_cache = deepspeed.runtime.utils.empty_cache
    SynchronizedWallClockTimer.Timer.reset = lambda self: None


def test_what_was_mended_would_be_seen():
    (seen,) = look_at([(Case((1, 2, 1), 0), _spoil)])
    step = seen.asked["step"]
    new = {wait for wait, count in step.waits.items() if count > ALLOWED["step"].get(wait, 0)}
    assert {how for how, _ in new} == {"synchronize", "copy to GPU", "item"}
    assert ("copy to GPU", "megabus/engine/engine.py:_on_device") in new
    assert step.quadratic == MICRO_BATCHES
    assert seen.events[0] < seen.events[1]
    assert seen.resets
    seen.beats.pop()
    seen.asked["step"].messages.pop(0)
    seen.beats.append(1)
    told = "\n".join(problems(Case((1, 2, 1), 0), seen))
    for problem in ("waits", "events that are kept", "peak of memory", "heartbeats", "holds the scores", "messages"):
        assert problem in told


def _index(write):
    from tests.support import fake_gpu

    fake_gpu.make_gpu()
    with fake_gpu.on_fake_gpu() as watch:
        values = torch.zeros(5, 3, device="gpu")
        for device in ("gpu", "cpu"):
            at = torch.zeros(2, dtype=torch.int64, device=device)
            watch.reset()
            if write:
                values[at] = 1.0
            else:
                values[:, at]
            yield device, [how for how, _ in watch.waits.elements()]
        with pytest.raises(DynamicOutputShapeException):
            values.nonzero()


def _indexed(write):
    return list(_index(write))


def test_indices_of_the_cpu_would_be_seen():
    for found in in_child(_indexed, [(False,), (True,)]):
        assert found == [("gpu", []), ("cpu", ["copy of indices"])]


def _misplace():
    from megabus.engine import engine

    engine.upload = lambda values, device: values


def test_a_tensor_on_the_wrong_device_would_be_seen():
    with pytest.raises(AssertionError, match="FakeTensorDeviceMismatchError"):
        look_at([(Case(), _misplace)])


def test_the_device_stays_in_its_process(seen):
    assert seen
    assert torch._C._get_privateuse1_backend_name() != "gpu"
