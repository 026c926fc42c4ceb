"""What a network predicts: a row y = c(t) x + d(t) z, and the one 2x2 solve that converts between rows.

With x_t = a x + b z and det = a d - b c, any other row y2 = c2 x + d2 z of the same pair (x, z) is

    y2 = [ (c2 d - d2 c) x_t + (a d2 - b c2) y ] / det

so every conversion (to x, z, velocity, score, ...) is this line with other coefficients. The rows are exact for posterior
means as well, because they are linear in (x, z) at fixed x_t.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flowjax.paths import Path, as_time, expand


def _edm(path, t, sigma_data=0.5):
    # EDM's F (2206.00364 eq. 7 solved for the target), written for any path: F = (b/sd x - a sd z)/sqrt(a^2 sd^2 + b^2).
    a, b = path.a(t), path.b(t)
    norm = jnp.sqrt((a * sigma_data) ** 2 + b**2)
    return b / sigma_data / norm, -a * sigma_data / norm


# name -> (path, t) -> (c, d)
PREDICTIONS: dict[str, Callable] = {
    "x": lambda path, t: (jnp.ones_like(t), jnp.zeros_like(t)),
    "eps": lambda path, t: (jnp.zeros_like(t), jnp.ones_like(t)),
    "velocity": lambda path, t: (path.da(t), path.db(t)),
    "v": lambda path, t: (-path.b(t), path.a(t)),
    "score": lambda path, t: (jnp.zeros_like(t), -1.0 / path.b(t)),
    "edm": _edm,
}


def row(path: Path, name: str, t):
    """(c, d) of the prediction `name` at time t; ValueError on an unknown name."""
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction {name!r}; valid: {', '.join(PREDICTIONS)}")
    t = as_time(t)
    return PREDICTIONS[name](path, t)


def target(path: Path, name: str, x, z, t):
    """The regression target y = c x + d z, shape of x."""
    c, d = row(path, name, t)
    return expand(c, x) * x + expand(d, z) * z


def convert(path: Path, source: str, goal: str, y, x_t, t):
    """Turn a prediction y of kind `source` into kind `goal` at x_t (B, ...), t scalar or (B,).

    Returns y itself when the kinds agree. Singular where the source carries no information about the goal (for example
    eps -> x at t = 1 of the rectified path); there the result is infinite or NaN.
    """
    if source == goal:
        row(path, goal, t)  # still refuse unknown names
        return y
    t = as_time(t)
    a, b = path.a(t), path.b(t)
    c, d = row(path, source, t)
    c2, d2 = row(path, goal, t)
    det = a * d - b * c
    on_x_t, on_y = (c2 * d - d2 * c) / det, (a * d2 - b * c2) / det
    return expand(on_x_t, x_t) * x_t + expand(on_y, y) * y


def to_x_and_z(path: Path, name: str, y, x_t, t):
    """The pair (x, z) that a prediction y of kind `name` implies at x_t."""
    return convert(path, name, "x", y, x_t, t), convert(path, name, "eps", y, x_t, t)


def edm_input(path: Path, t, sigma_data: float = 0.5):
    """EDM's c_in and c_noise (2206.00364 table 1) on any path: (1 / sqrt(a^2 sd^2 + b^2), log(b/a) / 4).

    The network then sees x_t with unit variance, for data of standard deviation sd, and the log of the noise level as time. a and
    b are floored at 1e-4 in the logarithm, beyond EDM's noise levels, to keep both ends of every path finite.
    """
    a, b = path.a(t), path.b(t)
    log_sigma = jnp.log(jnp.maximum(b, 1e-4)) - jnp.log(jnp.maximum(a, 1e-4))
    return 1.0 / jnp.sqrt((a * sigma_data) ** 2 + b**2), log_sigma / 4


def ddpm_input(path: Path, t, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02):
    """What a network of DDPM's discrete steps takes on any path: x_t with a^2 + b^2 = 1, and i / steps.

    i in [0, steps - 1] is the step whose noise level sqrt((1 - A_i) / A_i), A_i = prod_{j <= i} (1 - beta_j), is that of t, by
    interpolation of its logarithm between steps; beta_j grows linearly (2006.11239 section 4). Noise below that of step 0 is
    given as step 0. i agrees with steps * t of `vp_linear` to within five steps.
    """
    log_keep = np.cumsum(np.log1p(-np.linspace(beta_min, beta_max, steps)))
    log_sigmas = 0.5 * (np.log(-np.expm1(log_keep)) - log_keep)
    a, b = path.a(t), path.b(t)
    log_sigma = jnp.log(jnp.maximum(b, 1e-6)) - jnp.log(jnp.maximum(a, 1e-6))
    step = jnp.interp(log_sigma, jnp.asarray(log_sigmas, log_sigma.dtype), jnp.arange(steps, dtype=log_sigma.dtype))
    return 1.0 / jnp.sqrt(a**2 + b**2), step / steps


def reversed_input(path: Path, t):
    """x_t as it is and 1 - t: for a network whose time is 1 at the data, as that of SiT (2401.08740)."""
    del path
    return jnp.ones_like(t), 1.0 - t


# name -> (path, t) -> (factor on x_t, time that the network is given)
INPUT_SCALINGS: dict[str, Callable] = {"ddpm": ddpm_input, "edm": edm_input, "reversed": reversed_input}


def gain(path: Path, name: str, t):
    """k = |a d - b c| / b: ||y_hat - y|| = k ||x_hat - x|| at the same x_t, for exactly converted predictions."""
    c, d = row(path, name, t)
    return jnp.abs(path.a(t) * d - path.b(t) * c) / path.b(t)


class Memory(NamedTuple):
    """What a model wants to remember from one sampling step to the next (momentum of a guidance, a feature cache).

    init(x) -> state at the start of a trajectory; apply(x_t, t, cond, key, state) -> (y, next state).
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network together with the meaning of its output.

    apply(x_t, t, cond, key) -> y with t of shape (B,). `key` is None for a deterministic call and a PRNG key when the
    network should use dropout. `null(cond)` returns the condition that means "no condition". `memory` is None for a
    pure function of its arguments; else the sampling driver carries its state, and `apply` is the model with none yet.
    `project` takes what apply takes and returns (y, features (B, rows, columns, F) that a hidden state is projected to);
    None for networks without a projector. `guidance_embed` tells networks that take the scale of guidance as an input,
    cond["guidance"] (B,); `step_embed` those that take a step, cond["step"] (B,), and answer with the velocity's mean over it.
    `params` are the network's parameters and `of(params)` the same network with others, without guidance around it, for what is
    differentiated by them.
    """

    apply: Callable[..., Any]
    path: Path
    prediction: str
    null: Callable[[Any], Any] | None = None
    memory: Memory | None = None
    project: Callable[..., Any] | None = None
    guidance_embed: bool = False
    step_embed: bool = False
    params: Any = None
    of: Callable[[Any], "Model"] | None = None

    def __call__(self, x_t, t, cond=None, key=None):
        """y for x_t (B, ...) at t, scalar or (B,)."""
        t = jnp.broadcast_to(as_time(t), x_t.shape[:1])
        return self.apply(x_t, t, cond, key)

    def get(self, goal: str, x_t, t, cond=None, key=None):
        """The prediction converted to `goal`: "x", "eps", "velocity", "v", "score" or "edm"."""
        return convert(self.path, self.prediction, goal, self(x_t, t, cond, key), x_t, t)

    def x_and_z(self, x_t, t, cond=None, key=None):
        """(x_hat, z_hat) from one network call."""
        return to_x_and_z(self.path, self.prediction, self(x_t, t, cond, key), x_t, t)

    def bind(self, cond):
        """The same model with its condition fixed, as samplers take it; a condition given then is what they add to it."""

        def whole(more):
            return {**(cond or {}), **more} if more else cond

        memory = self.memory and Memory(
            self.memory.init, lambda x_t, t, more, key, state: self.memory.apply(x_t, t, whole(more), key, state)
        )
        return dataclasses.replace(self, apply=lambda x_t, t, more, key: self.apply(x_t, t, whole(more), key), memory=memory)

    def replace(self, **changes):
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)
