"""What layers are worth: a silent one nothing, and nothing is left changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import megabus
from megabus.ablation import ablate
from megabus.convert.changed import Untied
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.data.indexed import meta_path
from megabus.model.decoder import Decoder, param_specs
from tests.support import small_runs
from tests.support.command import run_command
from tests.support.small_models import config, lively_state
from tests.support.sources import MemorySource, model_config

ROOT = Path(__file__).resolve().parents[2]


def grown(kind):
    """A model of three layers, the last as silent as growth has added it."""
    old, new = config(kind, n_layers=2), config(kind, n_layers=3)
    model = Decoder(new)
    model.load_state_dict(megabus.grow_state(lively_state(old), old, new, 1))
    return model.eval()


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_a_layer_that_is_the_identity_is_worth_nothing(kind):
    model = grown(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(model.config.vocab_size, (11, 14), generator=torch.Generator().manual_seed(0))
    loss, branches = ablate(model, tokens[:, :-1], tokens[:, 1:])
    logits = model(tokens[:, :-1]).detach().double()
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(float(plain), abs=1e-6)
    assert [branch.layer for branch in branches] == [0, 0, 1, 1, 2, 2]
    for branch in branches:
        assert (branch.strength == 0) == (branch.layer == 2)
        assert (abs(branch.loss - loss) < 1e-6) == (branch.layer == 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gates = [name for name, spec in param_specs(model.config).items() if spec.gate]
    assert sorted(f"layers.{branch.layer}.{branch.gate}" for branch in branches) == sorted(gates)


def test_the_tool_wants_a_checkpoint(tmp_path):
    done = run_command("layers", tmp_path)
    assert done.returncode == 2
    assert "checkpoint" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_tool_wants_data_of_a_checkpoint_that_is_of_no_run(tmp_path):
    """One that was untied remembers how long sequences may be, and nothing else of the run."""
    source = MemorySource(model_config("gpt", tie_embeddings=True))
    source.state.config = {"train": {"seq_len": 8}, "growth": {"stages": []}}
    convert(Untied(source), tmp_path / "out", "checkpoint")
    done = run_command("layers", tmp_path / "out")
    assert done.returncode == 2
    (folder,) = (tmp_path / "out/checkpoints").glob("step-*")
    assert done.stderr == f"error: checkpoint = {folder}: is of no run; give --valid and --seq-len\n"


def test_the_tool_measures_what_the_run_validates_on(tmp_path):
    """Over a validation's tokens the whole model has the run's last loss; the last stage reads more at once."""
    corpus = small_runs.write_corpus(tmp_path)

    def made_with(sha256):
        meta = {"vocab_size": small_runs.VOCAB, "n_tokens": len(small_runs.read_tokens(corpus / "valid"))}
        meta_path(corpus / "valid").write_text(json.dumps(meta | {"tokenizer_sha256": sha256}))

    made_with("1" * 64)
    config = small_runs.run_config(corpus, tmp_path / "run", [{}] * 3)
    small_runs.start(config, 1)
    last = small_runs.rows_of(config, "eval")[-1]["loss"]
    done = run_command("layers", config.run_dir, "--tokens", "256")
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"whole model (\S+), over 256 tokens", done.stdout)
    assert float(loss) == pytest.approx(last, abs=6e-5)
    assert len(re.findall(r"^ +\d ", done.stdout, re.MULTILINE)) == 2 * config.growth.stages[-1].n_layers
    with OpenFiles() as files:
        convert(open_source(tmp_path / "run", files), tmp_path / "hf", "hf")
    assert "is of no run; give --valid and --seq-len" in run_command("layers", tmp_path / "hf").stderr
    words = ("--valid", corpus / "valid", "--seq-len", config.growth.stages[-1].seq_len, "--tokens", "256")
    assert run_command("layers", tmp_path / "hf", *words).stdout == done.stdout
    made_with("0" * 64)
    assert "belongs to another tokenizer than" in run_command("layers", config.run_dir).stderr
