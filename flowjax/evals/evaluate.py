"""generated images + real splits -> measurements, each beside what real images score in the same place.

The reference is always the held-out split: the feature network has seen the train images, and so may the generator have.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from flowjax.config import ConfigError, bind, check
from flowjax.evals import agreement as agreement_
from flowjax.evals import frechet as frechet_
from flowjax.evals import kid as kid_
from flowjax.evals import memorisation as memorisation_
from flowjax.evals import prdc as prdc_
from flowjax.evals import processes
from flowjax.evals import rewards as rewards_
from flowjax.evals.features import Features, extractor, fingerprint
from flowjax.evals.image import QUANTISATION, quantise

_fits: dict = {}  # of _fitted
MOST_FEATURES = 4096  # of a Frechet distance
BLOCK = 8192  # images per batch of streamed statistics


@dataclass(frozen=True)
class Sets:
    """What the metrics look at: uint8 images (N, H, W, C) and integer labels (N,) of the three sets.

    Of several processes, each has its share of generated and asked, and all of the real sets, of which it looks at its share;
    count: how many were generated in all. asked, the labels that samples were asked for, is None when unconditional; judge is
    None when no metric needs one.
    """

    generated: np.ndarray
    count: int
    asked: np.ndarray | None
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    features: tuple[Features, ...]
    judge: agreement_.Judge | None
    seed: int

    @functools.cached_property
    def compared(self) -> list[tuple[Features, np.ndarray, np.ndarray]]:
        """(network, generated features, held-out features) for every feature network."""
        return [(net, processes.gather(net(self.generated)), features_of(net, self.test)) for net in self.features]

    def label(self, prefix: str, net: Features) -> str:
        """The full name of a number: metric, network with hash, sample count."""
        return f"{prefix}-{net.name}@{self.count}"


def features_of(net: Features, images: np.ndarray) -> np.ndarray:
    """Features of real images, which every process has all of; each looks at its share of them."""
    return processes.gather(net(images[processes.share(len(images))]))


def frechet(sets: Sets) -> dict:
    """Frechet distances to the held-out and to the train split, with what real images score.

    distance         generated to held-out; distance_to_train: far below it is a sign of memorisation
    train_to_test    the whole train split to held-out; ratio = distance / train_to_test
    floor            as many train images as were generated (`floor_samples`, fewer where train has fewer) to held-out
    expected_bias    what perfect samples would score at this count, were the features Gaussian (leading order)
    rank_deficient   fewer samples than features: the value says more about the count than about the model
    """
    out = {}
    for net, generated, test in sets.compared:
        if net.dim > MOST_FEATURES:
            raise ConfigError(
                f"evaluate: {net.name} has {net.dim} features, too many for a Frechet distance (at most {MOST_FEATURES}): its covariances "
                "would be singular and huge; use features such as {'name': 'pca', 'dim': 64}"
            )
        own, held_out = frechet_.statistics(generated), frechet_.statistics(test)
        mine = sets.train[processes.share(len(sets.train))]
        train = frechet_.gather(frechet_.stream(net(mine[i : i + BLOCK]) for i in range(0, len(mine), BLOCK)))
        some = np.random.default_rng(sets.seed).permutation(len(sets.train))[: sets.count]
        real = frechet_.distance(train, held_out)
        value = frechet_.distance(own, held_out)
        out[sets.label("FD", net)] = {
            "distance": value,
            "distance_to_train": frechet_.distance(own, train),
            "train_to_test": real,
            "ratio": value / real if real > 0 else None,
            "floor": frechet_.distance(frechet_.statistics(features_of(net, sets.train[some])), held_out),
            "floor_samples": len(some),
            "expected_bias": frechet_.expected_bias(held_out.cov, own.n, held_out.n),
            "rank_deficient": min(own.n, held_out.n) <= net.dim,
        }
    return out


def kid(sets: Sets, subsets: int = 100, subset_size: int = 1000) -> dict:
    """Unbiased cubic-kernel MMD^2 to held-out, and of train to held-out (`floor`); subsets shrink to the smallest set."""
    size = min(subset_size, sets.count, len(sets.test), len(sets.train))
    out = {}
    for net, generated, test in sets.compared:
        value, spread = kid_.kid(generated, test, subsets, size, sets.seed)
        some = np.random.default_rng(sets.seed).permutation(len(sets.train))[: len(test)]
        floor, _ = kid_.kid(features_of(net, sets.train[some]), test, subsets, size, sets.seed)
        out[sets.label("KID", net)] = {"distance": value, "subset_sd": spread, "floor": floor, "subset_size": size}
    return out


def prdc(sets: Sets, k_precision: int = 3, k_density: int = 5) -> dict:
    """Precision, recall, density and coverage against held-out, on equal counts (the larger set is cut at random), and `real`:
    the same of as many train images.
    """
    n = min(sets.count, len(sets.test), len(sets.train))
    rng = np.random.default_rng(sets.seed)
    mine, held, some = (rng.permutation(count)[:n] for count in (sets.count, len(sets.test), len(sets.train)))

    def both(real, generated):
        return {
            **prdc_.precision_recall(real=real, generated=generated, k=k_precision),
            **prdc_.density_coverage(real=real, generated=generated, k=k_density),
        }

    return {
        sets.label("PRDC", net): {
            **both(test[held], generated[mine]),
            "samples": n,
            "real": both(test[held], features_of(net, sets.train[some])),
        }
        for net, generated, test in sets.compared
    }


def agreement(sets: Sets) -> dict:
    """Share of samples that the independent judge assigns to the asked class, and the judge's own accuracy on held-out images."""
    if sets.asked is None:
        raise ConfigError("evals.metrics: agreement needs the labels that the samples were asked for; these are unconditional")
    mine = processes.share(len(sets.test))
    own = agreement_.agreement(sets.test[mine], sets.test_labels[mine], sets.judge)["agreement"]
    name = f"{sets.judge.name}-{sets.judge.hash[:8]}"
    return {**agreement_.agreement(sets.generated, sets.asked, sets.judge), "judge": name, "judge_accuracy": own}


def memorisation(sets: Sets, quantile: float = 0.05, limit: int = 2000) -> dict:
    """Nearest-neighbour evidence of copying, per feature network (see flowjax.evals.memorisation)."""
    return {
        sets.label("NN", net): memorisation_.memorisation(generated, features_of(net, sets.train), test, quantile, limit, sets.seed)
        for net, generated, test in sets.compared
    }


def reward(sets: Sets, of="ink", checkpoint: str = "", weights: str = "ema") -> dict:
    """Mean and standard deviation of a reward (flowjax.rewards: a name, or {name: weight}), and those of the held-out images.

    checkpoint: the classifier or reward model that it asks.
    """
    judge = rewards_.judge(checkpoint, weights) if checkpoint else None
    mine = processes.gather(rewards_.reward(of, sets.generated, sets.asked, judge))
    real = rewards_.reward(of, sets.test, None if sets.asked is None else sets.test_labels, judge)
    about = {"of": of} | ({"checkpoint": checkpoint} if checkpoint else {})
    return about | {f"{k}{name}": float(v) for name, s in (("", mine), ("_real", real)) for k, v in (("mean", s.mean()), ("sd", s.std()))}


METRICS = {"frechet": frechet, "kid": kid, "prdc": prdc, "agreement": agreement, "memorisation": memorisation, "reward": reward}


def _fitted(fit, section, images, labels, *rest):
    """fit(section, images, labels, *rest), which of the same images comes out the same, and is kept: studies ask for it time and again. What a
    file holds may change."""
    if isinstance(section, Mapping) and "checkpoint" in section:
        return fit(section, images, labels, *rest)
    key = fit, json.dumps(section, sort_keys=True, default=str), fingerprint(images, np.asarray(labels, np.int64)), rest
    if key not in _fits:
        if len(_fits) == 8:
            del _fits[next(iter(_fits))]
        _fits[key] = fit(section, images, labels, *rest)
    return _fits[key]


def _split(data: Mapping, name: str) -> tuple[np.ndarray, np.ndarray]:
    if name not in data or not {"x", "label"} <= set(data[name]):
        raise ConfigError(f"evals: data.{name} must hold x and label")
    x, label = np.asarray(data[name]["x"]), np.asarray(data[name]["label"])
    images = quantise(x, f"data.{name}.x")
    if abs(x).max() > 1 + 1e-3:
        raise ConfigError(f"data.{name}.x must be in [-1, 1], got [{x.min():g}, {x.max():g}]")
    if label.shape != (len(x),) or label.dtype.kind not in "iu":
        raise ConfigError(f"data.{name}.label must be {len(x)} integers, got shape {label.shape} of {label.dtype}")
    return images, label


def real(section, manifest: Mapping, splits: Mapping) -> dict:
    """The data that samples are measured against, as `evaluate` takes it: images, also where `section` holds latents of them.

    manifest: of the data the network was trained on; splits: {"train_split", "test_split"}.
    """
    from flowjax.data.pipeline import arrays
    from flowjax.data.text import without

    def part(split):
        # Samples are compared with images, not with latents made of them, and whatever is said of them.
        found = arrays(without(manifest.get("latents", {}).get("section", section)), split, embedded=False)
        if "x" not in found:
            raise ConfigError(f"data {section} are preferences, not images to compare samples with: set evaluate.data (or give --data)")
        return {"x": found["x"], "label": found["cond"].get("label", np.zeros(len(found["x"]), np.int32))}

    return {k: part(splits[f"{k}_split"]) for k in ("train", "test")}


def evaluate(images: np.ndarray, labels: np.ndarray | None, data: Mapping, settings: Mapping) -> dict:
    """Measure generated images against real ones.

    Of several processes, each gives its share of the generated images and their labels (flowjax.evals.processes), and all of
    the real ones; the answer is that of one process with all images, and the same on each.

    Args:
      images: generated, float (N, H, W, C) around [-1, 1]; rounded to 8 bits here, once.
      labels: the asked classes, int (N,), or None.
      data: {"train": {"x": (M, H, W, C) in [-1, 1], "label": (M,)}, "test": the same}.
      settings: metrics, features, judge: names or sections of METRICS, FEATURES, JUDGES; seed; cache: a folder for networks; sampled: the
        images are a network's own, so that images without a negative value are not taken for another range.

    Returns:
      {metric: its measurements} for every metric asked for, and "circumstances": what a protocol.Record wants to know of it
      (sample count, features, reference hashes, rounding) with the share of pixel values clipped by more than one grey level.

    Raises:
      ConfigError: images of wrong shape, range or too few, NaN, labels that no class has, or settings that do not exist.
    """
    return _evaluate(images, labels, data, **check(_evaluate, settings, "evals", ("images", "labels", "data")))


def _evaluate(
    images,
    labels,
    data,
    metrics=("frechet", "kid", "prdc", "agreement", "memorisation"),
    features=("pixels", "classifier"),
    judge="svm",
    seed: int = 0,
    cache: str = None,
    sampled: bool = False,
) -> dict:
    """The settings of `evaluate` with their defaults, by name so that an unknown one is refused."""
    chosen = [bind(METRICS, section, "evals.metrics", ("sets",)) for section in metrics]
    (train, train_labels), (test, test_labels) = _split(data, "train"), _split(data, "test")
    generated = quantise(images, "generated images", sampled)
    if not train.shape[1:] == test.shape[1:] == generated.shape[1:]:
        raise ConfigError(f"image shapes differ: generated {generated.shape[1:]}, train {train.shape[1:]}, test {test.shape[1:]}")
    count = int(processes.gather(np.array([len(generated)])).sum())
    smallest, needed = min(count, len(test), len(train)), max(10, jax.process_count())
    if smallest < needed:
        raise ConfigError(f"evaluation needs at least {needed} images in every set, the smallest has {smallest}")
    if labels is not None:
        labels = np.asarray(labels)
        unknown = np.setdiff1d(labels, train_labels)
        if labels.shape != (len(generated),) or len(unknown):
            raise ConfigError(
                f"labels of shape {labels.shape} for {len(generated)} images; values the train split lacks: {unknown.tolist()}"
            )
    nets = tuple(_fitted(extractor, section, train, train_labels, cache) for section in features)
    asks_judge = any(metric.func is agreement for metric in chosen)
    sets = Sets(
        generated, count, labels, train, train_labels, test, test_labels, nets,
        _fitted(agreement_.judge, judge, train, train_labels) if asks_judge else None, seed,
    )  # fmt: skip
    results = {metric.func.__name__: metric(sets) for metric in chosen}
    results["circumstances"] = {
        "samples": count,
        "features": [net.name for net in nets],
        "reference": {
            name: {"count": len(x), "hash": fingerprint(x, np.asarray(y, np.int64))[:16]}
            for name, x, y in (("train", train, train_labels), ("test", test, test_labels))
        },
        "quantisation": QUANTISATION,
        "clipped": float(np.mean(processes.gather(np.mean(np.abs(images) > 1 + 1 / 127.5, axis=(1, 2, 3))))),
    }
    return results
