"""The studies: every one is listed, compute is counted as it is said to be, distances are those of closed forms."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from absl import flags

from experiments import study
from experiments.studies import common, distillation
from flowjax import exact, objectives
from flowjax.train import export
from flowjax.train import settings as settings_lib
from flowjax.train.assembly import Run


def test_every_study_is_listed():
    files = {p.stem for p in pathlib.Path(common.HERE).glob("*.py")} - {"__init__", "common"}
    assert files == set(study.STUDIES)
    assert all("def main():" in (common.HERE / f"{name}.py").read_text() for name in files)


@pytest.mark.parametrize("argv", [[], ["digit"], ["--runs=x"]])
def test_unknown_studies_are_refused_with_the_valid_ones(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", *argv])
    assert study.main() == 2
    said = capsys.readouterr().err
    assert "is not a study" in said and all(name in said for name in study.STUDIES)


def test_wasserstein_is_that_of_a_shift_and_of_a_permutation():
    """Shifting points moves each by as much; and the best pairing of a permutation is the permutation."""
    x = np.random.default_rng(0).normal(size=(200, 2))
    assert distillation.wasserstein(x, x[::-1] + [0.3, 0.4]) == pytest.approx(0.5)
    mean, cov = np.zeros(2), np.eye(2)
    wide = np.random.default_rng(1).normal(size=(1500, 2)) * 2
    narrow = np.random.default_rng(2).normal(size=(1500, 2))
    assert distillation.wasserstein(wide, narrow) ** 2 == pytest.approx(exact.wasserstein2_squared(mean, 4 * cov, mean, cov), rel=0.1)


def test_sliced_wasserstein_is_that_of_a_shift():
    x = np.random.default_rng(0).normal(size=(300, 2))
    assert distillation.sliced(x, x[::-1] + [0.3, 0.4]) == pytest.approx(0.5 / 2**0.5)


@pytest.mark.parametrize("part", [distillation.Plane, distillation.Digits])
def test_every_method_asks_for_an_objective_that_there_is(part, monkeypatch):
    """With its settings; nothing is trained."""
    asked, part = [], part()
    monkeypatch.setattr(distillation, "cost", lambda settings: objectives.build(settings["objective"]) and 1)
    monkeypatch.setattr(common, "train", lambda name, settings: asked.append(settings_lib.resolve(settings)) or pathlib.Path(name))
    monkeypatch.setattr(part, "coupled", lambda *a, **k: {"name": "mix4"})
    monkeypatch.setattr(part, "teacher", lambda seed: pathlib.Path("teacher"))
    monkeypatch.setattr(part, "start", lambda seed: pathlib.Path("start"))
    flags.FLAGS.mark_as_parsed()
    for name, method in distillation.METHODS.items():
        before, found = len(asked), method(part, 0)
        assert set(found) <= set(distillation.STEPS) and (not found or len(asked) > before), name
    kept = [s["ema"]["ema"] for s in asked]
    assert all(e == {"name": "warmup", "decay": 0.99} for e in kept)  # what a student began as is forgotten


def test_a_player_that_rests_costs_less(tmp_path, monkeypatch):
    """What a step costs on average: all of it in every fifth, the other player's part alone in four."""
    settings = common.config("mix4", steps=1, batch_size=16, model={"num_classes": 0, "width": 8, "depth": 1})
    settings["sample"]["every"] = 0
    start = tmp_path / "start"
    run = Run(settings)
    export.write(start, jax.device_get(run.fresh().params["net"]), run.info(0, "run"))
    roles = {k: {"checkpoint": str(start)} for k in ("net", "teacher", "fake")}
    of = lambda pace: distillation.cost(settings | {"objective": {"name": "distribution_matching"}, "ema": {}, "roles": roles | {"net": roles["net"] | {"every": pace}}})  # noqa: E731, E501
    every, fifth, hundredth = of(1), of(5), of(100)
    assert fifth - hundredth == pytest.approx((every - hundredth) * (1 / 5 - 1 / 100) / (1 - 1 / 100)) and hundredth < 0.6 * every


def test_a_student_has_the_compute_it_is_given(tmp_path, monkeypatch):
    """Half the budget at the teacher's own objective is half its steps; a target network costs a pass more."""
    monkeypatch.setattr(flags.FLAGS["runs"], "value", str(tmp_path))
    flags.FLAGS.mark_as_parsed()
    asked = []
    monkeypatch.setattr(common, "train", lambda name, settings: asked.append((name, settings)) or tmp_path / name)
    part = distillation.Plane()
    own = {"name": "flow_matching"}
    part.train("own", 0, own, {}, share=0.5)
    exact_teacher = part.teacher(0)
    part.train("cd", 0, {"name": "consistency_distillation"}, {"teacher": exact_teacher}, ema={"target": {"name": "constant", "decay": 0.9}})
    (name, half), (_, taught) = asked[-2:]
    assert name == "distillation/plane/3000/own/0" and half["steps"] == part.budget // 2
    # Three network passes for a step of flow matching; the target's pass makes four, the exact teacher has next to no products.
    assert taught["steps"] == pytest.approx(part.budget * 3 / 4, rel=0.02)
