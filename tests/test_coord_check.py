"""The coordinate check: what it measures, against the same by hand, and the command."""

from __future__ import annotations

import pytest
import torch
import yaml

from megabus.config import Layout
from megabus.model.decoder import param_specs
from megabus.testing import coord_check, parity
from megabus.testing.ranks import run_ranks
from tests.support.forked import run_python
from tests.support.small_models import model_of
from tests.support.small_runs import run_config, write_corpus

TRAINING = {kind: parity.parity_training(kind, Layout(1, 1, 1)) for kind in ("ngpt", "gpt")}


def _job(training):
    from megabus.engine.engine import Engine

    engine = Engine(training.train, training.optimizer, training.stage)
    engine.write_initial(0)
    batches = parity.rank_batches(engine, parity.batch_of(engine.stage, 0))
    coord_check.moves(engine, batches)  # the first step of all is a sign's
    before = coord_check._masters(engine)
    told = coord_check.moves(engine, batches)
    after = coord_check._masters(engine)
    engine.close()
    return told, before, after, batches[0][0]


@torch.no_grad()
def by_hand(model_config, before, after, tokens):
    """[(role, angles, change)] of every parameter, in fp64: branches are linear in what they write with."""
    specs = param_specs(model_config)
    shaped = [
        {name: rows.view(-1) if not specs[name].is_matrix else rows for name, rows in state.items()}
        for state in (before, after)
    ]
    was, now = (model_of(model_config, state) for state in shaped)
    moved = {name: (x, y.detach() - x) for (name, x), y in zip(was.named_parameters(), now.parameters(), strict=True)}
    seen = {}

    def watch(name):
        def keep(module, args):
            seen.setdefault(name, args)

        return keep

    modules = dict(was.named_modules())
    branches = [name for name in modules if name.endswith((".attn", ".mlp"))]
    for name in (*branches, "output.head"):
        modules[name].register_forward_pre_hook(watch(name))
    was(tokens)
    found = []
    for name, (w, dw) in moved.items():
        spec, (home, _, last) = specs[name], name.rpartition(".")
        cosines = torch.nn.functional.cosine_similarity(w, w + dw, dim=-1) if spec.is_matrix else None
        angles = None if cosines is None else cosines.clamp(max=1).arccos()
        if not spec.is_matrix:
            role, one, other = "gains", w, dw
        elif name == "embed.weight":
            role, one, other = "embedding", w[tokens], dw[tokens]
        elif home == "output.head":
            role, one, other = "head", seen[home][0] @ w.T, seen[home][0] @ dw.T
        elif last in ("out", "down"):
            role, one = "write", modules[home](*seen[home])
            whole = w.clone()
            w.copy_(dw)
            other = modules[home](*seen[home])
            w.copy_(whole)
        else:
            role, one, other = "read", seen[home][0] @ w.T, seen[home][0] @ dw.T
        found.append((role, angles, other.norm() / one.norm()))
    return found


def rms(values):
    return float(torch.cat([value.reshape(-1) for value in values]).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_moves_are_those_by_hand(kind):
    training = TRAINING[kind]
    ((told, *step),) = run_ranks(1, _job, training)
    hand = by_hand(training.stage.model, *step)
    assert set(told) == {role for role, _, _ in hand} == set(coord_check.ROLES)
    for role, moved in told.items():
        mine = [(angles, change) for name, angles, change in hand if name == role]
        assert moved.change == pytest.approx(rms([change for _, change in mine]), rel=1e-4)
        if role == "gains":
            assert moved.angle is None
        else:
            assert moved.angle == pytest.approx(rms([angles for angles, _ in mine]), rel=1e-4)


def _unseen_job(training):
    from megabus.engine.engine import Engine

    engine = Engine(training.train, training.optimizer, training.stage)
    watch = coord_check._Watch.__torch_function__

    def blind(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.embedding:
            return func(*args, **(kwargs or {}))
        return watch(self, func, types, args, kwargs)

    coord_check._Watch.__torch_function__ = blind
    try:
        coord_check._inputs(engine, (torch.zeros(1, 13, dtype=torch.int64),) * 2)
    except RuntimeError as error:
        return str(error)


def test_a_matrix_that_is_not_seen_is_told():
    assert run_ranks(1, _unseen_job, TRAINING["ngpt"])[0].startswith("the model multiplies embed.weight in a way")


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A run of two growths, its stages laid out over two ranks."""
    folder = tmp_path_factory.mktemp("run")
    config = run_config(write_corpus(folder), folder / "run", [{"tp": 2}, {"dp": 2}, {"pp": 2}])
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


def command(*words):
    return run_python(["-m", "megabus", "coord-check", "--config", *words])


def test_the_command_shows_every_stage_before_and_after_its_growth(config_file):
    tuned = "optimizer.transfer={d_model: 9, n_layers: 3, steps: 24}"  # 24: what the run takes
    done = command(config_file, tuned, "--steps", "4")
    assert done.returncode == 0, done.stderr
    rates, angles, changes, note = done.stdout.strip().split("\n\n")
    assert [line.split()[-4:] for line in rates.splitlines()[3:]] == [
        ["0.005", "0.003536", "0.003536", "0.003536"],
        ["0.00416", "0.002683", "0.002683", "0.002683"],
        ["0.001248", "0.000805", "0.000805", "0.000805"],
    ]
    assert [" ".join(line.split()[:-4]) for line in angles.splitlines()[3:]] == [
        "d36 L3 from scratch",
        "d52 L3 from scratch",
        "d52 L3 just grown",
        "d52 L3 grown",
        "d52 L5 from scratch",
        "d52 L5 just grown",
        "d52 L5 grown",
    ]
    assert len(changes.splitlines()) == len(angles.splitlines()) == 10
    assert note == "just grown: the first 1 of 4 steps after a growth; else the last 1 of 4 steps"
    assert not (config_file.parent / "run").exists()
    assert "inf" not in done.stdout  # of gates that silent layers bring, which are 0


def numbers(table, state):
    """{last columns of a state of the largest stage}, as printed."""
    (line,) = [line for line in table.splitlines() if state in line and " L5 " in line]
    return line.split(state)[1].split()


def test_silent_write_matrices_have_no_angle_from_zero(config_file):
    """A growth in depth gives gpt write rows of 0. Beside them those that were there move as they did."""
    after = ("growth.rewarm.tokens=100", "growth.boost.factor=3")
    done = command(config_file, "model.kind=gpt", "--steps", "2", *after)
    assert done.returncode == 0, done.stderr
    assert "inf" not in done.stdout
    *_, angles, changes, note = done.stdout.strip().split("\n\n")
    assert float(numbers(angles, "just grown")[2]) < 0.5  # a row that is new has turned by 1.05 from 0
    assert all(float(number) < 1 for number in numbers(changes, "just grown"))
    assert note.endswith("\nwithout what a run does after its growths by growth.boost, growth.rewarm")


def test_no_layers_have_dashes(config_file):
    done = command(config_file, "model.n_layers=0", "growth.depth=fresh", "--steps", "1", "layout.tp=1")
    assert done.returncode == 0, done.stderr
    rates, angles, changes, _ = done.stdout.strip().split("\n\n")
    for table in (rates, angles, changes):
        for line in table.splitlines()[3:]:
            cells = line.split()[-5:] if table is changes else line.split()[-4:]
            found = [number for number, cell in enumerate(cells) if cell == "-"]
            assert found == ([1, 2] if " L0 " in line else []), line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "error: --steps = 0: measures nothing"),
        (["data.train=nowhere"], "error: data.train = nowhere"),
        (["optimizer.transfer={d_model: 9}"], "error: optimizer.transfer.steps = (missing): "),
    ],
)
def test_bad_input_is_one_line(config_file, words, told):
    done = command(config_file, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
