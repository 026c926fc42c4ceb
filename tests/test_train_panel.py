"""The panel: what it measures is what it says, resuming is exact with it, and it ends a run for good."""

import copy
import shutil
import types

import jax
import numpy as np
import pytest

from flowjax import generate, rewards
from flowjax.config import ConfigError
from flowjax.evals import evaluate as evals
from flowjax.evals import image
from flowjax.evals import rewards as judged
from flowjax.train import export, loop, panel
from flowjax.train.assembly import Run
from train_runs import DIT, rows, stored, tiny, train

PANEL = {"every": 2, "count": 40, "steps": 3, "rewards": ["ink", "symmetry"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """config(**changes): Flow-GRPO from a network of random weights, two updates of two slices a step."""
    start = tmp_path_factory.mktemp("start")
    model = DIT | {"depth": 1}
    this = Run(tiny(data="digits", model=model, batch_size=32, ema={}))
    noise = lambda shape: 0.05 * np.random.default_rng(len(shape)).standard_normal(shape, np.float32)  # noqa: E731
    params = jax.tree.map(lambda p: p + noise(p.shape), jax.device_get(this.fresh().params["net"]))
    export.write(start, params, this.info(0, "run"))
    roles = {"reference": {"checkpoint": str(start)}, "net": {"checkpoint": str(start), "updates": 2}}
    objective = {"name": "flow_grpo", "reward": {"ink": 1.0, "upper": 0.0}, "group": 4, "steps": 3, "clip": 0.1, "beta": 0.1}
    given = dict(
        data="digits", model=model, batch_size=32, accumulate=2, objective=objective, roles=roles,
        optimizer={"name": "adamw", "schedule": {"name": "constant", "rate": 1e-2}}, panel=PANEL,
    )  # fmt: skip
    return lambda **changes: tiny(**{**given, **changes})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    step, said = train(config(), workdir)
    assert step == 4 and "done at step 4" in said
    return workdir


@pytest.fixture(scope="module")
def this(config):
    return Run(config())


def test_a_run_is_measured_from_the_start(whole):
    seen = [row for row in rows(whole) if "panel/ink" in row]
    assert [row["step"] for row in seen] == [0, 2, 4]
    names = {"ink", "ink/sd", "symmetry", "symmetry/sd", "diversity", "kl", "agreement", "frechet/pixels"}
    assert {k.removeprefix("panel/") for k in seen[0]} - {"step"} == names
    assert seen[0]["panel/kl"] < 1e-9 < seen[1]["panel/kl"]


def test_a_run_that_is_cut_in_two_measures_the_same(config, whole, tmp_path):
    """Three steps and one: two updates on each rollout, of two slices each, and the panel."""
    assert train(config(), tmp_path / "run", stop_at=3)[0] == 3
    assert [row["step"] for row in rows(tmp_path / "run") if "panel/ink" in row] == [0, 2]
    assert train(config(), tmp_path / "run")[0] == 4
    assert rows(tmp_path / "run") == rows(whole)
    assert stored(tmp_path / "run", 4)["fingerprints"] == stored(whole, 4)["fingerprints"]


def test_a_run_that_is_stopped_by_its_panel_stays_so_until_the_bounds_change(config, whole, tmp_path):
    run, strict = tmp_path / "run", config(panel=PANEL | {"stop": {"kl": {"above": 1e-9}, "ink": {"below": 0.0}}}, checkpoint={"every": 0})
    step, said = train(strict, run)
    assert step == 2 and "stopped by panel.stop: kl = " in said and "is above 1e-09, at step 2" in said
    before = rows(run)
    step, said = train(strict, run)
    assert step == 2 and "is already at step 2 of 4, where it stopped (panel.stop: kl = " in said and rows(run) == before
    step, said = train(config(panel=PANEL | {"stop": {"kl": {"above": 1e9}}}), run)
    assert step == 4 and "done at step 4" in said
    assert rows(run) == rows(whole) and stored(run, 4)["fingerprints"] == stored(whole, 4)["fingerprints"]


def test_what_is_measured_is_what_it_says(this):
    """Of the same samples, with the functions that the binaries use."""
    state, measure = this.fresh(), panel.Panel(this)
    found = measure(state)
    section = this.config["panel"]
    sample = this.sampler(section | {"negative": ""})
    label = np.arange(40) % 10
    x = generate.run(sample, this.drawing(state.ema["ema"]), {"label": label}, 40, batch=7)  # in other batches
    assert found["panel/symmetry"] == pytest.approx(judged.reward("symmetry", image.quantise(x), label).mean(), abs=2e-3)
    assert found["panel/ink/sd"] == pytest.approx(judged.reward("ink", image.quantise(x), label).std(), rel=0.05)
    within = [np.sqrt(x[label == k].var(0, ddof=1)).mean() for k in range(10)]
    assert found["panel/diversity"] == pytest.approx(np.mean(within), rel=1e-4)
    told = evals.evaluate(x, label, evals.real("digits", {}, this.config["evaluate"]), {"metrics": ["agreement", "frechet"], "features": ["pixels"]})
    assert found["panel/agreement"] == told["agreement"]["agreement"]
    assert found["panel/frechet/pixels"] == pytest.approx(next(iter(told["frechet"].values()))["distance"], rel=1e-4)
    assert {k.removeprefix("panel/") for k in found} == {*measure.names}
    # A network that has come to draw nothing but white is measured, as far as it went.
    bright = jax.tree.map(lambda p: p, state.ema["ema"])
    bright["final"]["linear"]["bias"] = bright["final"]["linear"]["bias"] - 20.0
    white = measure(state.replace(ema={"ema": bright}))
    assert white["panel/ink"] == pytest.approx(1.0) and white["panel/frechet/pixels"] > found["panel/frechet/pixels"]
    # What is no number is said to be none, and is out of every bound.
    lost = measure(state.replace(ema={"ema": jax.tree.map(lambda p: p * np.nan, state.ema["ema"])}))
    assert np.isnan(lost["panel/ink"]) and np.isnan(lost["panel/agreement"])


def test_without_a_reference_it_is_what_the_network_began_as(config):
    """Which outlives the state that began with it, as the step donates that."""
    objective = {"name": "reward_feedback", "reward": "ink", "steps": 2, "late": 1}
    net = {"checkpoint": config().to_dict()["roles"]["net"]["checkpoint"]}
    this = Run(config(objective=objective, roles={"net": net}))
    measure = panel.Panel(this)
    for leaf in jax.tree.leaves(this.fresh().params):
        leaf.delete()
    assert "kl" in measure.names and not any(leaf.is_deleted() for leaf in jax.tree.leaves(measure.others["reference"]))


def test_what_the_network_began_as_must_be_there_still(config, tmp_path):
    """A workdir that was trained further is another reference: kl would be measured from two networks in one run."""
    first = config().to_dict()["roles"]["net"]["checkpoint"]
    start = shutil.copytree(first, tmp_path / "start")
    objective = {"name": "reward_feedback", "reward": "ink", "steps": 2, "late": 1}
    given = config(objective=objective, roles={"net": {"checkpoint": str(start)}}, accumulate=1, panel=PANEL | {"count": 10, "metrics": []})
    assert train(given, tmp_path / "run", stop_at=2)[0] == 2
    _, params, info = export.load(start)
    shutil.rmtree(start)
    export.write(start, jax.tree.map(lambda p: p + 0.01, params), info)
    with pytest.raises(ConfigError, match="roles.net.checkpoint = .* changed since .* from which the panel measures kl"):
        train(given, tmp_path / "run")


def test_a_reward_and_a_metric_of_one_name_are_both_told():
    """The judge's log-probability, which is trained on, is not the share of right classes."""
    this = types.SimpleNamespace(roles={"net": types.SimpleNamespace(module=types.SimpleNamespace(kind="denoiser"))})
    this.config, this.asked = {"panel": {"every": 1, "count": 4, "seed": 0}}, lambda section: {"label": np.arange(4) % 2}
    this.network, this.average, this.whole = None, lambda role: None, lambda role, params: params
    seen = {"x": np.zeros((4, 2, 2, 1)), "rewards": {"agreement": np.full(4, -0.3), "ink": np.full(4, 0.5)}}

    class Known(panel.Panel):
        _rewards, _others, _metrics = lambda self: ["agreement", "ink"], lambda self: (None, {}), lambda self: (["agreement"], ())
        _look, _rules, _evaluated = lambda self: lambda *a: seen, lambda self: {}, lambda self, x: {"agreement": 0.9}

    this.config["evaluate"] = {"batch": 4}
    found = Known(this)(types.SimpleNamespace(params={"net": None}))
    assert found["panel/agreement"] == 0.9 and found["panel/reward/agreement"] == pytest.approx(-0.3)
    assert found["panel/reward/agreement/sd"] == pytest.approx(0) and found["panel/ink"] == 0.5 and "panel/agreement/sd" not in found


def test_bounds():
    halted = lambda values, **rules: panel.Panel.halted(type("", (), {"rules": rules}), values)  # noqa: E731
    seen = {"panel/kl": 3.0, "panel/ink": 0.4}
    assert not halted(seen, kl={"above": 3.0}) and not halted(seen, kl={"below": 3.0}) and not halted({}, kl={"above": 0.0})
    assert halted(seen, kl={"above": 2.5}) == "panel.stop: kl = 3 is above 2.5"
    assert halted(seen, kl={"above": 9.0}, ink={"below": 0.5}) == "panel.stop: ink = 0.4 is below 0.5"
    assert halted({"panel/kl": float("nan")}, kl={"above": 2.5}) == "panel.stop: kl = nan is no number"
    assert halted({"panel/kl": "nan"}, kl={"below": 2.5})  # as a checkpoint may hold it


def test_plain_errors(this, config):
    for change, message in [
        ({"stop": {"reward": {"above": 1.0}}}, "panel.stop.reward is not measured by this run; valid: ink, ink/sd, symmetry"),
        ({"stop": {"kl": 5.0}}, r"panel.stop.kl = 5.0 should be \{'above': number\}"),
        ({"stop": {"kl": {"over": 5.0}}}, "panel.stop.kl = "), ({"stop": {"kl": {}}}, "panel.stop.kl = "),
        ({"metrics": ["fid"]}, "panel.metrics: 'fid' is unknown; valid: agreement, frechet, kid"),
        ({"metrics": ["frechet", "frechet"]}, "measure something twice: frechet/pixels, frechet/pixels"),
        ({"rewards": ["beauty"]}, "panel.rewards = 'beauty' is unknown"), ({"sampler": "huen"}, "'huen' is unknown"),
        ({"rewards": ["agreement"]}, "'agreement' asks a classifier: roles.reward.checkpoint"), ({"noise": 0.0}, "panel.noise = 0.0 should be positive"),
        ({"steps": 1}, "panel.steps = 1 should be at least 2"),
    ]:  # fmt: skip
        other = copy.copy(this)
        other.config = this.config | {"panel": this.config["panel"] | change}
        with pytest.raises(ConfigError, match=message):
            panel.Panel(other)
    for section, message in [
        ({"every": 0, "stop": {"kl": {"above": 1}}}, "config.panel.stop = .* needs panel.every > 0"),
        ({"every": -1}, "config.panel.every = -1 should be at least 0"), ({"evry": 2}, "panel.evry is unknown; valid: every, count"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Run(config(panel=section))


def test_pairs_are_no_images_to_compare_with(tmp_path):
    from flowjax.data import sources

    x = np.zeros((4, 8, 8, 1), np.uint8)
    sources.write_preferences(tmp_path / "p", x, x + 9)
    with pytest.raises(ConfigError, match=r"are preferences, not images .*: set evaluate.data \(or give --data\)"):
        evals.real({"name": "preferences", "path": str(tmp_path / "p")}, {}, {"train_split": "train", "test_split": "test"})


def test_a_reward_that_is_no_number_ends_the_run_with_its_name(config, monkeypatch, tmp_path):
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda images: jax.numpy.where(images[:, 0, 0, 0] > 0, jax.numpy.nan, 0.0))
    objective = {"name": "online_dpo", "reward": {"ink": 1.0, "broken": 1.0}, "group": 4, "steps": 2}
    roles = config().to_dict()["roles"]
    with pytest.raises(loop.NonFinite, match=r"step 1: not finite in role 'net': the metric 'reward', the metric 'reward/broken', "):
        train(config(objective=objective, accumulate=1, roles=roles | {"net": roles["reference"]}, panel={"every": 0}), tmp_path / "run")
