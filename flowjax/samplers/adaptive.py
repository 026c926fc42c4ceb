"""The probability-flow ODE solved to a tolerance by diffrax, with the step size of the whole batch under control.

Give it the grid [1, 0] for one solve of the whole trajectory. The error is a mean over the batch, so a row depends on its
neighbours within the tolerance. The solver calls the model at both ends of the interval: a prediction that leaves the
velocity undetermined at b = 0 must stop before it (flowjax.times.interval).
"""

import functools

from flowjax import config
from flowjax.config import ConfigError
from flowjax.samplers.base import Sampler

SOLVERS = {"tsit5": "Tsit5", "dopri5": "Dopri5", "dopri8": "Dopri8", "heun": "Heun"}


def adaptive_step(model, x, t, s, key, carry, *, solver, rtol, atol, max_steps):
    """x_s from x_t by an adaptive solve."""
    diffrax = _diffrax()
    if model.memory is not None:
        raise ConfigError("sampler 'adaptive' has no fixed steps, which guidance with momentum needs; use another sampler")
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, args: model.get("velocity", x, t)),
        getattr(diffrax, SOLVERS[solver])(),
        t0=t,
        t1=s,
        dt0=None,
        y0=x,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        saveat=diffrax.SaveAt(t1=True),
        max_steps=max_steps,
    )
    return solution.ys[0], carry


def _diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise ConfigError("sampler 'adaptive' needs the package diffrax: pip install diffrax") from error
    return diffrax


def adaptive(solver: str = "tsit5", rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 4096) -> Sampler:
    """Adaptive Runge-Kutta; more than max_steps steps in one interval is an error."""
    config.lookup(SOLVERS, solver, "sampler.solver")
    _diffrax()
    settings = dict(solver=solver, rtol=rtol, atol=atol, max_steps=max_steps)
    return Sampler(functools.partial(adaptive_step, **settings), calls=None)
