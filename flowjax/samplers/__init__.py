"""Samplers: step(model, x, t, s, key, carry) -> (x, carry), one table, and the one driver that runs them."""

import jax
import jax.numpy as jnp

from flowjax import config
from flowjax.config import ConfigError
from flowjax.paths import Path
from flowjax.predictions import Model
from flowjax.samplers import adaptive, ddim, dpm, few_step, langevin, ode, sde
from flowjax.samplers.base import FLOWS, Sampler, fold_in, is_last, normal

# name -> settings -> Sampler
SAMPLERS = {
    "euler": ode.euler,
    "midpoint": ode.midpoint,
    "heun": ode.heun,
    "rk4": ode.rk4,
    "ddim": ddim.ddim,
    "ancestral": ddim.ancestral,
    "euler_maruyama": sde.euler_maruyama,
    "churn": sde.churn,
    "annealed_langevin": langevin.annealed_langevin,
    "predictor_corrector": langevin.predictor_corrector,
    "dpmpp_2m": dpm.dpmpp_2m,
    "dpmpp_2m_sde": dpm.dpmpp_2m_sde,
    "renoise": few_step.renoise,
    "flow_map": few_step.flow_map,
    "adaptive": adaptive.adaptive,
}


def sample(model: Model, x_init, key, times, sampler="heun", cond=None, return_trajectory: bool = False):
    """Run a sampler over the steps (times[i], times[i + 1]).

    model: unbound; guidance has wrapped it already. x_init: (B, ...) state at times[0], see `noise`. key: one key, or (B,)
    keys so that a row's noise depends on its own key only; step i uses fold_in(key, i). times: N + 1 times, decreasing
    from noise to data (increasing inverts the deterministic samplers); see flowjax.times.grid. sampler: a Sampler, or a name
    of SAMPLERS with its settings. cond: the condition of every call.

    Returns x at times[-1], in float32 or wider; with return_trajectory also all N + 1 states, (N + 1, B, ...).
    """
    sampler = sampler if isinstance(sampler, Sampler) else config.build(SAMPLERS, sampler, "sampler")
    x = jnp.asarray(x_init, jnp.promote_types(jnp.asarray(x_init).dtype, jnp.float32))
    times = jnp.asarray(times, x.dtype)
    if times.ndim != 1 or len(times) < 2:
        raise ConfigError(f"times has shape {times.shape}; valid: (N + 1,) for N >= 1 steps")
    model = model.bind(cond)

    def body(state, interval):
        x, carry, memory = state
        i, t, s = interval
        stepped, remembered = _remembering(model, memory)
        x, carry = sampler.step(stepped, x, t, s, fold_in(key, i), carry)
        return (x, carry, remembered[0] if remembered else memory), x if return_trajectory else None

    memory = model.memory.init(x) if model.memory else None
    intervals = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    (last, _, _), trajectory = jax.lax.scan(body, (x, sampler.init(x, times), memory), intervals)
    if return_trajectory:
        return last, jnp.concatenate([x[None], trajectory])
    return last


def _remembering(model, memory):
    """The model with its memory's state fixed during one step, and a list that receives the state of the next step.

    The first evaluation of a step writes it; the others of the same step read what the first one read. So within a step
    the model is a function of (x, t), as solvers of higher order require, and momentum advances once per step.
    """
    if model.memory is None:
        return model, []
    remembered = []

    def apply(x_t, t, cond, key):
        y, state = model.memory.apply(x_t, t, cond, key, memory)
        if not remembered:
            remembered.append(state)
        return y

    return model.replace(apply=apply), remembered


def noise(path: Path, key, shape, t, dtype=jnp.float32):
    """The state b(t) z at the start t of sampling, (B, ...); key: one key or (B,) keys.

    Exact where a(t) = 0; elsewhere it leaves out a(t) x, so b(t) / a(t) should be large against the data's scale.
    """
    z = normal(key, jax.ShapeDtypeStruct(shape, dtype))
    return path.b(jnp.asarray(t, dtype)) * z


def nfe(sampler: Sampler, model: Model, times) -> int:
    """Model calls of `sample` over `times`; a call that guidance doubles counts once."""
    if sampler.calls is None:
        raise ConfigError("an adaptive sampler decides its number of model calls as it runs")
    calls = sampler.calls * (len(times) - 1)
    end = jnp.asarray(times[-1], float)
    if sampler.ends_with_euler and model.prediction not in FLOWS and not model.path.b(end) > 0:
        calls -= sampler.calls - 1
    return calls + int(sampler.denoises and bool(is_last(model.path, end)))
