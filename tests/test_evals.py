"""Evaluation as a whole on the 8x8 digits: feature networks, the judge, ladders of damage, measurements, bad input."""

import functools
import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from nets import optimised
from flowjax.config import ConfigError
from flowjax.evals import agreement, features, frechet
from flowjax.evals.agreement import Judge
from flowjax.evals.evaluate import METRICS, evaluate
from flowjax.evals.image import dequantise, quantise


@functools.cache
def digits():
    """{"train": 1437, "test": 360 of {"x": (N, 8, 8, 1) in [-1, 1], "label": (N,)}}, split by a fixed permutation."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = (bunch.images / 8 - 1).astype(np.float32)[..., None][order]
    label = bunch.target.astype(np.int32)[order]
    return {"train": {"x": x[:1437], "label": label[:1437]}, "test": {"x": x[1437:], "label": label[1437:]}}


@functools.cache
def network(name):
    train = digits()["train"]
    with optimised():
        return features.extractor(name, quantise(train["x"]), train["label"])


@functools.cache
def svm():
    train = digits()["train"]
    return agreement.judge("svm", quantise(train["x"]), train["label"])


# --- feature networks


def test_pixels_are_the_images_after_rounding():
    x = np.clip(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), -1, 1)
    net = features.pixels(quantise(x))
    assert net.dim == 4 and net.name.startswith("pixels-") and len(net.hash) == 64
    assert net(quantise(x)).dtype == np.float64
    np.testing.assert_allclose(net(quantise(x)), x.reshape(3, 4), atol=0.5 / 127.5 + 1e-6)


def test_pca_keeps_the_variance_of_the_leading_components():
    train = quantise(digits()["train"]["x"])
    y = features.pca(train, dim=8)(train)
    flat = dequantise(train).reshape(len(train), -1)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(y.T), np.diag(np.linalg.eigvalsh(np.cov(flat.T))[::-1][:8]), atol=1e-5)
    with pytest.raises(ConfigError, match=r"1\.\.64"):
        features.pca(train, dim=65)


@pytest.mark.slow
def test_classifier_features_are_reproducible_cached_and_known_by_their_weights(tmp_path, monkeypatch):
    train = digits()["train"]
    images, label = quantise(train["x"][:64]), train["label"][:64]
    make = functools.partial(features.classifier, images, label, width=8, stages=1, dim=4, batch=8, cache=tmp_path)
    first = make(steps=3)
    again = features.classifier(images, label, width=8, stages=1, dim=4, batch=8, steps=3)
    assert first.hash == again.hash
    np.testing.assert_array_equal(first(images), again(images))
    assert first(images).shape == (64, 4)
    assert make(steps=4).hash != first.hash
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(features, "_fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception):
        make(steps=3)  # the code that trains has changed, so what it trained before does not count
    monkeypatch.undo()
    monkeypatch.setattr("flowjax.train.optim.build", lambda *_: pytest.fail("trained"))
    assert make(steps=3).hash == first.hash
    with pytest.raises(pytest.fail.Exception):
        make(steps=3, seed=1)


def test_batches_of_features_do_not_matter():
    double = lambda x: 2 * x.reshape(len(x), -1)  # noqa: E731
    x = quantise(np.random.default_rng(0).normal(size=(11, 2, 2, 1)))
    np.testing.assert_array_equal(features._in_batches(double, x, 4), double(dequantise(x)))


@pytest.mark.slow
def test_the_classifier_has_learned_its_classes():
    """Its features separate held-out digits: the nearest train image has the same class."""
    data, net = digits(), network("classifier")
    train, test = net(quantise(data["train"]["x"])), net(quantise(data["test"]["x"]))
    nearest = ((test[:, None] - train[None]) ** 2).sum(-1).argmin(1)
    assert np.mean(data["train"]["label"][nearest] == data["test"]["label"]) > 0.97


def damaged(kind):
    """Train digits with ever more of one damage, the undamaged first."""
    x, label = digits()["train"]["x"], digits()["train"]["label"]
    rng = np.random.default_rng(1)
    if kind == "blur":
        return [gaussian_filter(x, (0, s, s, 0)) for s in (0, 0.6, 0.8, 1.1, 1.6)]
    if kind == "noise":
        noise = rng.normal(size=x.shape)
        return [x + s * noise for s in (0, 0.25, 0.4, 0.6, 1.0)]
    if kind == "missing classes":
        return [x[label >= k] for k in (0, 1, 3, 5, 8)]
    if kind == "mode collapse":
        return [x[np.arange(len(x)) % k] for k in (len(x), 60, 20, 7, 2)]
    raise ValueError(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blur", "noise", "missing classes", "mode collapse"])
@pytest.mark.parametrize("name", ["pixels", "pca", "classifier"])
def test_more_damage_is_further_away(name, kind):
    """A network that fails a ladder may not be used for a claim about that damage."""
    net = network(name)
    held_out = frechet.statistics(net(quantise(digits()["test"]["x"])))
    values = [frechet.distance(frechet.statistics(net(quantise(x))), held_out) for x in damaged(kind)]
    assert (np.diff(values) > 0).all(), values
    assert values[-1] > 5 * values[0]


# --- the judge


def test_the_judge_of_digits_is_right_on_98_percent_of_held_out_images():
    test = digits()["test"]
    report = agreement.agreement(quantise(test["x"]), test["label"], svm())
    assert report["agreement"] >= 0.98
    assert sum(row["samples"] for row in report["per_class"].values()) == 360
    shuffled = agreement.agreement(quantise(test["x"]), (test["label"] + 1) % 10, svm())
    assert shuffled["agreement"] < 0.02


def test_agreement_table_worked_by_hand():
    class Fixed:
        def predict(self, x):
            return np.array([0, 1, 1, 7, 1, 3])

    report = agreement.agreement(np.zeros((6, 1, 1, 1), np.uint8), np.array([0, 0, 0, 0, 1, 3]), Judge("fixed", "", Fixed()))
    assert report == {
        "agreement": 0.5,
        "per_class": {
            "0": {"samples": 4, "agreement": 0.25, "mistaken_for": 1},
            "1": {"samples": 1, "agreement": 1.0, "mistaken_for": None},
            "3": {"samples": 1, "agreement": 1.0, "mistaken_for": None},
        },
    }


def test_the_judge_of_larger_images_works_on_principal_components():
    data = digits()
    large = lambda x: quantise(x.repeat(2, 1).repeat(2, 2))  # noqa: E731
    judge = agreement.svm(large(data["train"]["x"]), data["train"]["label"], dim=30, limit=1000)
    assert judge.model[0].n_components_ == 30 and judge.model[-1].shape_fit_[0] == 1000
    assert agreement.agreement(large(data["test"]["x"]), data["test"]["label"], judge)["agreement"] > 0.96


# --- the whole


def measure(images, labels=None, **settings):
    report = evaluate(images, labels, digits(), {"features": ["pixels"], **settings})
    json.dumps(report, allow_nan=False)
    return report


def only(section):
    (value,) = section.values()
    return value


def test_train_images_as_samples_score_what_real_images_score_and_are_flagged():
    data = digits()
    report = measure(data["train"]["x"], data["train"]["label"], metrics=tuple(METRICS))
    assert set(METRICS) < set(report)
    ink = [((data[k]["x"] + 1) / 2).mean((1, 2, 3)) for k in ("train", "test")]
    assert [report["reward"][k] for k in ("mean", "sd")] == pytest.approx([ink[0].mean(), ink[0].std()], abs=2e-3)  # of 8 bits
    assert [report["reward"][f"{k}_real"] for k in ("mean", "sd")] == pytest.approx([ink[1].mean(), ink[1].std()], abs=2e-3)
    (name,) = report["frechet"]
    assert name == f"FD-{network('pixels').name}@1437"
    distances = report["frechet"][name]
    assert distances["distance"] == pytest.approx(distances["train_to_test"]) == pytest.approx(distances["floor"])
    assert distances["ratio"] == pytest.approx(1)
    assert abs(distances["distance_to_train"]) < 1e-6
    assert 0.3 < distances["distance"] < 0.6 and 0.5 < distances["expected_bias"] / distances["distance"] < 2
    assert not distances["rank_deficient"] and distances["floor_samples"] == 1437
    assert abs(only(report["kid"])["distance"]) < 0.01 and only(report["kid"])["subset_size"] == 360
    overlap = only(report["prdc"])
    assert overlap["samples"] == 360
    for scores in (overlap, overlap["real"]):
        assert min(scores["precision"], scores["recall"]) > 0.85 and scores["coverage"] > 0.93
        assert 0.9 < scores["density"] < 1.1
    assert report["agreement"]["agreement"] > 0.99 and report["agreement"]["judge_accuracy"] >= 0.98
    assert only(report["memorisation"])["flagged"] and only(report["memorisation"])["exact_copies"] == 1


def test_held_out_images_as_samples():
    """Half of the held-out digits judged against the other half: real, fresh, and not taken for copies."""
    data = digits()
    halves = {"train": data["train"], "test": {k: v[180:] for k, v in data["test"].items()}}
    report = evaluate(data["test"]["x"][:180], None, halves, {"metrics": ["memorisation", "frechet"], "features": ["pixels"]})
    assert not only(report["memorisation"])["flagged"]
    distances = only(report["frechet"])
    assert distances["distance"] > 0 and distances["floor_samples"] == 180
    assert distances["distance"] == pytest.approx(distances["floor"], rel=0.3)
    assert 1 < distances["distance"] / distances["train_to_test"] < 3


def test_precision_and_recall_keep_their_sides():
    """One class alone looks real and covers little."""
    data = digits()
    report = measure(data["train"]["x"][data["train"]["label"] == 0], metrics=["prdc"])
    scores = only(report["prdc"])
    assert scores["precision"] > 0.8 and scores["recall"] < 0.3 and scores["coverage"] < 0.3


def test_noise_is_far_from_everything():
    x = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8, 1))
    report = measure(x, metrics=["frechet", {"name": "kid", "subsets": 3, "subset_size": 50}, "prdc", "memorisation"])
    assert only(report["frechet"])["ratio"] > 10
    assert only(report["kid"])["distance"] > 0.05 and only(report["kid"])["subset_size"] == 50
    assert only(report["prdc"])["precision"] == 0 == only(report["prdc"])["coverage"]
    assert not only(report["memorisation"])["flagged"]


def test_circumstances_say_what_a_record_needs():
    x = digits()["test"]["x"][:40].copy()
    before = measure(x, metrics=["frechet"])
    assert only(before["frechet"])["rank_deficient"]
    x[0, 0, 0, 0] = -1.5  # black is black after rounding: clipped, and nothing else changes
    report = measure(x, metrics=["frechet"])
    assert report["frechet"] == before["frechet"]
    told = report["circumstances"]
    assert told["clipped"] == pytest.approx(1 / (40 * 64)) and before["circumstances"]["clipped"] == 0
    assert told["samples"] == 40 and told["features"] == [network("pixels").name]
    assert {k: v["count"] for k, v in told["reference"].items()} == {"train": 1437, "test": 360}
    assert told["reference"]["train"]["hash"] != told["reference"]["test"]["hash"]


def test_several_networks_each_have_their_number():
    report = measure(digits()["test"]["x"], metrics=["frechet"], features=["pixels", {"name": "pca", "dim": 8}])
    assert [name.split("-")[1] for name in report["frechet"]] == ["pixels", "pca"]
    assert all(abs(v["distance"]) < 1e-6 for v in report["frechet"].values())


def change(split, **fields):
    data = digits()
    return {**data, split: {**data[split], **fields}}


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(images=np.full((20, 8, 8, 1), np.nan)), "generated images: 20 of 20 hold NaN"),
        (dict(images=np.full((20, 8, 8, 1), 200.0)), r"generated images must be in \[-1, 1\]"),
        (dict(images=-np.ones((20, 9, 8, 1))), "shapes differ"),
        (dict(images=-np.ones((9, 8, 8, 1)), labels=None), "at least 10"),
        (dict(labels=np.arange(20)), "lacks: .10, 11"),
        (dict(labels=np.zeros(19, int)), "labels of shape"),
        (dict(labels=None), "unconditional"),
        (dict(data={"train": digits()["train"]}), "data.test"),
        (dict(data=change("train", x=3 * digits()["train"]["x"])), r"data.train.x must be in \[-1, 1\]"),
        (dict(data=change("test", label=np.zeros(3, int))), "data.test.label"),
        (dict(settings={"metrics": ["fid"]}), "frechet"),
        (dict(settings={"metrics": [{"name": "kid", "subset": 3}]}), "subset_size"),
        (dict(settings={"features": ["inception"]}), "classifier, network, pca, pixels"),
        (dict(settings={"feature": ["pixels"]}), "evals.feature is unknown"),
        (dict(settings={"judge": "oracle", "features": []}), "svm"),
    ],
)
def test_bad_input_is_refused_in_plain_words(bad, message):
    case = {
        "images": -np.ones((20, 8, 8, 1)),
        "labels": np.zeros(20, int),
        "data": digits(),
        "settings": {"metrics": ["agreement"], "features": ["pixels"]},
        **bad,
    }
    with pytest.raises(ConfigError, match=message):
        evaluate(**case)


@pytest.mark.parametrize("count", [5, 40])
def test_principal_components_are_scikit_learns(count):
    """With fewer images than pixels as with more; up to the sign of each component."""
    from sklearn.decomposition import PCA

    images = np.random.default_rng(count).integers(0, 256, (count, 3, 4, 1), np.uint8)
    ours = features.pca(images, 3)(images)
    theirs = PCA(3).fit_transform(features.dequantise(images).reshape(count, -1).astype(np.float64))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-9)


def test_frechet_distances_of_too_many_features_are_refused():
    x = np.random.default_rng(0).uniform(-1, 1, (10, 65, 65, 1)).astype(np.float32)
    data = {"train": {"x": x, "label": np.zeros(10, int)}, "test": {"x": x, "label": np.zeros(10, int)}}
    with pytest.raises(ConfigError, match="pixels-.* has 4225 features, too many for a Frechet distance"):
        evaluate(x, None, data, {"metrics": ["frechet"], "features": ["pixels"], "judge": "svm", "seed": 0})
