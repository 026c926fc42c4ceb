"""What stands between x_t and a network: unit variance and the log noise level, on every path."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from flowjax import exact, models, objectives
from flowjax.config import ConfigError
from flowjax.paths import PATHS, edm, rectified
from flowjax.predictions import edm_input
from flowjax.train.assembly import build_roles
from flowjax.train.export import role_of
from flowjax.train.roles import build_role
from flowjax.train.settings import config_dict, defaults, resolve

MLP = {"name": "mlp", "width": 8, "depth": 1}


def scaled(path, section="edm", prediction="edm", model=MLP):
    return build_role(model, {"name": path}, prediction, "model", input_scaling=section)


def seen_by_network(role, x_t, t):
    """What the role's module is called with."""
    seen = []
    apply = lambda variables, *inputs, **options: seen.extend(inputs) or inputs[0]  # noqa: E731
    module = types.SimpleNamespace(apply=apply, null=None, kind="denoiser")
    dataclasses.replace(role, module=module).net({})(x_t, t)
    return seen[0], seen[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("section", "std"), [("edm", 0.5), ({"name": "edm", "sigma_data": 1.3}, 1.3)])
def test_input_has_the_variance_of_one_at_every_time(path, section, std):
    data, role = exact.gaussian([0.0], std**2), scaled(path, section)
    x, z = data.sample(jax.random.key(0), 20_000), jax.random.normal(jax.random.key(1), (20_000, 1))
    for t in (role.path.t_min, 0.01, 0.3, 1.0):
        x_t = role.path.perturb(x, z, jnp.asarray(t))
        inside, time = seen_by_network(role, x_t, t)
        assert np.std(inside) == pytest.approx(1.0, abs=0.02)
        assert time.shape == (20_000,) and np.isfinite(time).all()


def test_time_is_edms_noise_conditioning():
    """c_noise = log(sigma) / 4: -1.5537 at EDM's smallest level 0.002, 0 at 1, 1.0955 at 80."""
    role = scaled("edm")
    for sigma, c_noise in ((0.002, -1.553652), (1.0, 0.0), (80.0, 1.095507)):
        _, time = seen_by_network(role, jnp.zeros((1, 2)), sigma / 80)
        assert float(time[0]) == pytest.approx(c_noise, abs=1e-5)
    # The same noise level is the same time, and the same input, on every path.
    for path in PATHS:
        role = scaled(path)
        t = role.path.time_of_sigma(jnp.asarray(3.0))
        inside, time = seen_by_network(role, role.path.a(t) * jnp.ones((1, 2)), t)
        assert float(time[0]) == pytest.approx(np.log(3.0) / 4, abs=1e-4)
        np.testing.assert_allclose(inside, 1 / np.sqrt(0.25 + 9.0), rtol=1e-4)


def test_ends_of_a_path_are_finite_and_the_noise_levels_beyond_them_are_capped():
    role = scaled("rectified")
    times = [float(seen_by_network(role, jnp.ones((1, 1)), t)[1][0]) for t in (0.0, 1e-5, 1 - 1e-6, 1.0)]
    np.testing.assert_allclose(times, np.log([1e-4, 1e-4, 1e4, 1e4]) / 4, atol=1e-4)
    slope = jax.jvp(lambda t: edm_input(rectified(), t), (jnp.asarray(1.0),), (jnp.asarray(1.0),))[1]
    assert np.isfinite(slope).all()


def test_default_leaves_the_input_alone():
    assert defaults()["input_scaling"] == "none"
    role = build_role(MLP, {"name": "edm"}, "velocity", "model")
    x_t = jnp.full((2, 1), 40.0)
    inside, time = seen_by_network(role, x_t, 0.5)
    assert inside is x_t and (time == 0.5).all()


def alphas_cumprod(steps, beta_min, beta_max):
    """DDPM's A_i, one factor after another."""
    kept, product = [], 1.0
    for j in range(steps):
        product *= 1 - (beta_min + (beta_max - beta_min) * j / (steps - 1))
        kept.append(product)
    return np.array(kept)


@pytest.mark.parametrize(
    ("section", "schedule"),
    [("ddpm", (1000, 1e-4, 0.02)), ({"name": "ddpm", "steps": 50, "beta_min": 0.01, "beta_max": 0.2}, (50, 0.01, 0.2))],
)
@pytest.mark.parametrize("path", PATHS)
def test_steps_of_ddpm_are_met_at_their_noise_level_on_every_path(path, section, schedule, float64):
    role, steps = scaled(path, section, "eps"), schedule[0]
    kept = alphas_cumprod(*schedule)
    i = np.array([0, 1, 7, steps // 2, steps - 1])
    sigma = np.sqrt((1 - kept) / kept)[i]
    reached = (sigma > float(role.path.sigma(role.path.t_min))) & (sigma < float(role.path.sigma(0.9999999)))
    t = role.path.time_of_sigma(jnp.asarray(sigma))
    x, z = np.float64(0.7), np.float64(-1.3)
    x_t = role.path.a(t) * x + role.path.b(t) * z
    inside, time = seen_by_network(role, x_t[:, None], t)
    assert reached.sum() >= 4
    np.testing.assert_allclose((time * steps)[reached], i[reached], atol=1e-3)
    wanted = np.sqrt(kept[i]) * x + np.sqrt(1 - kept[i]) * z
    np.testing.assert_allclose(inside[:, 0][reached], wanted[reached], rtol=1e-6)
    # Between steps 3 and 4, and beyond both ends.
    between = role.path.time_of_sigma(jnp.sqrt(np.sqrt((1 - kept) / kept)[3] * np.sqrt((1 - kept) / kept)[4]))
    assert float(seen_by_network(role, jnp.ones((1, 1)), between)[1][0]) * steps == pytest.approx(3.5, abs=0.01)
    assert 0 <= float(seen_by_network(role, jnp.ones((1, 1)), 0.0)[1][0]) * steps < 60 * (path == "ve") + 1e-9
    assert float(seen_by_network(role, jnp.ones((1, 1)), 1.0)[1][0]) * steps <= steps - 1


def test_time_of_ddpm_is_near_the_continuous_one():
    """The claim of the docstring: within five steps of 1000 t on the path that is DDPM's limit."""
    t = jnp.linspace(0.0, 1.0, 501)
    _, time = seen_by_network(scaled("vp_linear", "ddpm", "eps"), jnp.zeros((501, 1)), t)
    assert np.abs(1000 * np.asarray(time) - 1000 * np.asarray(t)).max() < 5


def test_reversed_time_is_one_at_the_data():
    x = jnp.arange(6.0).reshape(3, 2)
    inside, time = seen_by_network(scaled("rectified", "reversed", "velocity"), x, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_array_equal(inside, x)
    np.testing.assert_array_equal(time, [1.0, 0.75, 0.0])


def test_network_itself_is_unchanged_by_the_scaling():
    """net(x_t, t) = module(c_in x_t, c_noise), with the output's meaning left to the prediction."""
    role = scaled("edm")
    x_t = jnp.asarray([[40.0, -80.0]])
    params = jax.tree.map(lambda p: p + 0.1, meta.unbox(role.init(jax.random.key(0), x_t, {})))
    y = role.net(params)(x_t, 0.5)
    want = role.module.apply({"params": params}, x_t / np.sqrt(0.25 + 1600), jnp.full(1, np.log(40.0) / 4), {})
    np.testing.assert_allclose(y, want, rtol=1e-5)
    np.testing.assert_allclose(role.net(params).get("edm", x_t, 0.5), y)


def test_edm_prediction_and_scaling_are_edms_preconditioning():
    """D = c_skip x + c_out F(c_in x; c_noise), at sigma = sd = 0.5: c_skip = 1/2, c_out = 0.5 / sqrt 2, c_in = sqrt 2."""
    module = types.SimpleNamespace(apply=lambda variables, x, t, cond, **options: x, null=None)  # F returns its first input
    net = models.denoiser(module, {}, edm(), "edm", edm_input)
    np.testing.assert_allclose(net.get("x", jnp.ones((1, 1)), 0.5 / 80), 0.5 + 0.5 / np.sqrt(2) * np.sqrt(2), rtol=1e-6)


def test_exports_remember_the_scaling():
    info = {"model": MLP, "path": {"name": "edm"}, "prediction": "edm", "input_scaling": {"name": "edm", "sigma_data": 0.7}}
    inside, _ = seen_by_network(role_of(info, "teacher"), jnp.ones((1, 1)), 0.0)
    np.testing.assert_allclose(inside, 1 / 0.7, rtol=1e-6)
    del info["input_scaling"]
    assert role_of(info, "teacher").scaling is None


def test_the_configs_key_reaches_the_trained_network():
    def net(**changes):
        config = resolve(config_dict(data={"name": "mix4"}, model=MLP, path={"name": "edm"}, prediction="edm", objective="flow_matching",
                                     optimizer={"name": "adamw"}, **changes))  # fmt: skip
        return build_roles(config, objectives.build("flow_matching"))[0]["net"]

    assert net().scaling is None
    inside, _ = seen_by_network(net(input_scaling={"name": "edm", "sigma_data": 0.7}), jnp.ones((1, 1)), 0.0)
    np.testing.assert_allclose(inside, 1 / 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("karras", "input_scaling.name = 'karras' is unknown; valid: ddpm, edm, reversed"),
        ({"name": "edm", "sd": 0.5}, "input_scaling.sd is unknown; valid: sigma_data"),
        ({"name": "edm", "t": 0.5}, "input_scaling.t is unknown; valid: sigma_data"),
    ],
)
def test_bad_scalings_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        scaled("edm", section)
