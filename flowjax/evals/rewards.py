"""The rewards of flowjax.rewards on stored images, and what follows from them: pairs, how often one sample beats another, and
whether a reward model's differences are the chances that they claim to be."""

from typing import Any, NamedTuple

import jax
import numpy as np

from flowjax import rewards
from flowjax.config import ConfigError

BATCH = 250


class Judge(NamedTuple):
    """The network that a reward asks: its callable, and what its export or workdir says of it."""

    net: Any
    info: dict
    checkpoint: str

    def asked(self, labels, prompts=()) -> dict:
        """What it is told of images that were asked for by labels (N,) or None, or by prompts, which it reads with its own tokenizer."""
        from flowjax.train import export

        if self.info.get("text"):
            if not prompts:
                raise ConfigError(f"reward: {self.checkpoint} reads captions, and these images were not asked for by any")
            return {"tokens": export.tokenizer_of(self.checkpoint, self.info)(prompts, "reward")}
        return {} if labels is None else {"label": np.asarray(labels)}


def judge(checkpoint: str, weights: str = "ema") -> Judge:
    """The Judge of a checkpoint, a classifier or a reward model."""
    from flowjax.train import export

    role, params, info = export.load(checkpoint, weights, where="reward")
    if role.module.kind not in rewards.JUDGES.values():
        raise ConfigError(f"reward: {checkpoint} is a {role.module.kind}, not a {' or '.join(rewards.JUDGES.values())}")
    return Judge(role.net(params), info, str(checkpoint))


def reward(section, images, labels, judge: Judge | None = None, prompts=()) -> np.ndarray:
    """Float64 (N,) of a name, or {name: weight}, for uint8 images (N, H, W, C) and the labels (N,) or prompts they were asked for.

    Rounded to twelve digits, to six where a network is asked, so that images of equal reward tie whatever the order of the sums.
    ConfigError where a reward is not a number.
    """
    if judge is None:
        with jax.enable_x64(True):
            total, _ = rewards.score(section, jax.numpy.asarray(images, float) / 127.5 - 1, labels, where="reward")
            return _numbers(section, np.round(np.asarray(total, np.float64), 12))
    if images.shape[1:] != tuple(judge.info["shape"]):
        raise ConfigError(f"reward: {judge.checkpoint} looks at images of shape {tuple(judge.info['shape'])}, not {images.shape[1:]}")
    cond = judge.asked(labels, prompts)

    @jax.jit
    def scored(x, cond, labels):
        x = jax.numpy.asarray(x, jax.numpy.float32) / 127.5 - 1
        return rewards.score(section, x, labels, judge.net, where="reward", cond=cond)[0]

    rows = np.arange(-(-len(images) // BATCH) * BATCH).reshape(-1, BATCH) % len(images)  # batches of one size compile once
    labels = None if labels is None else np.asarray(labels)
    parts = [scored(images[i], {k: v[i] for k, v in cond.items()}, None if labels is None else labels[i]) for i in rows]
    return _numbers(section, np.round(np.concatenate(parts).astype(np.float64), 6)[: len(images)])


def _numbers(section, scores):
    if bad := int((~np.isfinite(scores)).sum()):
        raise ConfigError(f"reward {section!r} is not a number for {bad} of {len(scores)} images")
    return scores


def differences(net, data, batch: int = BATCH) -> np.ndarray:
    """Reward of the better image less that of the other, float64 (pairs,), of all pairs of preferences as data.pipeline.arrays gives
    them; net: the callable of a reward model."""
    if not {"win", "ranked"} & {*data}:
        raise ConfigError("a reward model is measured on preferences, and the data holds none")
    members = np.stack([data["win"], data["lose"]], 1) if "win" in data else data["ranked"]
    k, scored = members.shape[1], jax.jit(lambda x, cond: net(x, cond))
    rows = np.arange(-(-len(members) // batch) * batch).reshape(-1, batch) % len(members)
    each = lambda j: np.concatenate([scored(members[i, j], {n: v[i] for n, v in data["cond"].items()}) for i in rows])  # noqa: E731
    found = [each(j).astype(np.float64)[: len(members)] for j in range(k)]
    return np.concatenate([found[i] - found[j] for i in range(k) for j in range(i + 1, k)])


def calibration(differences, bins: int = 10) -> dict:
    """Is sigmoid(difference) the chance of being preferred? differences (N,): reward of the preferred image less that of the other.

    Of the image that the model prefers, with confidence p = sigmoid |difference|, in `bins` equal parts of [1/2, 1]:
    ece        expected calibration error, the mean over pairs of |share that is right - mean p| of their bin (1706.04599 eq. 3)
    slope      the s for which sigmoid(s difference) is likeliest: 1 where calibrated, below where too sure; None where all are right, or none
    log_loss   -log sigmoid(difference), mean
    accuracy   share that is right; ties count half
    """
    from scipy import optimize, special  # half a second, which no training run should take

    d = np.asarray(differences, np.float64)
    p, right = special.expit(np.abs(d)), 0.5 + 0.5 * np.sign(d)
    which = np.minimum((2 * p - 1) * bins, bins - 1).astype(int)
    gaps = np.bincount(which, right - p, bins)
    slope, gradient = None, lambda s: np.mean(d * special.expit(-s * d))
    if d.min() < 0 < d.max():  # concave in s, with its maximum somewhere
        end = 1.0
        while gradient(end) > 0 or gradient(-end) < 0:
            end *= 2
        slope = optimize.brentq(gradient, -end, end)
    return {
        "accuracy": float(right.mean()), "ece": float(np.abs(gaps).sum() / len(d)), "slope": slope,
        "log_loss": float(np.logaddexp(0, -d).mean()), "pairs": len(d),
    }  # fmt: skip


def best_and_worst(x, scores):
    """(win, lose, kept): of x (P, K, ...) with scores (P, K) those of the highest and the lowest score in each row, without the rows
    in which all score the same; kept (P,) says which rows stayed."""
    kept = scores.max(1) > scores.min(1)
    rows = np.arange(len(x))
    return x[rows, scores.argmax(1)][kept], x[rows, scores.argmin(1)][kept], kept


def ranked(x, scores):
    """(x (P', K, ...) with the best of each row first, kept (P,)), without the rows in which any two score the same."""
    order = np.argsort(-scores, axis=1, kind="stable")
    kept = (np.diff(np.sort(scores, axis=1), axis=1) > 0).all(1)
    return x[np.arange(len(x))[:, None], order][kept], kept


def win_rate(a, b) -> float:
    """Share of pairs in which a's reward exceeds b's; ties count half."""
    return float(np.mean(0.5 * (1.0 + np.sign(np.asarray(a) - np.asarray(b)))))
