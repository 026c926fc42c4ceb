"""The exact network of a Gaussian mixture: a teacher without error, for toy problems."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax import exact, predictions
from flowjax.conditions import need
from flowjax.config import ConfigError, build
from flowjax.paths import PATHS, expand


class Mixture(nn.Module):
    """E[c x + d z | x_t] for data sum_k w_k N(mu_k, s_k^2 I), whose w, mu and s are the parameters; at init those of exact.mix4().

    Fields: path and prediction, which have to be those that the network is used with; num_classes, 0 or the number of components
    (then label k means component k alone, and one label more the whole mixture).
    """

    path: str = "rectified"
    prediction: str = "velocity"
    num_classes: int = 0

    kind = "denoiser"

    @property
    def has_null(self) -> bool:
        """Whether there is a condition to leave out."""
        return bool(self.num_classes)

    def null(self, cond):
        """Every label replaced by the one that means the whole mixture."""
        return {**cond, "label": jnp.full_like(cond["label"], self.num_classes)} if self.num_classes else cond

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: dict, train: bool = False) -> jax.Array:
        """Prediction (B, D) for x (B, D), t (B,), cond {"label": int (B,)} or {}."""
        del train
        data, path = exact.mix4(), build(PATHS, self.path, "model.path")
        if self.num_classes not in (0, data.num_components):
            raise ConfigError(f"model.num_classes = {self.num_classes} should be 0 or {data.num_components}, the components of the mixture")
        constant = lambda name, value: self.param(name, lambda key: jnp.asarray(value, jnp.float32))  # noqa: E731
        weights, means = constant("weights", data.weights), constant("means", data.means)
        stds = constant("stds", data.covs[:, 0, 0] ** 0.5)
        a, b = (expand(f(t), x)[..., None] for f in (path.a, path.b))  # (B, 1, 1)
        e = x[:, None] - a * means
        var = a**2 * stds[:, None] ** 2 + b**2
        log_weights = jnp.log(weights)[None]
        if self.num_classes:
            rows = jnp.vstack([jnp.where(jnp.eye(len(weights), dtype=bool), 0.0, -jnp.inf), log_weights])
            log_weights = rows[need(cond, "label", f"a mixture with num_classes = {self.num_classes}")]
        rho = jax.nn.softmax(log_weights - 0.5 * jnp.sum(jnp.log(var) + e**2 / var, -1))[..., None]
        clean = jnp.sum(rho * (means + a * stds[:, None] ** 2 * e / var), 1)
        noise = jnp.sum(rho * b * e / var, 1)
        return predictions.target(path, self.prediction, clean, noise, t)
