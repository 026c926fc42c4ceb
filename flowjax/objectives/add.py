"""Adversarial diffusion distillation, ADD 2311.17042 and LADD 2403.12015: a few-step student against a discriminator.

    x_in = a x + b z of the data at one of the student's `steps` times tau;  x_hat = x-prediction of net(x_in, tau)
    L_net           = L_fool(x_hat) + distill E a(t) mean_dims || x_hat - sg D_teacher(x_t) ||^2,   x_t = a x_hat + b z
    L_discriminator = L_D(x, x_hat)                                                            (flowjax.objectives.adversarial)

ADD has distill = 2.5 and judges clean images; LADD has no distillation term (distill = 0; roles.teacher is then left out) and
judges noisy ones by a teacher's features, at times of the law gan_time. a(t) is the "exponential" one of ADD's weights. Guidance
wraps the teacher.
Sample the student with sampler "renoise" and `steps` steps.

With roles.encoder, a frozen image encoder, ADD's discriminator judges by its tokens, as in the paper, which conditions it as well and
penalises its gradient: not here. LADD's has a head on every layer if model.projector.layer names all of them; the images that the teacher
makes, on which the paper trains, are data like others (tools.make_images).
"""

import jax
import jax.numpy as jnp

from flowjax import times
from flowjax.config import ConfigError, keywords
from flowjax.objectives.adversarial import discriminating, fooling, noises
from flowjax.objectives.base import Objective, Player, guided, mean_dims, same_meaning


def rollout(nets, batch, key, *, steps: int = 4, grid="uniform", time=None, gan_time=None):
    """Draw the student's input x_in at tau, and times and noises of the teacher and of the discriminator.

    steps, grid: the student's, as it will be sampled. time, gan_time: sections of flowjax.times, by default uniform, for the teacher
    and for a discriminator of noisy images.
    """
    net, x, n = nets["net"], batch["x"], len(batch["x"])
    if steps < 1:
        raise ConfigError(f"objective.steps = {steps} should be at least 1")
    if time is not None and "teacher" not in nets:
        raise ConfigError(f"objective.time = {time!r} is when roles.teacher looks, and there is none")
    taus = jnp.asarray(times.grid(steps, net.path, prediction=net.prediction, **keywords(grid))[:-1], jnp.float32)
    key_pick, key_in, key_t, key_z, key_gan = jax.random.split(key, 5)
    tau = taus[jax.random.randint(key_pick, (n,), 0, steps)]
    taught_by = nets.get("teacher", net).prediction
    return {
        **batch,
        "x_in": net.path.perturb(x, jax.random.normal(key_in, x.shape, x.dtype), tau), "tau": tau,
        "t": times.draw(key_t, n, net.path, prediction=taught_by, **keywords(time or "uniform")),
        "z_t": jax.random.normal(key_z, x.shape, x.dtype),
        **noises(nets, x, key_gan, gan_time),
    }  # fmt: skip


def student_loss(nets, batch, key, *, distill: float = 2.5, guidance="none", adversarial: str = "hinge"):
    """The student's loss. Metrics: its two terms, without the weight."""
    net, t, cond = nets["net"], batch["t"], batch["cond"]
    if bool(distill) != ("teacher" in nets):
        raise ConfigError(f"objective.distill = {distill} and roles.teacher go together: both or neither")
    x = net.get("x", batch["x_in"], batch["tau"], cond, key)
    value = fooling(nets, batch, x, adversarial)
    metrics = {"adversarial": value}
    if distill:
        teacher = nets["teacher"]
        same_meaning(teacher, net, "roles.teacher", ("path",))
        goal = guided(teacher, guidance).get("x", net.path.perturb(x, batch["z_t"], t), t, cond)
        error = jnp.mean(net.path.a(t) * mean_dims(jnp.square(x - jax.lax.stop_gradient(goal))))
        value, metrics["distillation"] = value + distill * error, error
    elif guidance != "none":
        raise ConfigError("objective.guidance guides roles.teacher, which objective.distill = 0 leaves out")
    return value, metrics


def discriminator_loss(nets, batch, key, *, adversarial: str = "hinge"):
    """The discriminator's loss. Metrics: the mean logits of data and of what is made."""
    return discriminating(nets, batch, key, adversarial)


OBJECTIVE = Objective(
    {"net": "trained", "discriminator": "trained", "teacher": "optional", "encoder": "optional"},
    (Player("discriminator", discriminator_loss), Player("net", student_loss)), rollout,
    {"teacher": "denoiser", "encoder": "image_encoder"}, reads={"discriminator": "encoder"},
)  # fmt: skip
