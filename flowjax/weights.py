"""Loss weights: one number per time, stated as a weight w_x on ||x_hat - x||^2 and valid for every prediction.

||y_hat - y||^2 = (det / b)^2 ||x_hat - x||^2 with det = a d - b c, hence a network that predicts y takes w_x b^2 / det^2, and
exactly converted predictions have exactly equal losses. The table holds w_x b^2, which is finite at both ends of a path.

Sources: SNR, SNR + 1, truncated SNR: progressive distillation 2202.00512 sec. 4; min-SNR: 2303.09556 eq. 8; EDM:
2206.00364 table 1; sigmoid: SiD2 2410.19324 eq. 4 (w of 2303.00848 with its -d lambda / dt).
"""

import jax.numpy as jnp

from flowjax import config, predictions, times
from flowjax.paths import Path, as_time


def _determinant(path, prediction, t):
    c, d = predictions.row(path, prediction, t)
    return path.a(t) * d - path.b(t) * c


def none(path, prediction, t):
    """1 on the network's own prediction, whatever it is."""
    return _determinant(path, prediction, t) ** 2


def x(path, t):
    """w_x = 1: the error of the clean data."""
    return path.b(t) ** 2


def snr(path, t):
    """w_x = SNR: 1 on eps (DDPM's simple loss)."""
    return path.a(t) ** 2


def snr_plus_one(path, t):
    """w_x = SNR + 1: 1 on v for variance-preserving paths."""
    return path.a(t) ** 2 + path.b(t) ** 2


def truncated_snr(path, t):
    """w_x = max(SNR, 1): the larger of the errors of x and eps."""
    return jnp.maximum(path.a(t) ** 2, path.b(t) ** 2)


def min_snr(path, t, gamma: float = 5.0):
    """w_x = min(SNR, gamma)."""
    return jnp.minimum(path.a(t) ** 2, gamma * path.b(t) ** 2)


def edm(path, t, sigma_data: float = 0.5):
    """w_x = (sigma^2 + sd^2) / (sigma sd)^2: 1 on EDM's preconditioned output."""
    return path.a(t) ** 2 + (path.b(t) / sigma_data) ** 2


def sigmoid(path, t, bias: float = 0.0):
    """w_x = e^B sigmoid(lambda - B) (-d lambda / dt), lambda the log SNR; a larger B favours cleaner times."""
    a, b, scale = jnp.abs(path.a(t)), path.b(t), jnp.exp(bias)  # |a|: cos(pi/2) rounds to -4e-8 in float32
    return 2 * scale * path.wronskian(t) * a * b / (a**2 + scale * b**2)


def velocity(path, t, floor: float = 0.0):
    """w_x = (W / max(b, floor))^2: 1 on the velocity. JiT (2511.13720), which predicts x, bounds it by floor = 0.05."""
    return path.wronskian(t) ** 2 * (jnp.minimum(path.b(t) / floor, 1.0) ** 2 if floor else 1.0)


WEIGHTS = {
    "none": none,
    "x": x,
    "snr": snr,
    "snr_plus_one": snr_plus_one,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "edm": edm,
    "sigmoid": sigmoid,
    "velocity": velocity,
}


def loss_weight(section, path: Path, prediction: str, t):
    """The weight on ||y_hat - y||^2 at t for a network that predicts y: shape of t, finite and non-negative.

    section: a name of WEIGHTS, or a mapping with that `name` and its settings. Outside of `times.interval` of the prediction
    the value at its bound is used: the weights of eps and score where a = 0, and of x and score where b = 0, have no finite
    limit in general, and where they have one this is it (1 for SNR and min-SNR on eps at zero SNR).
    """
    t = jnp.clip(as_time(t), *times.interval(path, prediction))
    on_x = config.build(WEIGHTS, section, "weight", path=path, prediction=prediction, t=t)
    return on_x / _determinant(path, prediction, t) ** 2
