"""When to look: laws for training times, step grids for sampling, and the resolution shift that applies to both.

A law is the quantile function of a time on the unit interval, increasing in u in (0, 1), so that stratification (which
spreads u) and the shift (which maps t) compose with every law. In all of them t = 1 is noise and a larger mean is noisier.

Sources: logit-normal, mode, cosmap and the shift: SD3 2403.03206 secs. 3.1 and 5.3.2; log-normal sigma and the rho grid:
EDM 2206.00364 table 1; stratification: VDM 2107.00630 app. I.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from flowjax import config, predictions
from flowjax.config import ConfigError
from flowjax.paths import Path

# Where a prediction is singular at an end of the path, stay at noise levels sigma = b/a between these; on the rectified
# path that is t in [0.001, 0.999], the bounds of SiT (2401.08740).
SIGMA_BOUNDS = (1e-3, 1e3)


def shift(t, s):
    """Multiply the odds t / (1 - t) by s: t -> s t / (1 + (s - 1) t). s > 1 moves towards noise.

    On the rectified path sigma = t / (1 - t), so this is sigma -> s sigma. shift(shift(t, s), r) = shift(t, r s).
    """
    return s * t / (1.0 + (s - 1.0) * t)


_shift = shift  # `draw` and `grid` have a setting of this name


def resolution_shift(size: float, reference: float) -> float:
    """s = sqrt(size / reference), sizes in pixels or tokens: keeps the uncertainty about a constant image when it grows to `size`."""
    return math.sqrt(size / reference)


def flux_mu(tokens: int) -> float:
    """FLUX's log shift for an image of `tokens` tokens: the line through (256, 0.5) and (4096, 1.15); use s = exp(mu).

    Constant outside the anchors, where FLUX's own code follows the line (to s = 25 at 16384 tokens).
    """
    return float(np.interp(tokens, (256, 4096), (0.5, 1.15)))


def uniform(u):
    """t = u."""
    return u


def logit_normal(u, mean: float = 0.0, std: float = 1.0):
    """logit t ~ N(mean, std^2)."""
    return jax.nn.sigmoid(mean + std * ndtri(u))


def mode(u, scale: float = 1.29):
    """SD3's mode law: scale in [-1, 2 / (pi - 2)], positive favours the middle. Their u is our 1 - u."""
    if not -1.0 <= scale <= 2.0 / (math.pi - 2.0):
        raise ConfigError(f"times.scale = {scale} makes the mode law non-monotone; valid: -1 to {2 / (math.pi - 2):.6f}")
    return u - scale * (jnp.sin(math.pi / 2 * u) ** 2 - u)


def cosmap(u):
    """The t whose rectified noise level is that of the trigonometric path at u: t / (1 - t) = tan(pi u / 2)."""
    sin, cos = jnp.sin(math.pi / 2 * u), jnp.cos(math.pi / 2 * u)
    return sin / (sin + cos)


def edm_lognormal(u, path, bounds, p_mean: float = -1.2, p_std: float = 1.2):
    """log sigma ~ N(p_mean, p_std^2) on any path, clipped to the bounds; logit_normal(p_mean, p_std) on the rectified path."""
    t = path.time_of_sigma(jnp.exp(p_mean + p_std * ndtri(u)))
    return jnp.clip((t - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)


def steps(u, count: int = 1):
    """The times at which `count` equal steps from noise begin: 1/count, 2/count, ..., 1; for count = 1, t = 1 alone."""
    if count < 1:
        raise ConfigError(f"times.count = {count} should be at least 1")
    return jnp.ceil(u * count) / count


LAWS = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "edm_lognormal": edm_lognormal,
    "steps": steps,
}


def _on_host(f, t):
    """f(t) in float64 numpy, also while an outer function is being traced."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(f(jnp.asarray(t, jnp.float64)))


def interval(path: Path, prediction: str = "velocity") -> tuple[float, float]:
    """(lowest, highest) time at which a `prediction` network determines x, z and the velocity; to train and to call it in.

    The path's own bounds, except where a d - b c is 0 or infinite at one of them (eps or score at a = 0, x or score at
    b = 0): there the bound moves to sigma = SIGMA_BOUNDS.
    """

    def determinant(t):
        c, d = predictions.row(path, prediction, t)
        return path.a(t) * d - path.b(t) * c

    bounds = [path.t_min, path.t_max]
    for i, det in enumerate(_on_host(determinant, bounds)):
        if not np.isfinite(det) or abs(det) < 1e-6:
            bounds[i] = float(_on_host(path.time_of_sigma, SIGMA_BOUNDS[i]))
    return bounds[0], bounds[1]


def _bounds(lowest: float, highest: float, t_lowest: float | None, t_highest: float | None, names: str) -> tuple[float, float]:
    lowest = lowest if t_lowest is None else t_lowest
    highest = highest if t_highest is None else t_highest
    if not 0.0 <= lowest < highest <= 1.0:
        raise ConfigError(f"{names} = {lowest}, {highest}; valid: 0 <= {names.replace(', ', ' < ')} <= 1")
    return lowest, highest


def _check_shift(s: float, where: str):
    if not s > 0:
        raise ConfigError(f"{where}.shift = {s} should be positive")


def _check_keys(table, name: str, settings, where: str, given: tuple[str, ...], common: tuple[str, ...]):
    """ConfigError that lists all valid settings, those of the entry and those of every entry, where one is neither."""
    own = config.arguments(config.lookup(table, name, f"{where}.name"), given)
    for key in settings:
        if key not in own:
            raise ConfigError(f"{where}.{key} is unknown for {name}; valid: {', '.join([*own, *common])}")


def draw(
    key,
    n: int,
    path: Path,
    name: str = "uniform",
    shift: float = 1.0,
    stratified: bool = False,
    t_min: float | None = None,
    t_max: float | None = None,
    prediction: str = "velocity",
    **law,
):
    """n training times, float32 (n,), in [t_min, t_max] (default: `interval(path, prediction)`).

    name, **law: an entry of LAWS and its settings. shift: multiplies the odds of the unit-interval time. stratified: one
    time in each n-th of the law's quantiles, in random order; each time alone still follows the law, so that expectations
    do not change. ConfigError on bad settings.
    """
    quantile = _quantile(path, name, shift, t_min, t_max, prediction, law)
    if stratified:
        offset_key, order_key = jax.random.split(key)
        # Shuffled, because objectives that treat a part of the batch differently must not find its times sorted.
        stratum = jax.random.permutation(order_key, n) / n
        u = (jax.random.uniform(offset_key, dtype=jnp.float32) + stratum.astype(jnp.float32)) % 1.0
    else:
        u = jax.random.uniform(key, (n,), jnp.float32)
    return quantile(jnp.clip(u, 2.0**-24, 1.0 - 2.0**-24))


def cdf(
    t,
    path: Path,
    name: str = "uniform",
    shift: float = 1.0,
    t_min: float | None = None,
    t_max: float | None = None,
    prediction: str = "velocity",
    **law,
) -> np.ndarray:
    """P(time <= t) of the times that `draw` draws with the same arguments, float64 numpy of t's shape, by bisection."""
    quantile = _quantile(path, name, shift, t_min, t_max, prediction, law)
    t = np.asarray(t, np.float64)
    low, high = np.zeros_like(t), np.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        below = _on_host(quantile, u) <= t
        low, high = np.where(below, u, low), np.where(below, high, u)
    return high


def _quantile(path, name, shift, t_min, t_max, prediction, law):
    """u in (0, 1) -> t, increasing; ConfigError on bad settings."""
    _check_shift(shift, "times")
    _check_keys(LAWS, name, law, "times", ("u", "path", "bounds"), ("shift", "stratified", "t_min", "t_max"))
    low, high = _bounds(*interval(path, prediction), t_min, t_max, "t_min, t_max")

    def quantile(u):
        t = config.build(LAWS, {"name": name, **law}, "times", u=u, path=path, bounds=(low, high))
        return low + (high - low) * _shift(t, shift)

    return quantile


def _uniform_grid(n):
    return np.linspace(1.0, 0.0, n + 1)


def _cosine_grid(n):
    # The angle of the trigonometric path at equal steps; exact ends.
    angle = np.linspace(np.pi / 2, 0.0, n + 1)
    return np.sin(angle) / (np.sin(angle) + np.cos(angle))


def _sigma_grid(n, path, bounds, sigma_min, sigma_max, spaced):
    """n + 1 unit times whose sigmas are `spaced`(first, last, count); an end that sigma does not reach is appended as it is."""
    low, high = bounds
    sigma_low, sigma_high = _on_host(path.sigma, (low, high))
    if sigma_max is None:
        sigma_max = sigma_high if sigma_high < SIGMA_BOUNDS[1] else 80.0
    reaches_end = sigma_low >= sigma_min  # false where the path ends in (almost) no noise: a last step goes there
    sigmas = spaced(sigma_max, sigma_low if reaches_end else sigma_min, n + 1 if reaches_end else n)
    times = (_on_host(path.time_of_sigma, sigmas) - low) / (high - low)
    times = times if reaches_end else np.append(times, 0.0)
    times[0] = 1.0  # from pure noise also where sigma(t_start) is infinite
    return times


def _karras_grid(n, path, bounds, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float | None = None):
    def spaced(first, last, count):
        return np.linspace(first ** (1 / rho), last ** (1 / rho), count) ** rho

    return _sigma_grid(n, path, bounds, sigma_min, sigma_max, spaced)


def _log_snr_grid(n, path, bounds, sigma_min: float = 0.002, sigma_max: float | None = None):
    return _sigma_grid(n, path, bounds, sigma_min, sigma_max, np.geomspace)


GRIDS = {
    "uniform": _uniform_grid,
    "cosine": _cosine_grid,
    "karras": _karras_grid,
    "log_snr": _log_snr_grid,
}


def grid(
    n: int,
    path: Path,
    name: str = "uniform",
    shift: float = 1.0,
    t_start: float | None = None,
    t_end: float | None = None,
    prediction: str = "velocity",
    **settings,
) -> np.ndarray:
    """The n + 1 times of an n-step sampler: float64 numpy, strictly decreasing from t_start to t_end exactly.

    Defaults: t_start is the end of `interval(path, prediction)`, t_end is path.t_min (0 unless the velocity is infinite
    there); a solver that calls an x or score network at the end of its step must not do so at sigma = 0. The shift is
    applied once, here, to (t - t_end) / (t_start - t_end), which leaves both ends in place.

    name: "uniform" in t; "cosine", uniform in the angle of the trigonometric path; "karras" (rho, sigma_min, sigma_max),
    n noise levels of EDM (2206.00364 eq. 5) and then the end; "log_snr" (sigma_min, sigma_max), the same with geometric
    noise levels. sigma_max is by default the path's own, or 80 where that is infinite. ConfigError on bad settings.
    """
    if n < 1:
        raise ConfigError(f"steps = {n} should be at least 1")
    _check_shift(shift, "grid")
    low, high = _bounds(path.t_min, interval(path, prediction)[1], t_end, t_start, "t_end, t_start")
    _check_keys(GRIDS, name, settings, "grid", ("n", "path", "bounds"), ("shift", "t_start", "t_end"))
    unit = config.build(GRIDS, {"name": name, **settings}, "grid", n=n, path=path, bounds=(low, high))
    times = low + (high - low) * _shift(unit, shift)
    times[0], times[-1] = high, low  # not one rounding beside them
    if not (np.diff(times) < 0).all():
        raise ConfigError(f"grid {name!r} with {settings} does not decrease from {high} to {low}: {np.round(times, 6)}")
    return times
