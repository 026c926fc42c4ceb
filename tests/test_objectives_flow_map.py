"""Flow maps: the exact mean velocity of a Gaussian flow solves both objectives; the tangent is that of the held end; steps and shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quadrature
from flowjax import exact, models, objectives, paths, samplers, times
from flowjax.config import ConfigError
from flowjax.models import MODELS
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF = paths.rectified()
DATA = exact.gaussian([0.0], 0.25)


def std(t):
    return jnp.sqrt((1 - t) ** 2 / 4 + t**2)


def mean_velocity(x_t, t, step):
    """u = (x_t - X(x_t; t -> s)) / step of data N(0, 1/4), whose flow multiplies by std(s) / std(t); the velocity where step = 0."""
    t, step = t[:, None], step[:, None]
    far = (1 - std(t - step) / std(t)) / jnp.where(step == 0, 1.0, step)
    near = (t - (1 - t) / 4) / std(t) ** 2
    return jnp.where(step == 0, near, far) * x_t


def flow_map(theta=(0.0, 0.0)):
    def apply(x_t, t, cond, key):
        step = cond.get("step", jnp.zeros_like(t)) if cond else jnp.zeros_like(t)
        return mean_velocity(x_t, t, step) + theta[0] * x_t + theta[1] * (step * t)[:, None]

    return Model(apply, RF, "velocity", step_embed=True)


def test_published_values():
    """N(0, 1/4), x = t = 1, by hand: over the whole way 1/2, over half of it 0.8819660."""
    one = jnp.ones((1, 1)), jnp.ones(1)
    np.testing.assert_allclose([mean_velocity(*one, jnp.asarray([d]))[0, 0] for d in (1.0, 0.5)], [0.5, 0.8819660], rtol=1e-7)


def test_meanflow_is_solved_by_the_mean_velocity_in_expectation():
    x, z, weights = quadrature.mixture_and_noise(exact.mixture([1.0], [0.0], [0.5]), 24)
    loss = objectives.build({"name": "meanflow", "power": 0.0}).players[0].loss

    def total(theta):
        out = 0.0
        for t, r in ((0.9, 0.3), (0.6, 0.6), (1.0, 0.0)):
            batch = {"x": x, "z": z, "t": jnp.full(len(x), t), "dropped": jnp.zeros(len(x), bool), "cond": {"step": jnp.full(len(x), t - r)}}
            out += quadrature.expected(lambda b: loss({"net": flow_map(theta)}, b, None), batch, weights)
        return out

    np.testing.assert_allclose(jax.grad(total)(jnp.zeros(2)), 0, atol=1e-9)
    assert (np.abs(jax.grad(total)(jnp.asarray([0.1, -0.2]))) > 1e-2).all()


def test_meanflow_tangent_by_finite_differences():
    """d/dt u(x_t, t, t - r) along the pair's line, r held: the target is v - step times it."""
    net = Model(lambda x, t, c, k: jnp.sin(2 * x) * t[:, None] + jnp.cos(c["step"])[:, None] * x**2, RF, "velocity", step_embed=True)
    x, z, t, r, h = jnp.asarray([[0.3]]), jnp.asarray([[-0.8]]), 0.7, 0.2, 1e-5
    u = lambda t: net(RF.perturb(x, z, t), t, {"step": jnp.asarray([t - r])})  # noqa: E731
    goal = (z - x) - (t - r) * (u(t + h) - u(t - h)) / (2 * h)
    batch = {"x": x, "z": z, "t": jnp.asarray([t]), "dropped": jnp.zeros(1, bool), "cond": {"step": jnp.asarray([t - r])}}
    value, metrics = objectives.build({"name": "meanflow", "power": 0.0}).players[0].loss({"net": net}, batch, None)
    np.testing.assert_allclose(value, jnp.square(u(t) - goal)[0, 0], rtol=1e-6)
    assert metrics["flow"] == 0 and metrics["map"] == value
    # The gradient does not run through the target.
    scaled = lambda a: objectives.build({"name": "meanflow", "power": 0.0}).players[0].loss(  # noqa: E731
        {"net": net.replace(apply=lambda x, t, c, k: a * net.apply(x, t, c, k))}, batch, None)[0]  # fmt: skip
    np.testing.assert_allclose(jax.grad(scaled)(1.0), 2 * ((u(t) - goal) * u(t))[0, 0], rtol=1e-6)


def test_step_zero_is_flow_matching():
    x, z = (jax.random.normal(jax.random.key(i), (8, 2)) for i in range(2))
    batch = {"x": x, "z": z, "t": jnp.linspace(0.1, 0.9, 8), "dropped": jnp.zeros(8, bool), "cond": {"step": jnp.zeros(8)}}
    net = flow_map((0.3, 0.0))
    ours = objectives.build({"name": "meanflow", "power": 0.0}).players[0].loss({"net": net}, batch, None)[0]
    plain = objectives.build("flow_matching").players[0].loss({"net": net}, batch, None)[0]
    np.testing.assert_allclose(ours, 2 * plain, rtol=1e-12)  # a sum over two dimensions against a mean


def test_adaptive_weight():
    """(||.||^2 + c)^-p of each example, without gradient."""
    x = jnp.asarray([[1.0], [3.0]])
    batch = {"x": x, "z": jnp.zeros_like(x), "t": jnp.full(2, 0.5), "dropped": jnp.zeros(2, bool), "cond": {"step": jnp.zeros(2)}}
    net = lambda a: Model(lambda x, t, c, k: a + 0 * x, RF, "velocity", step_embed=True)  # noqa: E731
    loss = lambda a: objectives.build({"name": "meanflow", "power": 0.5, "offset": 1.0}).players[0].loss({"net": net(a)}, batch, None)[0]  # noqa: E731
    np.testing.assert_allclose(loss(0.0), (1 / 2**0.5 + 9 / 10**0.5) / 2, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(loss)(0.0), (2 * 1 / 2**0.5 + 2 * 3 / 10**0.5) / 2, rtol=1e-9)


def labelled(u):
    """u(x_t, t, label, step) with label 2 for none."""
    apply = lambda x, t, c, k: u(x, t, c["label"][:, None], c["step"][:, None])  # noqa: E731
    return Model(apply, RF, "velocity", lambda c: {**c, "label": jnp.full_like(c["label"], 2)}, step_embed=True)


def test_meanflow_guidance_has_the_published_fixed_point():
    """With u = v_c where asked and v_0 where not, scale / (1 - mix) is the effective scale: v = v_0 + w (v_c - v_0) solves it."""
    scale, mix, v_c, v_0 = 0.5, 0.75, 1.0, -0.5  # effective 2
    guided = v_0 + scale / (1 - mix) * (v_c - v_0)
    x = jnp.zeros((1, 1))
    loss = objectives.build({"name": "meanflow", "scale": scale, "mix": mix, "power": 0.0}).players[0].loss
    base = {"x": x, "z": x + v_c, "t": jnp.full(1, 0.5), "cond": {"label": jnp.zeros(1, int), "step": jnp.zeros(1)}}
    net = lambda a: labelled(lambda x, t, label, step: jnp.where(label == 2, v_0, a) + 0 * x)  # noqa: E731
    for dropped, best in ((False, guided), (True, v_c)):
        batch = {**base, "dropped": jnp.full(1, dropped)}
        np.testing.assert_allclose(loss({"net": net(best)}, batch, None)[0], 0, atol=1e-12)
        assert loss({"net": net(best + 0.1)}, batch, None)[0] > 1e-4


def test_shares_steps_and_times():
    batch = {"x": jnp.zeros((4000, 1)), "cond": {}}
    net = flow_map()
    made = objectives.build({"name": "meanflow", "same": 0.75}).rollout({"net": net}, batch, jax.random.key(0))
    step, t = (np.asarray(v) for v in (made["cond"]["step"], made["t"]))
    assert (step == 0).mean() == 0.75 and (step >= 0).all() and (t - step >= 0).all()
    far = step[3000:]
    assert abs(far.mean() - 1 / 3) < 0.03  # of two uniform times the mean distance
    made = objectives.build({"name": "shortcut", "bootstrap": 0.5, "finest": 8}).rollout({"net": net, "target": net}, batch, jax.random.key(0))
    step, t = (np.asarray(v) for v in (made["cond"]["step"], made["t"]))
    assert (step[2000:] == 0).all()
    values, counts = np.unique(step[:2000], return_counts=True)
    np.testing.assert_allclose(values, [1 / 8, 1 / 4, 1 / 2, 1])
    assert abs(counts - 500).max() < 100
    np.testing.assert_allclose(t[:2000] / step[:2000] % 1, 0, atol=1e-9)
    assert t[:2000].max() == 1 and (t[:2000] - step[:2000] >= 0).all()


def test_shortcut_goal_is_the_mean_of_two_halves():
    """Of the exact map, every goal is the map's own answer, whatever the step; but for the finest, whose halves count as instants."""
    x = jax.random.normal(jax.random.key(0), (512, 1)) / 2
    net = flow_map()
    made = objectives.build({"name": "shortcut", "bootstrap": 1.0, "finest": 4}).rollout(
        {"net": net, "target": net}, {"x": x, "cond": {}}, jax.random.key(1)
    )
    x_t = RF.perturb(x, made["z"], made["t"])
    own = net(x_t, made["t"], made["cond"])
    fine = np.asarray(made["cond"]["step"]) == 0.25
    np.testing.assert_allclose(made["goal"][~fine], own[~fine], rtol=1e-9)
    euler = samplers.sample(net, x_t[fine], jax.random.key(0), [0.0, 0.0], "euler")  # not moved: shapes only
    v = lambda x, t: mean_velocity(x, t, jnp.zeros_like(t))  # noqa: E731
    t = made["t"][fine]
    first = v(euler, t)
    np.testing.assert_allclose(made["goal"][fine], (first + v(euler - first / 8, t - 0.125)) / 2, rtol=1e-9)


def test_shortcut_guides_the_finest_step_alone():
    net = labelled(lambda x, t, label, step: jnp.where(label == 2, -0.5, 1.0) + 0 * x)
    batch = {"x": jnp.zeros((256, 1)), "cond": {"label": jnp.zeros(256, int)}}
    made = objectives.build({"name": "shortcut", "bootstrap": 1.0, "finest": 2, "guidance": 3.0}).rollout(
        {"net": net, "target": net}, batch, jax.random.key(0)
    )
    fine = np.asarray(made["cond"]["step"]) == 0.5
    np.testing.assert_allclose(made["goal"][fine], -0.5 + 3 * 1.5)
    np.testing.assert_allclose(made["goal"][~fine], 1.0)
    assert fine.any() and not fine.all()


def test_sampler_of_flow_maps_is_exact_in_any_number_of_steps():
    z = jax.random.normal(jax.random.key(0), (16, 1))
    for n in (1, 2, 5):
        x = samplers.sample(flow_map(), z, jax.random.key(1), times.grid(n, RF), "flow_map")
        np.testing.assert_allclose(x, z / 2, rtol=1e-6)
    # Other samplers see the velocity: many Euler steps come near, one does not.
    one, many = (samplers.sample(flow_map(), z, jax.random.key(1), times.grid(n, RF), "euler") for n in (1, 200))
    np.testing.assert_allclose(many, z / 2, rtol=0.02)
    np.testing.assert_allclose(one, 0, atol=1e-6)
    with pytest.raises(ConfigError, match="model.step_embed"):
        samplers.sample(DATA.model(RF), z, jax.random.key(1), times.grid(1, RF), "flow_map")


FIELDS = {
    "mlp": {"width": 8, "depth": 1},
    "dit": {"patch": 2, "width": 16, "depth": 1, "heads": 2},
    "jit": {"patch": 2, "width": 16, "depth": 2, "heads": 2, "bottleneck": 4, "num_classes": 2, "class_tokens": 1, "context_from": 1},
}


@pytest.mark.parametrize("name", FIELDS)
def test_step_is_an_input_that_begins_without_effect(name):
    shape, cond = ((2, 2) if name == "mlp" else (2, 4, 4, 1)), ({"label": jnp.zeros(2, int)} if name == "jit" else {})
    x, t = jax.random.normal(jax.random.key(0), shape, "float32"), jnp.asarray([0.3, 0.8], "float32")
    plain, module = (models.build({"name": name, **FIELDS[name], "step_embed": on}) for on in (False, True))
    from flax.core import meta

    params = meta.unbox(module.init(jax.random.key(1), x, t, cond)["params"])
    assert "s_embed" in params and "s_embed" not in meta.unbox(plain.init(jax.random.key(1), x, t, cond)["params"])
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape, p.dtype), {k: v for k, v in params.items() if k != "s_embed"}) | {
        "s_embed": params["s_embed"]
    }
    ask = lambda p, **more: module.apply({"params": p}, x, t, {**cond, **more})  # noqa: E731
    rest = plain.apply({"params": {k: v for k, v in params.items() if k != "s_embed"}}, x, t, cond)
    np.testing.assert_array_equal(ask(params, step=jnp.full(2, 0.4, "float32")), rest)
    moved = params | {"s_embed": jax.tree.map(lambda p: p + 0.1, params["s_embed"])}
    a, b, c = (ask(moved, **k) for k in ({}, {"step": jnp.zeros(2, "float32")}, {"step": jnp.full(2, 0.4, "float32")}))
    np.testing.assert_array_equal(a, b)
    assert np.abs(c - b).max() > 1e-3 and name in MODELS


@pytest.mark.parametrize(
    "section, message",
    [({"name": "meanflow", "same": 1.5}, "objective.same"), ({"name": "shortcut", "finest": 12}, "power of two"), ({"name": "shortcut", "bootstrap": -1.0}, "objective.bootstrap"),
     ({"name": "meanflow", "label_drop": 0.1}, "null condition")],
)  # fmt: skip
def test_refusals(section, message):
    nets = {"net": flow_map(), "target": flow_map()}
    with pytest.raises(ConfigError, match=message):
        objectives.build(section).rollout(nets, {"x": jnp.zeros((4, 1)), "cond": {}}, jax.random.key(0))
    with pytest.raises(ConfigError, match="model.step_embed = True"):
        objectives.build(section["name"]).rollout({k: DATA.model(RF) for k in nets}, {"x": jnp.zeros((4, 1)), "cond": {}}, jax.random.key(0))


def test_finest_step_may_be_the_whole_way():
    batch = objectives.build({"name": "shortcut", "bootstrap": 1.0, "finest": 1}).rollout(
        {"net": flow_map(), "target": flow_map()}, {"x": jnp.zeros((4, 1)), "cond": {}}, jax.random.key(0)
    )
    assert (batch["cond"]["step"] == 1).all() and (batch["t"] == 1).all()


def test_tangents_are_of_r_and_t():
    """u = 2 x + 3 t + 5 step: with tangents (r', t') its derivative is 2 v + 3 t' + 5 (t' - r'), here for v = 1 and a step of 1/2."""
    net = Model(lambda x, t, c, k: 2 * x + (3 * t + 5 * c["step"])[:, None], paths.rectified(), "velocity", step_embed=True)
    batch = {"x": jnp.zeros((1, 1)), "z": jnp.ones((1, 1)), "t": jnp.full(1, 0.5), "dropped": jnp.zeros(1, bool), "cond": {"step": jnp.full(1, 0.5)}}
    for tangent, rate in (((0.0, 1.0), 10), ((0.0, 0.0), 2), ((1.0, 0.0), -3), ((1.0, 1.0), 5)):
        loss = objectives.build({"name": "meanflow", "power": 0.0, "tangent": tangent}).players[0].loss
        assert float(loss({"net": net}, batch, None)[0]) == pytest.approx((5 - (1 - 0.5 * rate)) ** 2)
    with pytest.raises(ConfigError, match="objective.tangent = .* should be two numbers"):
        objectives.build({"name": "meanflow", "tangent": (1.0,)}).players[0].loss({"net": net}, batch, None)
