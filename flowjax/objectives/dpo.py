"""Diffusion-DPO (2311.12908 eq. 14) for any prediction, with the pair sharing its time and its noise.

Notation map: the paper's T omega(lambda) is folded into beta; e is the MEAN over dimensions of the squared error, and the
factor 1/2 is the authors' code's (the diffusers script has none: its beta is half of ours).

    e = mean_dims ||y - net(x_t, t)||^2 of winner (w) and loser (l), the trained net (th) and the frozen reference (ref)
    L = -log sigmoid( -(beta/2) [ (e_w^th - e_w^ref) - (e_l^th - e_l^ref) ] )

Form "velocity" measures e on the velocity, "eps" on the noise; eps with constant beta is velocity with beta (1 - t)^2 on the
rectified path. The paper draws separate noises for the pair; its code, and we, share one (less variance).
"""

import jax
import jax.numpy as jnp

from flowjax import predictions, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives.base import Objective, Player, mean_dims, same_meaning


def rollout(nets, batch, key, *, time="uniform"):
    """One t (B,) and one z for both members of each pair."""
    net = nets["net"]
    if "win" not in batch or "lose" not in batch:
        raise ConfigError("objective diffusion_dpo needs preference pairs (data.name = 'preferences'); the data has no win/lose")
    key_t, key_z = jax.random.split(key)
    win = batch["win"]
    return {
        **batch,
        "t": times.draw(key_t, win.shape[0], net.path, prediction=net.prediction, **keywords(time)),
        "z": jax.random.normal(key_z, win.shape, win.dtype),
    }


def error(net, x, z, t, cond, form: str):
    """(B,) mean over dimensions of the squared error of the prediction, measured on `form`."""
    x_t = net.path.perturb(x, z, t)
    y = predictions.target(net.path, net.prediction, x, z, t)
    scale = 1.0
    if form != net.prediction:
        scale = jnp.square(predictions.gain(net.path, form, t) / predictions.gain(net.path, net.prediction, t))
    return scale * mean_dims(jnp.square(y - net(x_t, t, cond)))


def loss(nets, batch, key, *, beta: float = 1000.0, form: str = "velocity", anchor: float = 0.0):
    """Preference loss; `anchor` adds that multiple of the winner's own error, which keeps e_w from rising.

    Metrics: accuracy (implicit; ties count half), margin (mean of the term inside the sigmoid), winner and loser drift
    e^th - e^ref. Dropout is off in both networks, so `key` is unused.
    """
    del key
    if form not in ("velocity", "eps"):
        raise ConfigError(f"objective.form = {form!r} is unknown; valid: velocity, eps")
    same_meaning(nets["reference"], nets["net"], "roles.reference", ("path",))
    z, t, cond = batch["z"], batch["t"], batch["cond"]

    def errors(role, side):
        return error(nets[role], batch[side], z, t, cond, form)

    win = errors("net", "win")
    drift_win = win - jax.lax.stop_gradient(errors("reference", "win"))
    drift_lose = errors("net", "lose") - jax.lax.stop_gradient(errors("reference", "lose"))
    inside = -0.5 * beta * (drift_win - drift_lose)
    value = jnp.mean(-jax.nn.log_sigmoid(inside)) + anchor * jnp.mean(win)
    metrics = {
        "accuracy": jnp.mean(0.5 * (1.0 + jnp.sign(inside))),
        "margin": jnp.mean(inside),
        "drift_win": jnp.mean(drift_win),
        "drift_lose": jnp.mean(drift_lose),
    }
    return value, metrics


OBJECTIVE = Objective({"net": "trained", "reference": "frozen"}, (Player("net", loss),), rollout)
