"""DreamBooth: marked rows of a mixture, subsets of the data, and the loss of two means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import records
from flowjax.data.pipeline import pipeline
from flowjax.objectives import flow_matching
from flowjax.predictions import Model
from flowjax.paths import rectified
from flowjax.train import loop
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run
from train_runs import tiny

LABELS = np.arange(40) % 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets of 40 images in ten classes, all pixels of image i of the first i and of the second 100 + i."""
    home = tmp_path_factory.mktemp("data")
    for name, first in (("subject", 0), ("class", 100)):
        rows = [("train", f"{i}", {"image": np.full((8, 8, 1), first + i, np.uint8), "label": int(LABELS[i])}) for i in range(40)]
        records.write(home / name, rows, name=name, num_classes=10)
    return home


def mixture(home, prior=(1,), weights=(1.0, 1.0), **subset):
    parts = ({"name": "array_record", "path": str(home / "subject"), **subset}, {"name": "array_record", "path": str(home / "class")})
    return {"name": "mixture", "parts": parts, "weights": weights, "prior": prior}


def values(batch):
    return np.rint((batch["x"][:, 0, 0, 0] + 1) * 127.5).astype(int)


def test_a_subset_holds_what_was_asked_for(data):
    section = {"name": "array_record", "path": str(data / "subject")}
    pipe = pipeline(section | {"classes": (3, 7), "limit": 5}, 5, 0)
    for _ in range(3):
        batch = next(pipe)
        assert sorted(values(batch)) == [3, 7, 13, 17, 23] and {*batch["cond"]["label"]} == {3, 7}
    assert pipe.manifest["count"] == 5 and pipe.num_classes == 10
    assert sorted(values(next(pipeline(section | {"limit": 3}, 3, 1)))) == [0, 1, 2]
    for wrong, message in (
        ({"classes": (3, 10)}, r"data.classes = \(3, 10\): 10 is none of the 10 classes"),
        ({"limit": -1}, "data.limit = -1 should be a number of examples"),
        ({"name": "mix4", "limit": 2}, "mix4 is endless"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline({**({} if "name" in wrong else section), **wrong}, 2, 0)


def test_the_rows_of_the_prior_are_marked(data):
    pipe = pipeline(mixture(data, limit=3, weights=(1, 3)), 16, 0)
    batch = next(pipe)
    np.testing.assert_array_equal(batch["prior"], values(batch) >= 100)
    assert batch["prior"].dtype == bool and batch["prior"].sum() == 12 and {*values(batch)[~batch["prior"]]} == {0, 1, 2}
    assert pipe.manifest["prior"] == [1]
    # Every process has the marks of its own rows, also where all of them are of one part.
    blocks = [next(pipeline(mixture(data), 4, 0, process_index=i, process_count=4))["prior"] for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(blocks), next(pipeline(mixture(data), 4, 0))["prior"])
    assert "prior" not in next(pipeline(mixture(data, prior=()), 4, 0))
    for prior in ((2,), (0, 1)):
        with pytest.raises(ConfigError, match=r"data.prior = .* must be numbers of some of the 2 data.parts"):
            pipeline(mixture(data, prior=prior), 4, 0)


@pytest.mark.parametrize("marked", [[0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1], [0] * 6, [1] * 6])
def test_the_loss_is_the_sum_of_two_means(marked):
    marked, random = np.array(marked, bool), np.random.RandomState(0)
    x = jnp.asarray(random.standard_normal((6, 3)), jnp.float32)
    net = Model(lambda x_t, t, cond, key: jnp.sin(x_t) + t[:, None], rectified(), "velocity")
    batch = flow_matching.rollout({"net": net}, {"x": x, "cond": {}, "prior": jnp.asarray(marked)}, jax.random.key(0), prior=0.7)
    a, z, t = (np.asarray(batch[k], np.float64) for k in "xzt")
    error = np.square(np.sin((1 - t)[:, None] * a + t[:, None] * z) + t[:, None] - (z - a)).mean(axis=1)
    mean = lambda rows: error[rows].mean() if rows.any() else 0.0  # noqa: E731
    loss = lambda part: float(flow_matching.loss({"net": net}, part, None)[0])  # noqa: E731
    assert loss(batch) == pytest.approx(mean(~marked) + 0.7 * mean(marked), rel=1e-5)
    # Slices of the batch, however uneven, make the same mean.
    slices = [jax.tree.map(lambda v, i=i: v[i::2], batch) for i in range(2)]
    assert np.mean([loss(part) for part in slices]) == pytest.approx(loss(batch), rel=1e-5)


def config(**changes):
    points = {"name": "mixture", "parts": ("mix4", {"name": "mix4", "seed": 9}), "weights": (1.0, 1.0), "prior": (1,)}
    return tiny(**({"data": points, "objective": {"name": "flow_matching", "prior": 0.5}, "batch_size": 512} | changes))


def test_a_run_weighs_the_marked_rows():
    """A network that says zero has the loss E|z - x|^2 of each half."""
    this = Run(config(accumulate=2))
    batch = next(this.pipeline)
    _, metrics = this.step()(this.fresh(), this.frozen, mesh_lib.place(batch, this.mesh))
    x, marked = batch["x"], batch["prior"]
    half = np.square(x).mean(axis=1) + 1  # E|z|^2 = 1
    assert float(metrics["loss"]) == pytest.approx(half[~marked].mean() + 0.5 * half[marked].mean(), rel=0.05)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "flow_matching"}, "data.prior .* marks the rows whose weight objective.prior says: give both or none"),
        ({"data": {"name": "mix4"}}, "give both or none"),
        ({"objective": {"name": "flow_matching", "prior": -1.0}}, "objective.prior = -1.0 should not be negative"),
        ({"objective": {"name": "meanflow", "prior": 1.0}}, "objective.prior is unknown"),
    ],
)
def test_half_a_dreambooth_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.run(config(**changes), tmp_path / "run")
