"""The studies: every one is listed, compute is counted as it is said to be, distances are those of closed forms."""

import pathlib
import sys

import numpy as np
import pytest
from absl import flags

from experiments import study
from experiments.studies import common, distillation
from flowjax import exact


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


def test_a_student_has_the_compute_it_is_given(tmp_path, monkeypatch):
    """Half the budget at the teacher's own objective is half its steps; couplings cost the same, a teacher's Heun steps more."""
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
    assert name == "distillation/plane/own/0" and half["steps"] == part.budget // 2
    # Three network passes for a step of flow matching; the target's pass makes four, the exact teacher has next to no products.
    assert taught["steps"] == pytest.approx(part.budget * 3 / 4, rel=0.02)
