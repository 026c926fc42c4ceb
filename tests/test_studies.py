"""The studies: every one is listed, compute is counted as it is said to be, distances are those of closed forms."""

import importlib
import importlib.util
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import study
from experiments.studies import common, distillation
from experiments.studies.distilling import claims, methods, parts
from flowjax import exact, objectives, paths
from flowjax.data import records, text
from flowjax.predictions import Model
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
    assert parts.wasserstein(x, x[::-1] + [0.3, 0.4]) == pytest.approx(0.5)
    mean, cov = np.zeros(2), np.eye(2)
    wide = np.random.default_rng(1).normal(size=(1500, 2)) * 2
    narrow = np.random.default_rng(2).normal(size=(1500, 2))
    assert parts.wasserstein(wide, narrow) ** 2 == pytest.approx(exact.wasserstein2_squared(mean, 4 * cov, mean, cov), rel=0.1)


def test_the_rarest_mode():
    x = np.concatenate([np.tile(mean, (n, 1)) for mean, n in zip(exact.mix4().means, (50, 20, 20, 10))])
    assert parts.rarest(x + 0.1) == pytest.approx(10)


def test_straightness_is_that_of_a_gaussian():
    """Along its exact trajectories, x_t = std(t) xi; straight lines have none."""
    at, xi = np.linspace(1, 0, 801), np.random.default_rng(0).normal(size=(50, 3))
    std = np.sqrt((1 - at) ** 2 / 4 + at**2)
    of_one = exact.gaussian([0.0], 0.25).straightness(paths.rectified())
    assert parts.bend(std[:, None, None] * xi, at) == pytest.approx(of_one * (xi**2).mean(), rel=1e-3)
    assert parts.bend((0.3 + 0.7 * at)[:, None, None] * xi, at) == pytest.approx(0, abs=1e-20)


def test_what_couplings_take():
    """In steps of the teacher, each of which passes a batch three times; guidance doubles it."""
    part = parts.Digits()
    assert part.passes(False) == 10_000 * 10 * 4 and part.passes(True) == 2 * part.passes(False)


def fabricated(**values):
    """Measurements of one seed: {"method in steps": ratio}."""
    found = {}
    for name, value in values.items():
        what, _, n = name.rpartition("_")
        found[what.replace("_", " "), int(n)] = [{"ratio": value, "agreement": 96.0, "precision": 50.0, "recall": 40.0, "coverage": 50.0}]
    return found


def test_published_directions_are_held_against_numbers():
    part = parts.Digits()
    found = fabricated(consistency_distillation_1=2.0, consistency_distillation_2=1.0, consistency_training_1=3.0, consistency_training_2=1.5)
    found |= fabricated(output_distillation_1=2.0, teacher_50=1.0, guidance_distillation_50=1.2, shortcut_4=1.3)
    said = {row[0].split(" (")[0]: row[1:] for row in claims.directions(part, found, {"teacher": [1.0], "reflow": [0.2], "reflow twice": [0.1]})}
    assert said["consistency distillation beats consistency training"][1] == "agrees"
    assert said["reflow straightens"] == ["teacher 1, once 0.2, twice 0.1", "agrees"]
    assert said["guidance distillation equals two passes within the noise"] == ["two passes 1, one 1.2", "disagrees"]
    late = said["distillation after reflow beats distillation before it"]
    assert late == ["not measured: after", ""]
    found["consistency training", 2] = found["consistency distillation", 1]
    found["consistency distillation", 2] = found["consistency training", 1]
    assert {row[0].split(" (")[0]: row[2] for row in claims.directions(part, found, {})}["consistency distillation beats consistency training"] == "disagrees"
    goals = claims.goals(part, found)
    assert [row[2] for row in goals] == ["reached", "not reached"]  # 2 of 2 in one step at 96 %, 1.3 of 1.25 in four
    # Nearer without the asked class is not better; where nobody has it, it is not reached.
    vague = fabricated(progressive_distillation_1=0.2)
    vague["progressive distillation", 1][0]["agreement"] = 90.0
    assert claims.goals(part, found | vague) == goals
    assert claims.goals(part, fabricated(teacher_50=1.0) | vague)[0][2] == "not reached"
    # Guidance raises the distance: who learns without it is no match for a guided teacher.
    found |= fabricated(consistency_training_1=0.1) | {("IMM, from nothing", 4): [{"ratio": 0.5}]}
    assert claims.goals(part, found) == goals


def test_the_page_of_a_study(tmp_path, monkeypatch):
    """Every table, from measurements that were made up."""
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(common, "HERE", tmp_path)
    part = parts.Digits()
    monkeypatch.setattr(part, "teacher", lambda seed: tmp_path / "teacher")
    monkeypatch.setattr(part, "measure", lambda workdir, seed, n, *how: {k: float(n + seed) for k in part.measures})
    monkeypatch.setattr(part, "straightness", lambda workdir, seed: 0.5 + seed)
    monkeypatch.setattr(part, "speed", lambda workdir, seed, steps, sampler, guidance=None: 1000 / steps)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"config": {"steps": 7}}')
    study = distillation.Study(part, range(2))
    study.add("teacher", [methods.always(part, tmp_path / "teacher", "euler")] * 2)
    spent = [{"budget": 1500.0, "seconds": 60.0, "couplings": False}, {"budget": 500.0, "seconds": None, "couplings": True}]
    study.add("output distillation", [{1: (tmp_path / "run", "euler")}] * 2, [spent, spent])
    study.write()
    text = (tmp_path / "results/distillation_digits.md").read_text()
    assert "| output distillation | 1.5 ± 0.71 |" in text and "| teacher | 1.5 ± 0.71 | 2.5 ± 0.71 |" in text
    assert "| output distillation | 7 | 1500 | 500 | 1.0 |  |" in text and "| teacher | 1 ± 0.71 |" in text
    assert "1000 images/s in one step, 20.0 of the guided teacher in 50: 50 times as many." in text
    assert "## Published directions" in text and "## Figures to reach" in text and (tmp_path / "results/distillation_digits.png").exists()


def test_sliced_wasserstein_is_that_of_a_shift():
    x = np.random.default_rng(0).normal(size=(300, 2))
    assert parts.sliced(x, x[::-1] + [0.3, 0.4]) == pytest.approx(0.5 / 2**0.5)


@pytest.mark.parametrize("part", parts.PARTS.values())
def test_every_method_asks_for_an_objective_that_there_is(part, monkeypatch):
    """With its settings; nothing is trained."""
    asked, part = [], part()
    monkeypatch.setattr(parts, "cost", lambda settings: objectives.build(settings["objective"]) and 1)
    monkeypatch.setattr(common, "train", lambda name, settings: asked.append((name, settings_lib.resolve(settings))) or pathlib.Path(name))
    monkeypatch.setattr(part, "coupled", lambda *a, **k: {"name": "mix4"})
    monkeypatch.setattr(part, "teacher", lambda seed: pathlib.Path("teacher"))
    monkeypatch.setattr(part, "start", lambda seed: pathlib.Path("start"))
    monkeypatch.setattr(part, "roles", lambda seed: {})
    monkeypatch.setattr(part, "own", lambda seed: part.config(seed, batch_size=part.batch, model=part.model))
    flags.FLAGS.mark_as_parsed()
    chosen, names = methods.of(part), {}
    for name, method in chosen.items():
        before, found = len(asked), method(part, 0)
        assert set(found) <= set(part.steps) and (not found or len(asked) > before), name
        for _, settings in asked[before:]:  # shortcut models are asked for steps of a length that they have learned, and for no other
            if "finest" in settings["objective"]:
                assert found and all(settings["objective"]["finest"] % n == 0 for n in found)
        for workdir, settings in asked[before:]:  # one name, one run: what a later method finds there is what it would train
            assert names.setdefault(workdir, settings) == settings
    assert all(s["ema"]["ema"] == {"name": "warmup", "decay": 0.99} for s in names.values())  # what a student began as is forgotten
    assert not part.only or set(chosen) == set(part.only)
    assert methods.of(part, ["reflow, then"]).keys() <= {name for name in chosen if name.startswith("reflow, then")}


@pytest.mark.parametrize("part", [parts.Digits(), parts.Mnist(), parts.Pixels(), parts.Emoji()])
def test_the_page_names_the_methods_that_are_not_guided(part, monkeypatch):
    """Those whose objective has no scale of guidance and whose data are no guided couplings, by their short names."""
    flags.FLAGS.mark_as_parsed()
    asked = []
    monkeypatch.setattr(parts, "cost", lambda settings: 1)
    monkeypatch.setattr(common, "train", lambda name, settings: asked.append(settings) or pathlib.Path(name))
    monkeypatch.setattr(part, "coupled", lambda *a, guided, **k: {"name": "guided" if guided else "its own"})
    for of in ("teacher", "start", "judge"):
        monkeypatch.setattr(part, of, lambda seed, of=of: pathlib.Path(of), raising=False)
    monkeypatch.setattr(part, "roles", lambda seed: {})
    monkeypatch.setattr(part, "own", lambda seed: part.config(seed))
    for name, method in methods.of(part).items():
        asked.clear()
        method(part, 0)
        guided = any({"guidance", "mix", "scale_max"} & s["objective"].keys() or s["data"]["name"] == "guided" for s in asked)
        short = name.split("(")[-1].rstrip(")") if "(" in name else name.split(",")[0]
        assert guided or short in " ".join(part.notes), name


@pytest.mark.parametrize("part", [parts.Pixels(), parts.Emoji()])
def test_objectives_take_networks_that_predict_the_image(part, monkeypatch):
    """JiT's, of which some objectives have no use: no method that is left for such a part draws its batch in vain."""
    flags.FLAGS.mark_as_parsed()
    asked = []
    monkeypatch.setattr(parts, "cost", lambda settings: asked.append(settings) or 1)
    monkeypatch.setattr(common, "train", lambda name, settings: pathlib.Path(name))
    monkeypatch.setattr(part, "coupled", lambda *a, **k: {"name": "mix4"})
    monkeypatch.setattr(part, "teacher", lambda seed: pathlib.Path("teacher"))
    monkeypatch.setattr(part, "start", lambda seed: pathlib.Path("start"))
    monkeypatch.setattr(part, "roles", lambda seed: {})
    monkeypatch.setattr(part, "judge", lambda seed: pathlib.Path("judge"), raising=False)
    for method in methods.of(part).values():
        method(part, 0)
    x, label = jnp.zeros((128, 1)), jnp.zeros(128, jnp.int32)
    for settings in {repr(s["objective"]): s for s in asked}.values():
        assert settings["prediction"] == "x"
        net = Model(lambda x_t, t, cond, key: x_t, paths.rectified(), "x", lambda cond: cond, guidance_embed=True, project=lambda *a: a)
        bound = objectives.build(settings["objective"])
        nets = {role: net for role, kind in bound.roles.items() if kind != "optional" or role in settings["roles"]}
        jax.eval_shape(lambda bound=bound, nets=nets: bound.rollout(nets, {"x": x, "step": 0, "cond": {"label": label}}, jax.random.key(0)))


def test_a_player_that_rests_costs_less(tmp_path, monkeypatch):
    """What a step costs on average: all of it in every fifth, the other player's part alone in four."""
    settings = common.config("mix4", steps=1, batch_size=16, model={"num_classes": 0, "width": 8, "depth": 1})
    settings["sample"]["every"] = 0
    start = tmp_path / "start"
    run = Run(settings)
    export.write(start, jax.device_get(run.fresh().params["net"]), run.info(0, "run"))
    roles = {k: {"checkpoint": str(start)} for k in ("net", "teacher", "fake")}
    of = lambda pace: parts.cost(settings | {"objective": {"name": "distribution_matching"}, "ema": {}, "roles": roles | {"net": roles["net"] | {"every": pace}}})  # noqa: E731, E501
    every, fifth, hundredth = of(1), of(5), of(100)
    assert fifth - hundredth == pytest.approx((every - hundredth) * (1 / 5 - 1 / 100) / (1 - 1 / 100)) and hundredth < 0.6 * every


def test_a_student_has_the_compute_it_is_given(tmp_path, monkeypatch):
    """Half the budget at the teacher's own objective is half its steps; a target network costs a pass more."""
    monkeypatch.setattr(flags.FLAGS["runs"], "value", str(tmp_path))
    flags.FLAGS.mark_as_parsed()
    asked = []
    monkeypatch.setattr(common, "train", lambda name, settings: asked.append((name, settings)) or tmp_path / name)
    part = parts.Plane()
    own = {"name": "flow_matching"}
    part.train("own", 0, own, {}, share=0.5)
    exact_teacher = part.teacher(0)
    part.train("cd", 0, {"name": "consistency_distillation"}, {"teacher": exact_teacher}, ema={"target": {"name": "constant", "decay": 0.9}})
    assert [e["budget"] for e in part.spent] == [1500, 3000] and not any(e["couplings"] for e in part.spent)
    (name, half), (_, taught) = asked[-2:]
    assert name == "distillation/plane/3000/own/0" and half["steps"] == part.budget // 2
    # Three network passes for a step of flow matching; the target's pass makes four, the exact teacher has next to no products.
    assert taught["steps"] == pytest.approx(part.budget * 3 / 4, rel=0.02)


@pytest.fixture
def lives(tmp_path, monkeypatch):
    """{name: Life} of study lifecycle, its base, the settings of what is trained, and the tools that are called, of which none is."""
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(flags.FLAGS["runs"], "value", str(tmp_path))
    for kind in ("float", "integer", "enum"):  # other binaries have flags of these names too
        monkeypatch.setattr(flags, f"DEFINE_{kind}", lambda name, default, *a, **k: types.SimpleNamespace(value=default))
    before = {*sys.modules}
    study = importlib.import_module("experiments.studies.lifecycle")
    base = sys.modules["experiments.studies.living.base"]
    for name in {*sys.modules} - before:
        if name.startswith("experiments.studies."):
            del sys.modules[name]  # with flags that are none
    trained, tools = {}, []
    monkeypatch.setattr(common, "train", lambda name, settings: trained.setdefault(name, settings_lib.resolve(settings)) and tmp_path / name)
    monkeypatch.setattr(common, "binary", lambda module, *arguments: tools.append((module, arguments[-1])))
    return study.LIVES, base, trained, tools


def of_a_few_emoji(path):
    """A data set of captions of both domains, and the subject among those held out, with a tokenizer."""
    captions = [f"{who} with medium skin tone" for who in ("man", "woman", "cook")] + ["red heart", "rainbow", "slice of pizza"]
    rows = [("train", c, {"image": np.full((64, 64, 3), i, np.uint8), "caption": c}) for i, c in enumerate(captions)]
    rows.append(("test", "dog", {"image": np.zeros((64, 64, 3), np.uint8), "caption": "dog face"}))
    records.write(path, rows, name="few")
    text.learn(captions, 300).save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("name, stages, runs, made", [("digits", 8, 9, 3), ("emoji", 8, 10, 5)])
def test_a_life_asks_for_stages_and_tools_that_there_are(name, stages, runs, made, lives, tmp_path, monkeypatch):
    """And a shortened life leaves alone what a whole one would go on with."""
    lives, base, trained, tools = lives
    if name == "emoji":
        of_a_few_emoji(tmp_path / "few")
        monkeypatch.setattr(flags.FLAGS["data"], "value", str(tmp_path / "few"))
        monkeypatch.setitem(lives["emoji"].stages.__globals__, "PROMPTS", 3)
    life = lives[name]()
    assert len([stage for stage, *_ in life.stages()]) == stages and len(trained) == runs
    assert len(tools) == made and all(importlib.util.find_spec(module) for module, _ in tools)
    for settings in trained.values():
        # A role is none that the objective lacks, and what is loaded is the workdir of another stage.
        assert {*settings["roles"]} <= {*objectives.build(settings["objective"]).roles}
        assert all(role["checkpoint"].removeprefix(f"{tmp_path}/") in trained for role in settings["roles"].values())
    before, written = {*trained}, {out for _, out in tools}
    base.SHORTEN.value = 0.1
    tools.clear()
    list(life.stages())
    assert len(trained) == 2 * len(before) and not written & {out for _, out in tools} and len(tools) == made
    assert life.result(life.name).startswith(str(tmp_path))


def test_what_was_measured_of_a_run_is_measured_again_when_it_has_gone_on(tmp_path):
    made = []
    measure = lambda: common.kept(tmp_path, {"guidance": 2.0}, lambda: made.append(1) or {"found": len(made)})["found"]  # noqa: E731
    assert [measure(), measure()] == [1, 1]  # an export has no steps
    for step in (2, 4):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / "tmp").mkdir(exist_ok=True)
        assert [measure(), measure()] == [step // 2 + 1] * 2


def test_what_was_measured_against_other_data_is_another_measurement(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "_real", lambda data: data)
    monkeypatch.setattr(common, "draw", lambda *a, **k: None)
    monkeypatch.setattr("flowjax.train.export.info_of", lambda workdir: {"config": {"data": {"name": "digits"}}})
    monkeypatch.setattr("flowjax.evals.evaluate.evaluate", lambda x, labels, real, settings: seen.append(real) or {"against": real})
    ask = lambda **more: common.measure(tmp_path, count=10, **more)["against"]  # noqa: E731
    other = {"name": "array_record", "path": "mnist"}
    assert '"digits"' in ask() and "mnist" in ask(data=other) and '"digits"' in ask() and "mnist" in ask(data=other)
    assert len(seen) == 2


def test_two_points_lost_are_not_more_than_two():
    """8 of 400 samples: 0.9575 - 0.9775 is not -0.02 in binary."""
    from experiments.studies import rewards

    curve = {"kl": np.array([0.0, 4.0, 5.0]), "agreement": np.array([0.9775, 0.9575, 0.955]), "gain": np.array([0.0, 2.1, 2.3])}
    assert rewards.within(curve, 16.0) == 1
