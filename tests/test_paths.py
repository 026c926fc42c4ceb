import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import paths
from flowjax.paths import PATHS

pytestmark = pytest.mark.usefixtures("float64")

INSIDE = np.linspace(0.03, 0.97, 13)


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]()


def difference(f, t, h=1e-5):
    # Fourth-order central difference.
    return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)


def test_the_table_names_its_paths():
    assert set(PATHS) == {"rectified", "trigonometric", "vp_linear", "vp_cosine", "ve", "edm"}
    for name, make in PATHS.items():
        assert make().name == name


def test_derivatives_against_differences(path):
    np.testing.assert_allclose(path.da(INSIDE), difference(path.a, INSIDE), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(path.db(INSIDE), difference(path.b, INSIDE), rtol=1e-8)
    np.testing.assert_allclose(path.dlog_snr(INSIDE), difference(path.log_snr, INSIDE), rtol=1e-7)


def test_noise_level_and_signal_to_noise(path):
    a, b = path.a(INSIDE), path.b(INSIDE)
    np.testing.assert_allclose(path.sigma(INSIDE) * a, b, rtol=1e-13)
    np.testing.assert_allclose(path.snr(INSIDE) * path.sigma(INSIDE) ** 2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.exp(path.log_snr(INSIDE)), path.snr(INSIDE), rtol=1e-12)
    assert (np.diff(path.log_snr(INSIDE)) < 0).all()
    assert (path.wronskian(INSIDE) > 0).all()


def test_wronskian_is_the_speed_of_sigma(path):
    np.testing.assert_allclose(path.wronskian(INSIDE), path.a(INSIDE) ** 2 * difference(path.sigma, INSIDE), rtol=1e-7)


def test_forward_sde_has_the_moments_of_the_path(path):
    # dx = f x dt + g dW: mean' = f mean and variance' = 2 f variance + g^2.
    f, g2, b2 = path.drift(INSIDE), path.diffusion(INSIDE), path.b(INSIDE) ** 2
    np.testing.assert_allclose(difference(path.a, INSIDE), f * path.a(INSIDE), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(difference(lambda t: path.b(t) ** 2, INSIDE), 2 * f * b2 + g2, rtol=1e-6)


def test_time_of_sigma_inverts_sigma(path):
    t = np.append(np.geomspace(1e-5, 0.1, 9), INSIDE)
    np.testing.assert_allclose(path.time_of_sigma(path.sigma(t)), t, rtol=1e-9)


def test_bounds_are_finite_and_ordered(path):
    assert 0.0 <= path.t_min < path.t_max == 1.0
    for t in (path.t_min, path.t_max):
        assert all(np.isfinite(f(jnp.asarray(t))) for f in (path.a, path.b, path.da, path.db))
    assert path.t_min == (1e-5 if path.name in ("vp_linear", "vp_cosine") else 0.0)


def test_rectified():
    path = paths.rectified()
    np.testing.assert_allclose([path.a(0.25), path.b(0.25), path.da(0.25), path.db(0.25)], [0.75, 0.25, -1, 1], rtol=1e-15)
    np.testing.assert_allclose(path.wronskian(INSIDE), 1.0, rtol=1e-14)
    np.testing.assert_allclose(path.dlog_snr(INSIDE), -2 / (INSIDE * (1 - INSIDE)), rtol=1e-12)
    np.testing.assert_allclose(path.diffusion(INSIDE), 2 * INSIDE / (1 - INSIDE), rtol=1e-12)
    np.testing.assert_allclose(path.snr(0.25), 9.0, rtol=1e-14)


def test_trigonometric():
    path = paths.trigonometric()
    np.testing.assert_allclose([path.a(1 / 3), path.b(1 / 3)], [np.sqrt(0.75), 0.5], rtol=1e-14)
    np.testing.assert_allclose(path.wronskian(INSIDE), np.pi / 2, rtol=1e-13)
    np.testing.assert_allclose(path.diffusion(INSIDE), np.pi * np.tan(np.pi * INSIDE / 2), rtol=1e-12)
    # TrigFlow with data of std 0.5 starts EDM's sigma = 80 at the angle 1.564546 and has sigma .98238 at the angle 1.1.
    trigflow = paths.trigonometric(sigma_data=0.5)
    np.testing.assert_allclose(trigflow.time_of_sigma(80.0) * np.pi / 2, 1.564546, atol=1e-6)
    np.testing.assert_allclose(trigflow.sigma(1.1 / (np.pi / 2)), 0.98238, atol=1e-5)


def test_vp_linear():
    path = paths.vp_linear()
    # Published schedule, values derived in float64 outside of this repository.
    np.testing.assert_allclose([path.a(1.0), path.sigma(1.0)], [6.5716e-3, 152.17], rtol=5e-5)
    np.testing.assert_allclose([path.sigma(1e-3), path.sigma(1e-5)], [0.010486, 0.0010005], rtol=5e-5)
    np.testing.assert_allclose(path.a(INSIDE) ** 2 + path.b(INSIDE) ** 2, 1.0, rtol=1e-14)
    np.testing.assert_allclose(path.diffusion(INSIDE), 0.1 + INSIDE * 19.9, rtol=1e-10)  # g^2 = beta(t)
    np.testing.assert_allclose(path.drift(INSIDE), -(0.1 + INSIDE * 19.9) / 2, rtol=1e-12)
    np.testing.assert_allclose(paths.vp_linear(1.0, 3.0).diffusion(INSIDE), 1.0 + INSIDE * 2, rtol=1e-10)


def test_vp_cosine_is_the_product_of_the_discrete_betas():
    # Improved DDPM (2102.09672): alphabar_i is a product of 1 - beta_i over 1000 steps, and index i is our time (i + 1)/1000.
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    alphabar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    path = paths.vp_cosine()
    np.testing.assert_allclose(alphabar[0], 0.9999587, atol=5e-8)
    np.testing.assert_allclose(path.a(u[1:-1]) ** 2, alphabar[:-1], rtol=1e-9)
    np.testing.assert_allclose(path.a(INSIDE) ** 2 + path.b(INSIDE) ** 2, 1.0, rtol=1e-13)
    assert path.a(0.0) == 1.0 and path.b(0.0) == 0.0


def test_ve():
    path = paths.ve()
    np.testing.assert_allclose([path.b(0.0), path.b(0.5), path.b(1.0)], [0.01, np.sqrt(0.5), 50.0], rtol=1e-12)
    np.testing.assert_allclose(path.a(INSIDE), 1.0)
    np.testing.assert_allclose(path.diffusion(INSIDE), 2 * path.b(INSIDE) ** 2 * np.log(5000), rtol=1e-11)
    np.testing.assert_allclose(paths.ve(0.02, 100.0).b(np.array([0.0, 1.0])), [0.02, 100.0], rtol=1e-12)


def test_edm():
    path = paths.edm()
    np.testing.assert_allclose(path.sigma(INSIDE), 80 * INSIDE, rtol=1e-14)
    np.testing.assert_allclose(path.a(INSIDE), 1.0)
    np.testing.assert_allclose(paths.edm(sigma_max=10.0).time_of_sigma(2.0), 0.2, rtol=1e-14)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine"])
def test_noise_level_keeps_its_digits_in_float32(name):
    path, t = PATHS[name](), np.geomspace(1e-5, 1e-2, 20)
    exact = path.b(jnp.asarray(t))
    np.testing.assert_allclose(path.b(jnp.asarray(t, jnp.float32)), exact, rtol=1e-5)


def test_float32_stays_float32(path):
    t = jnp.asarray(INSIDE, jnp.float32)
    for f in (path.a, path.b, path.da, path.db, path.sigma, path.time_of_sigma, path.diffusion):
        assert f(t).dtype == jnp.float32


def test_derivatives_take_python_numbers(path):
    assert np.shape(path.da(0.5)) == () and np.shape(path.wronskian(jnp.asarray(0.5))) == ()


def test_perturb_broadcasts_one_time_per_sample(path):
    x, z = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    t = jnp.asarray([0.2, 0.5, 0.9])
    x_t = path.perturb(x, z, t)
    for i in range(3):
        np.testing.assert_allclose(x_t[i], path.a(t[i]) * x[i] + path.b(t[i]) * z[i], rtol=1e-13)
        np.testing.assert_allclose(path.perturb(x, z, t[i])[i], x_t[i], rtol=1e-13)


def test_expand():
    x = jnp.zeros((3, 2, 2))
    assert paths.expand(0.5, x).shape == ()
    assert paths.expand(jnp.ones(3), x).shape == (3, 1, 1)


def test_posterior_is_that_of_a_markov_chain(path):
    """x_s and x_t given x are jointly Gaussian with covariance (a_t / a_s) b_s^2: conditioning says the rest."""
    t, s = jnp.asarray([0.9, 0.5]), jnp.asarray([0.3, 0.45])
    x_t, x = jnp.asarray([[0.7], [-1.2]]), jnp.asarray([[0.4], [2.0]])
    (a_t, b_t), (a_s, b_s) = ((path.a(v)[:, None], path.b(v)[:, None]) for v in (t, s))
    covariance = a_t / a_s * b_s**2
    np.testing.assert_allclose(path.posterior_mean(x_t, x, t, s), a_s * x + covariance / b_t**2 * (x_t - a_t * x), rtol=1e-9)
    np.testing.assert_allclose(path.posterior_variance(t, s)[:, None], b_s**2 - covariance**2 / b_t**2, rtol=1e-9)
