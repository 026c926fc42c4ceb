"""Autoencoder against discriminator: losses of constant discriminators, the weight between them by hand, the start, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from nets import randomise
from test_train_step import machine

from flowjax import objectives
from flowjax.config import ConfigError
from flowjax.models.discriminator import PatchGAN
from flowjax.models.vae import AutoencoderKL
from flowjax.objectives import vae
from flowjax.train import step as step_lib
from flowjax.train.roles import Bound, Role

LN2 = np.log(2)


class Out(nn.Module):
    @nn.compact
    def __call__(self, latent):
        return self.param("w", nn.initializers.ones, ()) * latent + self.param("b", nn.initializers.zeros, ())


class Line(nn.Module):
    """Encodes x as itself with variance one, decodes a latent l as w l + b."""

    last_layer = ("out", "w")

    def encode(self, x):
        return x, jnp.zeros_like(x)

    @nn.compact
    def decode(self, latent):
        return Out(name="out")(latent)


def line(w=1.0, b=0.0):
    return Bound(Line(), {"out": {"w": jnp.asarray(w), "b": jnp.asarray(b)}})


def play(net, discriminator, x, step=10, **settings):
    """((generator's loss, metrics), (discriminator's loss, metrics)) on x (B, D), latents without noise."""
    bound = objectives.build({"name": "vae_gan", "reconstruction": "l2", "kl_weight": 0.0, "start": 10, **settings})
    nets = {"net": net, "discriminator": discriminator}
    batch = {"x": x, "z": jnp.zeros_like(x), "step": step}
    first, second = bound.players
    batch |= step_lib.measured(first, nets, batch, None)
    return first.loss(nets, batch, None), second.loss(nets, batch, None)


X = jnp.asarray([[0.5, -1.0, 0.25], [1.0, 0.5, -0.25]])


@pytest.mark.parametrize(
    "adversarial, logit, fooling, judging",
    [
        ("hinge", 0.0, 0.0, 1.0),
        ("hinge", 0.25, -0.25, (0.75 + 1.25) / 2),
        ("hinge", -3.0, 3.0, (4.0 + 0.0) / 2),
        ("hinge", 2.0, -2.0, (0.0 + 3.0) / 2),
        ("nonsaturating", 0.0, LN2, LN2),
        ("nonsaturating", np.log(3), np.log(4 / 3), (np.log(4 / 3) + np.log(4)) / 2),
    ],
)
def test_losses_of_a_discriminator_that_knows_nothing(adversarial, logit, fooling, judging):
    (loss, said), (judge, told) = play(line(), lambda x: jnp.full(2, logit), X, adversarial=adversarial, adaptive=False, adversarial_weight=6.0)
    assert float(said["adversarial"]) == pytest.approx(fooling, abs=1e-6)
    assert float(loss) == pytest.approx(6.0 * fooling / 3, abs=1e-6)  # three dimensions; the reconstruction is perfect
    assert float(judge) == pytest.approx(judging, rel=1e-6)
    assert float(told["real"]) == float(told["fake"]) == pytest.approx(logit)


def test_the_discriminator_is_shown_data_and_reconstructions():
    _, (loss, told) = play(line(b=2.0), lambda x: x[:, 0], X, adaptive=False)
    assert float(told["real"]) == 0.75 and float(told["fake"]) == 2.75
    assert float(loss) == pytest.approx((0.25 + (3.5 + 4.0) / 2) / 2)
    _, (loss, _) = play(line(b=2.0), lambda x: x[:, 0], X, adaptive=False, adversarial="nonsaturating")
    assert float(loss) == pytest.approx(np.mean(np.logaddexp(0, [-0.5, -1.0]) + np.logaddexp(0, [2.5, 3.0])) / 2)


def by_hand(w, scale, x, cap=1e4, weight=0.5):
    """lambda of x_hat = w x and D(x) = scale * mean x, by the derivatives of sum (w x - x)^2 and of -D in w."""
    reconstruction = np.mean(np.sum(2 * x * (w * x - x), axis=1))
    adversarial = -scale * np.mean(x)
    return weight * min(abs(reconstruction) / (abs(adversarial) + 1e-4), cap)


@pytest.mark.parametrize("w, scale, cap, weight", [(1.5, 2.0, 1e4, 0.5), (0.2, -3.0, 1e4, 0.8), (1.5, 1e-4, 1e4, 0.5), (3.0, 0.1, 7.0, 0.5)])
def test_the_adaptive_weight_is_the_ratio_of_gradients_of_the_last_layer(w, scale, cap, weight):
    critic = lambda x: scale * jnp.mean(x, axis=1)  # noqa: E731
    (loss, said), _ = play(line(w), critic, X, max_weight=cap, adversarial_weight=weight)
    x = np.asarray(X, np.float64)
    want = by_hand(w, scale, x, cap, weight)
    assert float(said["adversarial_weight"]) == pytest.approx(want, rel=1e-5)
    assert float(loss) == pytest.approx(np.mean((w - 1) ** 2 * x**2) - want * w * scale * np.mean(x) / 3, rel=1e-5)
    if cap == 7.0:
        assert want == weight * 7.0  # the case is one of the bound


def test_the_adaptive_weight_counters_the_scale_of_the_logits():
    weights = [float(play(line(1.5), lambda x, k=k: k * jnp.mean(x, axis=1), X)[0][1]["adversarial_weight"]) for k in (10.0, 40.0)]
    assert weights[0] / weights[1] == pytest.approx(4.0, rel=1e-3)


def test_the_adaptive_weight_is_a_constant_to_the_gradient():
    """By hand: d/dw of [sum (w x - x)^2 / 3 + (lambda / 3) (-D)] with lambda held."""
    critic = lambda x: 2.0 * jnp.mean(x, axis=1)  # noqa: E731
    slope = jax.grad(lambda w: play(line(w), critic, X)[0][0])(1.5)
    x = np.asarray(X, np.float64)
    want = np.mean(2 * 0.5 * x**2) - by_hand(1.5, 2.0, x) * 2.0 * np.mean(x) / 3
    assert float(slope) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("step, on", [(0, False), (9, False), (10, True), (11, True)])
def test_the_discriminator_joins_at_its_step(step, on):
    def both(parameters):
        (loss, said), (judge, _) = play(line(1.5), lambda x: parameters * jnp.mean(x, axis=1), X, step=step)
        return jnp.stack([loss, judge]), said["adversarial_weight"]

    (loss, judge), weight = both(2.0)
    slope = jax.jacobian(lambda p: both(p)[0])(2.0)
    alone = np.mean(0.25 * np.asarray(X) ** 2)
    if on:
        assert float(weight) > 0.1 and float(judge) > 0.5 and float(loss) != pytest.approx(alone, rel=1e-3) and np.all(np.abs(slope) > 1e-2)
    else:
        assert float(weight) == float(judge) == 0.0 and float(loss) == pytest.approx(alone) and not np.any(slope)


def test_default_start_is_that_of_the_paper():
    first, second = objectives.build("vae_gan").players
    nets = {"net": line(1.5), "discriminator": lambda x: jnp.mean(x, axis=1)}
    for step, on in ((50_000, False), (50_001, True)):
        batch = {"x": X, "z": jnp.zeros_like(X), "step": step}
        batch |= step_lib.measured(first, nets, batch, None)
        assert (float(first.loss(nets, batch, None)[1]["adversarial_weight"]) > 0) == (float(second.loss(nets, batch, None)[0]) > 0) == on


def test_neither_player_moves_the_other():
    def losses(w, scale):
        (loss, _), (judge, _) = play(line(w), lambda x: scale * jnp.mean(x, axis=1), X)
        return loss, judge

    assert float(jax.grad(lambda w: losses(w, 2.0)[1])(1.5)) == 0.0


class Maps:
    """Features whose distance is the squared difference of the first channel's mean times nine."""

    def feature_maps(self, x):
        return (3.0 * jnp.mean(x[..., :1], axis=(1, 2), keepdims=True),)


@pytest.mark.parametrize("name", ["vae", "vae_gan"])
def test_perceptual_distance_counts_once_for_every_dimension(name):
    """(sum |x - x_hat|^2 + dims w d) / dims, with d = 9 * 0.2^2."""
    x = jnp.zeros((2, 4, 4, 3))
    settings = {"reconstruction": "l2", "kl_weight": 0.0, "perceptual_weight": 0.5, **({"adaptive": False} if name == "vae_gan" else {})}
    player = objectives.build({"name": name, **settings}).players[0]
    nets = {"net": line(b=0.2), "perceptual": Maps(), "discriminator": lambda x: jnp.zeros(2)}
    loss, said = player.loss(nets, {"x": x, "z": x, "step": 0}, None)
    assert float(said["perceptual"]) == pytest.approx(0.36, rel=1e-5) and float(said["reconstruction"]) == pytest.approx(0.04, rel=1e-5)
    assert float(loss) == pytest.approx(0.04 + 0.18, rel=1e-5)
    for changes, without in (({"perceptual_weight": 0.0}, ()), ({}, ("perceptual",))):
        player = objectives.build({"name": name, **settings, **changes}).players[0]
        with pytest.raises(ConfigError, match="objective.perceptual_weight = .* and roles.perceptual go together"):
            player.loss({k: v for k, v in nets.items() if k not in without}, {"x": x, "z": x, "step": 0}, None)
    with pytest.raises(ConfigError, match="no feature maps"):
        objectives.build({"name": name, **settings}).players[0].loss({**nets, "perceptual": line()}, {"x": x, "z": x, "step": 0}, None)


def test_the_adaptive_weight_counts_the_perceptual_distance():
    x = 0.25 * jnp.ones((2, 4, 4, 3))
    nets = {"net": line(1.5), "perceptual": Maps(), "discriminator": lambda x: jnp.mean(x, axis=(1, 2, 3))}
    found = vae.last_gradients(nets, {"x": x, "z": jnp.zeros_like(x)}, None, reconstruction="l2", perceptual_weight=0.5)
    # d/dw of ((w - 1) / 4)^2 + 0.5 * 9 * ((w - 1) / 4)^2 and of -w / 4
    assert float(found["reconstruction"]) == pytest.approx(2 * 0.5 / 16 * (1 + 4.5), rel=1e-5)
    assert float(found["adversarial"]) == pytest.approx(-0.25, rel=1e-5)


@pytest.mark.parametrize("name", ["vae", "vae_gan"])
def test_a_plain_autoencoder_decodes_the_mean(name):
    batch = {"x": X, "z": jnp.ones_like(X), "step": 0}
    nets = {"net": line(), "discriminator": lambda x: x[:, 0]}
    settings = {"name": name, "kl_weight": 0.0, **({"adaptive": False, "start": 0} if name == "vae_gan" else {})}
    sampled, plain = (objectives.build({**settings, "sample": s}) for s in (True, False))
    assert float(sampled.players[0].loss(nets, batch, None)[1]["reconstruction"]) == pytest.approx(1.0)  # the posterior's deviation
    assert float(plain.players[0].loss(nets, batch, None)[1]["reconstruction"]) == 0.0
    with pytest.raises(ConfigError, match="kl_weight = 1e-06 needs objective.sample = True"):
        objectives.build({**settings, "sample": False, "kl_weight": 1e-6}).players[0].loss(nets, batch, None)
    if name == "vae_gan":
        fakes = [float(o.players[1].loss(nets, batch, None)[1]["fake"]) for o in (sampled, plain)]
        assert fakes == pytest.approx([1.75, 0.75])
        found = [vae.last_gradients(nets, {**batch, "x": 2 * X}, None, reconstruction="l2", sample=s)["reconstruction"] for s in (True, False)]
        assert float(found[1]) == 0.0 and float(found[0]) == pytest.approx(float(jnp.mean(2 * (2 * X + 1))), rel=1e-5)


def test_unknown_adversary_is_refused():
    with pytest.raises(ConfigError, match="objective.adversarial = 'wasserstein' is unknown; valid: hinge, nonsaturating"):
        play(line(), lambda x: x, X, adversarial="wasserstein", adaptive=False)


# --- in the train step

ROLES = {
    "net": Role(AutoencoderKL(channels=4, multipliers=(1,), layers=1, latent_channels=2, groups=2, mid_attention=False)),
    "discriminator": Role(PatchGAN(channels=4, layers=1, groups=2)),
}


def images(n=8):
    return {"x": jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (n, 8, 8, 3)), jnp.float32), "cond": {}}


def parameters():
    x = images(1)["x"]
    trees = {k: meta.unbox(jax.eval_shape(lambda key, r=role: r.init(key, x, {}), jax.random.key(0))) for k, role in ROLES.items()}
    return {k: jax.tree.map(lambda v: 0.5 * v, randomise(tree, seed)) for seed, (k, tree) in enumerate(trees.items())}


def steps(accumulate=1, count=3, **settings):
    """(state, metrics of every step)."""
    objective = objectives.build({"name": "vae_gan", "start": 1, **settings})
    slow = {"name": "sgd", "momentum": 0.0, "schedule": {"name": "constant", "rate": 0.05}}
    step, state = machine(objective, ROLES, parameters(), slow, accumulate=accumulate)
    said = []
    for _ in range(count):
        state, metrics = step(state, {}, images())
        said.append(metrics)
    return state, said


@pytest.mark.slow
def test_accumulation_equals_the_large_batch_although_norms_are_not_linear():
    (whole, told), (parts, told_parts) = (steps(n) for n in (1, 4))
    assert [float(m["net/adversarial_weight"]) > 1e-3 for m in told] == [False, True, True]
    for one, four in zip(told, told_parts, strict=True):
        for k in one.keys() - {"finite"}:
            np.testing.assert_allclose(one[k], four[k], rtol=1e-4, atol=1e-6, err_msg=k)
    start = parameters()
    for role in ROLES:
        for a, b, old in zip(*(jax.tree.leaves(t[role]) for t in (whole.params, parts.params, start)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert max(float(jnp.abs(a - old).max()) for a, old in zip(jax.tree.leaves(whole.params[role]), jax.tree.leaves(start[role]))) > 1e-3
    # The case tells exact from nearly: the mean of the slices' own weights is another.
    nets = {k: ROLES[k].net(v) for k, v in start.items()}
    batch = {**images(), "z": jnp.zeros((8, 8, 8, 2))}
    ratio = lambda found: float(jnp.linalg.norm(found["reconstruction"]) / jnp.linalg.norm(found["adversarial"]))  # noqa: E731
    own = [ratio(vae.last_gradients(nets, {k: v[i::4] for k, v in batch.items() if k != "cond"}, None)) for i in range(4)]
    assert np.mean(own) != pytest.approx(ratio(vae.last_gradients(nets, batch, None)), rel=1e-2)


@pytest.mark.slow
def test_the_discriminator_stays_until_its_start():
    start = parameters()
    for count, moved in ((1, False), (2, True)):
        state, _ = steps(count=count)
        change = [float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(state.params["discriminator"]), jax.tree.leaves(start["discriminator"]))]
        assert (max(change) > 0) == moved


def test_the_last_layer_is_the_decoders_last_convolution():
    params = parameters()["net"]
    kernel, placed = vae.last_layer(ROLES["net"].net(params))
    assert kernel.shape == (3, 3, 4, 3)
    z = jnp.ones((1, 8, 8, 2))
    difference = placed(2 * kernel).decode(z) - placed(kernel).decode(z)
    bias = params["decoder"]["conv_out"]["bias"]
    np.testing.assert_allclose(difference, placed(kernel).decode(z) - bias, rtol=1e-4, atol=1e-5)  # linear in the kernel: the last
