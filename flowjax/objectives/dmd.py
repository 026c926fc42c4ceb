"""Distribution matching distillation, DMD 2311.18828 and DMD2 2405.14867, for any path and prediction.

Two networks are trained: the generator `net`, a few-step student, and `fake`, which learns the flow of what the generator makes now.

    generator: x_in at one of the student's times tau, x = x_hat of net(x_in, tau);  x_t = a x + b z at a random t
    g = (D_fake(x_t) - D_teacher(x_t)) / mean |x - D_teacher(x_t)|            per example, without gradient
    L_net = 1/2 mean_dims || x - sg(x - g) ||^2                               so that dL/dx = g / dims
    L_fake = flow matching on sg(x)

D is the x-prediction; D_fake - D_teacher is (b^2 / a) times the difference of the scores, so L_net follows the gradient of
KL(p_fake,t || p_teacher,t). Without the norm the papers' factors of a and sigma differ; they agree on paths with a = 1. Guidance wraps the teacher and never the fake.

One step: tau = 1 and x_in = z. Several (DMD2 section 4.5): the student's own trajectory is simulated without gradient, each step
followed by fresh noise, and every example takes one of its states (the authors draw one place for the whole batch). On couplings,
`regression` adds DMD's mean_dims || net(z, 1) - x ||^2 of the pair. Both networks are meant to begin as the teacher; roles.net.every = 5
is DMD2's pace. Sample the student with sampler "renoise" and `steps` steps.

`distribution_matching_gan` adds DMD2's third player, a discriminator of what the generator makes and the data (flowjax.objectives.adversarial):

    L_net += adversarial_weight L_fool            L_discriminator = L_D            both at times of their own

The authors' is a head on the features of their fake network and trained with it; here it is a network of its own, which may begin as the
teacher too.
"""

import jax
import jax.numpy as jnp

from flowjax import times
from flowjax.config import ConfigError, keywords
from flowjax.objectives import flow_matching
from flowjax.objectives.adversarial import discriminating, fooling, noises
from flowjax.objectives.base import Objective, Player, guided, mean_dims, same_meaning
from flowjax.paths import expand


def rollout(nets, batch, key, *, steps: int = 1, grid="uniform", time="uniform", fake_time="uniform"):
    """Draw what both players need: the student's input x_in at tau, and times and noises of their own.

    steps, grid: the student's, as it will be sampled. time, fake_time: sections of flowjax.times for the times at which the
    distributions are compared, and at which the fake network is trained.
    """
    net, fake, x, cond = nets["net"], nets["fake"], batch["x"], batch["cond"]
    for name in ("fake", "teacher"):
        same_meaning(nets[name], net, f"roles.{name}", ("path",))
    if steps < 1:
        raise ConfigError(f"objective.steps = {steps} should be at least 1")
    taus = jnp.asarray(times.grid(steps, net.path, prediction=net.prediction, **keywords(grid))[:-1], jnp.float32)
    key_in, key_pick, key_t, key_z, key_fake_t, key_fake_z = jax.random.split(key, 6)
    noise = jax.random.normal(key_in, (steps, *x.shape), x.dtype)

    def walk(state, following):
        tau, after, xi = following
        return net.path.perturb(net.get("x", state, tau, cond), xi, after), state

    first = expand(net.path.b(taus[:1]), x) * noise[0]
    last, before = jax.lax.scan(walk, first, (taus[:-1], taus[1:], noise[1:]))
    pick = jax.random.randint(key_pick, x.shape[:1], 0, steps)
    states = jnp.concatenate([before, last[None]])
    n = x.shape[0]
    return {
        **batch,
        "x_in": states[pick, jnp.arange(n)], "tau": taus[pick],
        "t": times.draw(key_t, n, net.path, prediction=nets["teacher"].prediction, **keywords(time)),
        "z_t": jax.random.normal(key_z, x.shape, x.dtype),
        "fake_t": times.draw(key_fake_t, n, net.path, prediction=fake.prediction, **keywords(fake_time)),
        "fake_z": jax.random.normal(key_fake_z, x.shape, x.dtype),
    }  # fmt: skip


def fake_loss(nets, batch, key, *, fake_weight="none"):
    """Flow matching of `fake` on what the generator makes; fake_weight is a section of flowjax.weights."""
    made = jax.lax.stop_gradient(nets["net"].get("x", batch["x_in"], batch["tau"], batch["cond"]))
    own = {"x": made, "z": batch["fake_z"], "t": batch["fake_t"], "cond": batch["cond"]}
    return flow_matching.loss({"net": nets["fake"]}, own, key, weight=fake_weight)


def generator_loss(nets, batch, key, *, guidance="none", normalise: bool = True, regression: float = 0.0):
    """The generator's loss. Metrics: the norm of g per dimension, and the error of the regression."""
    return _matched(nets, batch, key, guidance, normalise, regression)[:2]


def _matched(nets, batch, key, guidance, normalise, regression):
    """(loss, metrics, x)."""
    net, fake, teacher, cond, t = nets["net"], nets["fake"], nets["teacher"], batch["cond"], batch["t"]
    x = net.get("x", batch["x_in"], batch["tau"], cond, key)
    x_t = net.path.perturb(jax.lax.stop_gradient(x), batch["z_t"], t)
    real = guided(teacher, guidance).get("x", x_t, t, cond)
    g = fake.get("x", x_t, t, cond) - real
    if normalise:
        scale = mean_dims(jnp.abs(jax.lax.stop_gradient(x) - real))
        g = jnp.where(expand(scale > 0, g), g / expand(jnp.maximum(scale, 1e-12), g), 0.0)
    g = jax.lax.stop_gradient(g)
    value = 0.5 * jnp.mean(mean_dims(jnp.square(x - jax.lax.stop_gradient(x - g))))
    metrics = {"gradient": jnp.sqrt(jnp.mean(mean_dims(jnp.square(g))))}
    if regression:
        if "z" not in batch:
            raise ConfigError("objective.regression needs couplings (tools.make_couplings) as data")
        # From pure noise, or where that does not tell the network's x from the latest time that does.
        latest = jnp.full_like(t, times.interval(net.path, net.prediction)[1])
        start = net.path.perturb(batch["x"], batch["z"], latest)
        error = jnp.mean(mean_dims(jnp.square(net.get("x", start, latest, cond, key) - batch["x"])))
        value, metrics["regression"] = value + regression * error, error
    elif "z" in batch:
        raise ConfigError("the data are couplings, which this objective uses with objective.regression > 0 only")
    return value, metrics, x


def gan_rollout(nets, batch, key, *, steps: int = 1, grid="uniform", time="uniform", fake_time="uniform", gan_time=None):
    """`rollout`, and what the discriminator's images are noised by; gan_time: a section of flowjax.times, by default uniform."""
    key, key_gan = jax.random.split(key)
    batch = rollout(nets, batch, key, steps=steps, grid=grid, time=time, fake_time=fake_time)
    return batch | noises(nets, batch["x"], key_gan, gan_time)


def gan_generator_loss(nets, batch, key, *, guidance="none", normalise: bool = True, regression: float = 0.0,
                       adversarial: str = "nonsaturating", adversarial_weight: float = 3e-3):
    """The generator's loss with L_fool, which is metric `adversarial`."""
    value, metrics, x = _matched(nets, batch, key, guidance, normalise, regression)
    adversary = fooling(nets, batch, x, adversarial)
    return value + adversarial_weight * adversary, {**metrics, "adversarial": adversary}


def discriminator_loss(nets, batch, key, *, adversarial: str = "nonsaturating"):
    """The discriminator's loss. Metrics: the mean logits of data and of what is made."""
    return discriminating(nets, batch, key, adversarial)


OBJECTIVE = Objective(
    {"net": "trained", "fake": "trained", "teacher": "frozen"}, (Player("fake", fake_loss), Player("net", generator_loss)), rollout,
    coupled=True,
)  # fmt: skip
GAN = Objective(
    {**OBJECTIVE.roles, "discriminator": "trained"},
    (Player("fake", fake_loss), Player("discriminator", discriminator_loss), Player("net", gan_generator_loss)), gan_rollout, coupled=True,
)  # fmt: skip
