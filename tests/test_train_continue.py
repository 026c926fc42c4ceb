"""Continued training: what a run starts from, which averages go on, what its card says; curated data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import records
from flowjax.evals import curate
from flowjax.train import ema, export, loop
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run
from train_runs import same, tiny, train

POWER = {"ema": {"name": "power", "std": 0.1}}
FIRST, SECOND = {"name": "mix4", "seed": 1}, {"name": "mix4", "seed": 2}


def config(base, average="", weights="params", **changes):
    net = {"checkpoint": str(base), "weights": weights, "average": average}
    return tiny(**({"roles": {"net": net}, "ema": POWER, "checkpoint": {"every": 2}} | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    train(tiny(ema=POWER, data=FIRST), workdir)
    return workdir


def test_weights_and_average_are_those_that_are_named(base):
    params, average = (export.load(base, name)[1] for name in ("params", "ema"))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(average)))
    cases = (config(base), params, params), (config(base, "ema"), params, average), (config(base, weights="ema"), average, average)
    for this, begun, kept in cases:
        state = Run(this).fresh()
        same(state.params["net"], begun)
        same(state.ema["ema"], kept)
    # All but the weights is new.
    fresh = Run(tiny(ema=POWER)).fresh()
    same(state.opt, fresh.opt)
    assert int(state.step) == 0


@pytest.mark.parametrize("average", ["", "ema"])
def test_an_average_that_goes_on_counts_on(base, average):
    this = Run(config(base, average))
    state = this.fresh()
    before = jax.device_get(state.ema["ema"])
    state, _ = this.step()(state, this.frozen, mesh_lib.place(next(this.pipeline), this.mesh))
    count = jnp.float32(5 if average else 1)  # the base made 4 updates
    wanted = ema.update(before, state.params["net"], ema.power(0.1)(count))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.device_get(state.ema["ema"]), jax.device_get(wanted))


def test_the_card_and_a_third_stage(base, tmp_path):
    data = {"name": "mixture", "parts": (SECOND, FIRST), "weights": (3.0, 1.0)}
    rules = {"name": "adamw", "schedule": {"name": "constant"}, "rules": ({"match": "x_embed", "rate": 0.0},)}
    second = config(base, "ema", data=data, optimizer=rules)
    train(second, tmp_path / "second", stop_at=2)
    # Had the source moved on, the decays to come would not be those that the steps before were counted by.
    file = tmp_path / "second/config.json"
    begun = file.read_text()
    file.write_text(begun.replace('"ema": 4\n', '"ema": 3\n'))
    with pytest.raises(ConfigError, match=r"has moved since .* began: \{'ema': 3\} -> \{'ema': 4\}"):
        train(second, tmp_path / "second")
    file.write_text(begun)
    train(second, tmp_path / "second")  # resumes
    card = json.loads((tmp_path / "second/card.json").read_text())
    assert card["start"] == {"net": f"{base} at step 4, weights params; optimizer state anew", "ema.ema": "goes on with its ema of 4 updates"}
    assert card["shares of the data"] == {"part 0": "75 %: name mix4, seed 2", "part 1": "25 % replay: name mix4, seed 1"}
    assert card["rules of the optimizer"]["net"]["frozen"].endswith("x_embed/bias, x_embed/kernel")
    old, new = (export.load(w, "params")[1] for w in (base, tmp_path / "second"))
    same(old["x_embed"], new["x_embed"])
    assert all((a != b).any() for k in old if k != "x_embed" for a, b in zip(jax.tree.leaves(old[k]), jax.tree.leaves(new[k])))
    third = Run(config(tmp_path / "second", "ema"))
    assert third.continued["ema"][1] == 8
    assert Run(config(base)).info(0, "run")["continued"] == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"roles": {"net": {"average": "ema"}}}, "roles.net.average goes on with an average of roles.net.checkpoint, which is missing"),
        ({"average": "emma"}, "weights = 'emma' is unknown in .*; valid: params, ema"),
        ({"average": "params"}, "average = 'params' goes on with an average of a workdir"),
        ({"average": "ema", "ema": {}}, "this run has no average of net"),
        ({"average": "ema", "ema": {"ema": POWER["ema"] | {"snapshot_every": 2}}}, "snapshot_every counts from the start of a run"),
        ({"average": "ema", "export": True}, "goes on with an average of a workdir; 'params' are none, and an export"),
    ],
)
def test_what_cannot_go_on_is_refused(base, changes, message, tmp_path):
    changes, source = dict(changes), base
    if changes.pop("export", False):
        source = tmp_path / "export"
        export.export(base, source)
    with pytest.raises(ConfigError, match=message):
        loop.run(config(source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- curated data


@pytest.fixture
def run(tmp_path):
    """run(settings) -> (train, test, manifest) of 12 grey pictures of three classes, brightness 0, 20, ..., 220, and one of 240."""
    rows = (("train" if i < 12 else "test", "", {"image": np.full((2, 2, 1), 20 * i, np.uint8), "label": i % 3}) for i in range(12 + 1))
    records.write(tmp_path / "grey", rows, name="grey", num_classes=3)

    def part(split):
        reader = records.Records(tmp_path / "out", split)
        return (reader.read(range(len(reader)))["image"][:, 0, 0, 0] // 20).tolist()

    def call(**settings):
        made, *_ = curate.curate({"name": "array_record", "path": str(tmp_path / "grey")}, tmp_path / "out", overwrite=True, **settings)
        return part("train"), part("test"), made

    return call


def test_curated_by_reward_or_by_hand(run, tmp_path):
    kept, rest, manifest = run(reward="ink", best=0.25)
    assert kept == [9, 10, 11] and rest == [12]
    told = manifest["source"]["curated"]
    assert told["best"] == 0.25 and told["reward"] == "ink" and told["of"] == 12 and told["least kept"] == pytest.approx(180 / 255)
    assert manifest["num_classes"] == 3
    assert run(reward="ink", best=0.25, each_class=True)[0] == [9, 10, 11]  # each a class of its own
    assert run(reward={"ink": -1.0}, best=0.5, each_class=True)[0] == [0, 1, 2, 3, 4, 5]
    assert run(reward="ink", least=99 / 255)[0] == [5, 6, 7, 8, 9, 10, 11]
    (tmp_path / "rows.txt").write_text("7\n3\n")
    kept, _, manifest = run(rows=str(tmp_path / "rows.txt"))
    assert kept == [3, 7] and manifest["source"]["curated"]["rows"].endswith("rows.txt")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "one of the three says what to keep"),
        ({"reward": "ink"}, "one of the three says what to keep"),
        ({"reward": "ink", "best": 0.5, "least": 0.1}, "one of the three says what to keep"),
        ({"reward": "ink", "best": 0.0}, "--best=0.0 should be a share"),
        ({"reward": "ink", "least": 2.0}, "--least=2.0 keeps nothing: the rewards are 0 to 0.8627"),
        ({"reward": "inc", "best": 1.0}, "'inc' is unknown"),
        ({"rows": "nowhere.txt"}, "--rows=nowhere.txt should be a file of numbers"),
        ({"reward": "ink", "least": 0.5, "each_class": True}, "--each_class goes with --best"),
    ],
)
def test_bad_choices_are_refused(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(**settings)
