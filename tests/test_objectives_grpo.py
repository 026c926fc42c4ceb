"""Flow-GRPO: the noise of every step, exact log-ratios and KL, groups, windows, and a step of training on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import integrate, stats

from flowjax import objectives, paths, samplers
from flowjax.config import ConfigError
from flowjax.objectives import groups, grpo
from flowjax.predictions import Model
from flowjax.times import grid
from flowjax.train import mesh as mesh_lib
from flowjax.train import optim
from flowjax.train import step as step_lib
from flowjax.train.roles import Role

RF = paths.rectified()
KEY = jax.random.key(0)
LABELS = jnp.arange(24, dtype=jnp.int32) % 10


def linear(slope, offset=0.0):
    """v = slope x_t + offset + label / 10."""

    def apply(x_t, t, cond, key):
        return slope * x_t + offset + (cond["label"] / 10).reshape(-1, *[1] * (x_t.ndim - 1))

    return Model(apply, RF, "velocity")


NET, OTHER, REFERENCE = linear(0.3), linear(0.35, 0.02), linear(0.2, -0.05)


def rolled(n=24, net=NET, step=0, shape=(2, 2, 1), key=KEY, **settings):
    settings = {"reward": "ink", "group": 4, "steps": 5} | settings
    batch = {"x": jnp.zeros((n, *shape)), "cond": {"label": LABELS[:n]}, "step": jnp.asarray(step)}
    nets = {"net": net, "reference": REFERENCE}
    return jax.jit(lambda batch, key: grpo.rollout(nets, batch, key, **settings))(batch, key)


def loss(batch, net=NET, reference=REFERENCE, **settings):
    return jax.jit(lambda batch: grpo.loss({"net": net, "reference": reference}, batch, None, **settings))(batch)


# --- the policy


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        (10, 1.0, [0.7000, 0.6641, 0.4427, 0.3381, 0.2711, 0.2214, 0.1807, 0.1449, 0.1107, 0.0738]),
        (40, 1.0, [0.7000, 0.0177]),
        (10, 3.0, [0.7000, 0.2021]),
    ],
)
def test_noise_of_every_step(steps, shift, expected):
    at = jnp.asarray(grid(steps, RF, shift=shift), jnp.float32)
    std = grpo.transition(Model(lambda x, t, c, k: x, RF, "velocity"), jnp.ones((steps, 1)), at[:-1], at[1:], 0.7)[1]
    np.testing.assert_allclose(std if len(expected) == steps else std[jnp.array([0, -1])], expected, atol=6e-5)


def test_mean_of_a_step_is_the_papers():
    """2505.05470 eq. 9: x - dt (v + s^2 / (2 t) (x + (1 - t) v)) with s = a sqrt(t / (1 - t)), each row at a time of its own."""
    x, v, t, s = np.array([[0.3, -1.2, 2.0], [0.7, 0.1, -0.4], [0.9, 0.5, 0.2], [0.8, 0.45, 0.1]], np.float32)[..., None]
    mean, std = grpo.transition(Model(lambda *_: jnp.asarray(v), RF, "velocity"), *(jnp.asarray(k) for k in (x, t[:, 0], s[:, 0])), 0.7)
    sigma, dt = 0.7 * np.sqrt(t / (1 - t)), t - s
    np.testing.assert_allclose(mean, x - dt * (v + sigma**2 / (2 * t) * (x + (1 - t) * v)), rtol=1e-5)
    np.testing.assert_allclose(std, (sigma * np.sqrt(dt))[:, 0], rtol=1e-5)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_samples_keep_the_law_of_the_data(noise):
    """Data N(1.5, 0.36) and its exact velocity, many steps: the states of the rollout have the mean and the variance of x_t."""
    m, variance = 1.5, 0.36

    def apply(x, t, cond, key):
        t = t.reshape(-1, 1, 1, 1)
        total = (1 - t) ** 2 * variance + t**2
        return (t / total - (1 - t) * variance / total) * (x - (1 - t) * m) - m

    net = Model(apply, RF, "velocity")
    batch = {"x": jnp.zeros((20_000, 1, 1, 1)), "cond": {}, "step": jnp.asarray(0)}
    run = jax.jit(lambda batch: grpo.rollout({"net": net, "reference": net}, batch, KEY, reward="ink", group=2, steps=200, noise=noise))
    out = run(batch)
    t = np.asarray(out["s"][0])[[50, 120, 180]]
    states = np.asarray(out["after"])[:, [50, 120, 180], 0, 0, 0]
    np.testing.assert_allclose(states.mean(0), (1 - t) * m, atol=0.03)
    np.testing.assert_allclose(states.std(0), np.sqrt((1 - t) ** 2 * variance + t**2), rtol=0.02)


# --- the loss


def test_first_update_is_the_plain_policy_gradient():
    """Ratio 1, nothing clipped, no value, and the gradient is - mean A grad log p of the transitions."""
    batch = rolled()
    value, metrics = loss(batch, beta=0.0)
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-6) and metrics["clipped"] == 0
    assert float(value) == pytest.approx(-float(batch["advantage"].mean()), abs=1e-6) == pytest.approx(0.0, abs=1e-5)

    def plain(theta):
        total = 0.0
        for k in range(4):
            at = (batch[name][:, k] for name in ("before", "t", "s"))
            mean, std = grpo.transition(linear(*theta).bind(batch["cond"]), *at, 0.7)
            log_p = jax.scipy.stats.norm.logpdf(batch["after"][:, k], mean, std.reshape(-1, 1, 1, 1))
            total += jnp.mean(-batch["advantage"] * log_p.mean(axis=(1, 2, 3))) / 4
        return total

    theta = jnp.asarray([0.3, 0.0])
    found = jax.grad(lambda theta: loss(batch, linear(*theta), beta=0.0)[0])(theta)
    np.testing.assert_allclose(found, jax.grad(plain)(theta), rtol=1e-4)
    assert np.abs(found).min() > 1e-3
    summed = jax.grad(lambda theta: loss(batch, linear(*theta), beta=0.0, reduce="sum")[0])(theta)
    np.testing.assert_allclose(summed, 4 * found, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_loss_of_another_policy_by_scipy(reduce):
    batch, beta, clip = rolled(), 0.3, 0.02
    over = getattr(np, reduce)
    laws = {}
    for name, net in (("new", OTHER), ("old", NET), ("reference", REFERENCE)):
        flat = [np.asarray(batch[k]).swapaxes(0, 1) for k in ("before", "t", "s")]
        steps = [grpo.transition(net.bind(batch["cond"]), *(jnp.asarray(v) for v in one), 0.7) for one in zip(*flat)]
        laws[name] = [np.stack([np.asarray(v[i]) for v in steps], 1).astype(np.float64) for i in (0, 1)]
    std = laws["new"][1][..., None, None, None]
    log_p = {k: stats.norm.logpdf(np.asarray(batch["after"], np.float64), laws[k][0], std) for k in ("new", "old")}
    ratio = np.exp(over(log_p["new"] - log_p["old"], axis=(2, 3, 4)))
    advantage = np.asarray(batch["advantage"])[:, None]
    policy = -np.minimum(advantage * ratio, advantage * np.clip(ratio, 1 - clip, 1 + clip)).mean()
    kl = (laws["new"][0] - laws["reference"][0]) ** 2 / (2 * std**2)
    value, metrics = loss(batch, OTHER, clip=clip, beta=beta, reduce=reduce)
    assert float(value) == pytest.approx(policy + beta * over(kl, axis=(2, 3, 4)).mean(), rel=1e-4)
    assert float(metrics["ratio"]) == pytest.approx(ratio.mean(), rel=1e-5)
    assert float(metrics["clipped"]) == pytest.approx((abs(ratio - 1) > clip).mean()) and 0 < metrics["clipped"] < 1
    assert float(metrics["kl"]) == pytest.approx(kl.sum((1, 2, 3, 4)).mean(), rel=1e-4)


def test_kl_is_the_integral_and_the_papers_closed_form():
    """One pixel, one step: the integral of p log(p / q), and (dt / 2) (s (1 - t) / (2 t) + 1 / s)^2 |v - v_ref|^2 of the paper."""
    t, s, a, x = 0.6, 0.5, 0.7, 0.4
    ones = jnp.ones((1, 1, 1, 1, 1))
    batch = {
        "cond": {"label": jnp.zeros(1, jnp.int32)}, "before": x * ones, "after": 0.3 * ones, "mean": 0.3 * ones,
        "t": jnp.full((1, 1), t), "s": jnp.full((1, 1), s), "advantage": jnp.zeros(1), "reward": jnp.zeros(1), "rewards": {},
        "spread": jnp.zeros(1),
    }  # fmt: skip
    value, metrics = loss(batch, beta=1.0)
    found = [grpo.transition(net.bind(batch["cond"]), batch["before"][0], t, s, a) for net in (NET, REFERENCE)]
    (mean, std), (other, _) = [(float(m[0, 0, 0, 0]), float(d)) for m, d in found]
    p, q = stats.norm(mean, std), stats.norm(other, std)
    integral = integrate.quad(lambda y: p.pdf(y) * (p.logpdf(y) - q.logpdf(y)), mean - 9 * std, mean + 9 * std)[0]
    sigma = a * np.sqrt(t / (1 - t))
    closed = (t - s) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * (0.1 * x + 0.05) ** 2
    assert float(metrics["kl"]) == pytest.approx(integral, rel=1e-4) == pytest.approx(closed, rel=1e-4)
    assert float(value) == pytest.approx(closed, rel=1e-4)
    assert loss(batch, REFERENCE)[1]["kl"] == 0


def test_slices_are_parts_of_the_loss():
    batch = rolled()
    parts = [loss(jax.tree.map(lambda v: v[i::3], batch), OTHER)[0] for i in range(3)]
    assert float(loss(batch, OTHER)[0]) == pytest.approx(float(np.mean(parts)), rel=1e-5)


# --- groups


def test_advantages():
    np.testing.assert_allclose(groups.advantages(jnp.asarray([1.0, 0, 0, 1]), 4), [0.9998, -0.9998, -0.9998, 0.9998], rtol=1e-6)
    np.testing.assert_array_equal(groups.advantages(jnp.full(4, 3.0), 2), 0)
    reward = jax.random.normal(KEY, (12,))
    plain = np.asarray(groups.advantages(reward, 4))
    r = np.asarray(reward).reshape(3, 4)
    np.testing.assert_allclose(plain, ((r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-4)).ravel(), rtol=1e-5)
    by_batch = (r - r.mean(1, keepdims=True)) / (r.std() + 1e-4)
    np.testing.assert_allclose(groups.advantages(reward, 4, "batch"), by_batch.ravel(), rtol=1e-5)
    # A reward's offset, different for each condition, and its scale mean nothing; the order within a group nothing but an order.
    np.testing.assert_allclose(groups.advantages(reward + jnp.repeat(jnp.asarray([5.0, -3, 0]), 4), 4), plain, atol=1e-5)
    np.testing.assert_allclose(groups.advantages(10 * reward, 4), plain, rtol=2e-3)
    turned = lambda v: v.reshape(3, 4)[:, ::-1].ravel()  # noqa: E731
    np.testing.assert_allclose(turned(groups.advantages(turned(reward), 4)), plain, rtol=1e-6)
    np.testing.assert_allclose(groups.advantages(reward, 4, limit=0.5), plain.clip(-0.5, 0.5), rtol=1e-6)
    assert np.isnan(groups.advantages(reward.at[5].set(jnp.nan), 4)).tolist() == [False] * 4 + [True] * 4 + [False] * 4
    # One of 40 stands out by sqrt(39) standard deviations, and counts for 5.
    np.testing.assert_array_equal(groups.advantages(jnp.zeros(40).at[0].set(1.0), 40)[0], 5.0)


def test_a_group_has_one_condition_and_noises_of_its_own():
    batch = rolled(reward={"ink": 1.0, "symmetry": 0.0})
    np.testing.assert_array_equal(batch["cond"]["label"], np.repeat([0, 4, 8, 2, 6, 0], 4))
    first = np.asarray(batch["before"][:, 0]).reshape(24, -1)
    assert len(np.unique(first)) == first.size
    np.testing.assert_allclose(batch["advantage"], groups.advantages(batch["rewards"]["ink"], 4), rtol=1e-6)
    assert set(loss(batch)[1]) == {"reward", "diversity", "reward/ink", "reward/symmetry", "ratio", "clipped", "kl"}
    shared = rolled(shared=True)["before"][:, 0].reshape(6, 4, -1)
    assert (shared == shared[:, :1]).all() and len(np.unique(shared[:, 0])) == 24
    x = jax.random.normal(KEY, (6, 2, 1, 1))
    np.testing.assert_allclose(groups.spread(x, 3), np.repeat(np.asarray(x).reshape(2, 3, 2).std(1).mean(1), 3), rtol=1e-5)


def test_a_reward_that_is_not_a_number_reaches_the_loss():
    batch = rolled()
    bad = batch | {"advantage": groups.advantages(batch["reward"].at[3].set(jnp.nan), 4)}
    assert np.isnan(loss(bad)[0])


# --- the window


@pytest.mark.parametrize(("step", "start"), [(0, 0), (2, 0), (3, 1), (8, 2), (9, 0)])
def test_window_moves_on_and_goes_back(step, start):
    """5 steps, 2 of them with noise: places 0, 1 and 2; the last step has none."""
    batch, at = rolled(window=2, move=3, step=step), np.linspace(1, 0, 6)
    np.testing.assert_allclose(batch["t"], np.tile(at[start : start + 2], (24, 1)), atol=1e-6)
    np.testing.assert_allclose(batch["s"], np.tile(at[start + 1 : start + 3], (24, 1)), atol=1e-6)


def test_outside_the_window_it_is_the_ode():
    """With shared noise a group is one trajectory until the window, and after it Euler leads to what was judged."""
    at = jnp.linspace(1, 0, 6)
    batch = rolled(window=1, move=1, step=2, shared=True)
    before = np.asarray(batch["before"][:, 0]).reshape(6, 4, -1)
    assert (before == before[:, :1]).all()
    start = samplers.sample(NET, rolled(window=1, move=1, shared=True)["before"][:, 0], KEY, at[:3], "euler", batch["cond"])
    np.testing.assert_allclose(start, batch["before"][:, 0], rtol=1e-5)
    std = grpo.transition(NET.bind(batch["cond"]), batch["before"][:, 0], at[2], at[3], 0.7)[1]
    assert stats.kstest(np.ravel((batch["after"] - batch["mean"])[:, 0] / std), "norm").pvalue > 1e-3
    end = samplers.sample(NET, batch["after"][:, 0], KEY, at[3:], "euler", batch["cond"])
    np.testing.assert_allclose(batch["reward"], (jnp.clip(end, -1, 1).mean(axis=(1, 2, 3)) + 1) / 2, rtol=1e-5)


def test_random_window_is_everywhere_but_at_the_end():
    nets, batch = {"net": NET, "reference": REFERENCE}, {"x": jnp.zeros((4, 2, 2, 1)), "cond": {"label": LABELS[:4]}, "step": 0}
    begin = lambda key: grpo.rollout(nets, batch, key, reward="ink", group=4, steps=5, window=1)["t"][0, 0]  # noqa: E731
    assert {*np.round(jax.jit(jax.vmap(begin))(jax.random.split(KEY, 25)), 3).tolist()} == {*np.float32([1.0, 0.8, 0.6, 0.4]).tolist()}
    assert len(rolled()["t"][0]) == 4


# --- the step of training


class Small(nn.Module):
    """Mixes the pixels of an image, differently for each class."""

    kind, has_null = "denoiser", False

    @nn.compact
    def __call__(self, x, t, cond, train=False):
        h = nn.Dense(16, name="in")(x.reshape(len(x), -1)) + nn.Embed(10, 16, name="label")(cond["label"]) + t[:, None]
        return nn.Dense(4, name="out")(nn.tanh(h)).reshape(x.shape)


def trained(mesh, updates=2):
    """(parameters before, after, metrics) of one step, SGD with rate 1."""
    role = Role(Small(), RF, "velocity")
    params, reference = (role.init(jax.random.key(i), jnp.zeros((1, 2, 2, 1)), {"label": jnp.zeros(1, jnp.int32)}) for i in (0, 1))
    transform = optim.build({"name": "sgd", "momentum": 0.0, "schedule": {"name": "constant", "rate": 1.0}}, params, 10)[0]
    state = step_lib.State(jnp.zeros((), jnp.int32), {"net": params}, {"net": transform.init(params)}, {})
    objective = objectives.build({"name": "flow_grpo", "reward": "ink", "group": 4, "steps": 4, "window": 2, "clip": 0.05})
    roles = {"net": role, "reference": role}
    pure = step_lib.make_step(objective, roles, {"net": transform}, {}, seed=3, updates={"net": updates}, mesh=mesh)
    batch = {"x": np.zeros((16, 2, 2, 1), np.float32), "cond": {"label": np.arange(16, dtype=np.int32) % 10}}
    batch = mesh_lib.place(batch, mesh) if mesh else batch
    state, metrics = jax.jit(pure)(state, {"reference": reference}, batch)
    return jax.device_get((params, state.params["net"], metrics))


def test_groups_that_lie_on_several_devices_and_several_updates():
    """Two rows a device, four a group, two updates a step: the same as on one device."""
    (start, one, told), (_, eight, told_eight) = trained(None), trained(mesh_lib.make_mesh(8, 1, 1))
    moved = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(one)))
    assert moved > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * moved), one, eight)
    for k in told.keys() - {"finite"}:
        np.testing.assert_allclose(told[k], told_eight[k], rtol=1e-4, atol=1e-6, err_msg=k)
    assert told["ratio"] != 1 and told["finite"]["net"].all()  # the second update is off policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 1}, "objective.group = 1: samples are compared in groups of at least 2, which divide the 24 rows of a batch"),
        ({"group": 5}, "objective.group = 5"),
        ({"window": 5}, "objective.window = 5 of objective.steps = 5: noise is in one step or more, never in the last"),
        ({"steps": 1}, "objective.steps = 1"),
        ({"noise": 0.0}, "objective.noise = 0.0 should be positive"),
        ({"move": -1}, "objective.move = -1"),
        ({"std": "all"}, "objective.std = 'all' is unknown; valid: group, batch"),
        ({"limit": 0.0}, "objective.limit = 0.0"),
        ({"reward": "beauty"}, "objective.reward = 'beauty' is unknown"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        rolled(**settings)


def test_bad_settings_of_the_loss_are_refused():
    batch = rolled()
    for name, value in (("reduce", "max"), ("clip", 0.0), ("beta", -1.0)):
        with pytest.raises(ConfigError, match=f"objective.{name} = {value!r}"):
            loss(batch, **{name: value})
    with pytest.raises(ConfigError, match="objective lacks reward; valid: "):
        objectives.build("flow_grpo")
    other = linear(0.1).replace(path=paths.vp_linear())
    with pytest.raises(ConfigError, match="roles.reference was trained with another path"):
        grpo.rollout({"net": NET, "reference": other}, {"x": jnp.zeros((4, 1, 1, 1)), "cond": {}}, KEY, reward="ink")
