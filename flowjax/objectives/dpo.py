"""Preferences without rollouts: Diffusion-DPO (2311.12908 eq. 14) with its other links, and Diffusion-KTO (2404.04465).

Notation map: the papers' T omega(lambda) is folded into beta; e is the MEAN over dimensions of the squared error, and the
factor 1/2 is the DPO authors' code's (the diffusers script has none: its beta is half of ours).

    e = mean_dims ||y - net(x_t, t)||^2 of the trained net (th) and the frozen reference (ref);  g = -(beta / 2) (e^th - e^ref)
    DPO, of winner w and loser l:     L = link(g_w - g_l),         link(u) = -log sigmoid(u)
    KTO, of samples good or bad:      L = link(+-(g - q)),         link(u) = sigmoid(-u),   q = max(0, mean of g of mismatched rows)

g stands for beta log(p_th / p_ref). The link "squared" is IPO (2310.12036 eq. 17) times beta^2, whose optimum is g / beta = 1 / (2 beta)
of the difference; "hinge" is SLiC's (2305.10425). KTO's q is what the network has moved away from the reference whatever is asked:
the mean, over the whole batch and without gradient, of g with each row's condition replaced by its neighbour's.

Form "velocity" measures e on the velocity, "eps" on the noise; eps with constant beta is velocity with beta (1 - t)^2 on the
rectified path. The DPO paper draws separate noises for the pair; its code, and we, share one (less variance).
"""

import jax
import jax.numpy as jnp

from flowjax import predictions, times
from flowjax.config import ConfigError, keywords, lookup
from flowjax.objectives import groups
from flowjax.objectives.base import Objective, Player, mean_dims, same_meaning

# What a margin u costs: above 0 the preferred has gained on the other.
LINKS = {
    "log_sigmoid": lambda u: -jax.nn.log_sigmoid(u),
    "squared": lambda u: jnp.square(u - 0.5),
    "hinge": lambda u: jax.nn.relu(1.0 - u),
    "sigmoid": lambda u: jax.nn.sigmoid(-u),
}


def cost(link: str, margin, weight=1.0):
    """(mean of weight x link(margin), metrics): accuracy (implicit; ties count half) and margin, each row by its weight."""
    value = jnp.mean(weight * lookup(LINKS, link, "objective.link")(margin))
    return value, {"accuracy": jnp.mean(weight * 0.5 * (1.0 + jnp.sign(margin))), "margin": jnp.mean(weight * margin)}


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


def drift(nets, x, z, t, cond, form: str):
    """((B,) e^th, (B,) e^th - e^ref)."""
    if form not in ("velocity", "eps"):
        raise ConfigError(f"objective.form = {form!r} is unknown; valid: velocity, eps")
    same_meaning(nets["reference"], nets["net"], "roles.reference", ("path",))
    own = error(nets["net"], x, z, t, cond, form)
    return own, own - jax.lax.stop_gradient(error(nets["reference"], x, z, t, cond, form))


def loss(nets, batch, key, *, beta: float = 1000.0, form: str = "velocity", link: str = "log_sigmoid", anchor: float = 0.0):
    """Preference loss; `anchor` adds that multiple of the winner's own error, which keeps e_w from rising.

    Metrics: accuracy, margin (mean of the term inside the link), winner and loser drift e^th - e^ref; what was rolled out, where pairs
    were (objectives.online_dpo). Dropout is off in both networks, so `key` is unused.
    """
    del key
    if beta <= 0 or anchor < 0:
        raise ConfigError(f"objective.beta = {beta} should be positive, and objective.anchor = {anchor} not negative")
    z, t, cond, weight = batch["z"], batch["t"], batch["cond"], batch.get("weight", 1.0)
    win, drift_win = drift(nets, batch["win"], z, t, cond, form)
    _, drift_lose = drift(nets, batch["lose"], z, t, cond, form)
    value, metrics = cost(link, -0.5 * beta * (drift_win - drift_lose), weight)
    metrics |= {"drift_win": jnp.mean(weight * drift_win), "drift_lose": jnp.mean(weight * drift_lose)}
    if "rewards" in batch:
        metrics |= groups.told(batch)
    return value + anchor * jnp.mean(weight * win), metrics


def judged_rollout(nets, batch, key, *, time="uniform"):
    """Rows "x" with a mark "good": of pairs, all winners and then all losers, each pair with one t and one z. Each row's neighbour's
    condition as "other"."""
    if "win" in batch:
        drawn = rollout(nets, batch, key, time=time)
        twice = lambda v: jnp.concatenate([v, v])  # noqa: E731
        x = jnp.concatenate([batch["win"], batch["lose"]])
        good = jnp.arange(len(x)) < len(batch["win"])
        t, z, cond = jax.tree.map(twice, (drawn["t"], drawn["z"], batch["cond"]))
    elif "desirable" in batch:
        x, good, cond = batch["x"], batch["desirable"], batch["cond"]
        drawn = rollout(nets, {"win": x, "lose": x}, key, time=time)
        t, z = drawn["t"], drawn["z"]
    else:
        raise ConfigError("objective diffusion_kto needs preference pairs (data.name = 'preferences'), or examples with a mark 'desirable'")
    return {"x": x, "good": good, "t": t, "z": z, "cond": cond, "other": {k: jnp.roll(v, 1, axis=0) for k, v in cond.items()}}


def reference_point(nets, batch, key, *, beta: float = 1000.0, form: str = "velocity"):
    """Mean of g where each row is asked for what its neighbour was (mismatched, as in KTO's estimate of the divergence)."""
    _, moved = drift(nets, batch["x"], batch["z"], batch["t"], batch["other"], form)
    return {"reference_point": jnp.mean(-0.5 * beta * moved)}


def judged_loss(
    nets, batch, key, *, beta: float = 1000.0, form: str = "velocity", link: str = "sigmoid", desirable: float = 1.0, undesirable: float = 1.0
):
    """KTO; desirable, undesirable: the weights of good and bad rows (2402.01306 eq. 8), to be chosen by how many there are of each.

    Metrics: accuracy and margin, of a row its gain over the reference point with its sign; reference_point; the drift of good and of
    bad rows, each over all rows.
    """
    del key
    if beta <= 0:
        raise ConfigError(f"objective.beta = {beta} should be positive")
    if desirable <= 0 or undesirable <= 0:
        raise ConfigError(f"objective.desirable = {desirable} and objective.undesirable = {undesirable} should be positive: both teach")
    good, point = batch["good"], jnp.maximum(batch["measured"]["reference_point"], 0.0)
    _, moved = drift(nets, batch["x"], batch["z"], batch["t"], batch["cond"], form)
    margin = jnp.where(good, 1.0, -1.0) * (-0.5 * beta * moved - point)
    _, metrics = cost(link, margin)
    value, _ = cost(link, margin, jnp.where(good, desirable, undesirable))
    parts = {"drift_win": jnp.mean(jnp.where(good, moved, 0.0)), "drift_lose": jnp.mean(jnp.where(good, 0.0, moved))}
    return value, {**metrics, "reference_point": point, **parts}


ROLES = {"net": "trained", "reference": "frozen"}
OBJECTIVE = Objective(ROLES, (Player("net", loss),), rollout)
KTO = Objective(ROLES, (Player("net", judged_loss, measure=reference_point),), judged_rollout, judged=True)
