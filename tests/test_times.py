import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from flowjax import paths, times
from flowjax.config import ConfigError
from flowjax.paths import PATHS

RECTIFIED = paths.rectified()
KEY = jax.random.key(0)


def logit(t):
    return scipy.special.logit(np.asarray(t, np.float64))


def assert_follows(samples, cdf):
    assert scipy.stats.kstest(np.asarray(samples, np.float64), cdf).pvalue > 0.01


def mode_cdf(scale):
    # The paper's decreasing form t(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), inverted by interpolation.
    u = np.linspace(1, 0, 20001)
    t = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    return lambda x: np.interp(x, t, 1 - u)


def cosmap_cdf(x):
    grid = np.linspace(0, 1, 4001)
    density = 2 / (np.pi - 2 * np.pi * grid + 2 * np.pi * grid**2)  # SD3 eq. 21
    return np.interp(x, grid, scipy.integrate.cumulative_simpson(density, x=grid, initial=0))


CDFS = {
    "uniform": ({}, lambda t: t),
    "logit_normal": ({"mean": 0.5, "std": 0.6}, lambda t: scipy.stats.norm.cdf(logit(t), 0.5, 0.6)),
    "mode": ({"scale": 1.29}, mode_cdf(1.29)),
    "cosmap": ({}, cosmap_cdf),
    "edm_lognormal": ({"p_mean": -0.4, "p_std": 1.0}, lambda t: scipy.stats.norm.cdf(logit(t), -0.4, 1.0)),
}
DEFAULTS = {
    "logit_normal": lambda t: scipy.stats.norm.cdf(logit(t)),
    "mode": mode_cdf(1.29),
    "edm_lognormal": lambda t: scipy.stats.norm.cdf(logit(t), -1.2, 1.2),
}


def test_every_law_is_tested():
    assert set(CDFS) | {"steps"} == set(times.LAWS)


@pytest.mark.parametrize("count", [1, 4])
def test_law_of_steps(count):
    """Each of the times at which an equal number of steps begins, equally often; the clean end never."""
    t = np.asarray(times.draw(KEY, 64, RECTIFIED, "steps", stratified=True, count=count))
    np.testing.assert_array_equal(np.sort(t), np.repeat(np.arange(1, count + 1) / count, 64 // count).astype(np.float32))
    np.testing.assert_allclose(times.cdf([0.1, 0.99], RECTIFIED, "steps", count=4), [0, 0.75], atol=1e-6)
    with pytest.raises(ConfigError, match="times.count"):
        times.draw(KEY, 4, RECTIFIED, "steps", count=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("name", CDFS)
def test_laws(name, stratified, shift):
    settings, cdf = CDFS[name]
    t = times.draw(KEY, 4000, RECTIFIED, name, shift, stratified, **settings)
    assert t.shape == (4000,) and t.dtype == jnp.float32
    unshifted = np.asarray(t, np.float64) / (shift - (shift - 1) * np.asarray(t, np.float64))
    assert_follows(unshifted, cdf)


@pytest.mark.parametrize("name", sorted(CDFS))
def test_cdf_is_the_published_one_where_it_rises_and_flat_elsewhere(name):
    settings, published = CDFS[name]
    t = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(times.cdf(t, RECTIFIED, name, **settings), published(t), atol=1e-6)
    # A shift moves the law along: P(shifted time <= shifted t) = P(time <= t).
    shifted = 3 * t / (1 + 2 * t)
    np.testing.assert_allclose(times.cdf(shifted, RECTIFIED, name, shift=3.0, **settings), published(t), atol=1e-6)
    inside = times.cdf([0.0, 0.19, 0.2, 0.6, 0.61, 1.0], RECTIFIED, "uniform", t_min=0.2, t_max=0.6)
    np.testing.assert_allclose(inside, [0, 0, 0, 1, 1, 1], atol=1e-6)


def test_levels_of_noise_stay_where_they_are_within_bounds():
    """EDM's law is one of noise levels: bounds cut it off, while the others are squeezed between them."""
    t = np.array([0.35, 0.5, 0.7, 0.85])
    bounded = times.cdf(t, RECTIFIED, "edm_lognormal", t_min=0.3, t_max=0.9)
    np.testing.assert_allclose(bounded, DEFAULTS["edm_lognormal"](t), atol=1e-6)
    squeezed = times.cdf(t, RECTIFIED, "logit_normal", t_min=0.3, t_max=0.9)
    np.testing.assert_allclose(squeezed, DEFAULTS["logit_normal"]((t - 0.3) / 0.6), atol=1e-6)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_settings(name):
    assert_follows(times.draw(KEY, 4000, RECTIFIED, name), DEFAULTS[name])


def test_draw_is_uniform_by_default():
    assert_follows(times.draw(KEY, 4000, RECTIFIED), lambda t: t)


def test_shifted_logit_normal_is_logit_normal():
    # logit t ~ N(m + log s, q^2)
    t = times.draw(KEY, 4000, RECTIFIED, "logit_normal", 3.0, mean=-0.2, std=1.0)
    assert_follows(logit(t), scipy.stats.norm(-0.2 + np.log(3), 1.0).cdf)


def test_a_larger_mean_is_noisier():
    means = [float(times.draw(KEY, 1000, RECTIFIED, "logit_normal", mean=m).mean()) for m in (-1.0, 0.0, 1.0)]
    assert means[0] < 0.35 < means[1] < 0.65 < means[2]


def test_points_of_the_laws():
    u = jnp.asarray([0.25, 0.5, 0.7])
    np.testing.assert_allclose(times.mode(u, 1.29)[2], 0.5789, atol=5e-5)  # u = .3 in the paper's direction
    np.testing.assert_allclose(times.cosmap(u)[0], 0.292893, atol=1e-6)
    np.testing.assert_allclose(times.logit_normal(u, 0.3, 2.0)[1], scipy.special.expit(0.3), rtol=1e-6)
    for scale in (-1.0, 1.751938):
        assert (np.diff(times.mode(jnp.linspace(0, 1, 101), scale)) > -1e-6).all()


@pytest.mark.parametrize("name", CDFS)
def test_laws_increase_from_zero_to_one(name):
    extra = {"path": RECTIFIED, "bounds": (0.0, 1.0)} if name == "edm_lognormal" else {}
    t = np.asarray(times.LAWS[name](jnp.linspace(1e-6, 1 - 1e-6, 201), **extra))
    assert (np.diff(t) > 0).all() and 0 <= t[0] < 0.02 and 0.98 < t[-1] <= 1


@pytest.mark.parametrize("name", ["trigonometric", "vp_linear", "vp_cosine", "edm"])
def test_edm_lognormal_is_lognormal_in_sigma_on_every_path(name):
    path = PATHS[name]()
    t = times.draw(KEY, 4000, path, "edm_lognormal")
    assert_follows(np.log(path.sigma(t)), scipy.stats.norm(-1.2, 1.2).cdf)


def test_edm_lognormal_is_clipped_to_the_interval():
    t = times.draw(KEY, 1000, RECTIFIED, "edm_lognormal", t_min=0.2, t_max=0.3)
    assert np.float32(0.2) <= t.min() < 0.2001 and 0.2999 < t.max() <= np.float32(0.3)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_one_time_in_each_stratum(n):
    t = np.sort(np.asarray(times.draw(jax.random.key(n), n, RECTIFIED, stratified=True), np.float64))
    np.testing.assert_allclose(np.diff(t), 1 / n, atol=1e-6)
    assert t[0] < 1 / n and t.min() > 0 and t.max() < 1


@pytest.mark.parametrize("n", [1, 4])
def test_each_stratified_time_is_uniform_and_unordered(n):
    t = jax.vmap(lambda key: times.draw(key, n, RECTIFIED, stratified=True))(jax.random.split(KEY, 3000))
    for i in range(n):
        assert_follows(t[:, i], lambda t: t)
    if n > 1:  # neighbours in the batch are not neighbours in time
        steps = np.round(np.diff(np.asarray(t), axis=1) * n) % n
        assert set(np.unique(steps)) == {1.0, 2.0, 3.0}


def test_draw_fills_the_interval():
    assert_follows(times.draw(KEY, 4000, RECTIFIED, t_min=0.2, t_max=0.7), scipy.stats.uniform(0.2, 0.5).cdf)


def test_draw_respects_the_prediction():
    # A law with all its mass at one end lands on the bound.
    for mean, bound in ((30.0, 0.999), (-30.0, 0.001)):
        t = times.draw(KEY, 4, RECTIFIED, "logit_normal", mean=mean, std=0.1, prediction="score")
        np.testing.assert_allclose(t, bound, atol=2e-6)
    np.testing.assert_allclose(times.draw(KEY, 4, RECTIFIED, "logit_normal", mean=30.0, std=0.1), 1.0)


def test_draw_traces():
    def draw(key):
        return times.draw(key, 8, paths.vp_cosine(), "edm_lognormal", 2.0, True, prediction="eps")

    np.testing.assert_allclose(jax.jit(draw)(KEY), draw(KEY), rtol=1e-4)


# 0.001 / 1.001 and 0.999 are sigma = 1e-3 and 1e3 on the rectified path.
INTERVALS = {
    ("rectified", "velocity"): (0, 1),
    ("rectified", "v"): (0, 1),
    ("rectified", "edm"): (0, 1),
    ("rectified", "eps"): (0, 1000 / 1001),
    ("rectified", "x"): (1 / 1001, 1),
    ("rectified", "score"): (1 / 1001, 1000 / 1001),
    ("trigonometric", "eps"): (0, np.arctan(1e3) * 2 / np.pi),
    ("trigonometric", "velocity"): (0, 1),
    ("vp_linear", "eps"): (1e-5, 1),
    ("vp_linear", "score"): (1e-5, 1),
    ("vp_cosine", "velocity"): (1e-5, 1),
    ("vp_cosine", "x"): (1e-5, 1),
    ("ve", "score"): (0, 1),
    ("ve", "x"): (0, 1),
    ("edm", "eps"): (0, 1),
    ("edm", "x"): (1e-3 / 80, 1),
}


@pytest.mark.parametrize("path, prediction", INTERVALS)
def test_intervals(path, prediction):
    np.testing.assert_allclose(times.interval(PATHS[path](), prediction), INTERVALS[path, prediction], rtol=1e-12)


def test_shift():
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(times.shift(times.shift(t, 2.0), 1.5), times.shift(t, 3.0), atol=1e-15)
    np.testing.assert_allclose(times.shift(times.shift(t, 2.5), 1 / 2.5), t, atol=1e-15)
    shifted = times.shift(t[1:-1], 3.0)
    np.testing.assert_allclose(shifted / (1 - shifted), 3 * t[1:-1] / (1 - t[1:-1]), rtol=1e-13)
    assert (shifted > t[1:-1]).all() and times.shift(0.0, 3.0) == 0 and times.shift(1.0, 3.0) == 1
    # FLUX writes e^mu / (e^mu + 1/t - 1).
    mu = 0.63
    np.testing.assert_allclose(times.shift(t[1:], np.exp(mu)), np.exp(mu) / (np.exp(mu) + 1 / t[1:] - 1), rtol=1e-14)


def test_resolution_shift_keeps_the_uncertainty():
    # std of the estimate of a constant image: t / ((1 - t) sqrt(pixels)).
    s = times.resolution_shift(1024**2, 256**2)
    assert s == pytest.approx(4.0)
    t = 0.37
    shifted = times.shift(t, s)
    assert shifted / (1 - shifted) / 1024 == pytest.approx(t / (1 - t) / 256)


FLUX = [(64, 0.5, 1.6487), (256, 0.5, 1.6487), (1024, 0.63, 1.8776), (4096, 1.15, 3.1582), (16384, 1.15, 3.1582)]


@pytest.mark.parametrize("tokens, mu, s", FLUX)
def test_flux_mu(tokens, mu, s):
    assert times.flux_mu(tokens) == pytest.approx(mu, abs=1e-9)
    assert np.exp(times.flux_mu(tokens)) == pytest.approx(s, abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", times.GRIDS)
@pytest.mark.parametrize("path", PATHS)
def test_grids_decrease_from_start_to_end(path, name, shift, n):
    path = PATHS[path]()
    t = times.grid(n, path, name, shift)
    assert isinstance(t, np.ndarray) and t.dtype == np.float64 and t.shape == (n + 1,)
    assert t[0] == 1.0 and t[-1] == path.t_min and (np.diff(t) < 0).all()
    part = times.grid(n, path, name, shift, t_start=0.8, t_end=0.3)
    assert part[0] == 0.8 and part[-1] == 0.3 and (np.diff(part) < 0).all() and len(part) == n + 1


def test_the_shift_is_applied_once():
    np.testing.assert_allclose(times.grid(4, RECTIFIED, shift=3.0), [1, 0.9, 0.75, 0.5, 0], rtol=1e-15)
    np.testing.assert_allclose(times.grid(4, RECTIFIED), [1, 0.75, 0.5, 0.25, 0], rtol=1e-15)


def test_karras_grid_is_edm():
    sigmas = 80 * times.grid(18, paths.edm(), "karras")
    np.testing.assert_allclose(sigmas[[0, 1, 2, 16, 17, 18]], [80, 57.586, 40.786, 0.00753, 0.002, 0], rtol=4e-4, atol=1e-12)
    i = np.arange(18)
    np.testing.assert_allclose(sigmas[:-1] ** (1 / 7), 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7)), rtol=1e-10)
    few = 80 * times.grid(3, paths.edm(), "karras", rho=1.0, sigma_min=20.0, sigma_max=60.0)
    np.testing.assert_allclose(few, [80, 40, 20, 0], atol=1e-10)  # the first node is the start of the path


def test_sigma_grids_carry_over_between_paths():
    # The same noise levels on every path; on the rectified path 80 stands for pure noise.
    on_edm = paths.edm().sigma(times.grid(8, paths.edm(), "karras"))
    on_line = RECTIFIED.sigma(times.grid(8, RECTIFIED, "karras")[1:])
    np.testing.assert_allclose(on_line, on_edm[1:], rtol=1e-5)


def test_log_snr_grid():
    path = paths.rectified()
    t = times.grid(8, path, "log_snr", t_start=0.95, t_end=0.05)
    np.testing.assert_allclose(np.diff(logit(t)), -2 * logit(0.95) / 8, rtol=1e-9)
    full = times.grid(5, path, "log_snr", sigma_min=0.01, sigma_max=100.0)
    np.testing.assert_allclose(logit(full[1:-1]), np.log([10, 1, 0.1, 0.01]), atol=1e-9)
    # ve ends at sigma = 0.01 > sigma_min, so that its grid is geometric to the end; vp_linear begins at its own 152.
    np.testing.assert_allclose(times.grid(4, paths.ve(), "log_snr"), [1, 0.75, 0.5, 0.25, 0], atol=1e-12)
    vp = paths.vp_linear()
    np.testing.assert_allclose(vp.sigma(times.grid(3, vp, "log_snr"))[1], np.sqrt(152.17 * 0.002), rtol=1e-4)


def test_cosine_grid_has_equal_angles():
    t = times.grid(6, RECTIFIED, "cosine")
    np.testing.assert_allclose(np.diff(np.arctan2(t, 1 - t)), -np.pi / 12, rtol=1e-12)


def test_grids_start_where_the_prediction_can():
    assert times.grid(4, RECTIFIED, prediction="eps")[0] == times.interval(RECTIFIED, "eps")[1] < 1
    assert times.grid(4, RECTIFIED, prediction="x")[0] == 1 and times.grid(4, RECTIFIED, prediction="x")[-1] == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: times.draw(KEY, 2, RECTIFIED, "lognormal"), "times.name = 'lognormal'.*logit_normal"),
        (lambda: times.draw(KEY, 2, RECTIFIED, "logit_normal", men=1.0), "times.men.*mean, std"),
        (lambda: times.draw(KEY, 2, RECTIFIED, "mode", scale=2.0), "times.scale = 2.0.*1.751938"),
        (lambda: times.draw(KEY, 2, RECTIFIED, "mode", scale=-1.1), "times.scale"),
        (lambda: times.draw(KEY, 2, RECTIFIED, shift=0.0), "times.shift"),
        (lambda: times.draw(KEY, 2, RECTIFIED, t_min=0.5, t_max=0.5), "t_min, t_max = 0.5, 0.5"),
        (lambda: times.draw(KEY, 2, RECTIFIED, t_min=-0.1), "0 <= t_min < t_max <= 1"),
        (lambda: times.draw(KEY, 2, RECTIFIED, t_max=1.1), "t_max"),
        (lambda: times.draw(KEY, 2, RECTIFIED, "edm_lognormal", path=1), "path"),
        (lambda: times.grid(0, RECTIFIED), "steps = 0"),
        (lambda: times.grid(4, RECTIFIED, "linear"), "grid.name = 'linear'.*karras"),
        (lambda: times.grid(4, RECTIFIED, "uniform", rho=7.0), "grid.rho"),
        (lambda: times.grid(4, RECTIFIED, shift=-1.0), "grid.shift"),
        (lambda: times.grid(4, RECTIFIED, t_start=0.2, t_end=0.4), "t_end, t_start = 0.4, 0.2"),
        (lambda: times.grid(40, paths.ve(), "karras", sigma_max=80.0), "does not decrease"),
    ],
)
def test_bad_settings_are_refused_by_name(call, words):
    with pytest.raises((ConfigError, TypeError), match=words):
        call()


@pytest.mark.parametrize("path", ["rectified", "edm", "vp_linear", "ve"])
def test_grids_over_noise_levels_start_and_end_where_the_path_does(path):
    path = PATHS[path]()
    low, high = times.interval(path)
    grid = np.asarray(times.grid(4, path, "karras"), np.float64)
    assert grid[0] == pytest.approx(high, rel=1e-6) and grid[-1] == pytest.approx(low, abs=1e-9) and (np.diff(grid) < 0).all()
