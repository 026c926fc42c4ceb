"""Adversarial distillation and DMD2's third player: losses by hand, the best discriminator, who is trained by what, what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quadrature
from flowjax import exact, objectives, paths
from flowjax.config import ConfigError
from flowjax.objectives import adversarial
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF, KEY, LN2 = paths.rectified(), jax.random.key(0), np.log(2)
NAMES = ("adversarial_distillation", "distribution_matching_gan")


def linear(c, k, path=RF):
    return Model(lambda x, t, cond, key: c + k * x, path, "x")


def judge(fn, path=RF):
    """A denoiser whose projection is fn(x_t, t), logits of one patch."""
    return Model(None, path, "velocity", project=lambda x, t, cond, key: (x, fn(x, t[:, None])[:, None, None]))


def players(name=NAMES[0], **settings):
    return {p.role: p.loss for p in objectives.build({"name": name, **settings}).players}


def given(n=2, **values):
    """Rows that are all alike: numbers become (n, 1) where they are images and (n,) where they are times."""
    base = {"x": 1.0, "x_in": 0.5, "tau": 1.0, "t": 0.5, "z_t": 0.0, "gan_t": 0.5, "gan_z": 0.0, "gan_z_data": 0.0} | values
    return {k: jnp.full(n if k in ("tau", "t", "gan_t") else (n, 1), v) for k, v in base.items()} | {"cond": {}}


@pytest.mark.parametrize("name, logit, fool, judged", [("hinge", 0.0, 0.0, 2.0), ("hinge", 0.25, -0.25, 2.0), ("hinge", -3.0, 3.0, 4.0),
                                                       ("nonsaturating", 0.0, LN2, 2 * LN2), ("nonsaturating", 2.0, np.log1p(np.exp(-2)), 2 + 2 * np.log1p(np.exp(-2)))])  # fmt: skip
def test_losses_of_constant_discriminators(name, logit, fool, judged):
    nets = {"net": linear(0.0, 1.0), "discriminator": judge(lambda x, t: logit + 0 * x)}
    loss = players(distill=0.0, adversarial=name)
    np.testing.assert_allclose(loss["net"](nets, given(), None)[0], fool, atol=1e-12)
    value, metrics = loss["discriminator"](nets, given(), None)
    np.testing.assert_allclose([value, metrics["data"], metrics["made"]], [judged, logit, logit])


def test_data_and_made_are_noised_at_one_time_by_noises_of_their_own():
    """x = 1, x_hat = 0.5, t = 1/4: the discriminator, which answers with x_t + t, sees 0.75 + 0.5 + t and 0.375 + 1 + t."""
    nets = {"net": linear(0.0, 1.0), "discriminator": judge(lambda x, t: x + t)}
    batch = given(gan_t=0.25, gan_z=4.0, gan_z_data=2.0)
    metrics = players(distill=0.0)["discriminator"](nets, batch, None)[1]
    np.testing.assert_allclose([metrics["data"], metrics["made"]], [1.5, 1.625])
    np.testing.assert_allclose(players(distill=0.0)["net"](nets, batch, None)[0], -1.625)
    # One without times looks at clean images.
    clean = {**nets, "discriminator": lambda x: 3 * x}
    metrics = players(distill=0.0)["discriminator"](clean, batch, None)[1]
    np.testing.assert_allclose([metrics["data"], metrics["made"]], [3.0, 1.5])


def test_best_discriminator_is_the_log_ratio_of_the_densities():
    """Data N(0, 1/4) against N(1/2, 0.64) at t = 1/2: log p - log q is a known quadratic of x_t, where L_D has no gradient."""
    real, fake = exact.gaussian([0.0], 0.25), exact.gaussian([0.5], 0.64)
    nodes, weights = quadrature.product(quadrature.normal(40), quadrature.normal(40))
    n, m = (jnp.asarray(v)[:, None] for v in nodes.T)
    half = jnp.full(len(n), 0.5)
    batch = {"x": n / 2, "x_in": n, "tau": jnp.ones(len(n)), "gan_t": half, "gan_z": m, "gan_z_data": m, "cond": {}}
    v_real, v_fake = 0.25 * 0.25 + 0.25, 0.25 * 0.64 + 0.25
    best = jnp.asarray([0.5 * np.log(v_fake / v_real) + 0.25**2 / (2 * v_fake), -0.25 / v_fake, 0.5 / v_fake - 0.5 / v_real])
    at = jnp.asarray([[0.3], [-1.0]])
    np.testing.assert_allclose(best[0] + best[1] * at[:, 0] + best[2] * at[:, 0] ** 2, real.log_prob(RF, at, 0.5) - fake.log_prob(RF, at, 0.5), rtol=1e-6)
    for name in NAMES:
        loss = players(name, adversarial="nonsaturating")["discriminator"]

        def total(w):
            nets = {"net": linear(0.5, 0.8), "discriminator": judge(lambda x, t: w[0] + w[1] * x + w[2] * x**2)}
            return quadrature.expected(lambda b: loss(nets, b, None), batch, jnp.asarray(weights))  # noqa: B023

        slope = jax.jit(jax.grad(total))
        np.testing.assert_allclose(slope(best), 0, atol=1e-6)
        assert np.abs(slope(best + 0.2)).min() > 1e-3


def test_distillation_by_hand():
    """x_hat = 0.5, x_t = 0.75 0.5 + 0.25 4 = 1.375 at t = 1/4; the teacher says 2 x_t: (1 - t) (0.5 - 2.75)^2, times 2.5."""
    nets = {"net": linear(0.0, 1.0), "teacher": linear(0.0, 2.0), "discriminator": judge(lambda x, t: 0 * x)}
    value, metrics = players()["net"](nets, given(t=0.25, z_t=4.0), None)
    wanted = 0.75 * 2.25**2
    np.testing.assert_allclose([value, metrics["distillation"], metrics["adversarial"]], [2.5 * wanted, wanted, 0], atol=1e-12)
    # A fixed point of the teacher leaves nothing to do; guidance makes the label's answer the goal.
    null = lambda cond: {"label": jnp.ones_like(cond["label"])}  # noqa: E731
    teacher = Model(lambda x, t, c, k: jnp.where(c["label"] == 0, 0.3, 0.2)[:, None] + 0 * x, RF, "x", null)
    batch = {**given(), "cond": {"label": jnp.zeros(2, int)}}
    value = players(guidance={"name": "cfg", "scale": 3.0})["net"]({**nets, "teacher": teacher}, batch, None)[0]
    np.testing.assert_allclose(value, 0, atol=1e-12)  # 0.2 + 3 0.1 is what it is: x_hat = 0.5


def test_each_player_trains_itself_alone():
    def nets(w):
        return {"net": linear(w[0], 0.7), "discriminator": judge(lambda x, t: w[1] * x), "teacher": linear(w[2], 0.4), "fake": linear(w[3], 0.6)}

    batch, w = given(fake_t=0.5, fake_z=0.3) | {"fake_t": jnp.full(2, 0.5)}, jnp.asarray([0.3, 0.5, -0.2, 0.1])
    for name in NAMES:
        for role, loss in players(name).items():
            slope = jax.grad(lambda w: loss(nets(w), batch, None)[0])(w)  # noqa: B023
            own = {"net": 0, "discriminator": 1, "fake": 3}[role]
            # The generator is led by the discriminator, whose parameters are not its own to move.
            assert [bool(g) for i, g in enumerate(slope) if not (role == "net" and i == 1)] == [i == own for i in range(4) if not (role == "net" and i == 1)]


def test_dmd2_adds_the_weighted_term():
    batch = given(t=0.25, z_t=4.0)
    nets = {"net": linear(0.0, 1.0), "fake": linear(0.1, 0.5), "teacher": linear(0.0, 0.4), "discriminator": judge(lambda x, t: 2 * x)}
    plain = players("distribution_matching")["net"](nets, batch, None)[0]
    value, metrics = players("distribution_matching_gan", adversarial_weight=0.5)["net"](nets, batch, None)
    fooling = np.log1p(np.exp(-2 * 0.25))  # x_t = 0.5 x_hat = 0.25
    np.testing.assert_allclose([value - plain, metrics["adversarial"]], [0.5 * fooling, fooling])
    assert metrics["gradient"] > 0
    default, same = (players("distribution_matching_gan", **settings)["net"](nets, batch, None)[0] for settings in ({}, {"adversarial_weight": 3e-3}))
    assert default == same


def test_features_of_an_encoder_are_judged():
    """Of decoded images, where a codec stands before the networks: 3 x + 1, cut into a grid of tokens, of which the head sees both columns."""
    encoder = lambda image: (image.reshape(len(image), 4, -1), None)  # noqa: E731
    nets = {"net": linear(0.0, 1.0), "encoder": encoder, "discriminator": lambda features: features.sum((1, 2, 3)) + features.shape[1]}
    shape = (2, 2, 2, 1)
    batch = {"x": jnp.ones(shape), "x_in": jnp.full(shape, 0.5), "tau": jnp.ones(2), "gan_t": jnp.ones(2), "gan_z": 0.0, "gan_z_data": 0.0, "cond": {}}
    for codec, wanted in (({}, (6.0, 4.0)), ({"vae": types.SimpleNamespace(decode=lambda x: 3 * x + 1)}, (18.0, 12.0))):
        metrics = players(distill=0.0)["discriminator"]({**nets, **codec}, batch, None)[1]
        np.testing.assert_allclose([metrics["data"], metrics["made"]], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_draws(name):
    n, net = 4000, linear(3.0, 0.0)
    bound = objectives.build({"name": name, "steps": 4, "gan_time": {"name": "uniform", "t_min": 0.8}})
    nets = {"net": net, "fake": net, "teacher": net, "discriminator": judge(lambda x, t: x)}
    batch = bound.rollout(nets, {"x": jnp.full((n, 1), 2.0), "cond": {}}, KEY)
    assert batch["gan_t"].min() >= 0.8 and abs(batch["gan_t"].mean() - 0.9) < 0.01
    drawn = [np.ravel(batch[k]) for k in ("gan_z", "gan_z_data", "z_t", "t", "gan_t", "tau")]
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(6, 1)]).max() < 0.06
    for v in drawn[:3]:
        assert abs(v.mean()) < 0.06 and abs(v.std() - 1) < 0.05
    assert np.unique(np.asarray(batch["tau"])).tolist() == [0.25, 0.5, 0.75, 1.0]
    for settings, count in (({}, {NAMES[0]: 4, NAMES[1]: 1}[name]), ({"steps": 1}, 1)):
        plain = objectives.build({"name": name, **settings}).rollout(nets, {"x": jnp.zeros((50, 1)), "cond": {}}, KEY)
        assert len(np.unique(plain["tau"])) == count and plain["tau"].max() == 1
    if name == NAMES[0]:
        # The inputs are data, 2 everywhere, noised at tau.
        noise = (batch["x_in"][:, 0] - 2 * (1 - batch["tau"])) / batch["tau"]
        assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.05 and abs(np.corrcoef(noise, drawn[2])[0, 1]) < 0.06
        # Drawn where the teacher's answer tells the image.
        eps = bound.rollout({**nets, "teacher": Model(None, RF, "eps")}, {"x": jnp.zeros((n, 1)), "cond": {}}, KEY)
        assert eps["t"].max() <= 1000 / 1001 + 1e-6


def test_refusals():
    ready = {"net": linear(0.0, 1.0), "discriminator": judge(lambda x, t: x), "teacher": linear(0.0, 1.0)}
    alone = {k: v for k, v in ready.items() if k != "teacher"}
    for nets, settings, words in (
        (alone, {}, "objective.distill = 2.5 and roles.teacher go together"),
        (ready, {"distill": 0.0}, "objective.distill = 0.0 and roles.teacher go together"),
        (alone, {"distill": 0.0, "guidance": {"name": "cfg", "scale": 2.0}}, "objective.guidance guides roles.teacher"),
        (ready, {"adversarial": "wasserstein"}, "objective.adversarial = 'wasserstein' is unknown; valid: hinge, nonsaturating"),
        ({**ready, "teacher": linear(0.0, 1.0, paths.trigonometric())}, {}, "roles.teacher was trained with another path"),
        ({**ready, "discriminator": judge(lambda x, t: x, paths.trigonometric())}, {}, "roles.discriminator was trained with another path"),
        ({**ready, "discriminator": linear(0.0, 1.0)}, {}, "roles.discriminator.model.projector"),
        ({**ready, "discriminator": types.SimpleNamespace(module=types.SimpleNamespace(kind="autoencoder"))}, {}, "of kind 'autoencoder'; valid: discriminator"),
    ):
        with pytest.raises(ConfigError, match=words):
            players(**settings)["net"](nets, given(), None)
    with pytest.raises(ConfigError, match="objective.steps = 0"):
        objectives.build({"name": NAMES[0], "steps": 0}).rollout(ready, {"x": jnp.zeros((2, 1)), "cond": {}}, KEY)
    images, without = {"x": jnp.zeros((2, 1)), "cond": {}}, {**alone, "discriminator": lambda x: x}
    for nets, settings, words in (
        ({**without, "teacher": ready["net"]}, {"gan_time": "cosmap"}, "objective.gan_time = 'cosmap' is when a discriminator of noisy images looks"),
        (alone, {"time": "cosmap"}, "objective.time = 'cosmap' is when roles.teacher looks"),
    ):
        with pytest.raises(ConfigError, match=words):
            objectives.build({"name": NAMES[0], **settings}).rollout(nets, images, KEY)
    objectives.build(NAMES[0]).rollout(without, images, KEY)
    with pytest.raises(ConfigError, match="roles.encoder is for a discriminator of its tokens"):
        players()["net"]({**ready, "encoder": None}, given(), None)
    assert adversarial.adversary("hinge") is adversarial.ADVERSARIES["hinge"]
