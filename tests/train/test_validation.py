"""The validation loss is of the same tokens, each once, under every layout: what they leave of batches is padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megabus.config import resolve_stages
from megabus.data.sources import open_sources
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks
from megabus.train.corpora import Corpora
from megabus.train.resume import data_order
from tests.support.small_runs import read_tokens, run_config, start, write_corpus, write_tokens

TOKENS = 224  # 7 sequences of 32 tokens, 14 of 16: in no layout below are they whole batches of all ranks
LAYOUTS = [
    {},
    {"tp": 2},
    {"dp": 2, "pp": 2},
    {"dp": 4},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("data"))
    write_tokens(folder / "valid", np.random.default_rng(5).integers(0, 67, TOKENS + 6))
    return folder


def config_of(corpus, layout, **changes):
    longer = {"growth__stages": [{"n_layers": 4, "seq_len": 32, "micro_batch_size": 2, "layout": layout}]}
    changes = longer | {"train__micro_batch_size": 2, "eval__tokens": TOKENS} | changes
    return run_config(corpus, "unused", [layout] * 3, **changes)


def losses(config, world):
    """On a rank: of sequences of 32 tokens and of 16."""
    stages = resolve_stages(config, world)
    corpora, engine = Corpora(open_sources(config, stages)), Engine(config.train, config.optimizer, stages[0])
    engine.write_initial(config.train.seed)
    return [corpora.validation_loss(engine, seq_len) for seq_len in (32, 16)]


def reference(config):
    """In one process, without batches and orders: the file's tokens one sequence after the other."""
    stage = resolve_stages(config, 1)[0]
    engine, tokens = Engine(config.train, config.optimizer, stage), torch.from_numpy(read_tokens(config.data.valid))
    engine.write_initial(config.train.seed)
    found = []
    for seq_len in (32, 16):
        parts = [tokens[None, at : at + seq_len + 1].long() for at in range(0, TOKENS, seq_len)]
        with torch.no_grad():
            decoder = engine.decoder.eval()
            found.append(
                float(torch.stack([decoder.loss(decoder.hidden(x[:, :-1]), x[:, 1:])[0] for x in parts]).mean())
            )
    return found


def test_every_layout_measures_the_same_tokens(corpus):
    (right,) = run_ranks(1, reference, config_of(corpus, {}))
    for layout in LAYOUTS:
        world = int(np.prod(list(layout.values())))
        for micro in (2, 4) if world == 1 else (2,):
            ranks = run_ranks(world, losses, config_of(corpus, layout, train__micro_batch_size=micro), world)
            assert all(rank == ranks[0] for rank in ranks)
            assert ranks[0] == pytest.approx(right, abs=1e-5), layout


def test_whole_batches_are_not_touched(corpus):
    """7 sequences in batches of one: the mean of today, to the bit."""
    config = config_of(corpus, {}, train__micro_batch_size=1, train__global_batch_size=8)
    (found,) = run_ranks(1, losses, config, 1)
    (right,) = run_ranks(1, reference, config)
    assert found == right


@pytest.mark.parametrize(
    ("longest", "wanted", "tokens"), [(16, 1000, 1008), (16, 1, 16), (48, 192, 192), (48, 145, 192), (48, 1000, 1008)]
)
def test_how_many_tokens_depends_on_sequences_alone(corpus, longest, wanted, tokens):
    write_tokens(corpus / "long", np.arange(1100) % 67)
    found = []
    for layout, micro in (({}, 2), ({"dp": 2}, 2), ({"dp": 4}, 1), ({"dp": 2, "tp": 2}, 4)):
        changes = {"train__seq_len": longest, "growth__stages": [], "growth__max_tokens": None, "eval__tokens": wanted}
        changes |= {"train__micro_batch_size": micro, "data__valid": str(corpus / "long")}
        config = run_config(corpus, "unused", [layout] * 3, **changes)
        stages = resolve_stages(config, int(np.prod(list(layout.values()))))
        found.append(data_order(open_sources(config, stages)))
    assert {order["valid_tokens"] for order in found} == {tokens}
    assert all(order == found[0] for order in found)  # so `resume: strict` accepts a change of layout


@pytest.mark.parametrize(("wanted", "problem"), [(193, 240), (240, 240)])
def test_no_token_is_read_twice(corpus, wanted, problem):
    """240 tokens hold four sequences of 48, whose last targets are tokens too."""
    write_tokens(corpus / "short", np.arange(240) % 67)
    changes = {"train__seq_len": 48, "growth__stages": [], "growth__max_tokens": None}
    changes["data__valid"] = str(corpus / "short")
    config = run_config(corpus, "unused", [{}] * 3, **changes, eval__tokens=192)
    assert open_sources(config, resolve_stages(config, 1)).valid_tokens == 192
    config = run_config(corpus, "unused", [{}] * 3, **changes, eval__tokens=wanted)
    with pytest.raises(UserError) as refused:
        open_sources(config, resolve_stages(config, 1))
    assert str(refused.value).startswith(f"eval.tokens = {wanted}: in sequences of 48 that is {problem}, and ")
    assert str(refused.value).endswith("has 192 in such; set it to 192 or less, or add text")


def test_a_strict_resume_under_another_layout(corpus, tmp_path):
    """What the validation is of does not change with it, so there is nothing to refuse."""
    changes = {"growth__stages": [], "growth__max_tokens": None, "eval__tokens": 112, "resume": "strict"}
    first = run_config(corpus, tmp_path / "run", [{}] * 3, train__max_tokens=512, **changes)
    start(first, 1)
    second = run_config(corpus, tmp_path / "run", [{"dp": 2}] * 3, train__max_tokens=512, **changes)
    assert start(second, 2)[0].numbers == []
