"""A larger vocabulary: rows of new pieces against the mean in fp64, in every layout, and what they do to logits."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megabus import counter
from megabus.convert import vocabulary
from megabus.convert.begin import begin, extended, origin_of, read_description
from megabus.convert.convert import convert
from megabus.convert.load import tokenizer_of_model
from megabus.convert.source import whole
from megabus.convert.vocabulary import LargerVocabulary
from megabus.data.tokenizer import Tokenizer, train_tokenizer
from megabus.data.tokenizer.extend import extend_tokenizer
from megabus.data.tokenizer.learn import Lesson
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from megabus.model.params import spec_of
from megabus.testing.ranks import run_ranks
from tests.support import checkpoints as ck
from tests.support.small_models import model_of
from tests.support.sources import MemorySource, model_config

OLD, N_IDS, NEW = 67, 64, 73  # rows, of which the tokenizer had so many, and rows that there will be
SPELLED = {64: [3], 65: [5, 9, 9, 63], 68: [1, 2, 3], 70: [0, 40]}  # 66, 67, 69, 71 and 72 are of no piece
CHANGED = [64, 65, *range(67, NEW)]
MODELS = [("ngpt", {}), ("gpt", {}), ("gpt", {"tie_embeddings": True})]
IDS = ["ngpt", "gpt", "tied"]


def larger(kind, changes):
    inner = MemorySource(model_config(kind, vocab_size=OLD, **changes))
    inner.folder = None
    return inner, LargerVocabulary(inner, NEW, SPELLED, N_IDS, None)


def states(kind, changes):
    inner, source = larger(kind, changes)
    return inner.state.model, inner.weights(), source.state.model, {n: whole(source, n) for n in source.specs}


def reference(model, state):
    """By the definition, on whole tensors: {name: fp64 rows} of CHANGED."""
    module = model_of(model, state)
    (head,) = [module.output.head.rows]
    gains = module.output.s_z if model.kind == "ngpt" else torch.ones(OLD, dtype=torch.float64)
    means = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if spec_of(p).rows != "vocab":
                continue
            rows = []
            for row in CHANGED:
                ids = SPELLED.get(row, list(range(N_IDS)))
                pieces = (gains[:, None] * head)[ids] if p is not module.embed.weight else p[ids]
                mean = pieces.mean(0)
                length = mean.norm()
                rows.append(length if p.ndim == 1 else mean / length if model.kind == "ngpt" else mean)
            means[name] = torch.stack(rows)
    return means


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=IDS)
def test_rows_are_means_and_all_else_stays(kind, changes):
    old, before, new, after = states(kind, changes)
    wanted = reference(old, before)
    assert new.vocab_size == NEW
    kept = [row for row in range(OLD) if row not in CHANGED]
    for name, spec in param_specs(new).items():
        if spec.rows != "vocab":
            assert after[name].equal(before[name])
            continue
        assert after[name][kept].equal(before[name][kept])
        assert (after[name][CHANGED].double() - wanted[name]).abs().max() <= 1e-7
        if spec.unit:
            assert (after[name].double().norm(dim=1) - 1).abs().max() <= 1e-6
    assert len(wanted) == {"ngpt": 3, "gpt": 1 + (not old.tie_embeddings)}[kind]


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=IDS)
def test_logits_of_old_ids_stay_and_new_ones_are_means(kind, changes):
    """Hence the loss on old text is known from the logits before: more by log(1 + new / old), and no more. The control:
    a head of rows that are means by themselves, beside gains that are, gives other logits on the sphere."""
    old, before, new, after = states(kind, changes)
    tokens = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        was, now = model_of(old, before)(tokens), model_of(new, after)(tokens)
    kept = [row for row in range(OLD) if row not in CHANGED]
    assert (now[..., kept] - was[..., kept]).abs().max() <= 1e-13 * was.abs().max()
    means = [was[..., SPELLED.get(row, list(range(N_IDS)))].mean(-1) for row in CHANGED]
    assert (now[..., CHANGED] - torch.stack(means, -1)).abs().max() <= 1e-6 * was.abs().max()
    more = torch.log1p(now[..., CHANGED].exp().sum(-1) / was[..., kept].exp().sum(-1))
    target = tokens % 60
    losses = [-z.log_softmax(-1).gather(-1, target[..., None])[..., 0] for z in (was[..., kept], now)]
    assert (losses[1] - losses[0] - more).abs().max() <= 1e-6
    spelt = [SPELLED.get(row, list(range(N_IDS))) for row in CHANGED]
    average = torch.stack([was[..., ids].exp().mean(-1) for ids in spelt], -1)
    assert (now[..., CHANGED].exp() <= average * (1 + 1e-6)).all()
    if kind == "ngpt":
        plain = dict(after)
        (gain,) = [name for name, spec in param_specs(new).items() if spec.rows == "vocab" and not spec.is_matrix]
        plain[gain] = after[gain].clone()
        plain[gain][CHANGED] = before[gain].mean()
        with torch.no_grad():
            other = model_of(new, plain)(tokens)
        assert (other - now)[..., CHANGED].abs().max() > 0.1 * now[..., CHANGED].abs().max()


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=IDS)
def test_any_interval_has_the_bits_of_the_whole(kind, changes):
    _, source = larger(kind, changes)
    for name, spec in source.specs.items():
        if spec.rows == "vocab":
            flat = whole(source, name).reshape(-1)
            cuts = sorted({0, len(flat), *np.random.default_rng(1).integers(0, len(flat), 9).tolist()})
            parts = [source.read("weight", name, *cut) for cut in pairwise(cuts)]
            assert torch.cat(parts).equal(flat)


def one_by_one(source, name):
    """The new rows of a parameter, each by itself from the old ones that it is made of; fp32 by number."""
    spec, inner = source.specs[name], source.inner.weights()
    matrix = inner[name if spec.is_matrix else source.head.name].double()  # a gain is made of what its head is
    if source.gain is not None and not spec.lookup:
        matrix = matrix * inner[source.gain.name].double()[:, None]
    rows = {}
    for row in CHANGED:
        ids = SPELLED.get(row, range(N_IDS))
        mean = counter.row_sum(matrix[[*ids]].T)[:, 0] / len(ids)
        length = counter.row_sum(mean * mean)[0].sqrt()
        rows[row] = (length if not spec.is_matrix else mean / length if spec.unit else mean).float()
    return rows


@pytest.mark.parametrize("together", [1, 3, 1000])  # of new pieces' rows, and of old ones that are read at once
@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=IDS)
def test_rows_made_together_have_the_bits_of_each_by_itself(monkeypatch, kind, changes, together):
    """The gain alone too, as a rank has it that holds nothing of the head. The control: a piece that
    counts once and not twice."""
    inner, _ = larger(kind, changes)
    monkeypatch.setattr(vocabulary, "BLOCK", together * inner.state.model.d_model)
    monkeypatch.setattr(vocabulary, "JOINED", together * inner.state.model.d_model)
    beats = []
    for order in (1, -1):
        source = larger(kind, changes)[1]
        source.heartbeat = partial(beats.append, 1)
        for name in [name for name, spec in source.specs.items() if spec.rows == "vocab"][::order]:
            rows = whole(source, name)
            assert all(rows[row].equal(values) for row, values in one_by_one(source, name).items())
    assert len(beats) >= (12 if together == 1 else 2)
    rows = whole(source, name)
    monkeypatch.setitem(SPELLED, 65, [5, 9, 63])
    assert not rows[65].equal(one_by_one(source, name)[65])


# ---- of weights with a tokenizer, into engines


WORDS = "the quick brown fox jumps over the lazy dog, and sixty wizards' quills make black jam. "
CASES = [  # a model, the layout that it begins in, and where its weights lie
    (MODELS[0], {"dp": 1}, "hf"),
    (MODELS[0], {"tp": 2}, "run"),
    (MODELS[2], {"pp": 2}, "run"),
    (MODELS[0], {"tp": 2, "pp": 2}, "run"),
    (MODELS[2], {"tp": 2, "pp": 2}, "hf"),
    (MODELS[1], {"dp": 4}, "run"),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The file of one of 265 pieces, and a directory with three more, of which one is learnt."""
    folder = tmp_path_factory.mktemp("tokenizers")
    old = train_tokenizer([WORDS * 9], 265, folder / "old")
    extend_tokenizer(old, [" Straße"], ["<|user|>"], folder / "new", lesson=Lesson(1, ["zzz zzz"], "text"))
    return old, folder / "new"


def made(folder, tokenizer, kind, changes):
    """Weights with a tokenizer, as a checkpoint of another layout and as a Hugging Face directory."""
    source = MemorySource(model_config(kind, vocab_size=266, **changes))
    source.tokenizer, source.folder = tokenizer, folder
    convert(source, folder / "run", "checkpoint", (2, 1, 2))
    convert(source, folder / "hf", "hf")
    return source


def begin_each(cases):
    told = []
    for config, path, tokenizer in cases:
        engine = ck.fresh(config)
        begin(extended(origin_of(path), Tokenizer(tokenizer), 271), engine)
        told.append(ck.held(engine))
        engine.close()
    return told


def test_every_layout_begins_with_the_bits_of_one_process(tmp_path, tokenizers):
    old, new = tokenizers
    spelled = {265 + n: Tokenizer(old).encode(text) for n, text in enumerate((" Straße", "<|user|>", "zz"))}
    wanted = {}
    for name, model in zip(IDS, MODELS, strict=True):
        alone = LargerVocabulary(made(tmp_path / name, old, *model), 271, spelled, 265, new)
        wanted[name] = alone.state.model, ck.bits({n: whole(alone, n) for n in alone.specs})
    for world in (1, 2, 4):
        cases = []
        for model, layout, form in CASES:
            name, config = IDS[MODELS.index(model)], ck.run_config(layout, model[0])
            config = config.model_copy(update={"model": wanted[name][0]})
            if ck.world_of(config) == world:
                cases.append((name, (config, tmp_path / name / form, new)))
        ranks = run_ranks(world, begin_each, [case for _, case in cases])
        for place, (name, (config, *_)) in enumerate(cases):
            state = ck.assembled(config, [told[place] for told in ranks])
            assert ck.same(state, wanted[name][1]), (name, config.layout)


def test_what_cannot_be_extended_is_refused(tmp_path, tokenizers):
    old, new = tokenizers
    source = MemorySource(model_config("ngpt", vocab_size=266))
    convert(source, tmp_path / "bare", "hf")
    made(tmp_path, old, "ngpt", {})

    def problem(path, tokenizer, vocab_size=271):
        with pytest.raises(UserError) as caught:
            extended(read_description(tmp_path / path), tokenizer, vocab_size)
        return str(caught.value)

    assert "has no tokenizer that could spell new pieces; begin" in problem("bare", Tokenizer(new))
    assert "has no piece that the tokenizer of" in problem("hf", Tokenizer(old), 266)
    other = Tokenizer(train_tokenizer(["another text of other words, " * 9], 268, tmp_path / "other"))
    assert re.search(r"data.tokenizer = .*other.json: .* of .*hf (has the id|is no piece)", problem("hf", other))
    tree = json.loads((new / "tokenizer.json").read_text())
    merges = {"model": tree["model"] | {"merges": []}}
    for number, change in enumerate(({"normalizer": {"type": "Lowercase"}}, merges)):
        (tmp_path / f"{number}.json").write_text(json.dumps(tree | change))
        told = problem("hf", Tokenizer(tmp_path / f"{number}.json"))
        assert re.search(r"\d.json: spells '.{1,9}' as \[.*\], and the tokenizer of the weights as \[.*\]; ", told)
    assert extended(read_description(tmp_path / "hf"), Tokenizer(old), 271).spelled == {}  # a padded vocabulary


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_pieces_of_its_own_tokenizer_that_had_no_rows_get_some(tmp_path, tokenizers, kind):
    """An embedding that was never resized: no conversion takes the tokenizer along in silence, and what the refusal
    names works."""
    old, own = tokenizers
    source = made(tmp_path, old, kind, {})
    (tmp_path / "hf/tokenizer.json").unlink()
    source.tokenizer = own
    for form in ("checkpoint", "shards", "hf"):
        told = r"has 268 pieces, the model 266; give .* in a run with extend_vocabulary; or leave it: --without-tok"
        with pytest.raises(UserError, match=told):
            convert(source, tmp_path / "new" / form, form)
        assert not (tmp_path / "new" / form).exists()
    for path in own.iterdir():
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    for given in (None, str(own)):
        with pytest.raises(UserError, match=r"has 268 pieces, the model 266; give .* rows for them"):
            tokenizer_of_model(tmp_path / "hf", given, 266)
    larger = extended(read_description(tmp_path / "hf"), Tokenizer(own), 268)
    assert larger.made == "2 pieces of its own tokenizer that had no row; 268 rows instead of 266"
    alike = LargerVocabulary(source, 268, {}, 266, own)  # as rows that only fill up are made
    for name, spec in larger.specs.items():
        assert whole(larger, name)[:266].equal(whole(source, name)[:266]), name
        assert whole(larger, name).equal(whole(alike, name)), name
        assert spec.rows != "vocab" or whole(larger, name).isfinite().all()
    more = LargerVocabulary(source, 270, {268: [267], 269: [3, 267]}, 268, own)
    assert more.spelled == {269: [3]}  # nothing is made of what has no row
    assert more.made == "2 new pieces, 2 pieces of its own tokenizer that had no row; 270 rows instead of 266"
    convert(larger, tmp_path / "run2", "checkpoint")
    assert tokenizer_of_model(tmp_path / "run2", None, 268).vocab_size == 268


def test_what_became_of_the_vocabulary_is_said():
    source = MemorySource(model_config("gpt", vocab_size=OLD))
    source.folder = None
    for spelled, rows, said in (
        ({64: [1], 65: [1], 66: [2]}, 67, "3 new pieces, in rows that were padding"),
        ({64: [1]}, 67, "1 new piece, in rows that were padding"),
        ({66: [1], 67: [1]}, 70, "2 new pieces, 1 of them in rows that were padding; 70 rows instead of 67"),
        ({67: [1]}, 68, "1 new piece; 68 rows instead of 67"),
    ):
        assert LargerVocabulary(source, rows, spelled, N_IDS, None).made == said


def begin_where_rank_1_has_nothing(folders):
    os.chdir(folders[dist.get_rank()])
    with pytest.raises(UserError) as caught:
        origin_of("hf")
    return str(caught.value)


def test_weights_that_one_host_lacks_are_told_by_all(tmp_path):
    """A relative path that is another directory on each rank, as hosts that share none have it."""
    convert(MemorySource(model_config("ngpt")), tmp_path / "hf", "hf")
    (tmp_path / "other").mkdir()
    told = run_ranks(2, begin_where_rank_1_has_nothing, [tmp_path, tmp_path / "other"])
    assert told == ["init_from = hf: is not on the host of rank 1; share it between hosts, or fetch it on each"] * 2
