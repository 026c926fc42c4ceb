"""Flow matching / diffusion training on any path, prediction, time law and weight.

Sources: 2209.03003 and 2210.02747 (rectified flow, flow matching), 2006.11239 (eps), 2202.00512 (v), 2206.00364 (EDM F).
Notation map: ours is t = 0 data, t = 1 noise; the first two papers run time the other way (v = -v_theirs).

    t ~ p(t),  z ~ N(0, I),  x_t = a x + b z,  y = c x + d z,    L = E omega(t) mean_dims ||net(x_t, t) - y||^2

On couplings, data that bring along the z which a network made each x from (tools.make_couplings), this is reflow (2209.03003),
and at t = 1 alone (time "steps") the distillation of a one-step student (2101.02388; InstaFlow 2309.06380). InstaFlow's second stage
compares the x of the pair with the network's in the features of a frozen network (role "perceptual", optional):

    L = E [ squares omega(t) mean_dims ||net(x_t, t) - y||^2 + perceptual_weight d(x, x_hat(x_t, t)) ]

With `prior` on a mixture that marks rows (data.prior) it is DreamBooth's loss with prior preservation (2208.12242):
the mean over the few images of a subject plus `prior` times the mean over images of its class, which the network made before.
"""

import jax
import jax.numpy as jnp

from flowjax import predictions, times, weights
from flowjax.config import ConfigError, keywords
from flowjax.objectives.base import Objective, Player, drop_condition, mean_dims, perceptual_error


def rollout(nets, batch, key, *, time="uniform", label_drop: float = 0.0, prior: float = None):
    """Draw t (B,), z like x where the data bring none, and drop conditions. `time` is a section of flowjax.times.

    prior: with batch["prior"] (B,), the weight of the marked rows' mean beside that of the others, as factors batch["share"]
    (B,) of the rows in the mean of the whole batch, which are therefore right for its slices as well.
    """
    net = nets["net"]
    key_t, key_z, key_drop = jax.random.split(key, 3)
    x = batch["x"]
    if "perceptual" in nets and "z" not in batch:
        raise ConfigError("roles.perceptual compares what is made of a noise with what should be: the data should be couplings (tools.make_couplings)")
    if "z" in batch and batch["z"].shape != x.shape:
        raise ConfigError(f"the couplings' noise has shape {batch['z'].shape[1:]} and what the network sees {x.shape[1:]}: they were made in another space")
    return {
        **batch,
        "t": times.draw(key_t, x.shape[0], net.path, prediction=net.prediction, **keywords(time)),
        "z": batch["z"] if "z" in batch else jax.random.normal(key_z, x.shape, x.dtype),
        "cond": drop_condition(net, batch["cond"], key_drop, label_drop),
        **({} if prior is None else {"share": shares(batch["prior"], prior)}),
    }


def shares(marked, prior: float):
    """Factors (B,) with which the mean of all rows is the mean of the rows that are not marked plus `prior` times that of the
    marked."""
    if prior < 0:
        raise ConfigError(f"objective.prior = {prior} should not be negative")
    count = jnp.sum(marked)
    return marked.size * jnp.where(marked, prior / jnp.maximum(count, 1), 1 / jnp.maximum(marked.size - count, 1))


def loss(nets, batch, key, *, weight="none", perceptual_weight: float = 0.0, squares: float = 1.0):
    """Weighted regression; `weight` is a section of flowjax.weights. Metric `mse` is unweighted.

    perceptual_weight, squares: of the distance by roles.perceptual, and of the regression beside it.
    """
    net, x_t = nets["net"], noisy(nets["net"], batch)
    output = net(x_t, batch["t"], batch["cond"], key)
    value, metrics = regression(net, batch, output, weight)
    if squares != 1 and not perceptual_weight:
        raise ConfigError(f"objective.squares = {squares} weighs the regression beside objective.perceptual_weight, which is 0")
    x_hat = predictions.convert(net.path, net.prediction, "x", output, x_t, batch["t"]) if perceptual_weight else output
    seen, said = perceptual_error(nets, perceptual_weight, batch["x"], x_hat)
    return squares * value + jnp.mean(batch.get("share", 1.0) * seen), metrics | said


def noisy(net, batch):
    """x_t of the batch, what the network is called with."""
    return net.path.perturb(batch["x"], batch["z"], batch["t"])


def regression(net, batch, output, weight):
    """(loss, metrics) of the network's output at `noisy`."""
    y = predictions.target(net.path, net.prediction, batch["x"], batch["z"], batch["t"])
    return weighted(net, batch["t"], output, y, weight, batch.get("share", 1.0))


def weighted(net, t, output, y, weight, share=1.0):
    """(loss, metrics) of the network's output at t (B,), whose goal is y; share: factors of the rows."""
    error = mean_dims(jnp.square(output - y))
    omega = weights.loss_weight(weight, net.path, net.prediction, t)
    return jnp.mean(share * omega * error), {"mse": jnp.mean(error)}


OBJECTIVE = Objective({"net": "trained", "perceptual": "optional"}, (Player("net", loss),), rollout, coupled=True)
