"""Gaussian paths x_t = a(t) x + b(t) z, with t = 0 at the data x and t = 1 at the noise z ~ N(0, I).

A path is the two functions a and b; everything else (derivatives, noise level, signal-to-noise ratio, the forward SDE)
follows from them. Times may be scalars or arrays; every function is elementwise in t.

Sources: RF 2209.03003; VP and VE SDE 2011.13456; improved-DDPM cosine 2102.09672; EDM 2206.00364; GVP / TrigFlow
2401.08740 and 2410.11081. EDM's own time is sigma in [0, 80]; ours is sigma / 80.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def expand(coefficient, x):
    """Shape a scalar or (B,) coefficient so that it multiplies x of shape (B, ...)."""
    coefficient = jnp.asarray(coefficient)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient


def as_time(t):
    """t as an array of at least float32; a Python number takes the default precision (float64 when that is enabled)."""
    return jnp.asarray(t, jnp.promote_types(jnp.result_type(t, float), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Path:
    """A Gaussian path.

    Properties: `t_min` and `t_max` bound the times at which a, b and the velocity are finite and worth training or
    sampling at; `time_of_sigma` inverts sigma(t) = b/a.
    """

    name: str
    a: Callable[[Array], Array] = dataclasses.field(compare=False)
    b: Callable[[Array], Array] = dataclasses.field(compare=False)
    time_of_sigma: Callable[[Array], Array] = dataclasses.field(compare=False)
    t_min: float = 0.0
    t_max: float = 1.0
    settings: tuple[float, ...] = ()  # with the name, what makes two paths the same path

    def da(self, t):
        """da/dt."""
        return _derivative(self.a, t)

    def db(self, t):
        """db/dt."""
        return _derivative(self.b, t)

    def wronskian(self, t):
        """W = a b' - a' b > 0: the speed at which noise replaces signal."""
        return self.a(t) * self.db(t) - self.da(t) * self.b(t)

    def sigma(self, t):
        """Noise level b/a (EDM's sigma); infinite where a = 0."""
        return self.b(t) / self.a(t)

    def snr(self, t):
        """Signal-to-noise ratio (a/b)^2; infinite at b = 0."""
        return (self.a(t) / self.b(t)) ** 2

    def log_snr(self, t):
        """lambda = log SNR = 2 log(a/b)."""
        return 2.0 * (jnp.log(self.a(t)) - jnp.log(self.b(t)))

    def dlog_snr(self, t):
        """d lambda / dt = -2 W / (a b) < 0."""
        return -2.0 * self.wronskian(t) / (self.a(t) * self.b(t))

    def drift(self, t):
        """f = a'/a of the forward SDE dx = f x dt + g dW."""
        return self.da(t) / self.a(t)

    def diffusion(self, t):
        """g^2 = 2 b W / a of the forward SDE (2011.13456, written for any path)."""
        return 2.0 * self.b(t) * self.wronskian(t) / self.a(t)

    def perturb(self, x, z, t):
        """x_t = a x + b z for x, z of shape (B, ...) and t scalar or (B,)."""
        return expand(self.a(t), x) * x + expand(self.b(t), z) * z

    def posterior_mean(self, x_t, x, t, s):
        """E[x_s | x_t, x] for s < t, which DDPM (2006.11239 eq. 7) samples with x_hat for x: r (b_s/b_t)^2 x_t + (a_s V / b_t^2) x,
        r = a_t/a_s, V = b_t^2 - r^2 b_s^2."""
        ratio, b_t, b_s = self.a(t) / self.a(s), self.b(t), self.b(s)
        on_x_t, on_x = ratio * (b_s / b_t) ** 2, self.a(s) * (b_t**2 - ratio**2 * b_s**2) / b_t**2
        return expand(on_x_t, x_t) * x_t + expand(on_x, x) * x

    def posterior_variance(self, t, s):
        """Var[x_s | x_t, x] = (b_s/b_t)^2 (b_t^2 - (a_t/a_s)^2 b_s^2), s < t: DDPM's "fixed small" variance."""
        ratio = self.a(t) / self.a(s)
        return (self.b(s) / self.b(t)) ** 2 * jnp.maximum(self.b(t) ** 2 - (ratio * self.b(s)) ** 2, 0.0)


def _derivative(f, t):
    t = as_time(t)
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def rectified() -> Path:
    """Straight line a = 1 - t, b = t (rectified flow, conditional OT)."""
    return Path("rectified", lambda t: 1.0 - t, lambda t: 1.0 * t, lambda s: s / (1.0 + s))


def trigonometric(sigma_data: float = 1.0) -> Path:
    """a = cos(pi t/2), b = sigma_data sin(pi t/2): GVP of SiT and, with its angle divided by pi/2, TrigFlow."""
    half_pi = np.pi / 2
    return Path(
        "trigonometric",
        lambda t: jnp.cos(half_pi * t),
        lambda t: sigma_data * jnp.sin(half_pi * t),
        lambda s: jnp.arctan(s / sigma_data) / half_pi,
        settings=(sigma_data,),
    )


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Variance-preserving SDE with linear beta(t) (2011.13456): a = exp(-t^2 (bmax - bmin)/4 - t bmin/2), a^2 + b^2 = 1.

    The velocity diverges at t = 0 (b ~ sqrt t), hence t_min = 1e-5 (score_sde's training bound).
    """
    slope = beta_max - beta_min

    def log_a(t):
        return -(t**2) * slope / 4 - t * beta_min / 2

    def time_of_sigma(s):
        y = jnp.log1p(s**2)
        # Root of slope t^2 / 2 + beta_min t = y, in the form that does not cancel for small y.
        return 2 * y / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * y))

    return Path(
        "vp_linear",
        lambda t: jnp.exp(log_a(t)),
        lambda t: jnp.sqrt(-jnp.expm1(2 * log_a(t))),
        time_of_sigma,
        t_min=1e-5,
        settings=(beta_min, beta_max),
    )


def vp_cosine(offset: float = 0.008) -> Path:
    """Improved DDPM's cosine schedule in continuous time: a = cos(u(t)) / cos(u(0)), u(t) = (t + s)/(1 + s) pi/2.

    b^2 = 1 - a^2 is written as a product of sines so that it does not cancel; t_min as in vp_linear.
    """
    u0 = offset / (1 + offset) * np.pi / 2
    scale = np.pi / 2 / (1 + offset)
    cos0 = float(np.cos(u0))

    def b(t):
        return jnp.sqrt(jnp.sin(scale * t) * jnp.sin(scale * t + 2 * u0)) / cos0

    def time_of_sigma(s):
        return (jnp.arccos(cos0 / jnp.sqrt(1 + s**2)) - u0) / scale

    return Path("vp_cosine", lambda t: jnp.cos(scale * t + u0) / cos0, b, time_of_sigma, t_min=1e-5, settings=(offset,))


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    """Variance-exploding path a = 1, b = sigma_min (sigma_max / sigma_min)^t (2011.13456). b(0) = sigma_min, not 0."""
    log_ratio = float(np.log(sigma_max / sigma_min))
    return Path(
        "ve",
        lambda t: jnp.ones_like(t),
        lambda t: sigma_min * jnp.exp(log_ratio * t),
        lambda s: jnp.log(s / sigma_min) / log_ratio,
        settings=(sigma_min, sigma_max),
    )


def edm(sigma_max: float = 80.0) -> Path:
    """EDM (2206.00364) with time scaled to [0, 1]: a = 1, b = sigma_max t. Pair it with the `karras` grid."""
    return Path("edm", lambda t: jnp.ones_like(t), lambda t: sigma_max * t, lambda s: s / sigma_max, settings=(sigma_max,))


PATHS = {
    "rectified": rectified,
    "trigonometric": trigonometric,
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "ve": ve,
    "edm": edm,
}
