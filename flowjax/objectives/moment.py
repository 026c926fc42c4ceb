"""Moment matching distillation in a few steps, 2406.04103, in its alternating and its parameter-space form, for any path and prediction.

`moment_matching`: two networks are trained: the student `net`, whose x_hat(x_t, t) is a sample and not a mean, and `auxiliary`, which learns what its
samples are on average.

    x_t = a x + b z of the data;  x~ = x_hat of net(x_t, t), x_s ~ q(x_s | x_t, x~), both without gradient;  s < t < s + 1/steps
    L_auxiliary = E omega(s) mean_dims [ || sg x_hat(x_t) - D_auxiliary(x_s) ||^2 + || D_auxiliary(x_s) - D_teacher(x_s) ||^2 ]
    L_net       = E omega(s) mean_dims [ x_hat(x_t) sg( D_auxiliary(x_s) - D_teacher(x_s) ) ]

D is the x-prediction. The best auxiliary is halfway between E[x_hat | x_s] and D_teacher, so the student's gradient is half of the
first moment's error at x_s, and 0 where E[x_hat | x_s] is the teacher's. L_net itself may have any sign. Guidance wraps the teacher.
The paper turns to the two losses in alternate steps and on batches of their own; here both follow each other in a step. Both networks are
meant to begin as the teacher. Sample the student with sampler "ancestral" and `steps` steps.

`parameter_moment_matching` has no auxiliary: the moments that are matched are those of the gradient of the teacher's own loss, by its
parameters theta, which is 0 where E[x_hat | x_s] is the teacher's.

    L_net = || E G ||^2,    G = d/d theta  omega(s) mean_dims || x_hat(x_t) - D_teacher(x_s; theta) ||^2,    x_s without gradient

estimated by the inner product of the mean gradients of the two halves of a batch, which are independent. The paper weighs the parameters
by Adam's second moments of the teacher's training, which no export holds; here they all weigh the same.
"""

import jax
import jax.numpy as jnp
import optax

from flowjax import times, weights
from flowjax.config import ConfigError, keywords
from flowjax.objectives.base import Objective, Player, guided, mean_dims, same_meaning
from flowjax.paths import expand


def rollout(nets, batch, key, *, steps: int = 8, time="uniform", guidance="none"):
    """Draw s of the law `time` (a section of flowjax.times), t up to 1 / steps of the way later, and x_s after a step of the student.

    steps: of the student, as it will be sampled. guidance: a section of flowjax.guidance that wraps the teacher. What both players ask
    of networks that are not theirs is asked here, once: x_hat(x_t) as batch["made"], D_teacher(x_s) as batch["taught"].
    """
    batch = states(nets, batch, key, steps=steps, time=time)
    return {**batch, "taught": guided(nets["teacher"], guidance).get("x", batch["x_s"], batch["s"], batch["cond"])}


def states(nets, batch, key, *, steps: int = 8, time="uniform"):
    """`rollout` without the teacher."""
    net, x, cond, n = nets["net"], batch["x"], batch["cond"], len(batch["x"])
    for name in nets.keys() & {"auxiliary", "teacher"}:
        same_meaning(nets[name], net, f"roles.{name}", ("path",))
    if steps < 1:
        raise ConfigError(f"objective.steps = {steps} should be at least 1")
    key_s, key_t, key_z, key_xi = jax.random.split(key, 4)
    # s from where the teacher's velocity tells x and z, below the last of the student's times.
    latest = times.interval(net.path, net.prediction)[1]
    s = times.draw(key_s, n, net.path, prediction=nets["teacher"].prediction, **keywords(time))
    s = jnp.minimum(s, jnp.float32(latest - 1e-3))
    t = jnp.minimum(s + jnp.maximum(jax.random.uniform(key_t, (n,)) / steps, 1e-3), latest)
    x_t = net.path.perturb(x, jax.random.normal(key_z, x.shape, x.dtype), t)
    std = jnp.sqrt(net.path.posterior_variance(t, s))
    made = net.get("x", x_t, t, cond)
    x_s = net.path.posterior_mean(x_t, made, t, s) + expand(std, x) * jax.random.normal(key_xi, x.shape, x.dtype)
    return {**batch, "t": t, "s": s, "x_t": x_t, "x_s": x_s, "made": made}


def auxiliary_loss(nets, batch, key, *, weight="none"):
    """The auxiliary's loss. `weight` is a section of flowjax.weights, for errors of x.

    Metric `gap`: the root mean square of D_auxiliary - D_teacher.
    """
    omega = weights.loss_weight(weight, nets["net"].path, "x", batch["s"])
    guess = nets["auxiliary"].get("x", batch["x_s"], batch["s"], batch["cond"], key)
    apart = mean_dims(jnp.square(guess - batch["taught"]))
    value = jnp.mean(omega * (mean_dims(jnp.square(batch["made"] - guess)) + apart))
    return value, {"gap": jnp.sqrt(jnp.mean(apart))}


def student_loss(nets, batch, key, *, weight="none"):
    """The student's loss; its gradient is what matters."""
    omega = weights.loss_weight(weight, nets["net"].path, "x", batch["s"])
    gap = nets["auxiliary"].get("x", batch["x_s"], batch["s"], batch["cond"]) - batch["taught"]
    made = nets["net"].get("x", batch["x_t"], batch["t"], batch["cond"], key)
    return jnp.mean(omega * mean_dims(made * jax.lax.stop_gradient(gap))), {}


def parameter_loss(nets, batch, key, *, guidance="none", weight="none"):
    """The student's loss without an auxiliary. guidance: a section of flowjax.guidance that wraps the teacher, at all its parameters.

    Its value may be negative, as an estimate of a square of which it has two halves. Metric `gap`: as the auxiliary's, of x_hat itself.
    """
    net, teacher, n = nets["net"], nets["teacher"], len(batch["x_t"])
    if n % 2:
        raise ConfigError(f"batch_size = {n} should be even: the two halves of a batch are compared")
    omega = weights.loss_weight(weight, net.path, "x", batch["s"])
    made = net.get("x", batch["x_t"], batch["t"], batch["cond"], key)

    def error(params, rows):
        taught = guided(teacher.of(params), guidance).get("x", batch["x_s"][rows], batch["s"][rows], jax.tree.map(lambda v: v[rows], batch["cond"]))
        apart = mean_dims(jnp.square(made[rows] - taught))
        return jnp.mean(omega[rows] * apart), jnp.mean(apart)

    by_parameters = jax.grad(error, has_aux=True)
    (one, near), (other, far) = (by_parameters(teacher.params, rows) for rows in (slice(0, n // 2), slice(n // 2, n)))
    return optax.tree.vdot(one, other), {"gap": jnp.sqrt((near + far) / 2)}


OBJECTIVE = Objective(
    {"net": "trained", "auxiliary": "trained", "teacher": "frozen"}, (Player("auxiliary", auxiliary_loss), Player("net", student_loss)),
    rollout,
)  # fmt: skip
PARAMETERS = Objective({"net": "trained", "teacher": "frozen"}, (Player("net", parameter_loss),), states, whole=True)
