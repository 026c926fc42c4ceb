"""A reward model of the digits: how many held-out preferences it shares, and how sure it is, as labels get noisier.

    python -m experiments.study reward_model

Preferences by rule between two real digits of one class: the one with more ink. Train pairs are of train images, held-out pairs of
held-out images. Noise turns so many of the train labels round.
"""

import pathlib

import numpy as np

from experiments.studies import common
from flowjax.train import runtime

NOISES = (0.0, 0.1, 0.2, 0.3)
PAIRS = {"train": 4000, "test": 1000}


def pairs(split: str, seed: int) -> str:
    """Directory of the pairs of a split, written now where they are not: two images of a class, the one with more ink preferred."""
    from flowjax.data import pipeline, sources
    from flowjax.evals import image, rewards

    out = pathlib.Path(common.RUNS.value) / "reward_model" / "pairs" / f"{split}{seed}"
    if not out.exists():
        data = pipeline.arrays("digits", split)
        x, label = image.quantise(data["x"]), data["cond"]["label"]
        rng = np.random.default_rng(seed)
        classes = np.arange(PAIRS[split]) % 10
        members = np.stack([rng.choice(np.flatnonzero(label == c), 2, replace=False) for c in classes])
        scores = rewards.reward("ink", x, label)[members]
        win, lose, kept = rewards.best_and_worst(x[members], scores)
        sources.write_preferences(out, win, lose, classes[kept], 10, {"reward": "ink", "of": split, "seed": seed})
    return str(out)


def main():
    runtime.setup()
    from flowjax.data import pipeline
    from flowjax.evals import rewards

    seeds = range(common.SEEDS.value)
    start = [common.train(f"reward_model/backbone/{s}", common.config("digits_classifier", "clean", seed=s)) for s in seeds]
    rows = []
    for noise in NOISES:
        clean, noisy = [], []
        for s in seeds:
            data = {"path": pairs("train", s), "noise": noise, "noise_seed": s}
            settings = common.config("digits_reward", seed=s, data=data, roles={"net": {"checkpoint": str(start[s])}}, validation={"every": 0})
            net = rewards.judge(str(common.train(f"reward_model/{noise:g}/{s}", settings))).net
            held = lambda share, s=s: pipeline.arrays(  # noqa: E731
                {"name": "preferences", "path": pairs("test", s), "noise": share, "noise_seed": s}
            )
            clean.append(rewards.calibration(rewards.differences(net, held(0.0))))
            noisy.append(rewards.calibration(rewards.differences(net, held(noise))))
        told = lambda results, key, scale=100: common.spread([scale * r[key] for r in results])  # noqa: E731
        rows.append([
            f"{100 * noise:g}", told(clean, "accuracy"), told(clean, "ece"), told(noisy, "accuracy"), told(noisy, "ece"), told(noisy, "slope", 1),
        ])  # fmt: skip
    head = ["train labels turned round %", "accuracy %", "ECE %", "accuracy % on labels as noisy", "ECE % on them", "calibration slope on them"]
    common.page("reward_model", "\n".join([
        "# A reward model from noisy labels", "",
        f"{common.measured_by('reward_model')}. Bradley-Terry on the features of a",
        f"classifier of digits (configs/digits_reward.py), from {PAIRS['train']:,} pairs of train images of one class, of which the one with",
        f"more ink is preferred; measured on {PAIRS['test']:,} such pairs of held-out images. ECE: expected calibration error of",
        "sigmoid(difference of rewards), ten bins. The first two measurements are on right labels, the others on labels that are turned",
        "round as often as the train labels were: there a calibrated model has an ECE near 0 and a slope near 1.", "",
        common.table("reward_model", head, rows),
    ]))  # fmt: skip
