"""Reward models: strengths of choix, identities of Bradley-Terry and Plackett-Luce, a planted reward; the network and what it starts from."""

import functools
import math

import choix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_sharded, close, randomise, shapes
from scipy import optimize, special

from flowjax import models, objectives, rewards
from flowjax.config import ConfigError
from flowjax.evals.rewards import calibration
from flowjax.models.classifier import Classifier
from flowjax.models.reward import Reward
from flowjax.models.two_tower import TwoTower
from flowjax.objectives import reward_model
from flowjax.train.roles import Bound


def loss(r, **cond):
    """(value, metrics) of rewards r (B, K), the best first."""
    r = jnp.asarray(r)
    return reward_model.loss({"net": lambda x, cond: x[:, 0]}, {"ranked": r[..., None], "cond": cond}, None)


def strengths(rankings, items: int):
    """The rewards of `items` that the objective finds likeliest, with mean 0."""
    rows = jnp.asarray(rankings)
    fn = jax.jit(jax.value_and_grad(lambda theta: loss(theta[rows])[0] + jnp.mean(theta) ** 2))
    found = optimize.minimize(lambda v: [np.asarray(a, float) for a in fn(v)], np.zeros(items), jac=True, options={"gtol": 1e-9})
    return found.x - found.x.mean()


@pytest.mark.usefixtures("float64")
def test_strengths_are_those_of_choix():
    """An independent library's maximum likelihood, of pairs and of rankings of four."""
    truth = np.random.RandomState(0).normal(size=6)
    np.random.seed(1)  # choix draws from the global generator
    pairs = choix.generate_pairwise(truth, 300)
    theirs = choix.opt_pairwise(6, pairs, alpha=0.0, tol=1e-10)
    np.testing.assert_allclose(strengths(pairs, 6), theirs - theirs.mean(), atol=1e-5)
    np.random.seed(2)
    rankings = choix.generate_rankings(truth, 80, size=4)
    theirs = choix.opt_rankings(6, rankings, alpha=0.0, tol=1e-10)
    np.testing.assert_allclose(strengths(rankings, 6), theirs - theirs.mean(), atol=1e-5)


R = np.random.RandomState(3).normal(size=(7, 2))


def test_two_are_bradley_and_terry():
    value, metrics = loss(R)
    assert float(value) == pytest.approx(-special.log_expit(R[:, 0] - R[:, 1]).mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx((R[:, 0] > R[:, 1]).mean())
    assert float(metrics["margin"]) == pytest.approx((R[:, 0] - R[:, 1]).mean(), rel=1e-6)
    assert float(loss(R)[0] - loss(R[:, ::-1])[0]) == pytest.approx(-(R[:, 0] - R[:, 1]).mean(), rel=1e-6)
    gradient = jax.grad(lambda r: loss(r)[0])(jnp.asarray(R))
    np.testing.assert_allclose(gradient[:, 0] * len(R), -(1 - special.expit(R[:, 0] - R[:, 1])), rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 1], -gradient[:, 0], rtol=1e-6)


def test_rankings():
    """Equal rewards give log K!; the chances of all orders add up to one; a constant of its own in each row changes nothing."""
    assert float(loss(np.zeros((3, 5)))[0]) == pytest.approx(math.log(math.factorial(5)), rel=1e-6)
    assert float(loss(np.zeros((3, 5)))[1]["accuracy"]) == 0.5
    import itertools

    r = np.array([0.3, -1.2, 0.8, 2.0])
    assert sum(np.exp(-float(loss(r[None, list(order)])[0])) for order in itertools.permutations(range(4))) == pytest.approx(1, rel=1e-5)
    several = np.random.RandomState(4).normal(size=(5, 3))
    moved = several + np.arange(5)[:, None] * 3.0
    assert float(loss(several)[0]) == pytest.approx(float(loss(moved)[0]), rel=1e-5)
    # The first choice alone is softmax cross-entropy; with the order of the rest certain, nothing is added.
    far = np.array([[0.0, -0.5, -60.0]])
    assert float(loss(far)[0]) == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-5)
    assert float(loss([[2.0, 1.0, 3.0]])[1]["accuracy"]) == pytest.approx(1 / 3)
    assert np.isfinite(float(loss([[500.0, -500.0, 0.0]])[0]))


def test_pairs_become_rankings_of_two_and_the_condition_goes_with_every_image():
    win, lose = jnp.ones((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 1))
    batch = reward_model.rollout({}, {"win": win, "lose": lose, "cond": {"label": jnp.asarray([3, 5])}, "step": 0}, None)
    assert batch["ranked"].shape == (2, 2, 4, 4, 1) and "win" not in batch
    net = lambda x, cond: x[:, 0, 0, 0] * cond["label"]  # noqa: E731
    value, metrics = reward_model.loss({"net": net}, batch, None)
    assert float(metrics["margin"]) == 4.0 and float(value) == pytest.approx(-special.log_expit([3.0, 5.0]).mean(), abs=1e-6)
    assert reward_model.rollout({}, batch, None) is batch
    with pytest.raises(ConfigError, match="needs pairs or rankings .* no win/lose"):
        reward_model.rollout({}, {"x": win, "cond": {}}, None)
    with pytest.raises(ConfigError, match="roles.vae takes no part"):
        reward_model.rollout({"vae": None}, batch, None)
    with pytest.raises(ConfigError, match=r"gave shape \(4, 4\) for 4 images"):
        reward_model.loss({"net": lambda x, cond: x[:, 0, :, 0]}, batch, None)


@pytest.mark.usefixtures("float64")
def test_a_planted_reward_is_found_and_is_calibrated():
    """Choices drawn by Bradley and Terry from a linear reward: its weights, Bayes' accuracy, slope 1."""
    random, truth = np.random.RandomState(0), np.array([1.5, -0.8, 0.4])
    x = random.normal(size=(12000, 2, 3))
    first = random.uniform(size=len(x)) < special.expit((x[:, 0] - x[:, 1]) @ truth)
    ranked = jnp.asarray(np.where(first[:, None, None], x, x[:, ::-1]))
    train, held = ranked[:8000], ranked[8000:]

    @jax.jit
    @jax.value_and_grad
    def value(w):
        return reward_model.loss({"net": lambda x, cond: x @ w}, {"ranked": train, "cond": {}}, None)[0]

    w = optimize.minimize(lambda v: [np.asarray(a, float) for a in value(v)], np.zeros(3), jac=True).x
    np.testing.assert_allclose(w, truth, atol=0.08)
    told = calibration((held[:, 0] - held[:, 1]) @ w)
    bayes = special.expit(np.abs((held[:, 0] - held[:, 1]) @ truth)).mean()
    assert told["accuracy"] == pytest.approx(bayes, abs=0.012) and told["ece"] < 0.02 and told["slope"] == pytest.approx(1, abs=0.07)
    # One that is three times too sure is as accurate and not calibrated.
    sure = calibration(3 * np.asarray((held[:, 0] - held[:, 1]) @ w))
    assert sure["accuracy"] == told["accuracy"] and sure["ece"] > 0.08 and sure["slope"] == pytest.approx(told["slope"] / 3, rel=1e-6)


def test_calibration_of_made_numbers():
    """Four pairs at p = 0.8, of which three are right, one at 0.6 that is wrong: |0.75 - 0.8| 4/5 + |0 - 0.6| / 5."""
    d = np.array([1, 1, 1, -1.0]) * special.logit(0.8)
    told = calibration(np.concatenate([d, [-special.logit(0.6)]]))
    assert told["ece"] == pytest.approx(0.8 * 0.05 + 0.2 * 0.6) and told["accuracy"] == pytest.approx(0.6) and told["pairs"] == 5
    assert told["log_loss"] == pytest.approx(-np.log([0.8, 0.8, 0.8, 0.2, 0.4]).mean())
    slope = calibration(d)["slope"]  # three of four: sigmoid(s logit 0.8) = 3/4
    assert slope == pytest.approx(special.logit(0.75) / special.logit(0.8))
    assert calibration(np.ones(3))["slope"] is None and calibration(np.zeros(2))["accuracy"] == 0.5


# --- the network ------------------------------------------------------------------------------------------------------

BACKBONE = {"name": "classifier", "num_classes": 4, "width": 8, "stages": 2, "features": 16}
TOWERS = {
    "name": "two_tower", "features": 8, "image": {"patch": 4, "width": 16, "depth": 1, "heads": 2, "grid": 2},
    "text": {"vocab": 9, "length": 5, "width": 16, "depth": 1, "heads": 2},
}  # fmt: skip
X = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (8, 8, 8, 1)), jnp.float32)
LABEL, TOKENS = {"label": jnp.arange(8) % 3}, {"tokens": jnp.asarray(np.random.RandomState(1).randint(0, 9, (8, 5)))}
NETS = {"classes": (Reward(BACKBONE, num_classes=3), LABEL), "captions": (Reward(TOWERS, hidden=12), TOKENS)}


@functools.cache
def values(which):
    net, cond = NETS[which]
    return randomise(shapes(net, X, cond))


@pytest.mark.parametrize("which", NETS)
def test_every_image_and_condition_counts_for_its_own_row(which):
    (net, cond), params = NETS[which], values(which)
    apply = jax.jit(lambda x, cond: net.apply({"params": params}, x, cond))
    r = apply(X, cond)
    assert r.shape == (8,) and r.dtype == jnp.float32
    (name,) = cond
    others = jnp.array([0, *range(2, 8)])
    for changed in ((X.at[1].add(0.5), cond), (X, {name: cond[name].at[1].set((cond[name][1] + 1) % 3)})):
        other = apply(*changed)
        np.testing.assert_allclose(other[others], r[others], rtol=1e-5, atol=1e-6)
        assert abs(other[1] - r[1]) > 1e-3


def test_it_begins_at_zero_or_at_the_scaled_cosine():
    net, cond = NETS["classes"]
    begun = meta.unbox(jax.jit(net.init)(jax.random.key(0), X, cond))["params"]
    assert not net.apply({"params": begun}, X, cond).any()
    net, cond = NETS["captions"]
    begun = meta.unbox(jax.jit(net.init)(jax.random.key(0), X, cond))["params"]
    towers = TwoTower(**{k: v for k, v in TOWERS.items() if k != "name"})
    images, texts, scale = towers.apply({"params": begun["body"]}, X, cond)
    close(net.apply({"params": begun}, X, cond), scale * jnp.sum(images * texts, axis=1), 1e-5)


def test_it_takes_its_backbones_parameters_and_no_others():
    classifier = Classifier(**{k: v for k, v in BACKBONE.items() if k != "name"})
    net = NETS["classes"][0]
    whole = randomise(shapes(classifier, X), 5)
    taken = net.adopt(classifier, whole, "roles.net.checkpoint = 'c'")
    own = values("classes") | taken
    assert "logits" in whole and jax.tree.structure(own) == jax.tree.structure(values("classes"))
    head = {"out": {"kernel": jnp.zeros((32, 1)).at[7].set(1.0), "bias": jnp.zeros(1)}}
    seen = classifier.apply({"params": whole}, X, features=True)
    close(net.apply({"params": own | {"head": head}}, X, LABEL), seen[:, 7], 1e-5)
    with pytest.raises(ConfigError, match="roles.net.checkpoint = 'c' is a Classifier, and model.backbone a TwoTower"):
        NETS["captions"][0].adopt(classifier, whole, "roles.net.checkpoint = 'c'")


def test_bad_settings_are_refused():
    init = lambda net, cond=LABEL: jax.eval_shape(net.init, jax.random.key(0), X, cond)  # noqa: E731
    for net, cond, message in (
        (Reward("mlp"), LABEL, "backbone of a reward is a denoiser; valid: classifier, two_tower"),
        (Reward(TOWERS, num_classes=3), TOKENS, "should be 0: they read captions"), (Reward(TOWERS), LABEL, r"needs cond\['tokens'\]"),
        (Reward(BACKBONE, num_classes=3), {}, r"a reward of classes needs cond\['label'\]"),
        (Reward({"name": "clasifier"}), LABEL, "model.backbone.name = 'clasifier' is unknown"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            init(net, cond)
    assert models.build({"name": "reward", "backbone": BACKBONE}).num_classes == 0
    with pytest.raises(ConfigError, match="model lacks backbone"):
        models.build("reward")
    assert init(Reward(BACKBONE), {})["params"].keys() == {"body", "head"}


@pytest.mark.parametrize("which", NETS)
def test_it_is_the_same_on_a_mesh(which):
    check_sharded(NETS[which][0], X, NETS[which][1])


def test_posttraining_asks_it():
    net, cond = NETS["classes"]
    judge = Bound(net, values("classes"))
    total, each = rewards.score({"model": 2.0, "ink": 0.0}, X, cond["label"], judge)
    close(total, 2 * net.apply({"params": values("classes")}, X, cond), 1e-6)
    assert set(each) == {"model", "ink"}
    judge = Bound(NETS["captions"][0], values("captions"))
    close(rewards.score("model", X, None, judge, cond=TOKENS)[0], judge(X, TOKENS), 1e-6)
    with pytest.raises(ConfigError, match="'model' asks a reward: roles.reward.checkpoint"):
        rewards.score("model", X)
    with pytest.raises(ConfigError, match="'agreement' asks a classifier, and the network that is given is a reward"):
        rewards.score("agreement", X, cond["label"], judge)
    asking = {name for name, objective in objectives.OBJECTIVES.items() if "reward" in objective.roles}
    assert {"flow_grpo", "reward_feedback", "diffusion_nft", "online_dpo", "stepwise_preference"} <= asking
    for name in asking:
        assert {*objectives.OBJECTIVES[name].kinds["reward"]} == {"classifier", "reward"}


def test_a_classifier_that_judges_must_look_at_such_images():
    """As a reward model must; of another size its answers would mean nothing, and a convolution gives them all the same."""
    from types import SimpleNamespace

    from flowjax.train import checks

    judge = SimpleNamespace(module=SimpleNamespace(kind="classifier", num_classes=10))
    run = SimpleNamespace(
        roles={"reward": judge}, loaded={"reward": (None, {"shape": [28, 28, 1]})}, pipeline=SimpleNamespace(num_classes=10),
        image_shape=lambda: (8, 8, 1), tokenizer=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"another shape of images than this run's: \(28, 28, 1\) is not \(8, 8, 1\)"):
        checks.reward(run)
    run.image_shape = lambda: (28, 28, 1)
    checks.reward(run)
