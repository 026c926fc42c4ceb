"""DPM-Solver++ and DDIM against the schedulers of diffusers 0.42, on their grids, with their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.paths import Path, rectified
from flowjax.predictions import Model
from flowjax.samplers import sample

pytestmark = pytest.mark.oracle
KEY = jax.random.key(0)


def network(numpy):
    """One smooth function for both libraries."""
    return lambda x, level: numpy.sin(2 * x) + 0.3 * x + level


@pytest.mark.parametrize("stochastic", [False, True])
def test_dpm_solver_pp_on_flow_sigmas(stochastic):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(9)
    sigmas = scheduler.sigmas.numpy()
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    state = torch.tensor(x)
    for i, t in enumerate(scheduler.timesteps):
        xi = torch.tensor(np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), x.shape)))
        output = network(torch)(state, float(sigmas[i]))
        state = scheduler.step(output, t, state, variance_noise=xi if stochastic else None).prev_sample
    model = Model(lambda x_t, t, cond, key: network(jnp)(x_t, t[:, None]), rectified(), "velocity")
    ours = sample(model, x, KEY, sigmas, "dpmpp_2m_sde" if stochastic else "dpmpp_2m")
    np.testing.assert_allclose(ours, state.numpy(), atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim(eta, prediction):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    betas = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)  # a = .07 at the start, not .006
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type=kind, **betas)
    scheduler.set_timesteps(8)
    levels = [1 - float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]  # our t, on a path with b^2 = t
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    state = torch.tensor(x)
    for i, t in enumerate(scheduler.timesteps):
        xi = torch.tensor(np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), x.shape)))
        output = network(torch)(state, levels[i])
        state = scheduler.step(output, t, state, eta=eta, variance_noise=xi if eta else None).prev_sample
    path = Path("ddpm", lambda t: jnp.sqrt(1 - t), lambda t: jnp.sqrt(t), lambda s: s**2 / (1 + s**2))
    model = Model(lambda x_t, t, cond, key: network(jnp)(x_t, t[:, None]), path, prediction)
    ours = sample(model, x, KEY, [*levels, 0.0], {"name": "ddim", "eta": eta})
    np.testing.assert_allclose(ours, state.numpy(), rtol=1e-4, atol=1e-4)
