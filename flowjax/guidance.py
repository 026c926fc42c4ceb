"""Guidance: wraps a model into a model, so that samplers never see it.

One convention everywhere, that of Imagen, Stable Diffusion, DiT and EDM2:

    out = out_u + w (out_c - out_u)          w = 1 conditional (one call), w = 0 unconditional (one call)

Ho & Salimans (2207.12598) and LCM write 1 + w for our w. Combinations are linear in the network's output, hence the same
in x, eps, velocity or score, except where a docstring says otherwise. All channels are guided; every norm, standard
deviation and inner product is per sample, over all other dimensions. `scale` is a number or, for training targets, (B,).

A guided model has no null condition any more: guiding it twice is an error, not a square.
"""

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.paths import expand
from flowjax.predictions import Memory, Model, convert

_TINY = 1e-12


def cfg(model: Model, scale: float) -> Model:
    """Classifier-free guidance (2207.12598 eq. 6)."""
    if _equals(scale, 1):
        return _wrap(model, model.apply)
    null = _null(model, "cfg")
    if _equals(scale, 0):
        return _wrap(model, lambda x_t, t, cond, key: model.apply(x_t, t, null(cond), key))

    def apply(x_t, t, cond, key):
        return _mix(*_both(model, x_t, t, cond, key), scale)

    return _wrap(model, apply)


def interval(
    model: Model,
    scale: float,
    t_low: float = 0.0,
    t_high: float = 1.0,
    sigma_low: float | None = None,
    sigma_high: float | None = None,
) -> Model:
    """Guidance within t_low <= t <= t_high only, conditional outside (2404.07724); bounds may be noise levels b/a instead.

    Outside, the unconditional half is not computed. Every evaluation decides by its own t, also within one Heun step.
    """
    if (sigma_low is not None and t_low != 0.0) or (sigma_high is not None and t_high != 1.0):
        raise ConfigError("guidance.interval: give a bound as t or as sigma, not both")
    with jax.ensure_compile_time_eval():
        low = t_low if sigma_low is None else float(model.path.time_of_sigma(jnp.asarray(sigma_low, float)))
        high = t_high if sigma_high is None else float(model.path.time_of_sigma(jnp.asarray(sigma_high, float)))
    if not low < high:
        raise ConfigError(f"guidance.interval: lower bound t = {low} is not below upper bound t = {high}")
    if _equals(scale, 1):
        return _wrap(model, model.apply)
    _null(model, "interval")

    def apply(x_t, t, cond, key):
        inside = (t >= low) & (t <= high)

        def guided(_):
            out_c, out_u = _both(model, x_t, t, cond, key)
            # Samplers share one t; a batch of mixed times still gets each row right.
            return jnp.where(expand(inside, out_c), _mix(out_c, out_u, scale), out_c)

        return jax.lax.cond(jnp.any(inside), guided, lambda _: model.apply(x_t, t, cond, key), None)

    return _wrap(model, apply)


def rescale(model: Model, scale: float, phi: float = 0.7) -> Model:
    """CFG whose standard deviation is pulled back to the conditional one (2305.08891 eq. 14-16).

    Acts on the prediction that the network makes, and is not invariant to its kind. phi = 0 is CFG.
    """
    if _equals(scale, 1):
        return _wrap(model, model.apply)
    _null(model, "rescale")

    def apply(x_t, t, cond, key):
        out_c, out_u = _both(model, x_t, t, cond, key)
        out = _mix(out_c, out_u, scale)
        ratio = _std(out_c) / jnp.maximum(_std(out), _TINY)
        return phi * (out * ratio) + (1 - phi) * out

    return _wrap(model, apply)


def autoguidance(model: Model, scale: float, bad: Model) -> Model:
    """Guidance away from a worse version of the model itself, under the same condition (2406.02507 eq. 3).

    `bad` is a smaller or less trained network on the same path. Its prediction may be of another kind, converted to the
    model's: give both the same one where samplers evaluate at an end of the path.
    """
    if bad.path != model.path:
        raise ConfigError(f"guidance.bad is a model of the path {bad.path.name!r} and not of the guided one, {model.path.name!r}")
    if _equals(scale, 1):
        return _wrap(model, model.apply)

    def apply(x_t, t, cond, key):
        worse = bad.get(model.prediction, x_t, t, cond, key)
        return worse if _equals(scale, 0) else _mix(model.apply(x_t, t, cond, key), worse, scale)

    return _wrap(model, apply)


def apg(model: Model, scale: float, eta: float = 0.0, norm: float | None = None, momentum: float = 0.0) -> Model:
    """Adaptive projected guidance (2410.02416 alg. 1): the part of the update parallel to the prediction is damped.

    Lengths and angles are those of the x-prediction. The update D = x_c - x_u becomes D + momentum * (previous D), is
    shortened to at most `norm`, and its component along x_c is multiplied by eta. eta = 1 without the others is CFG.
    A (negative) momentum is carried from step to step by the sampling driver, and is zero in a single call.
    """
    if _equals(scale, 1):
        return _wrap(model, model.apply)
    _null(model, "apg")

    def guided(x_t, t, cond, key, previous):
        out_c, out_u = _both(model, x_t, t, cond, key)
        x_c = convert(model.path, model.prediction, "x", out_c, x_t, t)
        # dx/dy = 0 where b = 0: a velocity then has a guided value though x has none, so we project in units of y.
        slope = expand(_slope(model, model.prediction, "x", t), out_c)
        difference = out_c - out_u
        update = slope * difference
        if momentum:
            update = update + momentum * previous
            difference = difference + jnp.where(slope == 0, 0.0, momentum * previous / jnp.where(slope == 0, 1.0, slope))
        if norm is not None:
            difference = difference * jnp.minimum(1.0, norm / jnp.maximum(_norm(update), _TINY))
        direction = x_c / jnp.maximum(_norm(x_c), _TINY)
        parallel = _dot(difference, direction) * direction
        step = difference - parallel + eta * parallel
        return out_c + expand(jnp.asarray(scale) - 1, out_c) * step, update

    def apply(x_t, t, cond, key):
        return guided(x_t, t, cond, key, jnp.zeros_like(x_t))[0]

    return _wrap(model, apply, Memory(jnp.zeros_like, guided) if momentum else None)


def cfg_zero(model: Model, scale: float, zero_above: float = 1.0) -> Model:
    """CFG-Zero* (2503.18886 eq. 7): the unconditional velocity is first scaled by s = <v_c, v_u> / |v_u|^2.

    The velocity is 0 at t > zero_above ("zero-init"; the paper skips the first 4 % of the steps).
    """
    _null(model, "cfg_zero")

    def apply(x_t, t, cond, key):
        if _equals(scale, 1):
            v = model.get("velocity", x_t, t, cond, key)
        else:
            v_c, v_u = (
                convert(model.path, model.prediction, "velocity", y, x_t, t) for y in _both(model, x_t, t, cond, key)
            )
            v_u = _dot(v_c, v_u) / jnp.maximum(_dot(v_u, v_u), _TINY) * v_u
            v = _mix(v_c, v_u, scale)
        v = jnp.where(expand(t > zero_above, v), 0.0, v)
        return convert(model.path, "velocity", model.prediction, v, x_t, t)

    return _wrap(model, apply)


def classifier(model: Model, scale: float, log_prob) -> Model:
    """Classifier guidance (2105.05233 eq. 11): score + w grad_x log p(cond | x_t).

    log_prob(x_t, t, cond) -> (B,) log-probabilities of a classifier of noisy data. The model is left alone at a(t) = 0,
    where the gradient carries no information, and at b(t) = 0, where no score changes the velocity.
    """
    if _equals(scale, 0):
        return _wrap(model, model.apply)

    def apply(x_t, t, cond, key):
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t, cond)))(x_t)
        informative = (model.path.a(t) > 1e-6) & (model.path.b(t) > 0)
        slope = jnp.where(informative, _slope(model, "score", model.prediction, jnp.where(informative, t, 0.5)), 0.0)
        return model.apply(x_t, t, cond, key) + expand(scale * slope, x_t) * gradient

    return _wrap(model, apply)


def embedded(model: Model, scale: float) -> Model:
    """The scale as an input of a network that was distilled from guided ones (2210.03142, FLUX.1-dev): one call."""
    if not model.guidance_embed:
        raise ConfigError("guidance 'embedded' needs a network that takes the scale as an input (model.guidance_embed = True)")

    def apply(x_t, t, cond, key):
        scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), x_t.shape[:1])
        return model.apply(x_t, t, {**(cond or {}), "guidance": scales}, key)

    return _wrap(model, apply).replace(guidance_embed=False)


GUIDANCE = {
    "cfg": cfg,
    "interval": interval,
    "rescale": rescale,
    "autoguidance": autoguidance,
    "apg": apg,
    "cfg_zero": cfg_zero,
    "classifier": classifier,
    "embedded": embedded,
}


def _wrap(model, apply, memory=None):
    return model.replace(apply=apply, null=None, memory=memory)


def _null(model, name):
    if model.null is None:
        raise ConfigError(f"guidance {name!r} needs a model with a null condition (and one that is not guided already)")
    return model.null


def _both(model, x_t, t, cond, key):
    """(conditional, unconditional) outputs from one call on the doubled batch.

    The two copies of a row are neighbours, not half a batch apart, so that a batch sharded over devices stays in place.
    """
    pair = lambda u, v: jnp.stack([u, v], 1).reshape((-1,) + u.shape[1:])
    y = model.apply(pair(x_t, x_t), pair(t, t), jax.tree.map(pair, cond, model.null(cond)), key)
    y = y.reshape((-1, 2) + y.shape[1:])
    return y[:, 0], y[:, 1]


def _mix(out_c, out_u, scale):
    return out_u + expand(scale, out_c) * (out_c - out_u)


def _equals(scale, number):
    return isinstance(scale, (int, float)) and scale == number


def _slope(model, source, goal, t):
    """d goal / d source at fixed x_t, shape of t."""
    return convert(model.path, source, goal, jnp.ones_like(t), jnp.zeros_like(t), t)


def _dot(u, v):
    return jnp.sum(u * v, axis=tuple(range(1, u.ndim)), keepdims=True)


def _norm(u):
    return jnp.sqrt(_dot(u, u))


def _std(u):
    return jnp.std(u, axis=tuple(range(1, u.ndim)), keepdims=True)
