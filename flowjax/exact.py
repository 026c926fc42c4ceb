"""Closed-form flows of Gaussians and Gaussian mixtures: the oracle of the tests and the perfect teacher of toy problems.

For data sum_k w_k N(mu_k, S_k) on any path x_t = a x + b z, with V_k = a^2 S_k + b^2 I and e_k = x_t - a mu_k:

    p_t = sum_k w_k N(a mu_k, V_k)             rho_k = p(k | x_t) = softmax_k(log w_k + log N(e_k; 0, V_k))
    E[x | x_t] = sum rho_k (mu_k + a S_k V_k^-1 e_k)     E[z | x_t] = b sum rho_k V_k^-1 e_k     score = -E[z | x_t] / b

and every prediction of the table in flowjax.predictions is c E[x | x_t] + d E[z | x_t]. Each S_k is diagonalised once, in
float64, so that no linear system is solved inside a jitted function; results have the dtype of x_t. All of it is the algebra
of conditional Gaussians; straightness is that of 2209.03003.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp

from flowjax import predictions
from flowjax.paths import Path, expand, rectified

_einsum = functools.partial(jnp.einsum, precision="highest")


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Mixture of K Gaussians in D dimensions: weights (K,), means (K, D), covs (K, D, D), kept in float64.

    Methods take a path, points x_t of shape (B, ...) whose trailing axes flatten to D, and t, scalar or (B,). With `label`
    (B,) given, row i sees only component label[i]; label K means the whole mixture, as does None. Everything traces under
    jit, vmap and jvp. A component with zero covariance (a point mass) is allowed wherever b(t) > 0.
    """

    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    def __post_init__(self):
        weights, means, covs = (np.asarray(v, np.float64) for v in (self.weights, self.means, self.covs))
        if means.ndim != 2 or weights.shape != means.shape[:1] or covs.shape != (*means.shape, means.shape[1]):
            shapes = f"{weights.shape}, {means.shape}, {covs.shape}"
            raise ValueError(f"mixture needs weights (K,), means (K, D), covs (K, D, D); got {shapes}")
        if (weights < 0).any() or weights.sum() <= 0:
            raise ValueError(f"mixture weights must be non-negative and not all zero; got {weights}")
        if not np.allclose(covs, covs.swapaxes(1, 2)):
            raise ValueError("mixture covariances must be symmetric")
        if np.linalg.eigvalsh(covs).min() < -1e-12:
            raise ValueError("mixture covariances must be positive semi-definite")
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covs", covs)

    @property
    def num_components(self) -> int:
        """K; also the null label."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    @functools.cached_property
    def _eigen(self):
        values, vectors = np.linalg.eigh(self.covs)
        return np.maximum(values, 0.0), vectors  # (K, D), (K, D, D) with eigenvectors in columns

    @functools.cached_property
    def _log_weights(self):
        # Row k < K keeps component k alone, row K is the mixture.
        with np.errstate(divide="ignore"):
            return np.log(np.vstack([np.eye(self.num_components), self.weights]))

    # Data.

    def mean(self):
        """E[x], (D,) float64."""
        return self.weights @ self.means

    def cov(self):
        """Cov[x], (D, D) float64."""
        centred = self.means - self.mean()
        return np.einsum("k,kij->ij", self.weights, self.covs) + np.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def sample(self, key, n: int, dtype=jnp.float32):
        """n draws from the data, (n, D)."""
        return self.sample_labelled(key, n, dtype)[0]

    def sample_labelled(self, key, n: int, dtype=jnp.float32):
        """n draws and the components they came from: (n, D) and int32 (n,)."""
        label_key, noise_key = jax.random.split(key)
        label = jax.random.categorical(label_key, jnp.asarray(self._log_weights[-1]), shape=(n,)).astype(jnp.int32)
        values, vectors = self._eigen
        root = jnp.asarray(vectors * np.sqrt(values)[:, None, :], dtype)
        z = jax.random.normal(noise_key, (n, self.dim), dtype)
        return jnp.asarray(self.means, dtype)[label] + _einsum("bde,be->bd", root[label], z), label

    # Marginals p_t and posteriors p(x, z | x_t).

    def _components(self, path: Path, x_t, t, label):
        """a, b shaped to broadcast on (B, K, D); e and V in each component's eigenbasis; log w_k N(e_k; 0, V_k) (B, K)."""
        flat = jnp.asarray(x_t).reshape(len(x_t), -1)
        dtype = jnp.result_type(flat, jnp.float32)
        values, vectors = (jnp.asarray(v, dtype) for v in self._eigen)
        log_weights = jnp.asarray(self._log_weights, dtype)[self.num_components if label is None else label]
        t = jnp.asarray(t, dtype).reshape(-1, 1, 1)
        a, b = path.a(t), path.b(t)
        e = _einsum("kde,bkd->bke", vectors, flat[:, None] - a * jnp.asarray(self.means, dtype))
        var = a**2 * values + b**2
        log_density = log_weights - 0.5 * jnp.sum(jnp.log(2 * np.pi * var) + e**2 / var, axis=-1)
        return a, b, e, var, log_density

    def _posterior(self, path, x_t, t, label):
        """rho (B, K), per-component means of x (B, K, D), and V_k^-1 e_k (B, K, D), in the data basis."""
        a, _, e, var, log_density = self._components(path, x_t, t, label)
        values, vectors = (jnp.asarray(v, e.dtype) for v in self._eigen)
        means = jnp.asarray(self.means, e.dtype) + _einsum("kde,bke->bkd", vectors, a * values * e / var)
        return jax.nn.softmax(log_density), means, _einsum("kde,bke->bkd", vectors, e / var)

    def log_prob(self, path: Path, x_t, t, label=None):
        """log p_t(x_t), (B,)."""
        return logsumexp(self._components(path, x_t, t, label)[-1], axis=-1)

    def responsibilities(self, path: Path, x_t, t, label=None):
        """p(component | x_t), (B, K): the exact noisy classifier."""
        return self._posterior(path, x_t, t, label)[0]

    def x_mean(self, path: Path, x_t, t, label=None):
        """E[x | x_t], the perfect denoiser; shape of x_t."""
        rho, means, _ = self._posterior(path, x_t, t, label)
        return _einsum("bk,bkd->bd", rho, means).reshape(jnp.shape(x_t))

    def score(self, path: Path, x_t, t, label=None):
        """grad log p_t(x_t), shape of x_t."""
        rho, _, whitened = self._posterior(path, x_t, t, label)
        return -_einsum("bk,bkd->bd", rho, whitened).reshape(jnp.shape(x_t))

    def z_mean(self, path: Path, x_t, t, label=None):
        """E[z | x_t], the perfect noise prediction; shape of x_t."""
        score = self.score(path, x_t, t, label)
        return -expand(path.b(jnp.asarray(t, score.dtype)), score) * score

    def predict(self, path: Path, prediction: str, x_t, t, label=None):
        """E[c x + d z | x_t] for any row of predictions.PREDICTIONS; shape of x_t."""
        x, z = self.x_mean(path, x_t, t, label), self.z_mean(path, x_t, t, label)
        return predictions.target(path, prediction, x, z, jnp.asarray(t, x.dtype))

    def velocity(self, path: Path, x_t, t, label=None):
        """E[a' x + b' z | x_t], the marginal velocity; shape of x_t. Infinite or NaN outside [path.t_min, path.t_max]."""
        return self.predict(path, "velocity", x_t, t, label)

    def x_cov(self, path: Path, x_t, t, label=None):
        """Cov[x | x_t], (B, D, D) = (b^2 / a) d E[x | x_t] / d x_t."""
        rho, means, _ = self._posterior(path, x_t, t, label)
        _, b, _, var, _ = self._components(path, x_t, t, label)
        values, vectors = (jnp.asarray(v, rho.dtype) for v in self._eigen)
        within = _einsum("kde,bke,kfe->bkdf", vectors, b**2 * values / var, vectors)
        centred = means - _einsum("bk,bkd->bd", rho, means)[:, None]  # centred first: no cancellation
        return _einsum("bk,bkdf->bdf", rho, within) + _einsum("bk,bkd,bkf->bdf", rho, centred, centred)

    def model(self, path: Path, prediction: str = "velocity", conditional: bool = False) -> predictions.Model:
        """The perfect network: a Model whose output is the exact prediction.

        conditional: read cond["label"] (int (B,)), where label k is component k and K the whole mixture (the null label).
        """

        def apply(x_t, t, cond, key):
            del key
            return self.predict(path, prediction, x_t, t, cond["label"] if conditional else None)

        def null(cond):
            return {**cond, "label": jnp.full_like(cond["label"], self.num_components)}

        return predictions.Model(apply, path, prediction, null if conditional else None)

    # The probability-flow ODE.

    def flow_map(self, path: Path, x_t, t, s, label=None, steps: int = 512):
        """x_s on the exact ODE trajectory through x_t; t and s scalar or (B,), in any order.

        One Gaussian: a_s mu + V_s^1/2 V_t^-1/2 (x_t - a_t mu). One dimension: F_s^-1(F_t(x_t)), to machine precision.
        Otherwise RK4 with `steps` steps (error about 1e-9 in float64 on `mix4`).
        """
        if self.num_components == 1:
            return self._gaussian_map(path, x_t, t, s)[:, 0].reshape(jnp.shape(x_t))
        if self.dim == 1:
            return self._quantile_map(path, x_t, t, s, label).reshape(jnp.shape(x_t))
        return self._rk4_map(path, x_t, t, s, label, steps)

    def consistency(self, path: Path, x_t, t, label=None, steps: int = 512):
        """f(x_t, t) = x_0, where the trajectory through x_t ends (at the smallest noise of the path)."""
        return self.flow_map(path, x_t, t, 0.0, label, steps)

    def average_velocity(self, path: Path, x_t, t, r, label=None, steps: int = 512):
        """(x_t - x_r) / (t - r) along the exact trajectory (MeanFlow's u); the velocity where r = t."""
        x_t = jnp.asarray(x_t)
        dtype = jnp.result_type(x_t, jnp.float32)
        t, r = jnp.broadcast_arrays(jnp.asarray(t, dtype), jnp.asarray(r, dtype))
        gap = expand(t - r, x_t)
        secant = (x_t - self.flow_map(path, x_t, t, r, label, steps)) / jnp.where(gap == 0, 1.0, gap)
        return jnp.where(gap == 0, self.velocity(path, x_t, t, label), secant)

    def _gaussian_map(self, path, x_t, t, s):
        """Where each component alone would carry x_t: (B, K, D)."""
        _, _, e, var_t, _ = self._components(path, x_t, t, None)
        values, vectors = (jnp.asarray(v, e.dtype) for v in self._eigen)
        s = jnp.asarray(s, e.dtype).reshape(-1, 1, 1)
        var_s = path.a(s) ** 2 * values + path.b(s) ** 2
        return path.a(s) * jnp.asarray(self.means, e.dtype) + _einsum("kde,bke->bkd", vectors, jnp.sqrt(var_s / var_t) * e)

    def _quantile_map(self, path, x_t, t, s, label):
        log_weights = self._log_weights[self.num_components] if label is None else jnp.asarray(self._log_weights)[label]

        def logit_cdf(y, at):
            # log F - log(1 - F), each from log_ndtr, is accurate in both tails.
            _, _, e, var, _ = self._components(path, y, at, label)
            u = (e / jnp.sqrt(var))[..., 0]
            w = jnp.asarray(log_weights, u.dtype)
            return (logsumexp(w + log_ndtr(u), axis=-1) - logsumexp(w + log_ndtr(-u), axis=-1))[:, None]

        flat = jnp.asarray(x_t).reshape(-1, 1)
        goal = logit_cdf(flat, t)
        # F_s^-1(F_t(x)) lies between the maps of the components, because each F_s^k preserves its own F_t^k.
        ends = jax.lax.stop_gradient(self._gaussian_map(path, flat, t, s))
        frozen_goal, frozen_s = jax.lax.stop_gradient((goal, s))

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            below = logit_cdf(middle, frozen_s) < frozen_goal
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, jnp.finfo(goal.dtype).nmant + 8, halve, (ends.min(axis=1), ends.max(axis=1)))
        y = (low + high) / 2
        slope = jax.jvp(lambda y: logit_cdf(y, frozen_s), (y,), (jnp.ones_like(y),))[1]
        # A Newton step whose value is zero carries the implicit derivatives in x_t, t and s; the slope underflows in gaps.
        residual = logit_cdf(y, s) - goal
        return y - (residual - jax.lax.stop_gradient(residual)) / jnp.maximum(slope, jnp.finfo(slope.dtype).tiny)

    def _rk4_map(self, path, x_t, t, s, label, steps):
        # Trajectories of all paths coincide after x / (a + b) and b / (a + b), so the smooth rectified path integrates them all.
        x_t = jnp.asarray(x_t)
        dtype = jnp.result_type(x_t, jnp.float32)
        t, s = jnp.asarray(t, dtype), jnp.asarray(s, dtype)
        line = rectified()
        scale_t, scale_s = path.a(t) + path.b(t), path.a(s) + path.b(s)
        start, stop = path.b(t) / scale_t, path.b(s) / scale_s
        h = (stop - start) / steps
        wide = expand(h, x_t)

        def velocity(x, at):
            return self.velocity(line, x, at, label)

        def step(x, i):
            at = start + i * h
            k1 = velocity(x, at)
            k2 = velocity(x + wide / 2 * k1, at + h / 2)
            k3 = velocity(x + wide / 2 * k2, at + h / 2)
            k4 = velocity(x + wide * k3, at + h)
            return x + wide / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        x, _ = jax.lax.scan(step, x_t / expand(scale_t, x_t), jnp.arange(steps))
        return x * expand(scale_s, x)

    # Reference numbers, float64 on the host unless said otherwise.

    def irreducible_loss(self, path: Path, t, prediction: str = "velocity", key=None, n: int = 65536):
        """E ||y - E[y | x_t]||^2 at scalar t, 0 < b(t): gain^2 E tr Cov[x | x_t], summed over dimensions.

        No network goes below it. Closed form for one Gaussian; for a mixture the mean over n points drawn with `key`.
        """
        gain = predictions.gain(path, prediction, t)
        if self.num_components == 1:
            values, _ = self._eigen
            a, b = path.a(jnp.asarray(t)), path.b(jnp.asarray(t))
            return gain**2 * jnp.sum(b**2 * values / (a**2 * values + b**2))
        if key is None:
            raise ValueError("the irreducible loss of a mixture is a Monte Carlo mean: pass key")
        x_key, z_key = jax.random.split(key)
        x = self.sample(x_key, n)
        x_t = path.perturb(x, jax.random.normal(z_key, x.shape, x.dtype), t)
        return gain**2 * jnp.mean(jnp.trace(self.x_cov(path, x_t, t), axis1=1, axis2=2))

    def straightness(self, path: Path, nodes: int = 128) -> float:
        """int_0^1 E ||(x_1 - x_0) - v(x_t, t)||^2 dt of one Gaussian (2209.03003 eq. 7); 0 iff one Euler step is exact.

        Along a trajectory x_t = a mu + V^1/2 xi with fixed xi, so the integrand is deterministic; Gauss-Legendre in t.
        """
        if self.num_components != 1:
            raise ValueError(f"straightness has a closed form for one Gaussian; this mixture has {self.num_components}")
        roots, weights = np.polynomial.legendre.leggauss(nodes)
        values, mean = self._eigen[0][0], self.means[0]

        def std(t):
            return jnp.sqrt(path.a(t) ** 2 * values[:, None] + path.b(t) ** 2)

        with jax.enable_x64(True):
            t, ends = jnp.asarray((roots + 1) / 2), jnp.asarray([0.0, 1.0])
            std_rate = jax.jvp(std, (t,), (jnp.ones_like(t),))[1]
            of_std = jnp.sum((jnp.diff(std(ends)) - std_rate) ** 2, axis=0)
            of_mean = np.sum(mean**2) * (jnp.diff(path.a(ends)) - path.da(t)) ** 2
            return float(np.asarray(of_std + of_mean) @ weights / 2)


def gaussian(mean, cov) -> GaussianMixture:
    """N(mean (D,), cov (D, D)); a scalar or (D,) cov is a variance per dimension."""
    mean = np.atleast_1d(np.asarray(mean, np.float64))
    cov = np.asarray(cov, np.float64)
    return GaussianMixture(np.ones(1), mean[None], (cov if cov.ndim == 2 else np.diag(np.broadcast_to(cov, mean.shape)))[None])


def mixture(weights, means, stds) -> GaussianMixture:
    """Mixture of isotropic Gaussians: weights (K,), means (K, D) or (K,) in one dimension, standard deviations () or (K,)."""
    means = np.asarray(means, np.float64)
    means = means[:, None] if means.ndim == 1 else means
    variances = np.broadcast_to(np.asarray(stds, np.float64), means.shape[:1]) ** 2
    return GaussianMixture(weights, means, variances[:, None, None] * np.eye(means.shape[1]))


def mix4(std: float = 0.25) -> GaussianMixture:
    """Four equal Gaussians at (+-1, +-1): the standard two-dimensional problem."""
    return mixture(np.ones(4), [(-1, -1), (-1, 1), (1, -1), (1, 1)], std)


def wasserstein2_squared(mean1, cov1, mean2, cov2) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64."""
    mean1, mean2 = (np.asarray(v, np.float64) for v in (mean1, mean2))
    cov1, cov2 = ((v + v.T) / 2 for v in (np.asarray(c, np.float64) for c in (cov1, cov2)))
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0.0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)
