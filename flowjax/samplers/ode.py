"""Fixed-step solvers of the probability-flow ODE dx/dt = v(x, t), from t down to s (or up: h may be negative).

Euler, midpoint, Heun and classical Runge-Kutta 4: orders 1, 2, 2, 4 and 1, 2, 2, 4 model calls per step. On the rectified
path Euler is DDIM. Heun on the `edm` path is EDM's Algorithm 2 (2206.00364) without churn.
"""

import jax

from flowjax.samplers.base import FLOWS, Sampler


def euler_step(model, x, t, s, key, carry):
    """x_s = x_t - h v(x_t, t)."""
    return x - (t - s) * model.get("velocity", x, t), carry


def midpoint_step(model, x, t, s, key, carry):
    """x_s = x_t - h v(x_t - h/2 v(x_t, t), t - h/2). Never calls the model at s."""
    h = t - s
    halfway = x - h / 2 * model.get("velocity", x, t)
    return x - h * model.get("velocity", halfway, t - h / 2), carry


def heun_step(model, x, t, s, key, carry):
    """x_s = x_t - h (k1 + k2) / 2 with k2 at (x_t - h k1, s); Euler where the model has no velocity at s."""
    h = t - s

    def slope(k1):
        return (k1 + model.get("velocity", x - h * k1, s)) / 2

    return x - h * _unless_singular(model, s, slope, model.get("velocity", x, t)), carry


def rk4_step(model, x, t, s, key, carry):
    """The classical fourth-order step; Euler where the model has no velocity at s."""
    h = t - s

    def slope(k1):
        k2 = model.get("velocity", x - h / 2 * k1, t - h / 2)
        k3 = model.get("velocity", x - h / 2 * k2, t - h / 2)
        k4 = model.get("velocity", x - h * k3, s)
        return (k1 + 2 * k2 + 2 * k3 + k4) / 6

    return x - h * _unless_singular(model, s, slope, model.get("velocity", x, t)), carry


def _unless_singular(model, s, slope, k1):
    """slope(k1), or k1 where b(s) = 0 and the prediction leaves the velocity undetermined (EDM Alg. 2, line 6)."""
    if model.prediction in FLOWS:
        return slope(k1)
    return jax.lax.cond(model.path.b(s) > 0, slope, lambda k1: k1, k1)


def euler() -> Sampler:
    """Euler."""
    return Sampler(euler_step)


def midpoint() -> Sampler:
    """Explicit midpoint."""
    return Sampler(midpoint_step, calls=2)


def heun() -> Sampler:
    """Heun; 2n - 1 model calls where the last step falls back to Euler."""
    return Sampler(heun_step, calls=2, ends_with_euler=True)


def rk4() -> Sampler:
    """Runge-Kutta 4."""
    return Sampler(rk4_step, calls=4, ends_with_euler=True)
