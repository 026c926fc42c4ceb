"""What holds for every entry of OBJECTIVES: the gradient vanishes at the exact solution and nowhere near it; settings are checked.

A new entry needs a case here: (expected loss as a function of parameters, the parameters that solve it, others that do not).
"""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quadrature
from flowjax import config, exact, objectives
from flowjax.config import ConfigError
from flowjax.objectives import GIVEN, OBJECTIVES, Objective, Player, bind
from flowjax.paths import rectified
from flowjax.predictions import Model

RF = rectified()
LINE = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])
CURVE = jnp.asarray([0.1, -0.2, 0.3])


def near(model: Model, theta) -> Model:
    """The model plus theta_0 + theta_1 x_t + theta_2 t."""

    def apply(x_t, t, cond, key):
        return model.apply(x_t, t, cond, key) + theta[0] + theta[1] * x_t + theta[2] * t[:, None]

    return model.replace(apply=apply)


def flow_matching():
    x, z, weights = quadrature.mixture_and_noise(LINE)
    player = objectives.build({"name": "flow_matching", "weight": "x"}).players[0]

    def loss(theta):
        nets = {"net": near(LINE.model(RF), theta)}
        return sum(
            quadrature.expected(
                lambda b: player.loss(nets, b, None), {"x": x, "z": z, "t": jnp.full(len(x), t), "cond": {}}, weights
            )
            for t in (0.3, 0.7)
        )

    return loss, jnp.zeros(3), CURVE


def repa():
    """Flow matching's optimum together with a projection along the encoder's features."""
    x, z, weights = quadrature.mixture_and_noise(LINE)
    player = objectives.build({"name": "repa", "weight": "x", "align": 2.0}).players[0]
    features = jnp.broadcast_to(jnp.asarray([0.6, 0.8]), (len(x), 1, 1, 2))

    def loss(theta):
        net = near(LINE.model(RF), theta[:3])
        angle = jnp.arctan2(0.8, 0.6) + theta[3]
        guess = jnp.broadcast_to(3 * jnp.stack([jnp.cos(angle), jnp.sin(angle)]), features.shape)
        nets = {"net": net.replace(project=lambda x_t, t, cond, key: (net.apply(x_t, t, cond, key), guess))}
        batch = {"x": x, "z": z, "t": jnp.full(len(x), 0.3), "cond": {}, "features": features}
        return quadrature.expected(lambda b: player.loss(nets, b, None), batch, weights)

    return loss, jnp.zeros(4), jnp.asarray([0.1, -0.2, 0.3, 0.4])


def consistency(name, factors):
    """Data N(0, 1/4), N = 4 steps: the optimum is linear, f(x, t_i) = c_i x with c_i the product of the solver's factors."""
    n = 4
    x, z = (jnp.asarray(v) for v in np.meshgrid([-0.5, 0.5], [-1.0, 1.0]))  # all moments up to the third are those of the data
    i = jnp.arange(n)
    batch = {
        "x": jnp.tile(x.reshape(-1, 1), (n, 1)),
        "z": jnp.tile(z.reshape(-1, 1), (n, 1)),
        "t": jnp.repeat((i + 1) / n, 4),
        "s": jnp.repeat(i / n, 4),
        "cond": {},
    }
    teacher = exact.gaussian([0.0], 0.25).model(RF)
    player = objectives.build(name).players[0]

    def student(c):
        table = jnp.concatenate([jnp.ones(1), c])

        def apply(x_t, t, cond, key):
            return ((1 - table[jnp.round(t * n).astype(int)]) / jnp.maximum(t, 1e-9))[:, None] * x_t

        return Model(apply, RF, "velocity")

    def loss(c):
        nets = {"net": student(c), "target": student(c), "teacher": teacher}
        return player.loss(nets, batch, None)[0]

    optimum = jnp.cumprod(jnp.asarray(factors))
    return loss, optimum, optimum + jnp.asarray([0.1, -0.1, 0.1, -0.1])


def slope(t):
    """v = slope x of data N(0, 1/4) on the rectified path."""
    return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2)


def consistency_training():
    t = np.arange(1, 5) / 4
    return consistency("consistency_training", 1 - slope(t) / 4)


def consistency_distillation():
    t = np.arange(1, 5) / 4
    k1 = slope(t)
    return consistency("consistency_distillation", 1 - (k1 + slope(t - 0.25) * (1 - k1 / 4)) / 8)


def progressive_distillation():
    """Data N(0, 1/4): the student's factor of a step is the product of the teacher's two."""
    n = 2
    bound = objectives.build({"name": "progressive_distillation", "steps": n})
    teacher = exact.gaussian([0.0], 0.25).model(RF)

    def student(k):
        return Model(lambda x_t, t, cond, key: k[jnp.round(t * n).astype(int) - 1][:, None] * x_t, RF, "velocity")

    x = jax.random.normal(jax.random.key(0), (16, 1)) / 2
    batch = bound.rollout({"net": student(jnp.zeros(n)), "teacher": teacher}, {"x": x, "cond": {}}, jax.random.key(1))
    assert {*np.asarray(batch["t"]).tolist()} == {0.5, 1.0}
    t, h = np.array([0.5, 1.0]), 0.25
    optimum = jnp.asarray((1 - (1 - h * slope(t)) * (1 - h * slope(t - h))) * n)
    return lambda k: bound.players[0].loss({"net": student(k)}, batch, None)[0], optimum, optimum + jnp.asarray([0.1, -0.2])


def guided_progressive_distillation():
    """The same of a teacher whose velocity is w times that, for every w: the student's is a square of w with known coefficients."""
    n, h = 2, 0.25
    bound = objectives.build({"name": "guided_progressive_distillation", "steps": n})
    plain = exact.gaussian([0.0], 0.25).model(RF)
    teacher = Model(lambda x_t, t, cond, key: cond["guidance"][:, None] * plain(x_t, t, {}), RF, "velocity", guidance_embed=True)

    def student(k):
        def apply(x_t, t, cond, key):
            w, row = cond["guidance"].astype(k.dtype), k.reshape(n, 2)[jnp.round(t * n).astype(int) - 1]
            return (row[:, 0] * w + row[:, 1] * w**2)[:, None] * x_t

        return Model(apply, RF, "velocity", guidance_embed=True)

    x = jax.random.normal(jax.random.key(0), (16, 1)) / 2
    batch = bound.rollout({"net": student(jnp.zeros(2 * n)), "teacher": teacher}, {"x": x, "cond": {}}, jax.random.key(1))
    assert np.ptp(batch["cond"]["guidance"]) > 2
    t = np.array([0.5, 1.0])
    optimum = jnp.asarray(np.stack([n * h * (slope(t) + slope(t - h)), -n * h**2 * slope(t) * slope(t - h)], 1).ravel())
    return lambda k: bound.players[0].loss({"net": student(k)}, batch, None)[0], optimum, optimum + jnp.asarray([0.1, 0.02, -0.2, 0.1])


def gaussian_map(x_t, t, step):
    """The mean velocity of data N(0, 1/4) over a step: the flow multiplies by the ratio of standard deviations."""
    std = lambda t: jnp.sqrt((1 - t) ** 2 / 4 + t**2)  # noqa: E731
    inside = jnp.where(step == 0, 1.0, step)
    return jnp.where(step == 0, slope(t), (1 - std(t - step) / std(t)) / inside)[:, None] * x_t


def near_map(theta):
    def apply(x_t, t, cond, key):
        return gaussian_map(x_t, t, cond["step"]) + theta[0] * x_t + theta[1] * (t * cond["step"])[:, None]

    return Model(apply, RF, "velocity", step_embed=True)


def meanflow():
    x, z, weights = quadrature.mixture_and_noise(exact.mixture([1.0], [0.0], [0.5]), 16)
    player = objectives.build({"name": "meanflow", "power": 0.0}).players[0]
    ones = jnp.ones(len(x))

    def loss(theta):
        batch = {"x": x, "z": z, "dropped": ones < 0}
        return sum(
            quadrature.expected(lambda b: player.loss({"net": near_map(theta)}, b, None), batch | {"t": t * ones, "cond": {"step": s * ones}}, weights)
            for t, s in ((0.9, 0.6), (0.5, 0.0))
        )

    return loss, jnp.zeros(2), jnp.asarray([0.1, -0.2])


def shortcut():
    """Steps above the finest: the goals of an exact average are the exact map's own."""
    bound = objectives.build({"name": "shortcut", "bootstrap": 1.0, "finest": 8})
    x = jax.random.normal(jax.random.key(0), (64, 1)) / 2
    nets = {"net": near_map(jnp.zeros(2)), "target": near_map(jnp.zeros(2))}
    batch = bound.rollout(nets, {"x": x, "cond": {}}, jax.random.key(1))
    coarse = np.flatnonzero(np.asarray(batch["cond"]["step"]) > 1 / 8)
    batch = jax.tree.map(lambda v: v[coarse], batch)
    return lambda theta: bound.players[0].loss({"net": near_map(theta)}, batch, None)[0], jnp.zeros(2), jnp.asarray([0.1, -0.2])


def distribution_matching():
    """Data N(0.2, 1/4): the generator 0.2 + z / 2, and the fake network that has its exact velocity; each player's gradient alone."""
    t, mean = 0.6, 0.2
    nodes, weights = quadrature.product(quadrature.normal(4), quadrature.normal(4))
    z_in, z_t = (jnp.asarray(v)[:, None] for v in nodes.T)
    time = jnp.full(len(z_in), t)
    batch = {"x": z_in, "x_in": z_in, "tau": jnp.ones_like(time), "t": time, "z_t": z_t, "fake_t": time, "fake_z": z_t, "cond": {}}
    players = objectives.build({"name": "distribution_matching", "normalise": False}).players

    def loss(theta):
        def nets(own):
            m, s = theta[:2] if own == "net" else jax.lax.stop_gradient(theta[:2])
            k, c = theta[2:] if own == "fake" else jax.lax.stop_gradient(theta[2:])
            return {
                "net": Model(lambda x, t, cond, key: m + s * x, RF, "x"),
                "fake": Model(lambda x, t, cond, key: c + k * x, RF, "velocity"),
                "teacher": exact.gaussian([mean], 0.25).model(RF),
            }

        return sum(quadrature.expected(lambda b, p=p: p.loss(nets(p.role), b, None), batch, jnp.asarray(weights)) for p in players)

    k = slope(t)
    optimum = jnp.asarray([mean, 0.5, k, -mean - k * (1 - t) * mean])
    return loss, optimum, optimum + jnp.asarray([0.1, 0.05, -0.2, 0.1])


def scm(name):
    """The exact consistency function of data N(0.3, 1/4): training's tangent is 0 in expectation, distillation's everywhere."""
    data = exact.gaussian([0.3], 0.25)
    x, z, weights = quadrature.mixture_and_noise(exact.mixture([1.0], [0.3], [0.5]), 16)
    player = objectives.build({"name": name, "warmup": 0, "normalise": False}).players[0]
    consistent = Model(lambda x_t, t, cond, key: (x_t - data.consistency(RF, x_t, t)) / t[:, None], RF, "velocity")

    def loss(theta):
        nets = {"net": near(consistent, theta), "teacher": data.model(RF)}
        return sum(
            quadrature.expected(
                lambda b: player.loss(nets, {**b, "step": 0}, None), {"x": x, "z": z, "t": jnp.full(len(x), t), "cond": {}}, weights
            )
            for t in (0.3, 0.7)
        )

    return loss, jnp.zeros(3), CURVE


def latent_consistency():
    """Data N(0, 1/4), guided by 2 against a velocity of 0, N = 4 intervals: f(x, t_i) = c_i x is the product of the teacher's steps."""
    n, x = 4, jnp.asarray([[-0.5], [0.5]] * 4)
    i = jnp.repeat(jnp.arange(n), 2)
    cond = {"label": jnp.zeros(8, int), "guidance": jnp.full(8, 2.0)}
    batch = {"x": x, "z": 2 * x, "t": (i + 1) / n, "s": i / n, "cond": cond}
    player = objectives.build({"name": "latent_consistency", "timestep_scaling": 3.0}).players[0]
    exact_velocity = exact.gaussian([0.0], 0.25).model(RF)
    teacher = Model(
        lambda x_t, t, cond, key: jnp.where(cond["label"][:, None] == 0, exact_velocity(x_t, t), 0.0), RF, "velocity",
        lambda cond: {"label": jnp.ones_like(cond["label"])},
    )  # fmt: skip

    def student(k):
        """x_hat = k_i x, of which c_i = c_skip + c_out k_i."""
        return Model(lambda x_t, t, cond, key: k[jnp.round(t * n).astype(int) - 1][:, None] * x_t, RF, "x", guidance_embed=True)

    far = 3.0 * np.arange(1, n + 1) / n
    c_skip, c_out = 0.25 / (far**2 + 0.25), far / np.sqrt(far**2 + 0.25)
    optimum = jnp.asarray((np.cumprod(1 - 2 * slope(np.arange(1, n + 1) / n) / n) - c_skip) / c_out)
    nets = lambda k: {"net": student(k), "target": student(k), "teacher": teacher}  # noqa: E731
    return lambda k: player.loss(nets(k), batch, None)[0], optimum, optimum + jnp.asarray([0.1, -0.1, 0.1, -0.1])


def with_discriminator(name, mean, std, **settings):
    """Data N(mean, std^2): a generator that makes them, a fake network that has their exact velocity, a discriminator that sees no
    difference; each player's gradient alone. Of a fake network only one objective takes notice."""
    t = 0.6
    nodes, weights = quadrature.product(quadrature.normal(4), quadrature.normal(4))
    z, noise = (jnp.asarray(v)[:, None] for v in nodes.T)
    time = jnp.full(len(z), t)
    batch = {"x": mean + std * z, "x_in": z, "tau": jnp.ones_like(time), "cond": {}}
    batch |= {k: time for k in ("t", "fake_t", "gan_t")} | {k: noise for k in ("z_t", "fake_z", "gan_z", "gan_z_data")}
    players = objectives.build({"name": name, "adversarial": "nonsaturating", **settings}).players
    teacher = Model(lambda x, t, cond, key: mean + 0 * x, RF, "x") if std == 0 else exact.gaussian([mean], std**2).model(RF)
    parts = {"net": slice(0, 2), "discriminator": slice(2, 4), "fake": slice(4, 6)}

    def loss(theta):
        def nets(own):
            (m, s), (b, w), fake = (theta[part] if role == own else jax.lax.stop_gradient(theta[part]) for role, part in parts.items())
            return {
                "net": Model(lambda x, t, cond, key: m + s * x, RF, "x"),
                "fake": Model(lambda x, t, cond, key: fake[0] + fake[1] * x, RF, "velocity"),
                "teacher": teacher,
                # Of the noisy image's second power as well, or a difference of spread would not show.
                "discriminator": Model(None, RF, "velocity", project=lambda x, t, cond, key: (x, b * x + w * x**2)),
            }

        return sum(quadrature.expected(lambda b, p=p: p.loss(nets(p.role), b, None), batch, jnp.asarray(weights)) for p in players)

    return loss


def distribution_matching_gan():
    loss = with_discriminator("distribution_matching_gan", 0.2, 0.5, normalise=False, adversarial_weight=0.3)
    k = slope(0.6)
    optimum = jnp.asarray([0.2, 0.5, 0.0, 0.0, -0.2 - k * 0.4 * 0.2, k])
    return loss, optimum, optimum + jnp.asarray([0.1, 0.05, 0.2, 0.2, 0.1, -0.2])


def adversarial_distillation():
    """Data that are one point: where they vary, the teacher's mean is not a sample, and the two terms of ADD disagree."""
    loss = with_discriminator("adversarial_distillation", 0.2, 0.0)
    optimum = jnp.asarray([0.2, 0.0, 0.0, 0.0])
    return loss, optimum, optimum + jnp.asarray([0.1, 0.1, 0.2, 0.2])


def moment_matching():
    """Data N(0.2, 1/4) in one step: the student 0.2 + z / 2 and an auxiliary that agrees with the teacher; each player's gradient alone."""
    s, mean = 0.5, 0.2
    nodes, weights = quadrature.product(quadrature.normal(4), quadrature.normal(4))
    z, xi = (jnp.asarray(v)[:, None] for v in nodes.T)
    ones = jnp.ones(len(z))
    players = objectives.build("moment_matching").players

    def loss(theta):
        def nets(own):
            m, k = theta[:2] if own == "net" else jax.lax.stop_gradient(theta[:2])
            c, g = theta[2:] if own == "auxiliary" else jax.lax.stop_gradient(theta[2:])
            return {
                "net": Model(lambda x, t, cond, key: m + k * x, RF, "x"),
                "auxiliary": Model(lambda x, t, cond, key: c + g * x, RF, "x"),
            }

        made = jax.lax.stop_gradient(theta[0] + theta[1] * z)
        x_s = RF.perturb(made, xi, s)
        taught = exact.gaussian([mean], 0.25).x_mean(RF, x_s, s * ones)
        batch = {"x_t": z, "x_s": x_s, "made": made, "taught": taught, "t": ones, "s": s * ones, "cond": {}}
        return sum(quadrature.expected(lambda b, p=p: p.loss(nets(p.role), b, None), batch, jnp.asarray(weights)) for p in players)

    # D of the data at s: mean + a / (4 V) (x_s - a mean), V = a^2 / 4 + s^2 = 5/16.
    optimum = jnp.asarray([mean, 0.5, mean - 0.4 * 0.5 * mean, 0.4])
    return loss, optimum, optimum + jnp.asarray([0.1, 0.05, 0.1, 0.1])


def parameter_moment_matching():
    """Data N(0.2, 1/4) in one step and a teacher that knows them, a line of two parameters: the student 0.2 + z / 2."""
    s = 0.5
    z, xi = (jnp.asarray(v) for v in np.meshgrid([-1.0, 1.0], [-1.0, 1.0]))  # all moments up to the third are those of noise
    z, xi = (jnp.tile(v.reshape(-1, 1), (2, 1)) for v in (z, xi))  # the two halves of the batch are the same
    player, ones = objectives.build("parameter_moment_matching").players[0], jnp.ones(len(z))
    # D of the data at s: mean + a / (4 V) (x_s - a mean), V = a^2 / 4 + s^2 = 5/16.
    line = jnp.asarray([0.2 - 0.4 * 0.1, 0.4])

    def loss(theta):
        x_s = jax.lax.stop_gradient(RF.perturb(theta[0] + theta[1] * z, xi, s))
        batch = {"x_t": z, "x_s": x_s, "t": ones, "s": s * ones, "cond": {}}
        of = lambda line: Model(lambda x, t, cond, key: line[0] + line[1] * x, RF, "x")  # noqa: E731
        nets = {"net": Model(lambda x, t, cond, key: theta[0] + theta[1] * x, RF, "x"), "teacher": of(line).replace(params=line, of=of)}
        return player.loss(nets, batch, None)[0]

    return loss, jnp.asarray([0.2, 0.5]), jnp.asarray([0.4, 0.8])


def inductive_moment_matching():
    """Pairs z = 2 x of data N(0, 1/4) lie on its flow, which they make straight: the exact map lands them at one point from t and r."""
    x = jax.random.normal(jax.random.key(0), (16, 1)) / 2
    batch = {"x": x, "z": 2 * x, "t": jnp.full(16, 0.8), "r": jnp.full(16, 0.6), "s": jnp.full(16, 0.2), "cond": {}}
    std = lambda t: (1 + t) / 2  # noqa: E731

    def loss(theta):
        def apply(x_t, t, cond, key):
            t, step = t[:, None], cond["step"][:, None]
            return (1 - std(t - step) / std(t)) / step * x_t + theta[0] * x_t + theta[1] * t * step

        return player.loss({"net": Model(apply, RF, "velocity", step_embed=True)}, batch, None)[0]

    player = objectives.build({"name": "inductive_moment_matching", "particles": 8}).players[0]
    return loss, jnp.zeros(2), jnp.asarray([0.1, -0.2])


def guidance_distillation():
    """The optimum is u_0 + w (u_1 - u_0) of the exact velocities u_k of the data, with the condition and without."""
    random = np.random.RandomState(0)
    x, z, w = (jnp.asarray(random.standard_normal(16)) for _ in range(3))
    cond = {"label": jnp.arange(16) % 2, "guidance": 3 + w}
    batch = {"x": x[:, None], "z": z[:, None], "t": jnp.linspace(0.1, 0.9, 16), "cond": cond}

    def apply(x_t, t, cond, key):
        with_, without = LINE.velocity(RF, x_t, t, cond["label"]), LINE.velocity(RF, x_t, t)
        return without + cond["guidance"][:, None] * (with_ - without)

    student, teacher = Model(apply, RF, "velocity", guidance_embed=True), LINE.model(RF, conditional=True)
    player = objectives.build("guidance_distillation").players[0]
    return lambda theta: player.loss({"net": near(student, theta), "teacher": teacher}, batch, None)[0], jnp.zeros(3), CURVE


def diffusion_dpo():
    """Without a preference (every pair in both orders) the reference is the optimum, whatever the pairs."""
    random = np.random.RandomState(0)
    first, second, z = (jnp.asarray(random.standard_normal((16, 1))) for _ in range(3))
    both = {
        "win": jnp.concatenate([first, second]),
        "lose": jnp.concatenate([second, first]),
        "z": jnp.concatenate([z, z]),
        "t": jnp.tile(jnp.linspace(0.1, 0.9, 16), 2),
        "cond": {},
    }
    reference = LINE.model(RF)
    player = objectives.build({"name": "diffusion_dpo", "beta": 2.0}).players[0]
    return lambda theta: player.loss({"net": near(reference, theta), "reference": reference}, both, None)[0], jnp.zeros(3), CURVE


def reward_model():
    """Rankings of three things as often as a race of exponential clocks of rates exp(r) ends in that order, by successive choices."""
    optimum, orders = jnp.asarray([0.7, -0.4]), np.array(list(itertools.permutations(range(3))))
    rates = np.exp([0.7, -0.4, 0.0])
    chances = [rates[a] / rates.sum() * rates[b] / (rates[b] + rates[c]) for a, b, c in orders]
    player = objectives.build("reward_model").players[0]

    def loss(theta):
        nets = {"net": lambda x, cond: jnp.append(theta, 0.0)[x[:, 0]]}
        return quadrature.expected(lambda b: player.loss(nets, b, None), {"ranked": jnp.asarray(orders)[..., None], "cond": {}}, jnp.asarray(chances))

    return loss, optimum, optimum + jnp.asarray([0.3, 0.2])


def diffusion_kto():
    """With the averse link, and every sample good as often as bad, the reference is the optimum; with a reference point of 0."""
    batch = {"x": jnp.linspace(-2, 2, 16)[:, None], "z": jnp.cos(jnp.arange(16.0))[:, None], "t": jnp.linspace(0.1, 0.9, 16)}
    batch = jax.tree.map(lambda v: jnp.concatenate([v, v]), batch) | {"good": jnp.arange(32) < 16, "cond": {}}
    batch["measured"] = {"reference_point": jnp.zeros(())}
    reference = LINE.model(RF)
    player = objectives.build({"name": "diffusion_kto", "beta": 2.0, "link": "log_sigmoid"}).players[0]
    return lambda theta: player.loss({"net": near(reference, theta), "reference": reference}, batch, None)[0], jnp.zeros(3), CURVE


def online_dpo():
    """IPO's optimum: every winner's log-ratio exceeds its loser's by 1 / (2 beta). The reference predicts nothing, so that an error's
    drift p^2 - 2 (z - x) p, with p = theta . (1, x_t, t), is quadratic in x: losers are found for the winners by its roots.
    """
    random, beta = np.random.RandomState(0), 2.0
    optimum = np.array([-0.1, 0.2, -0.3])
    t, z, win = random.uniform(0.1, 0.9, 16), *random.standard_normal((2, 16))
    a, b = optimum[0] + optimum[1] * t * z + optimum[2] * t, optimum[1] * (1 - t)
    drift = np.stack([b**2 + 2 * b, 2 * a * b + 2 * a - 2 * z * b, a**2 - 2 * z * a])
    wanted = (drift * np.stack([win**2, win, np.ones(16)])).sum(0) + 1 / beta
    lose = np.array([np.roots([d[0], d[1], d[2] - w]).real.max() for d, w in zip(drift.T, wanted)])
    batch = {k: jnp.asarray(v)[:, None] for k, v in (("win", win), ("lose", lose), ("z", z))} | {"t": jnp.asarray(t), "cond": {}}
    batch |= reward_batch(16) | {"weight": jnp.ones(16)}
    nothing = Model(lambda x_t, t, cond, key: 0 * x_t, RF, "velocity")
    player = objectives.build({"name": "online_dpo", "reward": "ink", "beta": beta, "link": "squared"}).players[0]
    loss = lambda theta: player.loss({"net": near(nothing, theta), "reference": nothing}, batch, None)[0]  # noqa: E731
    return loss, jnp.asarray(optimum), jnp.asarray(optimum) + CURVE


def stepwise_preference():
    """IPO's optimum again, of single steps: <mean - mean_ref, win - lose> / std^2 = 1 / (2 beta), where candidates are that far apart."""
    x, t, s = (np.array(v) for v in ([-1.0, 0.4, 0.9, -0.3], [0.9, 0.7, 0.4, 0.2], [0.8, 0.5, 0.3, 0.1]))
    beta, a = 2.0, 0.7
    std = a * np.sqrt(t / (1 - t) * (t - s))
    # As in flow_grpo: 2505.05470 eq. 9.
    moved = -(t - s) * (1 + a**2 / 2) * (CURVE[0] + CURVE[1] * x + CURVE[2] * t)
    pixel = lambda v: jnp.asarray(v).reshape(4, 1, 1, 1, 1)  # noqa: E731
    batch = {
        "cond": {}, "before": pixel(x), "win": pixel(x + std**2 / (2 * beta * moved)), "lose": pixel(x), "t": jnp.asarray(t)[:, None],
        "s": jnp.asarray(s)[:, None], "weight": jnp.ones((4, 1)), "reward": jnp.zeros(4), "rewards": {},
    }  # fmt: skip
    settings = {"name": "stepwise_preference", "reward": "ink", "beta": beta, "link": "squared"}
    player = objectives.build(settings).players[0]
    reference = lambda x_t, t: jnp.sin(x_t)  # noqa: E731

    def loss(theta):
        return player.loss({"net": by_pixel(reference, theta), "reference": by_pixel(reference, jnp.zeros(3))}, batch, None)[0]

    return loss, CURVE, CURVE + jnp.asarray([0.3, -0.2, 0.1])


def reward_batch(n):
    """What the loss tells of n samples besides."""
    return {"reward": jnp.zeros(n), "rewards": {}, "spread": jnp.zeros(n)}


def by_pixel(fn, theta):
    """fn's velocity of images of one pixel, plus theta_0 + theta_1 x_t + theta_2 t."""

    def apply(x_t, t, cond, key):
        return fn(x_t, t) + theta[0] + theta[1] * x_t + theta[2] * t.reshape(-1, 1, 1, 1)

    return Model(apply, RF, "velocity")


def flow_grpo():
    """Rewards linear in the noise that was drawn, A = slope e, and a penalty of strength beta: the optimum is the reference tilted by
    exp(A / beta), a normal law whose mean is moved by std slope / beta. The slopes are those of CURVE, at four points and times.
    """
    e, weights = quadrature.normal(60)
    x, t, s = (np.repeat(v, 60) for v in ([-1.0, 0.4, 0.9, -0.3], [0.9, 0.7, 0.4, 0.2], [0.8, 0.5, 0.3, 0.1]))
    e, weights, beta, a = np.tile(e, 4), np.tile(weights, 4), 2.0, 0.7
    std = a * np.sqrt(t / (1 - t) * (t - s))
    # The mean of a step moves by -(t - s) (1 + a^2 / 2) times the change of the velocity (2505.05470 eq. 9).
    moved = -(t - s) * (1 + a**2 / 2) * (CURVE[0] + CURVE[1] * x + CURVE[2] * t)
    reference = lambda x_t, t: jnp.sin(x_t)  # noqa: E731
    mean = x - (t - s) * (np.sin(x) + a**2 / 2 / (1 - t) * (x + (1 - t) * np.sin(x)))
    pixel = lambda v: jnp.asarray(v).reshape(-1, 1, 1, 1, 1)  # noqa: E731
    batch = {
        "cond": {}, "before": pixel(x), "after": pixel(mean + std * e), "mean": pixel(mean), "t": jnp.asarray(t)[:, None],
        "s": jnp.asarray(s)[:, None], "advantage": jnp.asarray(beta * moved / std * e), **reward_batch(240),
    }  # fmt: skip
    player = objectives.build({"name": "flow_grpo", "reward": "ink", "clip": 1e9, "beta": beta, "reduce": "sum"}).players[0]

    def loss(theta):
        nets = {"net": by_pixel(reference, theta), "reference": by_pixel(reference, jnp.zeros(3))}
        return quadrature.expected(lambda b: player.loss(nets, b, None), batch, jnp.asarray(weights))

    return loss, CURVE, CURVE + jnp.asarray([0.3, -0.2, 0.1])


def reward_feedback():
    """Flow matching's error is quadratic in the parameters and the ink of x_in - t v linear: the optimum solves a linear system."""
    random = np.random.RandomState(0)
    x, z, x_in = (random.uniform(-0.3, 0.3, 20) for _ in range(3))
    t, at = random.uniform(0.1, 0.9, (2, 20))
    strength, pretrain = 3.0, 0.7
    basis = lambda x, t: np.stack([np.ones(20), x, t], 1)  # noqa: E731
    x_t, goal = (1 - t) * x + t * z, z - x
    phi = basis(x_t, t)
    # strength E[t phi(x_in)] / 2 + 2 pretrain E[phi (phi theta - goal)] = 0
    right = 2 * pretrain * phi.T @ goal / 20 - strength * at @ basis(x_in, at) / 40
    optimum = np.linalg.solve(2 * pretrain * phi.T @ phi / 20, right)
    pixel = lambda v: jnp.asarray(v).reshape(-1, 1, 1, 1)  # noqa: E731
    batch = {"x": pixel(x), "z": pixel(z), "t": jnp.asarray(t), "x_in": pixel(x_in), "at": jnp.asarray(at)[:, None], "cond": {}}
    player = objectives.build({"name": "reward_feedback", "reward": "ink", "strength": strength, "pretrain": pretrain}).players[0]
    optimum = jnp.asarray(optimum)
    return lambda theta: player.loss({"net": by_pixel(lambda x_t, t: 0.0, theta)}, batch, None)[0], optimum, optimum + CURVE


def diffusion_nft():
    """At each of three x_t the optimum is v_old + (2 / beta) E[(r - 1/2) (v - v_old) | x_t], by theorem 3.2 of the paper."""
    x_t, t, beta = np.repeat([-0.5, 0.2, 1.0], 2), np.repeat([0.3, 0.5, 0.8], 2), 0.5
    x, good = np.array([-1.0, 0.5, 0.3, 1.2, -0.4, 0.9]), np.array([0.1, 0.9, 0.4, 0.8, 0.5, 0.0])
    z = (x_t - (1 - t) * x) / t
    old = 0.6 * x_t
    optimum = jnp.asarray(old[::2] + 2 / beta * ((good - 0.5) * (z - x - old)).reshape(3, 2).mean(1))
    pixel = lambda v: jnp.asarray(v).reshape(-1, 1, 1, 1)  # noqa: E731
    batch = {"cond": {}, "x": pixel(x), "z": pixel(z)[:, None], "t": jnp.asarray(t)[:, None], "good": jnp.asarray(good)}
    batch |= reward_batch(6)
    player = objectives.build({"name": "diffusion_nft", "reward": "ink", "beta": beta, "normalise": False}).players[0]

    def loss(theta):
        nets = {
            "net": Model(lambda x_t, t, cond, key: pixel(jnp.repeat(theta, 2)), RF, "velocity"),
            "old": Model(lambda x_t, t, cond, key: 0.6 * x_t, RF, "velocity"),
        }
        return player.loss(nets, batch, None)[0]

    return loss, optimum, optimum + jnp.asarray([0.1, -0.2, 0.3])


class LinearAutoencoder:
    """q(l | x) = N(gain x, exp(logvar)), decoder weight l, on the first of two dimensions."""

    def __init__(self, theta):
        self.gain, self.logvar, self.weight = theta

    def encode(self, x):
        return self.gain * x[:, :1], jnp.full((len(x), 1), self.logvar)

    def decode(self, latent):
        return self.weight * jnp.concatenate([latent, jnp.zeros_like(latent)], axis=1)


def vae():
    """Probabilistic PCA: |x - x_hat|^2 + 2 s^2 KL is 2 s^2 times the negative ELBO for observation noise s^2 per dimension, whose
    optimum for data variances (1, s^2) is weight = sqrt(1 - s^2), posterior gain = weight and variance s^2 (Tipping and Bishop 1999).
    """
    noise = 0.36
    x1, x2, z = (v.ravel() for v in np.meshgrid([-1.0, 1.0], [-0.6, 0.6], [-1.0, 1.0]))
    batch = {"x": jnp.asarray(np.stack([x1, x2], axis=1)), "z": jnp.asarray(z[:, None])}
    player = objectives.build({"name": "vae", "reconstruction": "l2", "kl_weight": 2 * noise}).players[0]
    optimum = jnp.asarray([0.8, np.log(noise), 0.8])
    return lambda theta: player.loss({"net": LinearAutoencoder(theta)}, batch, None)[0], optimum, optimum + CURVE


def vae_gan():
    """Both players at once, by stopping each one's gradient in the other's loss: an autoencoder that returns its images leaves
    nothing to tell apart, and a discriminator that sees no difference leaves nothing to fool it with.
    """
    x = jnp.asarray([[-1.0], [0.2], [1.1]])
    batch = {"x": x, "z": jnp.zeros_like(x), "step": 3}
    bound = objectives.build({
        "name": "vae_gan", "reconstruction": "l2", "kl_weight": 0.0, "sample": False, "adversarial": "nonsaturating",
        "adaptive": False, "start": 3,
    })  # fmt: skip

    def loss(theta):
        def nets(own):
            decoder, critic = (theta[part] if part == own else jax.lax.stop_gradient(theta[part]) for part in (slice(2), slice(2, 4)))
            net = types.SimpleNamespace(encode=lambda x: (x, jnp.zeros_like(x)), decode=lambda z: decoder[0] * z + decoder[1])
            return {"net": net, "discriminator": lambda x: critic[0] * x + critic[1]}

        return sum(player.loss(nets(part), batch, None)[0] for player, part in zip(bound.players, (slice(2), slice(2, 4))))

    return loss, jnp.asarray([1.0, 0.0, 0.0, 0.0]), jnp.asarray([1.2, -0.2, 0.3, 0.2])


class LogisticRegression:
    """Logits (0, w x + b)."""

    module = types.SimpleNamespace(time=False)

    def __init__(self, theta):
        self.theta = theta

    def __call__(self, x, t=None):
        return jnp.concatenate([jnp.zeros_like(x), self.theta[0] * x + self.theta[1]], axis=1)


def classification():
    """Classes N(-1/2, 1) and N(1/2, 1) in proportion 1 : 3 have the log odds x + log 3."""
    x, weight = quadrature.normal(40)
    batch = {"x": jnp.asarray(np.concatenate([x - 0.5, x + 0.5])[:, None]), "cond": {"label": jnp.repeat(jnp.arange(2), 40)}}
    rule = jnp.asarray(np.concatenate([0.25 * weight, 0.75 * weight]))
    player = objectives.build("classification").players[0]

    def loss(theta):
        nets = {"net": LogisticRegression(theta)}
        return quadrature.expected(lambda b: player.loss(nets, b, None), batch, rule)

    return loss, jnp.asarray([1.0, np.log(3)]), jnp.asarray([1.2, 0.8])


class Table:
    """logits[image, caption] = theta[kind of the image, caption], for images that hold their kind and captions of one token."""

    def __init__(self, theta):
        self.theta = theta

    def __call__(self, x, cond):
        return self.theta.reshape(2, 2)[x], jax.nn.one_hot(cond["tokens"][:, 0], 2, dtype=self.theta.dtype), 1.0


def contrastive():
    """The optimum is the pointwise mutual information log N(x, c) / (N(x) N(c)), up to a constant (CPC, 1807.03748 eq. 4)."""
    together = np.array([[1, 2], [3, 1]])
    kinds, captions = (np.repeat(v.ravel(), together.ravel()) for v in np.indices((2, 2)))
    batch = {"x": jnp.asarray(kinds), "cond": {"tokens": jnp.asarray(captions)[:, None]}}
    player = objectives.build("contrastive").players[0]
    optimum = jnp.asarray(np.log(together / (together.sum(0) * together.sum(1, keepdims=True))).ravel())
    way = jnp.asarray([0.3, -0.2, 0.1, -0.4])
    return lambda theta: player.loss({"net": Table(theta)}, batch, None)[0], optimum, optimum + way


def mae():
    """One guess for all hidden patches: their mean. Patches (0, 0, 0, 4000) are (-1, -1, -1, 3) / 2 when normalised, and so on."""
    order = jnp.asarray([[0, 1, 2], [2, 0, 1]])
    spike = lambda place: 4000.0 * jax.nn.one_hot(place, 4).reshape(2, 2)  # noqa: E731
    # Hidden: spikes at 3 and 0 in the first image (patches 1, 2), at 0 and 1 in the second (patches 0, 1).
    x = jnp.stack([jnp.concatenate([spike(k) for k in places], axis=1) for places in ((2, 3, 0), (0, 1, 2))])[..., None]
    player = objectives.build({"name": "mae", "mask_ratio": 0.6}).players[0]

    class Same:
        module = types.SimpleNamespace(patch=2)

        def __init__(self, theta):
            self.theta = theta

        def __call__(self, x, order, seen):
            return jnp.broadcast_to(self.theta, (2, 3, 4))

    optimum = jnp.asarray([0.5, 0.0, -0.5, 0.0])  # 2 of 4 spikes at 0, one at 1, none at 2, one at 3
    return lambda theta: player.loss({"net": Same(theta)}, {"x": x, "order": order}, None)[0], optimum, optimum + 0.2


def language_model():
    """A table of logits by the token before: at the log of the frequencies in the batch, of the second texts alone."""
    rows = jnp.asarray([[1, 0, 1, 2, 1, 0], [2, 0, 1, 1, 2, 0], [1, 0, 2, 2, 0, 0], [2, 0, 1, 1, 0, 0], [1, 0, 2, 1, 1, 0]])
    counts = np.zeros((3, 3))
    for first, second in (("01", "12 21 10"), ("01", "11 12 20"), ("02", "22 20"), ("01", "11 10"), ("02", "21 11 10")):
        for before, after in [first, *second.split()]:
            counts[int(before), int(after)] += 1
    player = objectives.build({"name": "language_model", "prefix": 1}).players[0]
    batch = {"x": rows, "measured": player.measure({}, {"x": rows}, None)}

    def loss(theta):
        table = jnp.stack([jnp.concatenate([jnp.asarray([-1e9, 0.0]), theta[:1]]), *jnp.pad(theta[1:].reshape(2, 2), ((0, 0), (1, 0)))])
        return player.loss({"net": lambda tokens: table[tokens]}, batch, None)[0]

    optimum = jnp.log(jnp.asarray([counts[0, 2] / counts[0, 1], *(counts[1:, 1:] / counts[1:, :1]).ravel()]))
    return loss, optimum, optimum + jnp.asarray([0.3, 0.2, -0.3, 0.4, -0.2])


CASES = {
    "language_model": language_model,
    "contrastive": contrastive,
    "classification": classification,
    "flow_matching": flow_matching,
    "repa": repa,
    "mae": mae,
    "consistency_distillation": consistency_distillation,
    "consistency_training": consistency_training,
    "progressive_distillation": progressive_distillation,
    "guided_progressive_distillation": guided_progressive_distillation,
    "distribution_matching": distribution_matching,
    "latent_consistency": latent_consistency,
    "scm_distillation": lambda: scm("scm_distillation"),
    "scm_training": lambda: scm("scm_training"),
    "moment_matching": moment_matching,
    "parameter_moment_matching": parameter_moment_matching,
    "inductive_moment_matching": inductive_moment_matching,
    "distribution_matching_gan": distribution_matching_gan,
    "adversarial_distillation": adversarial_distillation,
    "meanflow": meanflow,
    "shortcut": shortcut,
    "guidance_distillation": guidance_distillation,
    "reward_model": reward_model,
    "diffusion_dpo": diffusion_dpo,
    "diffusion_kto": diffusion_kto,
    "online_dpo": online_dpo,
    "stepwise_preference": stepwise_preference,
    "flow_grpo": flow_grpo,
    "reward_feedback": reward_feedback,
    "diffusion_nft": diffusion_nft,
    "vae": vae,
    "vae_gan": vae_gan,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_vanishes_at_the_exact_solution_only(name):
    with jax.enable_x64(True):
        loss, optimum, elsewhere = CASES[name]()
        gradient = jax.jit(jax.grad(loss))
        at_optimum, off, way = (np.asarray(v) for v in (gradient(optimum), gradient(elsewhere), elsewhere - optimum))
    assert np.abs(at_optimum).max() < 1e-7
    # Every parameter matters, and descending from elsewhere leads back.
    assert np.abs(off).min() > 1e-4
    assert np.dot(off, way) > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_roles_are_declared_and_every_trained_role_has_a_player(name):
    objective = OBJECTIVES[name]
    trained = [role for role, kind in objective.roles.items() if kind == "trained"]
    assert sorted({p.role for p in objective.players}) == sorted(trained)
    for kind in objective.roles.values():
        assert kind in ("trained", "frozen", "optional") or objective.roles[kind.removeprefix("ema:")] == "trained"


def test_settings_reach_the_functions_that_name_them():
    bound = objectives.build({"name": "flow_matching", "weight": "snr", "label_drop": 0.25, "time": "cosmap"})
    assert bound.players[0].loss.keywords == {"weight": "snr"}
    assert bound.rollout.keywords == {"label_drop": 0.25, "time": "cosmap"}
    assert objectives.build("vae").roles == {"net": "trained", "perceptual": "optional"}
    bound = objectives.build({"name": "vae_gan", "adaptive": False, "start": 7, "kl_weight": 0.1})
    assert bound.players[0].loss.keywords == {"adaptive": False, "start": 7, "kl_weight": 0.1}
    assert bound.players[0].measure.keywords == {"adaptive": False}
    assert bound.players[1].loss.keywords == {"start": 7} and bound.players[1].measure is None


def test_settings_named_by_two_players_reach_both():
    def first(nets, batch, key, *, shared: int, own: float = 0.0):
        return shared + own, {}

    def second(nets, batch, key, *, shared: int):
        return 10 * shared, {}

    objective = Objective({"a": "trained", "b": "trained"}, (Player("a", first), Player("b", second, every=5)))
    bound = bind(objective, {"shared": 2, "own": 0.5})
    assert [p.loss(None, None, None)[0] for p in bound.players] == [2.5, 20]
    assert [p.every for p in bound.players] == [1, 5]

    def rollout(nets, batch, key, *, shared: int):
        return {**batch, "shared": shared}

    bound = bind(objective._replace(rollout=rollout), {"shared": 2, "own": 0.5})
    assert bound.rollout(None, {"x": 1}, None) == {"x": 1, "shared": 2}
    assert [p.loss(None, None, None)[0] for p in bound.players] == [2.5, 20]
    bound = bind(objective, {"shared": 2})
    assert bound.rollout(None, {"x": 1}, None) == {"x": 1}  # an objective without rollout leaves the batch alone


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("flow", "objective.name = 'flow' is unknown; valid: .*flow_matching"),
        ({"weight": "x"}, "objective.name is missing"),
        ({"name": "flow_matching", "wieght": "x"}, "objective.wieght is unknown; valid: .*weight.*time, label_drop"),
        ({"name": "flow_matching", "label_drop": "often"}, "objective.label_drop = 'often' should be float"),
        ({"name": "consistency_training", "solver": "euler"}, "objective.solver is unknown"),
        ({"name": "vae", "nets": {}}, "objective.nets is unknown"),
    ],
)
def test_bad_settings_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        objectives.build(section)


def guiding(name):
    """The functions of an objective that take a guidance of its teacher."""
    return [fn for fn in (OBJECTIVES[name].rollout, *(p.loss for p in OBJECTIVES[name].players)) if fn and "guidance" in config.arguments(fn)]


@pytest.mark.parametrize("name", [k for k, o in OBJECTIVES.items() if "teacher" in o.roles and guiding(k)])
def test_guidance_that_remembers_is_refused(name):
    """The momentum of apg is carried from step to step of a sampler; a loss asks once, and would leave it out without a word."""
    net = Model(lambda x_t, t, cond, key: 0.5 * x_t, RF, "velocity", lambda cond: cond, params=jnp.ones(()), of=lambda params: net)
    nets = {role: net for role in OBJECTIVES[name].roles if role != "encoder"}
    nets["discriminator"] = net.replace(project=lambda x, t, cond, key: (x, x))
    t, x = jnp.full(2, 0.5), jnp.ones((2, 1))
    batch = {k: x for k in ("x", "z", "x_in", "z_t", "x_t", "x_s", "gan_z")} | {"t": t, "s": t / 2, "tau": t, "gan_t": t}
    batch |= {"step": 0, "cond": {"label": jnp.zeros(2, int)}}

    def run(guidance):
        for fn in guiding(name):
            needed = {k: v for k, v in {"steps": 2, "regression": 1.0}.items() if k in config.arguments(fn)}
            fn(nets, batch, jax.random.key(0), guidance=guidance, **needed)

    run({"name": "apg", "scale": 2.0})
    with pytest.raises(ConfigError, match="objective.guidance.*momentum"):
        run({"name": "apg", "scale": 2.0, "momentum": -0.5})


PUBLISHED = {
    "flow_grpo": {"steps": 10, "noise": 0.7, "clip": 1e-4, "beta": 0.004, "limit": 5.0, "window": 0, "move": 0},  # 2505.05470, its code
    "diffusion_nft": {"limit": 5.0, "beta": 1.0, "anchor": 0.0},  # 2509.16117
    "reward_feedback": {"steps": 40, "late": 10, "through": 1, "pretrain": 0.0, "anchor": 0.0},  # ReFL, 2304.05977
    "adversarial_distillation": {"steps": 4, "distill": 2.5},  # 2311.17042
    "distribution_matching_gan": {"adversarial_weight": 3e-3, "regression": 0.0},  # DMD2 on ImageNet, 2405.14867
    "moment_matching": {"steps": 8},  # 2406.04103
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_are_not_given_are_the_papers(name):
    objective = OBJECTIVES[name]
    functions = [config.arguments(fn, GIVEN) for fn in (objective.rollout, *(p.loss for p in objective.players)) if fn]
    for key, value in PUBLISHED[name].items():
        assert {f[key].default for f in functions if key in f} == {value}, key
