"""What a checkpoint holds beside tensors comes back as it was, to the last bit of every float."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, fields, replace

import pytest

from megabus.checkpoint.manifest import DamagedError
from megabus.checkpoint.state import FORMAT, STATE, Progress, SavedState, read_state, write_state
from megabus.config import Layout, RunConfig
from megabus.config.schema import KappaConfig
from megabus.data.order import Deal
from megabus.errors import UserError
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.predictors import StageSpan
from megabus.model.cost import count_parameters, counted_sizes
from megabus.parallel.fragments import KINDS
from tests.support import checkpoints as ck

FLOATS = [0.1 + 0.2, 1 / 3, math.pi * 1e21, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 2.0**53 + 2, -0.0]


def monitor_after(evals, kind="ngpt"):
    monitor = KappaMonitor(KappaConfig(patience=2, min_evals=5))
    n_params = count_parameters(full_model(kind))
    monitor.start_stage(StageSpan(2, n_params, 0.7, 2**40 + 1, 1e14 / 7, None, 1e15 / 3))
    for n in range(evals):
        loss = math.nan if n == 3 else 2 + 3 / (n + 1) ** 0.37
        monitor.observe(2**40 + 1 + 1000 * n, 1e14 / 7 * (1 + n), loss)
    return monitor


WATCHED = {"seq_len": 6, "kappa": 0.7, "max_flops": 1e15 / 3}


def full_config(kind):
    config = ck.run_config({"tp": 2}, kind, tokenizer="naïve/τ.model").model_dump(mode="json")
    return RunConfig.model_validate(config | {"growth": {"stages": [{"d_model": 52}, WATCHED]}})


def full_model(kind):
    return full_config(kind).model.grown(d_model=52)


def full_state(kind="ngpt", optimizer_step=41, flops=1e19 / 7):
    config, model = full_config(kind), full_model(kind)
    sizes, small = counted_sizes(model), counted_sizes(full_config(kind).model)
    second = {"step": 9, "tokens": 2**40 + 1, "flops": 1e14 / 7, "stage": 2, "reason": "kappa", "κ": None}
    first = second | {"step": 7, "tokens": 2**39, "flops": 1e13 / 7, "stage": 1, "reason": "cap"}
    growths = [first | {"old": small, "new": sizes}, second | {"old": sizes, "new": sizes}]
    step_tokens = 6 * config.train.global_batch_size
    progress = Progress(40, 2**60 + 1, 2**60 + 2, flops, 2**40 + 1, 1e14 / 7, growths, 3, 2, 1)
    progress.mark(40 if optimizer_step else 0, step_tokens, 0.0)
    progress.deals = (Deal(0, (1024,)),)
    if optimizer_step:
        progress.step, progress.tokens, progress.position = 41, 2**60 + 1 + step_tokens, 2**60 + 2 + step_tokens
    return SavedState(
        progress=progress,
        stage=2,
        model=model,
        layout=Layout(2, 3, 5),
        optimizer_step=optimizer_step,
        kinds=KINDS if optimizer_step else ("weight",),
        monitor=monitor_after(9, kind).state_dict(),
        config=config.model_dump(mode="json"),
        data=full_data() | {"floats": FLOATS},
    )


def full_data():
    source = {"tokens": [2**40], "blend": [1024], "chunk_len": ck.T, "tokenizers": ["é"]}
    return {"train": source, "valid": source, "valid_tokens": 2**20 * ck.T}


def exactly(value):
    """A form in which floats are equal only if their bits are, and 1 is not 1.0; tuples are lists, as in JSON."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exactly(item) for item in value]
    return value.hex() if isinstance(value, float) else (type(value).__name__, value)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
@pytest.mark.parametrize("optimizer_step", [0, 41])
def test_a_state_comes_back(tmp_path, kind, optimizer_step):
    state = full_state(kind, optimizer_step)
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert exactly(asdict(found.progress)) == exactly(asdict(state.progress))
    for field in fields(SavedState):
        was, now = getattr(state, field.name), getattr(found, field.name)
        assert type(was) is type(now)
        assert was == now or field.name == "monitor"  # whose points are tuples before
    assert exactly(found.data) == exactly(state.data)
    assert exactly(found.monitor) == exactly(state.monitor)
    assert RunConfig.model_validate(found.config) == full_config(kind)
    before = (tmp_path / STATE).read_bytes()
    write_state(tmp_path, found)
    assert (tmp_path / STATE).read_bytes() == before


def test_that_form_sees_a_last_bit():
    assert exactly({"a": [0.1 + 0.2]}) != exactly({"a": [0.3]})
    assert exactly(0.0) != exactly(-0.0)
    assert exactly(1) != exactly(1.0)


def test_any_finite_float_comes_back(tmp_path):
    draw, floats = random.Random(1), []
    while len(floats) < 2000:
        value = float.fromhex(f"0x1.{draw.getrandbits(52):013x}p{draw.randint(-1074, 1023)}")
        floats.append(draw.choice((1, -1)) * value)
    largest = max(floats)
    data = full_data() | {"floats": floats}
    write_state(tmp_path, replace(full_state(flops=largest), data=data))
    assert exactly(read_state(tmp_path).data) == exactly(data)
    assert read_state(tmp_path).progress.flops.hex() == largest.hex()


def test_a_monitor_goes_on_from_it(tmp_path):
    """Two more validations give the decision and the view that they give a monitor that was never saved."""
    state, going, back = full_state(), monitor_after(9), monitor_after(0)
    write_state(tmp_path, state)
    back.load_state_dict(read_state(tmp_path).monitor)
    for n in (9, 10):
        point = (2**40 + 1 + 1000 * n, 1e14 / 7 * (1 + n), 3.0)
        assert exactly(asdict(back.observe(*point))) == exactly(asdict(going.observe(*point)))
    assert exactly(back.state_dict()) == exactly(going.state_dict())
    assert exactly(back.state_dict()) != exactly(state.monitor)


# ---- other formats, and what is no state


def edited(folder, change):
    write_state(folder, full_state())
    tree = json.loads((folder / STATE).read_text())
    change(tree)
    (folder / STATE).write_text(json.dumps(tree))


@pytest.mark.parametrize("number", [FORMAT + 1, 1])
def test_another_format_is_refused_and_no_damage(tmp_path, number):
    # A later format may hold anything else: nothing but the number is read.
    edited(tmp_path, lambda tree: (tree.clear(), tree.update(format=number, new="things")))
    with pytest.raises(UserError) as caught:
        read_state(tmp_path)
    assert type(caught.value) is UserError
    expected = (
        f"checkpoint = {tmp_path / STATE}: has format {number}, this megabus reads 2 and {FORMAT}; use the megabus"
    )
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "change",
    [
        dict.clear,
        lambda tree: tree.pop("progress"),
        lambda tree: tree["progress"].update(unknown=1),
        lambda tree: tree["layout"].pop("tp"),
        lambda tree: tree["model"].update(d_model=-3),
        lambda tree: tree.update(kinds=None),
    ],
)
def test_a_state_that_lacks_something_is_damaged_or_another_versions(tmp_path, change):
    """Nobody can tell which: it is set aside, as other damage is."""
    edited(tmp_path, change)
    with pytest.raises(DamagedError, match=rf"{STATE}: is damaged \("):
        read_state(tmp_path)
