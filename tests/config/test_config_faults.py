"""What a YAML file may say of κ, numerics, saving, resuming and accidents."""

from __future__ import annotations

import pytest
import yaml

from megabus.config import load_config
from megabus.errors import UserError
from tests.support.tiny_config import tiny_config


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(tiny_config()))
    return path


@pytest.mark.parametrize(
    "override",
    [
        "resume=maybe",
        "checkpoint.every=0",
        "checkpoint.every=2.5",
        "checkpoint.keep_last=0",
        "checkpoint.keep_every=-1",
        "checkpoint.asynchronous=later",
        "checkpoint.on_error=skip",
        "faults.max_skips=-1",
        "faults.max_rollbacks=some",
        "faults.hang_timeout=1e10",  # no clock of the machine's goes that far
        "faults.stop_exit_code=256",
        "faults.patience=1",
        "growth.trigger.patience=0",
        "growth.trigger.min_evals=0",
        "growth.trigger.max_std=0",
        "growth.trigger.scaling_law.E=-1",
        "growth.max_tokens=0",
        "growth.max_flops=0",
        "optimizer.decay_rho=1.5",  # a share
    ],
)
def test_wrong_values(base, override):
    key, _, value = override.partition("=")
    with pytest.raises(UserError) as caught:
        load_config(base, [override])
    assert str(caught.value).startswith(f"{key} = {value}: ")


LARGEST = {
    "model.vocab_size": 2**31,
    "model.d_model": 2**20,
    "model.n_layers": 4096,
    "model.n_heads": 2**16,
    "model.n_kv_heads": 2**16,
    "model.head_dim": 2**16,
    "model.d_ff": 2**24,
    "train.seq_len": 2**27,
    "train.micro_batch_size": 2**30,
    "train.global_batch_size": 2**30,
    "train.max_steps": 2**63 - 1,
    "train.max_tokens": 2**63 - 1,
    "eval.tokens": 2**63 - 1,
    "layout.tp": 2**20,
    "layout.dp": 2**20,
}


@pytest.mark.parametrize("key", LARGEST)
def test_sizes_have_a_bound(base, key):
    """So that what is wrong is refused before anything is built by it: 1e8 layers, 1e15 pieces."""
    for where in (key, key.replace("model.", "growth.stages.0.").replace("train.", "growth.stages.0.")):
        if where.partition("growth.stages.0.")[2] in ("vocab_size", "head_dim", "max_steps"):
            continue
        stage = "growth.stages=[{n_layers: 4}]"
        load_config(base, [stage, f"{where}={LARGEST[key]}"])
        for beyond in (LARGEST[key] + 1, 10**30):
            with pytest.raises(UserError, match=rf"^{where} = {beyond}: Input should be less than "):
                load_config(base, [stage, f"{where}={beyond}"])


def test_growths_have_a_bound(base):
    for count in (100, 101):
        stages = ", ".join(f"{{d_ff: {70 + n}}}" for n in range(count))
        if count == 100:
            assert len(load_config(base, [f"growth.stages=[{stages}]"]).growth.stages) == count
        else:
            with pytest.raises(UserError, match=r"^growth\.stages = .*: List should have at most 100 items"):
                load_config(base, [f"growth.stages=[{stages}]"])


@pytest.mark.parametrize("seconds", [0.001, 0.99, 0, -1])
def test_no_wait_is_over_before_it_begins(base, seconds):
    told = (
        rf"^faults\.hang_timeout = {seconds}: is over before ranks have met, .*; give 1 second or more, 600 is usual$"
    )
    with pytest.raises(UserError, match=told):
        load_config(base, [f"faults.hang_timeout={seconds}"])
    assert load_config(base, ["faults.hang_timeout=1"]).faults.hang_timeout == 1


@pytest.mark.parametrize("override", ["growth.trigger.smoothing=0", "growth.trigger.start=run"])
def test_keys_that_are_gone_are_unknown(base, override):
    with pytest.raises(UserError, match=r"^growth\.trigger\.\w+ = \w+: unknown key"):
        load_config(base, [override])


def test_fp16_is_refused_with_what_to_use(base):
    told = r"^train\.precision = fp16: is not supported: .* few significant bits; use bf16 or fp32$"
    with pytest.raises(UserError, match=told):
        load_config(base, ["train.precision=fp16"])


@pytest.mark.parametrize("override", ["resume=yes", "faults.max_skips=on", "checkpoint.keep_last=true"])
def test_a_switch_is_no_number(base, override):
    with pytest.raises(UserError, match=r" = True: .*is true or false where no switch is"):
        load_config(base, [override])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("faults.spikes=true", r"give its keys \(deviations, lasting, window\), or write {} for their defaults"),
        ("log.profile=yes", r"give its keys \(memory, start, steps\), start at least"),
        ("log.samples=true", r"give its keys \(every, max_tokens, prompts, temperature\), every, prompts at least"),
    ],
)
def test_a_switch_is_no_section(base, override, told):
    with pytest.raises(UserError, match=rf"^[a-z.]+ = True: is no section of keys; {told}$"):
        load_config(base, [override])


def test_what_they_are_when_left_out(base):
    config = load_config(base, ["checkpoint.every=2e3", "checkpoint.asynchronous=no"])
    assert config.resume == "auto"
    assert config.checkpoint.model_dump() == {
        "every": 2000,
        "keep_last": 2,
        "keep_every": None,
        "asynchronous": False,
        "on_error": "continue",
    }
    assert config.faults.model_dump() == {
        "max_skips": 3,
        "max_rollbacks": 2,
        "hang_timeout": 600.0,
        "stop_exit_code": 0,
        "spikes": None,
    }
