"""Stochastic samplers against exact variances.

For Gaussian data a step is affine, x_s = A x_t + B xi + C, so that two evaluations give A, B and C exactly and the variance
recursion V <- A^2 V + B^2 replaces Monte Carlo.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import config, exact
from flowjax.paths import PATHS, Path, edm, rectified, trigonometric, ve
from flowjax.predictions import Model
from flowjax.samplers import SAMPLERS, noise, sample
from flowjax.samplers.sde import DIFFUSIONS, transition
from flowjax.times import grid

pytestmark = pytest.mark.usefixtures("float64")

RF = rectified()
KEY = jax.random.key(0)


def affine(sampler, model, times, draw=lambda key: key):
    """A, B, C (N,) of the steps over `times`, for a one-dimensional model affine in x and one draw xi per step.

    draw: the key that the sampler draws xi from, given the step's.
    """
    sampler = config.build(SAMPLERS, sampler, "sampler")
    times = jnp.asarray(times)
    x = jnp.asarray([[0.0], [1.0]])

    @jax.jit
    @jax.vmap
    def coefficients(t, s):
        def at(k):
            out, _ = sampler.step(model, x, t, s, jnp.stack([k, k]), sampler.init(x, times))
            return out[:, 0], jax.random.normal(draw(k), (1,), x.dtype)[0]

        (first, xi1), (second, xi2) = at(jax.random.key(3)), at(jax.random.key(4))
        b = (first[0] - second[0]) / (xi1 - xi2)
        return first[1] - first[0], b, first[0] - b * xi1

    return tuple(np.asarray(v) for v in coefficients(times[:-1], times[1:]))


def normal_data(mean, variance, path):
    """The exact velocity of N(mean, variance) in one dimension: as exact.gaussian has it, but quick to compile."""

    def velocity(x_t, t, cond, key):
        t = t[:, None]
        a, b, da, db = path.a(t), path.b(t), path.da(t), path.db(t)
        return da * mean + (a * da * variance + b * db) / (a**2 * variance + b**2) * (x_t - a * mean)

    return Model(velocity, path, "velocity")


def moments(steps, mean, variance):
    """Mean and variance after each of the affine steps."""
    out = []
    for a, b, c in zip(*steps):
        mean, variance = a * mean + c, a**2 * variance + b**2
        out.append((mean, variance))
    return np.asarray(out).T


def steps_to(n, t=0.999, s=0.001):
    return np.linspace(t, s, n + 1)


# Euler-Maruyama.


def test_variance_recursion_of_the_sde():
    """Data N(0, 1/4), g^2 = 2t, so Dif = t: weak order 1, exact value .24950."""
    model = normal_data(0.0, 0.25, RF)
    found = []
    for n in (50, 200, 800, 3200):
        steps = affine({"name": "euler_maruyama", "diffusion": "linear"}, model, steps_to(n))
        found.append(moments(steps, 0.0, 0.001**2 / 4 + 0.999**2)[1][-1])
    np.testing.assert_allclose(found, [0.2457, 0.2485, 0.24925, 0.24944], atol=6e-5)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("path", ["rectified", "vp_linear"])
def test_every_diffusion_keeps_the_marginals(diffusion, path):
    path = PATHS[path]()
    errors = []
    for n in (1000, 4000):
        times = steps_to(n, 0.95, 0.05)
        steps = affine({"name": "euler_maruyama", "diffusion": diffusion}, normal_data(0.6, 0.25, path), times)
        a, b = (np.asarray(f(jnp.asarray(times))) for f in (path.a, path.b))
        variance = a**2 / 4 + b**2
        mean, found = moments(steps, 0.6 * a[0], variance[0])
        np.testing.assert_allclose(mean, 0.6 * a[1:], atol=20 / n)
        errors.append(abs(found[-1] / variance[-1] - 1))
    assert errors[1] < 0.01
    assert errors[1] < 0.3 * errors[0] or errors[0] < 1e-6  # first order in the step


def test_diffusion_coefficients():
    t, s = jnp.asarray(1 / 6), jnp.asarray(1 / 9)
    expected = {
        "constant": 1.0,
        "sbdm": 1 / 5,
        "sigma": 1 / 6,
        "linear": 1 / 6,
        "decreasing": (1 - math.sqrt(0.75)) ** 2 / 4,
        "increasing_decreasing": 0.25,
        "flow_grpo": 1 / 5,
    }
    assert set(expected) == set(DIFFUSIONS)
    for name, value in expected.items():
        assert float(DIFFUSIONS[name](RF, t, s)) == pytest.approx(value, abs=1e-12), name
    gvp = trigonometric()
    assert float(DIFFUSIONS["sigma"](gvp, t, s)) == pytest.approx(math.sin(math.pi / 12))
    assert float(DIFFUSIONS["sbdm"](gvp, t, s)) == pytest.approx(math.pi / 2 * math.tan(math.pi / 12))
    for path in (RF, gvp, PATHS["vp_linear"](), ve()):  # half the g^2 of the forward SDE
        assert float(DIFFUSIONS["sbdm"](path, t, s)) == pytest.approx(float(path.diffusion(t)) / 2)
    assert float(DIFFUSIONS["sbdm"](RF, jnp.asarray(1.0), s)) == 0.0
    assert float(DIFFUSIONS["flow_grpo"](RF, jnp.asarray(1.0), s)) == pytest.approx(9 / 8)
    # A grid for eps starts where a is next to nothing and not nothing: the same first step, not one a thousand times as wide.
    assert float(DIFFUSIONS["flow_grpo"](RF, jnp.asarray(0.999), s)) == pytest.approx(9 / 8, rel=2e-3)


def test_transition_reports_the_law_of_the_step():
    data = exact.gaussian([0.6], 0.25)
    x, t, s = jnp.asarray([[0.3]]), jnp.asarray(0.5), jnp.asarray(0.4)
    mean, std = transition(data.model(RF), x, t, s, "constant", 0.7)
    a, b, c = (v[0] for v in affine({"name": "euler_maruyama", "diffusion": "constant", "scale": 0.7}, data.model(RF), [t, s]))
    assert float(mean[0, 0]) == pytest.approx(0.3 * a + c)
    assert float(std) == pytest.approx(b) == pytest.approx(math.sqrt(2 * 0.7 * 0.1))


def test_scale_zero_is_euler_to_the_bit():
    data = exact.mix4()
    x = noise(RF, KEY, (4, 2), 1.0, jnp.float64)
    ode = sample(data.model(RF), x, KEY, grid(5, RF), "euler")
    sde = sample(data.model(RF), x, KEY, grid(5, RF), {"name": "euler_maruyama", "scale": 0.0})
    np.testing.assert_array_equal(ode, sde)


def test_anderson_drift():
    """With Dif = sbdm the drift is f x - g^2 score."""
    data, path = exact.gaussian([0.6], 0.25), PATHS["vp_linear"]()
    x, t = jnp.asarray([[0.3]]), jnp.asarray(0.5)
    mean, _ = transition(data.model(path), x, t, t - 1.0, "sbdm")
    drift = path.drift(t) * x - path.diffusion(t) * data.score(path, x, t)
    np.testing.assert_allclose(x - mean, drift, rtol=1e-10)


def test_last_step_of_the_sde():
    data = exact.gaussian([0.6], 0.25)
    times = [0.04, 0.0]
    ends = {}
    for last in ("mean", "euler", "denoise"):
        a, b, c = (v[0] for v in affine({"name": "euler_maruyama", "diffusion": "constant", "last": last}, data.model(RF), times))
        assert b == 0.0
        ends[last] = a * 0.3 + c
    x = jnp.asarray([[0.3]])
    assert ends["euler"] == pytest.approx(float((x - 0.04 * data.velocity(RF, x, 0.04))[0, 0]))
    assert ends["denoise"] == pytest.approx(float(data.x_mean(RF, x, 0.04)[0, 0]))
    assert ends["mean"] == pytest.approx(ends["euler"] + 0.04 * float(data.score(RF, x, 0.04)[0, 0]))
    # The clean end of this path is not zero: the step goes there, and not beyond.
    model, times = data.model(PATHS["vp_linear"]()), [3e-5, 1e-5]
    by_sde = sample(model, x, KEY, times, {"name": "euler_maruyama", "last": "euler"})
    np.testing.assert_allclose(by_sde - x, sample(model, x, KEY, times, "euler") - x, rtol=1e-9)


# Point-mass data: x_hat is exact, and so is the law after every step of a sampler that draws from the path's own posterior.


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_linear", "ve", "edm"])
@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "ancestral"},
        {"name": "ddim", "eta": 0.6},
        {"name": "ddim", "eta": 1.0},
        {"name": "ddim", "eta": 0.0},
        {"name": "renoise"},
        {"name": "dpmpp_2m_sde"},
    ],
    ids=str,
)
def test_exact_law_for_a_point_mass(sampler, path):
    path = PATHS[path]()
    times = path.time_of_sigma(jnp.asarray([30.0, 3.0, 1.0, 0.2]))
    a, b = (np.asarray(f(times)) for f in (path.a, path.b))
    steps = affine(sampler, exact.gaussian([0.7], 0.0).model(path, "x"), times)
    mean, variance = moments(steps, 0.7 * a[0], b[0] ** 2)
    np.testing.assert_allclose(mean, 0.7 * a[1:], rtol=1e-9)
    np.testing.assert_allclose(variance, b[1:] ** 2, rtol=1e-9)
    is_random = sampler.get("eta", 1.0) > 0
    assert (abs(steps[1]) > 1e-3).all() == is_random


def test_ancestral_variances():
    """alpha-bar .3 -> .6: transition variance .5, posterior variance 2/7 (DDPM's two choices)."""
    path = Path("ddpm", lambda t: jnp.sqrt(1 - t), lambda t: jnp.sqrt(t), lambda s: s**2 / (1 + s**2))
    model = exact.gaussian([0.7], 0.0).model(path, "x")
    small, large = (affine({"name": "ancestral", "variance": v}, model, [0.7, 0.4]) for v in ("small", "large"))
    assert small[1][0] ** 2 == pytest.approx(2 / 7)
    assert large[1][0] ** 2 == pytest.approx(0.5)
    assert small[0] == pytest.approx(large[0]) and small[2] == pytest.approx(large[2])
    half = affine({"name": "ddim", "eta": 0.5}, model, [0.7, 0.4])
    assert half[1][0] ** 2 == pytest.approx(0.25 * 2 / 7)


@pytest.mark.parametrize("name", ["ancestral", "euler_maruyama", "renoise", "dpmpp_2m_sde"])
@pytest.mark.parametrize("path", ["rectified", "ve", "vp_linear"])
def test_no_noise_on_the_last_step(name, path):
    path = PATHS[path]()
    sampler = {"name": name, "variance": "large"} if name == "ancestral" else name
    steps = affine(sampler, exact.gaussian([0.7], 0.25).model(path), [0.5, 0.3, path.t_min])
    assert abs(steps[1][0]) > 1e-3
    assert abs(steps[1][1]) < 1e-15  # what rounding leaves, not noise


@pytest.mark.parametrize("path", PATHS)
def test_ddim_with_eta_one_is_ancestral(path):
    path = PATHS[path]()
    data = exact.mix4()
    times = grid(5, path, t_start=0.98)
    x = noise(path, KEY, (4, 2), 0.98, jnp.float64)
    ends = [sample(data.model(path), x, KEY, times, s) for s in ("ancestral", {"name": "ddim", "eta": 1.0})]
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-9)
    assert not np.allclose(ends[0], sample(data.model(path), x, KEY, times, "ddim"))


def test_clipping_keeps_x_hat_in_range_and_z_hat_consistent():
    far = Model(lambda x_t, t, cond, key: jnp.asarray([[3.0, -5.0, 0.2]]), RF, "x")
    x = jnp.asarray([[0.4, 0.4, 0.4]])
    for name in ("ddim", "ancestral"):
        end = sample(far, x, KEY, [0.5, 0.0], {"name": name, "clip": 1.0})
        np.testing.assert_allclose(end, [[1.0, -1.0, 0.2]], atol=1e-12)
    # On the straight line from x_t through the clipped x_hat.
    halfway = sample(far, x, KEY, [0.5, 0.25], {"name": "ddim", "clip": 1.0})
    np.testing.assert_allclose(halfway, [[0.7, -0.3, 0.3]], atol=1e-12)


@pytest.mark.parametrize("name", ["ancestral", "dpmpp_2m_sde", "churn", "predictor_corrector", "euler_maruyama"])
def test_many_steps_give_the_data(name):
    """Mean and variance of mixture data, by Monte Carlo."""
    data = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])
    path = trigonometric()
    sampler = {"name": name, "diffusion": "sigma"} if name == "euler_maruyama" else name
    x = noise(path, KEY, (20000, 1), 1.0, jnp.float64)
    end = sample(data.model(path), x, jax.random.key(1), grid(100, path), sampler)
    assert float(end.mean()) == pytest.approx(float(data.mean()[0]), abs=0.03)
    assert float(end.var()) == pytest.approx(float(data.cov()[0, 0]), rel=0.04)
    skew = float(jnp.mean((end - end.mean()) ** 3))
    truth = sum(w * ((m - 0.26) ** 3 + 3 * (m - 0.26) * s**2) for w, m, s in ((0.3, -1.0, 0.3), (0.7, 0.8, 0.5)))
    assert skew == pytest.approx(truth, abs=0.06)


def test_second_order_sde_beats_its_first_order_start():
    """Variance of Gaussian data after N steps: DPM-Solver++(2M) SDE against ancestral sampling, which is its first order."""
    data = exact.gaussian([0.0], 0.25)
    times = 1 / (1 + np.exp(np.linspace(-math.log(19), math.log(19), 17)))
    x = math.sqrt(0.05**2 / 4 + 0.95**2) * jax.random.normal(KEY, (40000, 1))
    goal = 0.95**2 / 4 + 0.05**2
    errors = [abs(float(sample(data.model(RF), x, KEY, times, s).var()) - goal) for s in ("dpmpp_2m_sde", "ancestral")]
    assert errors[0] < 0.012 and errors[1] > 0.05


# Churn.


def test_churn_on_the_rectified_path():
    """t = .5 and gamma = sqrt 2 - 1: t_hat = .585786, noise .414214, x_hat = (.414214 / .5) x."""
    still = Model(lambda x_t, t, cond, key: jnp.zeros_like(x_t), RF, "velocity")
    steps = affine({"name": "churn", "churn": 40.0, "s_noise": 1.0}, still, [0.5, 0.25])
    np.testing.assert_allclose([v[0] for v in steps], [2 * (math.sqrt(2) - 1), math.sqrt(2) - 1, 0.0], atol=1e-9)
    clock = Model(lambda x_t, t, cond, key: jnp.ones_like(x_t), RF, "velocity")
    assert affine("churn", clock, [0.5, 0.25])[2][0] == pytest.approx(-(2 - math.sqrt(2) - 0.25))
    louder = affine({"name": "churn", "s_noise": 1.5}, still, [0.5, 0.25])
    assert louder[1][0] == pytest.approx(1.5 * (math.sqrt(2) - 1))


def test_churn_is_spread_over_the_steps():
    """gamma = S_churn / N: on the edm path sigma_hat = (1 + gamma) sigma and the noise sqrt(sigma_hat^2 - sigma^2)."""
    still = Model(lambda x_t, t, cond, key: jnp.zeros_like(x_t), edm(), "velocity")
    steps = affine({"name": "churn", "churn": 0.8}, still, [0.5, 0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(steps[0], 1.0)
    np.testing.assert_allclose(steps[1], 80 * np.asarray([0.5, 0.4, 0.3, 0.2]) * math.sqrt(1.2**2 - 1), rtol=1e-9)
    limited = affine({"name": "churn", "churn": 0.8, "s_min": 20.0, "s_max": 33.0}, still, [0.5, 0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(limited[1] / steps[1], [0, 1, 1, 0], atol=1e-9)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_linear"])
def test_churn_keeps_the_law_of_a_point_mass(path):
    path = PATHS[path]()
    times = path.time_of_sigma(jnp.asarray([1.1, 1.0]))
    a, b = (np.asarray(f(times)) for f in (path.a, path.b))
    steps = affine({"name": "churn", "churn": 0.1}, exact.gaussian([0.7], 0.0).model(path, "x"), times)
    mean, variance = moments(steps, 0.7 * a[0], b[0] ** 2)
    np.testing.assert_allclose(mean, 0.7 * a[1:], rtol=2e-3)
    np.testing.assert_allclose(variance, b[1:] ** 2, rtol=2e-3)  # the Heun step is not exact off the rectified path
    assert steps[1][0] > 0.1


def test_churn_never_leaves_the_path():
    still = Model(lambda x_t, t, cond, key: jnp.broadcast_to(t[:, None], x_t.shape), edm(), "velocity")
    sampler = SAMPLERS["churn"](churn=40.0)
    x, _ = sampler.step(still, jnp.zeros((1, 1)), jnp.asarray(1.0), jnp.asarray(0.5), KEY, jnp.asarray(0.4))
    assert float(x[0, 0]) == pytest.approx(-0.5 * 0.75)  # Heun from t = 1, no noise added


def test_no_churn_is_heun():
    data = exact.mix4()
    x = noise(RF, KEY, (4, 2), 1.0, jnp.float64)
    ends = [sample(data.model(RF), x, KEY, grid(5, RF), s) for s in ({"name": "churn", "churn": 0.0}, "heun")]
    np.testing.assert_allclose(*ends, atol=1e-12)


# Langevin.


def test_stationary_variance_of_langevin():
    """Unadjusted Langevin on N(0, V): V / (1 - eta / (2 V)) = .753846 for V = .7, eta = .1."""
    path, t = ve(), 0.5
    b = float(path.b(jnp.asarray(t)))
    model = exact.gaussian([0.0], 0.7 - b**2).model(path, "score")
    sampler = {"name": "annealed_langevin", "updates": 1, "step_size": 0.1 / b**2, "denoise": False}
    steps = affine(sampler, model, [t, t], draw=lambda key: jax.random.fold_in(key, 0))
    assert steps[0][0] == pytest.approx(1 - 0.1 / 0.7)
    assert steps[1][0] ** 2 == pytest.approx(0.2)
    variance = 1.0
    for _ in range(200):
        variance = steps[0][0] ** 2 * variance + steps[1][0] ** 2
    assert variance == pytest.approx(0.7 / (1 - 0.1 / 1.4), rel=1e-9)
    assert variance == pytest.approx(0.753846, abs=1e-6)


def test_langevin_step_size_follows_the_level():
    """eta = step_size b^2: NCSNv2's step_lr (sigma_i / sigma_L)^2."""
    flat = Model(lambda x_t, t, cond, key: jnp.ones_like(x_t), edm(), "score")
    one = {"name": "annealed_langevin", "updates": 1, "step_size": 0.05, "denoise": False}
    steps = affine(one, flat, [0.5, 0.25], draw=lambda key: jax.random.fold_in(key, 0))
    np.testing.assert_allclose([v[0] for v in steps], [1.0, math.sqrt(2 * 0.05) * 40, 0.05 * 1600], rtol=1e-9)


def test_langevin_repeats_its_updates_with_fresh_noise():
    flat = Model(lambda x_t, t, cond, key: jnp.ones_like(x_t), edm(), "score")
    sampler = {"name": "annealed_langevin", "updates": 3, "step_size": 0.01, "denoise": False}
    x = sample(flat, jnp.zeros((20000, 1)), KEY, [0.0125, 0.01], sampler)
    assert float(x.mean()) == pytest.approx(0.03, abs=0.005)
    assert float(x.var()) == pytest.approx(0.06, rel=0.04)


def test_langevin_rescales_and_denoises():
    quiet = {"name": "annealed_langevin", "updates": 1, "step_size": 0.0, "denoise": True}
    model = Model(lambda x_t, t, cond, key: jnp.full_like(x_t, 0.2), RF, "x")
    states = sample(model, jnp.ones((1, 1)), KEY, [0.5, 0.25, 0.0], quiet, return_trajectory=True)[1]
    np.testing.assert_allclose(states[:, 0, 0], [1.0, 1.5, 0.2], atol=1e-12)
    kept = sample(model, jnp.ones((1, 1)), KEY, [0.5, 0.25, 0.0], {**quiet, "denoise": False})
    np.testing.assert_allclose(kept, 2.0, atol=1e-12)
    from_noise = sample(model, jnp.ones((1, 1)), KEY, [1.0, 0.25], quiet)
    np.testing.assert_allclose(from_noise, 1.0, atol=1e-12)  # no signal to rescale


def test_annealed_langevin_samples_the_data():
    data, path = exact.gaussian([0.5], 0.25), ve(0.05, 10.0)
    x = noise(path, KEY, (4000, 1), 1.0, jnp.float64)
    times = np.repeat(np.linspace(1.0, 0.0, 21), 5)
    end = sample(data.model(path), x, KEY, times, {"name": "annealed_langevin", "step_size": 0.1})
    assert float(end.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(end.var()) == pytest.approx(0.25, rel=0.15)


def test_corrector_step_size():
    """For score = -z / b the drift is snr times the noise in norm: eta / b = snr sqrt(2 eta), so eta = 2 (snr b)^2."""
    flat = Model(lambda x_t, t, cond, key: jnp.ones_like(x_t), edm(), "score")
    settings = {"name": "predictor_corrector", "predictor": "euler", "snr": 0.2}  # a predictor from t to t moves nothing
    a, b, c = (v[0] for v in affine(settings, flat, [0.1, 0.1], draw=lambda key: jax.random.fold_in(key, 1)))
    assert a == pytest.approx(1.0)
    assert c / 8.0 == pytest.approx(0.2 * b)
    assert b**2 == pytest.approx(2 * c)


def test_corrector_repeats_with_fresh_noise():
    flat = Model(lambda x_t, t, cond, key: jnp.ones_like(x_t), edm(), "score")
    settings = {"name": "predictor_corrector", "predictor": "euler", "snr": 0.1, "corrector_updates": 3}
    x = sample(flat, jnp.zeros((20000, 1)), KEY, [0.0125, 0.0125], settings)
    assert float(x.mean()) == pytest.approx(0.06, abs=0.01)
    assert float(x.var()) == pytest.approx(0.12, rel=0.04)


@pytest.mark.parametrize("predictor", ["ancestral", "ddim", "euler"])
def test_predictor_without_corrector(predictor):
    data = exact.mix4()
    x = noise(RF, KEY, (4, 2), 1.0, jnp.float64)
    sampler = SAMPLERS["predictor_corrector"](predictor, corrector_updates=0)
    step = config.build(SAMPLERS, predictor, "sampler").step
    t, s = jnp.asarray(0.8), jnp.asarray(0.5)
    found, _ = sampler.step(data.model(RF), x, t, s, KEY, ())
    np.testing.assert_allclose(found, step(data.model(RF), x, t, s, jax.random.fold_in(KEY, 0), ())[0], atol=1e-12)


# Few-step.


def test_renoise_accepts_a_consistency_function():
    """x_hat is data for the exact map, so every level of a multistep run has the data's own law."""
    data = exact.gaussian([0.5], 0.25)
    model = Model(lambda x_t, t, cond, key: data.consistency(RF, x_t, t), RF, "x")
    steps = affine("renoise", model, [1.0, 0.6, 0.3, 0.0])
    mean, variance = moments(steps, 0.0, 1.0)
    np.testing.assert_allclose(mean, [0.5 * 0.4, 0.5 * 0.7, 0.5], atol=1e-9)
    np.testing.assert_allclose(variance, [0.4**2 / 4 + 0.36, 0.7**2 / 4 + 0.09, 0.25], atol=1e-9)


def test_published_defaults():
    """NCSNv2: step_lr 6.2e-6 at sigma_L = .01, 5 updates. Score SDE: snr .16. EDM on ImageNet-64: S_churn 40."""
    default = lambda name, setting: config.arguments(SAMPLERS[name])[setting].default
    assert default("annealed_langevin", "step_size") == pytest.approx(6.2e-6 / 0.01**2)
    assert default("annealed_langevin", "updates") == 5
    assert default("predictor_corrector", "snr") == 0.16
    assert default("predictor_corrector", "corrector_updates") == 1
    assert default("churn", "churn") == 40.0
    assert (default("churn", "s_min"), default("churn", "s_max"), default("churn", "s_noise")) == (0.0, math.inf, 1.0)
    assert default("euler_maruyama", "scale") == 1.0
