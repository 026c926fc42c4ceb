import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from flowjax import exact, paths, predictions
from flowjax.paths import PATHS
from flowjax.predictions import PREDICTIONS

pytestmark = pytest.mark.usefixtures("float64")

RECTIFIED = paths.rectified()


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]()


def random_mixture(seed=0, k=3, d=2):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(k, d, d)) * 0.5
    return exact.GaussianMixture(rng.uniform(0.2, 1, k), rng.normal(size=(k, d)), roots @ roots.swapaxes(1, 2) + 0.05 * np.eye(d))


def points(path, t, n=5, d=2, seed=1):
    # Where the marginal has mass: x_t of a standard normal x.
    x, z = np.random.default_rng(seed).normal(size=(2, n, d))
    return path.perturb(jnp.asarray(x), jnp.asarray(z), t)


LINE = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])


def test_spot_values_of_a_one_dimensional_mixture():
    x = jnp.asarray([[0.4]])
    want = {"x_mean": 0.5417398119, "x_cov": 0.6104965465, "velocity": -0.2362330199, "score": -0.5091779867}
    for name, value in want.items():
        np.testing.assert_allclose(getattr(LINE, name)(RECTIFIED, x, 0.6).item(), value, rtol=2e-9)
    np.testing.assert_allclose(LINE.responsibilities(RECTIFIED, x, 0.6)[0], [0.15963735, 0.84036265], rtol=1e-7)
    slope = jax.jacfwd(lambda x: LINE.x_mean(RECTIFIED, x, 0.6))(x).item()
    np.testing.assert_allclose(slope, 0.678329496, rtol=2e-9)


def test_density_against_scipy(path):
    data, t = random_mixture(), 0.4
    x_t, a, b = points(path, t), path.a(t), path.b(t)
    density = sum(
        w * scipy.stats.multivariate_normal(a * m, a**2 * c + b**2 * np.eye(2)).pdf(x_t)
        for w, m, c in zip(data.weights, data.means, data.covs)
    )
    np.testing.assert_allclose(data.log_prob(path, x_t, t), np.log(density), rtol=1e-11)


def test_score_is_the_gradient_of_the_density(path):
    data, x_t = random_mixture(), points(path, 0.6)
    gradient = jax.grad(lambda x: data.log_prob(path, x, 0.6).sum())(x_t)
    np.testing.assert_allclose(data.score(path, x_t, 0.6), gradient, rtol=1e-9, atol=1e-12)


def test_noise_mean_is_the_score(path):
    data, t = random_mixture(), jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    x_t = points(path, t)
    np.testing.assert_allclose(data.z_mean(path, x_t, t), -path.b(t)[:, None] * data.score(path, x_t, t), rtol=1e-12)
    # a E[x | x_t] + b E[z | x_t] = x_t
    np.testing.assert_allclose(path.perturb(data.x_mean(path, x_t, t), data.z_mean(path, x_t, t), t), x_t, rtol=1e-10)


def test_jacobians_are_posterior_covariances(path):
    data, t = random_mixture(), 0.45
    x_t, a, b, w = points(path, t), path.a(t), path.b(t), path.wronskian(t)
    cov = data.x_cov(path, x_t, t)
    of_x = jax.vmap(jax.jacfwd(lambda x: data.x_mean(path, x[None], t)[0]))(x_t)
    of_v = jax.vmap(jax.jacfwd(lambda x: data.velocity(path, x[None], t)[0]))(x_t)
    np.testing.assert_allclose(of_x, a / b**2 * cov, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_v, path.db(t) / b * np.eye(2) - w * a / b**3 * cov, rtol=1e-8, atol=1e-10)


def test_continuity_equation(path):
    # d/dt log p + div v + v . grad log p = 0, all by autodiff.
    data, t = random_mixture(), jnp.asarray(0.35)
    x_t = points(path, t)

    def residual(x):
        rate = jax.grad(lambda t: data.log_prob(path, x[None], t)[0])(t)
        divergence = jnp.trace(jax.jacfwd(lambda x: data.velocity(path, x[None], t)[0])(x))
        return rate, divergence + data.velocity(path, x[None], t)[0] @ data.score(path, x[None], t)[0]

    rate, transport = jax.vmap(residual)(x_t)
    assert np.abs(rate).max() > 0.1
    np.testing.assert_allclose(rate, -transport, rtol=1e-9)


def test_posterior_mean_by_importance_sampling():
    data, t = random_mixture(), 0.6
    x = data.sample(jax.random.key(0), 1_000_000)
    x_t = jnp.asarray([[0.3, -0.2], [-0.5, 0.4]])
    for i in range(2):
        weight = jax.nn.softmax(-jnp.sum((x_t[i] - (1 - t) * x) ** 2, axis=1) / (2 * t**2))
        mean = weight @ x
        np.testing.assert_allclose(data.x_mean(RECTIFIED, x_t, t)[i], mean, atol=4e-3)
        np.testing.assert_allclose(data.x_cov(RECTIFIED, x_t, t)[i], (x - mean).T @ (weight[:, None] * (x - mean)), atol=6e-3)


def test_samples_follow_the_data():
    data = random_mixture()
    x, label = data.sample_labelled(jax.random.key(3), 200_000)
    assert x.dtype == jnp.float32 and label.dtype == jnp.int32
    np.testing.assert_allclose(x.mean(0), data.mean(), atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), data.cov(), atol=0.02)
    np.testing.assert_allclose(np.bincount(label) / len(x), data.weights, atol=0.005)
    for k in range(3):
        np.testing.assert_allclose(x[label == k].mean(0), data.means[k], atol=0.015)
        np.testing.assert_allclose(np.cov(x[label == k].T), data.covs[k], atol=0.03)
    np.testing.assert_array_equal(data.sample(jax.random.key(3), 10), data.sample_labelled(jax.random.key(3), 10)[0])


def test_predictions_convert_into_each_other(path):
    data, t = random_mixture(), 0.3
    x_t = points(path, t)
    x, z, v = data.x_mean(path, x_t, t), data.z_mean(path, x_t, t), data.velocity(path, x_t, t)
    for prediction in PREDICTIONS:
        model = data.model(path, prediction)
        assert model.prediction == prediction and model.path is path and model.null is None
        x_hat, z_hat = model.x_and_z(x_t, t)
        np.testing.assert_allclose(x_hat, x, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(z_hat, z, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(model.get("velocity", x_t, t), v, rtol=1e-7)


def test_score_prediction_is_the_score(path):
    data, x_t = random_mixture(), points(path, 0.3)
    np.testing.assert_allclose(data.predict(path, "score", x_t, 0.3), data.score(path, x_t, 0.3), rtol=1e-12)


def test_conditional_model_selects_components():
    data, x_t = random_mixture(), points(RECTIFIED, 0.5, n=4)
    model = data.model(RECTIFIED, "x", conditional=True)
    got = model(x_t, 0.5, {"label": jnp.asarray([0, 1, 2, 3])})
    for k in range(3):
        alone = exact.gaussian(data.means[k], data.covs[k])
        np.testing.assert_allclose(got[k], alone.x_mean(RECTIFIED, x_t, 0.5)[k], rtol=1e-12)
    np.testing.assert_allclose(got[3], data.x_mean(RECTIFIED, x_t, 0.5)[3], rtol=1e-12)
    null = model.null({"label": jnp.asarray([0, 1], jnp.int32), "other": 1})
    np.testing.assert_array_equal(null["label"], [3, 3])
    assert null["other"] == 1 and null["label"].dtype == jnp.int32
    np.testing.assert_allclose(data.log_prob(RECTIFIED, x_t, 0.5, jnp.full(4, 3)), data.log_prob(RECTIFIED, x_t, 0.5), rtol=1e-13)


def test_labels_reach_every_method_and_have_gradients():
    data, label = random_mixture(), jnp.asarray([2, 0, 3])
    x_t = points(RECTIFIED, 0.5, n=3)
    gradient = jax.grad(lambda x: data.log_prob(RECTIFIED, x, 0.5, label).sum())(x_t)
    np.testing.assert_allclose(data.score(RECTIFIED, x_t, 0.5, label), gradient, rtol=1e-10)
    jacobian = jax.vmap(jax.jacfwd(lambda x, k: data.x_mean(RECTIFIED, x[None], 0.5, k[None])[0]))(x_t, label)
    np.testing.assert_allclose(data.x_cov(RECTIFIED, x_t, 0.5, label), jacobian * 0.5, rtol=1e-10)  # b^2 / a = 0.5


def test_one_time_per_sample_equals_one_call_per_sample(path):
    data, t = random_mixture(), jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    x_t = points(path, t)
    batched = data.velocity(path, x_t, t)
    for i in range(5):
        np.testing.assert_allclose(batched[i], data.velocity(path, x_t[i : i + 1], t[i])[0], rtol=1e-10)


def test_images_are_flattened_and_restored():
    data = exact.gaussian(np.arange(8) / 8, 0.3)
    x_t = jax.random.normal(jax.random.key(0), (3, 2, 2, 2))
    want = data.velocity(RECTIFIED, x_t.reshape(3, 8), 0.4).reshape(3, 2, 2, 2)
    np.testing.assert_allclose(data.model(RECTIFIED)(x_t, 0.4), want)
    assert data.flow_map(RECTIFIED, x_t, 0.4, 0.1).shape == x_t.shape


def test_float32_under_jit_is_close_to_float64(path):
    data = exact.mix4()
    x_t = points(path, 0.5)
    single = jax.jit(lambda x, t: data.velocity(path, x, t))(x_t.astype(jnp.float32), jnp.float32(0.5))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, data.velocity(path, x_t, 0.5), rtol=2e-4, atol=1e-4)


def test_point_mass():
    # A perfect denoiser of a single point answers with the point.
    data = exact.gaussian([0.5, -1.0], 0.0)
    x_t = points(RECTIFIED, 0.3)
    np.testing.assert_allclose(data.x_mean(RECTIFIED, x_t, 0.3), np.tile([0.5, -1.0], (5, 1)), rtol=1e-13)
    np.testing.assert_allclose(data.consistency(RECTIFIED, x_t, 0.3), np.tile([0.5, -1.0], (5, 1)), rtol=1e-13)
    np.testing.assert_allclose(data.x_cov(RECTIFIED, x_t, 0.3), 0.0, atol=1e-15)


def test_ends_of_the_rectified_path_are_finite():
    data, x = random_mixture(), points(RECTIFIED, 0.0)
    np.testing.assert_allclose(data.x_mean(RECTIFIED, x, 0.0), x, rtol=1e-10)
    np.testing.assert_allclose(data.velocity(RECTIFIED, x, 0.0), -x, rtol=1e-10)
    # At pure noise the answer is the mean of the data, whatever x_t is.
    np.testing.assert_allclose(data.x_mean(RECTIFIED, x, 1.0), np.tile(data.mean(), (5, 1)), rtol=1e-12)
    np.testing.assert_allclose(data.velocity(RECTIFIED, x, 1.0), x - data.mean(), rtol=1e-12)
    np.testing.assert_allclose(data.score(RECTIFIED, x, 1.0), -x, rtol=1e-12)


def test_gaussian_spot_values():
    data, x = exact.gaussian(0.3, 0.25), jnp.asarray([[0.8]])
    np.testing.assert_allclose(data.velocity(RECTIFIED, x, 0.7).item(), 0.56585366, rtol=1e-7)
    np.testing.assert_allclose(data.average_velocity(RECTIFIED, x, 0.7, 0.2).item(), 0.23293303, rtol=1e-7)
    v = data.velocity(RECTIFIED, x, 0.7)
    u, du = jax.jvp(lambda x, t: data.average_velocity(RECTIFIED, x, t, 0.2), (x, 0.7), (v, 1.0))
    np.testing.assert_allclose(du.item(), 0.66584125, rtol=1e-7)
    np.testing.assert_allclose(v - 0.5 * du, u, rtol=1e-10)  # MeanFlow identity
    np.testing.assert_allclose(data.average_velocity(RECTIFIED, x, jnp.asarray([0.7]), 0.7), v, rtol=1e-12)
    unit = exact.gaussian(0.0, 0.25)
    for r, value in ((0.0, 0.5), (0.5, 0.8819660)):
        np.testing.assert_allclose(unit.average_velocity(RECTIFIED, jnp.ones((1, 1)), 1.0, r).item(), value, atol=1e-7)
    assert unit.consistency(RECTIFIED, jnp.ones((1, 1)), 1.0).item() == pytest.approx(0.5, abs=1e-14)


FLOWS = {"gaussian": random_mixture(5, k=1), "line": LINE, "plane": random_mixture()}


@pytest.mark.parametrize("data", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("name", ["rectified", "vp_linear", "ve"])
def test_flow_map_solves_the_ode(name, data):
    path, t, s = PATHS[name](), 0.7, 0.4
    x_t = points(path, t, n=4, d=data.dim)
    move = jax.jit(lambda x, t, s: data.flow_map(path, x, t, s, steps=64))
    x_s, rate = jax.jvp(lambda s: move(x_t, t, s), (s,), (1.0,))
    np.testing.assert_allclose(rate, data.velocity(path, x_s, s), rtol=1e-4 if data.dim == 2 and len(data.weights) > 1 else 1e-9)
    np.testing.assert_allclose(move(x_s, s, t), x_t, rtol=1e-6)
    np.testing.assert_allclose(move(x_t, t, t), x_t, rtol=1e-12)
    # Along a trajectory log p changes by minus the integral of the divergence: the map pushes p_t onto p_s.
    jacobian = jax.vmap(jax.jacfwd(lambda x: move(x[None], t, s)[0]))(x_t)
    sign, change = np.linalg.slogdet(jacobian)
    assert (sign == 1).all()  # trajectories do not cross, nor turn over
    pushed = data.log_prob(path, x_t, t) - change
    np.testing.assert_allclose(data.log_prob(path, x_s, s), pushed, rtol=1e-6, atol=1e-6)


def test_quantile_map_spot_values():
    z = jnp.asarray([[-0.5], [0.3], [1.2]])
    want = [-0.27704747, 0.74242003, 1.28829670]
    np.testing.assert_allclose(LINE.consistency(RECTIFIED, z, 1.0)[:, 0], want, atol=1e-8)
    np.testing.assert_allclose(LINE._rk4_map(RECTIFIED, z, 1.0, 0.0, None, 512)[:, 0], want, atol=1e-8)


def test_quantile_map_in_float32():
    z = jnp.linspace(-2.0, 2.0, 7)[:, None]
    want = LINE.consistency(RECTIFIED, z, 1.0)
    np.testing.assert_allclose(LINE.consistency(RECTIFIED, z.astype(jnp.float32), jnp.float32(1.0)), want, atol=2e-6)


def test_average_velocity_has_gradients_where_its_interval_is_a_point():
    x, t = jnp.asarray([[0.8], [-0.3]]), jnp.asarray([0.7, 0.4])
    data = exact.gaussian(0.3, 0.25)
    want = jax.grad(lambda x: data.velocity(RECTIFIED, x, t).sum())(x)
    np.testing.assert_allclose(jax.grad(lambda x: data.average_velocity(RECTIFIED, x, t, t).sum())(x), want, rtol=1e-12)


def test_quantile_map_in_the_tails_and_gaps():
    z = jnp.linspace(-9.0, 9.0, 36)[:, None]  # without 0, where F = 1/2 on the whole gap
    gap = exact.mixture([0.5, 0.5], [-3.0, 3.0], 0.1)
    x = gap.consistency(RECTIFIED, z, 1.0)
    assert np.isfinite(x).all() and (np.diff(x[:, 0]) >= 0).all()
    np.testing.assert_allclose(x, -x[::-1], atol=1e-9)
    far = jnp.asarray([[-6.0], [-3.0], [-1.5], [1.0]])
    u = scipy.stats.norm.logcdf(far)[:, 0]
    x = gap.consistency(RECTIFIED, far, 1.0)[:, 0]
    u0 = np.logaddexp(scipy.stats.norm.logcdf(x, -3, 0.1), scipy.stats.norm.logcdf(x, 3, 0.1)) + np.log(0.5)
    np.testing.assert_allclose(u0, u, rtol=1e-9)


def test_flow_map_takes_labels_and_times_per_sample():
    data, x = LINE, jnp.asarray([[0.2], [0.4], [0.9]])
    t, s = jnp.asarray([0.9, 0.6, 0.3]), jnp.asarray([0.1, 0.2, 0.5])
    got = data.flow_map(RECTIFIED, x, t, s, jnp.asarray([0, 1, 2]))
    for i in range(2):
        alone = exact.gaussian(data.means[i], data.covs[i]).flow_map(RECTIFIED, x[i : i + 1], t[i], s[i])
        np.testing.assert_allclose(got[i], alone[0], rtol=1e-10)
    np.testing.assert_allclose(got[2], data.flow_map(RECTIFIED, x[2:], t[2], s[2])[0], rtol=1e-12)
    np.testing.assert_allclose(got, data._rk4_map(RECTIFIED, x, t, s, jnp.asarray([0, 1, 2]), 256), atol=1e-8)


@pytest.mark.parametrize("name", ["trigonometric", "edm", "vp_linear"])
def test_every_path_has_the_same_flow(name):
    # The same noise level on another path is the same point up to scale, and ends in the same sample.
    other, data, t = PATHS[name](), exact.mix4(), 0.8
    x_t = points(RECTIFIED, t)
    s = other.time_of_sigma(RECTIFIED.sigma(t))
    on_other = x_t * other.a(s) / RECTIFIED.a(t)
    np.testing.assert_allclose(data.x_mean(other, on_other, s), data.x_mean(RECTIFIED, x_t, t), rtol=1e-9)
    end = data.consistency(other, on_other, s)
    np.testing.assert_allclose(end, data.consistency(RECTIFIED, x_t, t), rtol=1e-7)
    # RK4 on the other path itself, in its own time.
    grid = np.linspace(float(s), 0.0 if name != "vp_linear" else 1e-5, 2001)

    def step(x, times):
        t, h = times[0], times[1] - times[0]
        k1 = data.velocity(other, x, t)
        k2 = data.velocity(other, x + h / 2 * k1, t + h / 2)
        k3 = data.velocity(other, x + h / 2 * k2, t + h / 2)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + data.velocity(other, x + h * k3, t + h)), None

    direct = jax.lax.scan(step, on_other, np.stack([grid[:-1], grid[1:]], 1))[0]
    np.testing.assert_allclose(direct, end, atol=1e-6 if name != "vp_linear" else 1e-4)


def test_irreducible_loss_of_a_gaussian():
    # RF, data N(mu, s^2 I_D): the integral over t is D s pi / 2.
    nodes, weights = np.polynomial.legendre.leggauss(64)
    for s, d in ((1.0, 3), (0.5, 2)):
        data = exact.gaussian(np.full(d, 0.7), s**2)
        losses = np.array([data.irreducible_loss(RECTIFIED, t) for t in (nodes + 1) / 2])
        np.testing.assert_allclose(losses @ weights / 2, d * s * np.pi / 2, rtol=1e-9)


def test_irreducible_loss_of_mix4():
    # 2.770465 by quadrature over x_t and t in NumPy and SciPy alone.
    nodes, weights = np.polynomial.legendre.leggauss(12)
    losses = [exact.mix4().irreducible_loss(RECTIFIED, t, key=jax.random.key(0), n=20000) for t in (nodes + 1) / 2]
    np.testing.assert_allclose(np.array(losses) @ weights / 2, 2.770465, rtol=5e-3)
    with pytest.raises(ValueError, match="key"):
        exact.mix4().irreducible_loss(RECTIFIED, 0.5)


def test_irreducible_loss_is_attained(path):
    data, t = exact.gaussian([0.2, -0.4], [[0.5, 0.2], [0.2, 0.3]]), 0.4
    x_key, z_key = jax.random.split(jax.random.key(1))
    x, z = data.sample(x_key, 20_000, jnp.float64), jax.random.normal(z_key, (20_000, 2))
    x_t = path.perturb(x, z, t)
    for prediction in PREDICTIONS:
        error = predictions.target(path, prediction, x, z, t) - data.predict(path, prediction, x_t, t)
        np.testing.assert_allclose((error**2).sum(1).mean(), data.irreducible_loss(path, t, prediction), rtol=0.04)


def test_straightness():
    for s, d in ((0.5, 2), (1.0, 3), (0.3, 1)):
        got = exact.gaussian(np.full(d, 0.4), s**2).straightness(RECTIFIED)
        np.testing.assert_allclose(got, d * s * (2 - np.pi / 2), rtol=1e-9)
    with pytest.raises(ValueError, match="4"):
        exact.mix4().straightness(RECTIFIED)


def test_straightness_by_simulation():
    path, data = paths.trigonometric(), exact.gaussian([0.8], 0.25)
    x_1 = jax.random.normal(jax.random.key(0), (4000, 1))
    chord = x_1 - data.consistency(path, x_1, 1.0)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    total = 0.0
    for t, w in zip((nodes + 1) / 2, weights / 2):
        total += w * np.mean((chord - data.velocity(path, data.flow_map(path, x_1, 1.0, t), t)) ** 2)
    np.testing.assert_allclose(data.straightness(path), total, rtol=0.03)


def test_wasserstein():
    s1, s2 = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.2], [-0.2, 3]])
    got = exact.wasserstein2_squared((1, 0), s1, (0, 2), s2)
    np.testing.assert_allclose(got, 5.8838173, atol=1e-7)
    np.testing.assert_allclose(got, 5 + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real), rtol=1e-12)
    assert exact.wasserstein2_squared((1, 0), s1, (1, 0), s1) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(exact.wasserstein2_squared([0.0], [[4.0]], [3.0], [[1.0]]), 10.0, rtol=1e-13)
    # On two axes at right angles: nothing of one is near anything of the other.
    assert exact.wasserstein2_squared((0, 0), np.diag([1.0, 0.0]), (0, 0), np.diag([0.0, 1.0])) == pytest.approx(2.0, abs=1e-12)


def test_mix4():
    data = exact.mix4()
    assert sorted(map(tuple, data.means)) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    np.testing.assert_allclose(data.covs, np.tile(np.eye(2) / 16, (4, 1, 1)))
    np.testing.assert_allclose(data.weights, 0.25)
    np.testing.assert_allclose(data.cov(), np.eye(2) * (1 + 1 / 16))
    assert data.num_components == 4 and data.dim == 2


def test_constructors():
    assert exact.gaussian(0.3, 0.25).covs.shape == (1, 1, 1)
    np.testing.assert_allclose(exact.gaussian([0, 0], [1, 4]).covs[0], np.diag([1, 4]))
    np.testing.assert_allclose(exact.mixture([1, 3], [0, 1], 0.5).weights, [0.25, 0.75])
    np.testing.assert_allclose(exact.mixture([1, 3], [0, 1], [0.5, 2]).covs.ravel(), [0.25, 4])


@pytest.mark.parametrize(
    "weights, means, covs, words",
    [
        ([1, 1], [[0.0]], [[[1.0]]], "shapes|weights"),
        ([1], [[0.0, 0.0]], [[[1.0]]], "covs"),
        ([-1], [[0.0]], [[[1.0]]], "non-negative"),
        ([0], [[0.0]], [[[1.0]]], "zero"),
        ([1], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
        ([1], [[0.0]], [[[-1.0]]], "semi-definite"),
    ],
)
def test_impossible_mixtures_are_refused(weights, means, covs, words):
    with pytest.raises(ValueError, match=words):
        exact.GaussianMixture(weights, means, covs)
