"""The one train step: every method of flowjax goes through it.

    batch -> (latents, embeddings) -> rollout -> for each player: gradients over slices, update -> averages

State is one pytree. Randomness is a function of (seed, step): nothing random is saved, so a resumed run repeats the
uninterrupted one. The step is pure; the loop jits it with shardings and donation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from flowjax import conditions
from flowjax.config import ConfigError
from flowjax.models import sharding
from flowjax.objectives import BoundObjective
from flowjax.train import ema as ema_lib
from flowjax.train.roles import Role

Tree = Any


@flax.struct.dataclass
class State:
    """step: int32 count of finished steps; params[role]; opt[role of the player]; ema[name]."""

    step: jax.Array
    params: dict[str, Tree]
    opt: dict[str, Tree]
    ema: dict[str, Tree]


def step_key(seed: int, step):
    """The key of one train step. Initialisation uses branch 0 of the seed, training branch 1."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def rollout_key(seed: int, step):
    """Branch 0 of a step's key; branch i + 1 is player i's. A key that is folded must not also be used: fold_in(key, 1) is
    split(key)[1]."""
    return jax.random.fold_in(step_key(seed, step), 0)


def nets_of(objective: BoundObjective, roles: Mapping[str, Role], params, ema, frozen):
    """Role -> callable. "ema:<role>" roles take the average of their own name; extra frozen roles (vae) come along. Of a role
    with an adapter `frozen` holds what is adapted."""
    nets = {name: roles[name].net(p) for name, p in frozen.items() if roles[name].lora is None}
    whole = lambda of, p: roles[of].net(roles[of].whole(p, frozen.get(of)))  # noqa: E731
    for name, kind in objective.roles.items():
        if kind == "trained":
            nets[name] = whole(name, params[name])
        elif kind.startswith("ema:"):
            nets[name] = whole(kind.removeprefix("ema:"), ema[name])
    return nets


def encode(nets, batch):
    """Images -> latents and tokens -> embeddings, where a frozen autoencoder or text encoder takes part.

    The images stay as batch["image"] where a frozen image encoder takes part as well.
    """
    if "vae" in nets:
        pixels = {"image": batch["x"]} if "encoder" in nets else {}
        batch = {k: nets["vae"].encode(v) if k in ("x", "win", "lose") else v for k, v in batch.items()} | pixels
    if "text" in nets:
        batch = {**batch, "cond": conditions.embed(nets["text"], batch["cond"])}
    return batch


def prepare(objective, nets, batch, key, step):
    """Everything that happens to a batch before the losses, without gradients."""
    batch = objective.rollout(nets, {**encode(nets, batch), "step": step}, key)
    rows = lambda v: sharding.constrain(v, "batch", *(None,) * (v.ndim - 1)) if v.ndim else v  # noqa: E731
    return jax.lax.stop_gradient(jax.tree.map(rows, batch))


def slices(batch, count: int):
    """Split rows into `count` interleaved slices on a new leading axis; interleaving keeps every device's rows at home."""

    def one(v):
        if v.ndim == 0:
            return jnp.broadcast_to(v, (count,))
        v = v.reshape((v.shape[0] // count, count) + v.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(v, None, "batch", *(None,) * (v.ndim - 2))

    return jax.tree.map(one, batch)


def mean_of_slices(fn: Callable, batch, key, accumulate: int):
    """Mean in float32 of the tree fn(part, key) over `accumulate` slices of the batch, one after another."""

    def one(part, key):
        return jax.tree.map(lambda v: v.astype(jnp.float32) / accumulate, fn(part, key))

    if accumulate == 1:
        return one(batch, key)
    parts, keys = slices(batch, accumulate), jax.random.split(key, accumulate)
    first = jax.tree.map(lambda v: v[0], parts)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first, keys[0]))
    total, _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, one(*part)), None), zero, (parts, keys))
    return total


def gradients(loss_of: Callable, params, batch, key, accumulate: int):
    """(gradients, loss, metrics) of mean-reduced loss_of(params, batch, key), averaged over `accumulate` slices."""

    def grad(part, key):
        (value, metrics), g = jax.value_and_grad(loss_of, has_aux=True)(params, part, key)
        return g, value, metrics

    return mean_of_slices(grad, batch, key, accumulate)


def measured(player, nets, batch, key, accumulate: int = 1):
    """What a slice of the batch has to know of the whole: {} or {"measured": ...} (objectives.Player)."""
    if player.measure is None:
        return {}
    found = mean_of_slices(lambda part, key: player.measure(nets, part, key), batch, key, accumulate)
    return {"measured": jax.lax.stop_gradient(found)}


def make_step(
    objective: BoundObjective,
    roles: Mapping[str, Role],
    transforms: Mapping[str, optax.GradientTransformation],
    averages: Mapping[str, tuple[Callable, str]],
    *,
    seed: int,
    accumulate: int = 1,
    every: Mapping[str, int] | None = None,
    updates: Mapping[str, int] | None = None,
    mesh=None,
    rules=None,
) -> Callable:
    """step(state, frozen, batch) -> (state, metrics).

    transforms: optimizer by player role; averages: name -> (decay(n), role); every: overrides of Player.every; updates: how many
    updates a player makes in turn with one rollout, each on a slice of its own; metrics are their mean. A player whose
    loss or gradients are not finite leaves the whole state as it was and raises the flag metrics["finite"][role], a bool per
    parameter leaf (in tree order; the last entry is the loss), so that the loop can name the culprits without blocking.
    """
    updates = {p.role: (updates or {}).get(p.role, 1) for p in objective.players}
    if objective.whole and max(accumulate, *updates.values()) > 1:
        names = {"accumulate": accumulate} | {f"roles.{role}.updates": n for role, n in updates.items()}
        name, count = max(names.items(), key=lambda item: item[1])
        raise ConfigError(f"{name} = {count}: this objective compares the rows of a batch with each other, so it cannot be sliced; use 1")
    every = {p.role: (every or {}).get(p.role, p.every) for p in objective.players}

    def update(player, state, frozen, batch, key):
        role = player.role
        whole = measured(player, nets_of(objective, roles, state.params, state.ema, frozen), batch, key, accumulate)

        def loss_of(p, part, key):
            nets = nets_of(objective, roles, {**state.params, role: p}, state.ema, frozen)
            return player.loss(nets, {**part, **whole}, key)

        grads, value, metrics = gradients(loss_of, state.params[role], batch, key, accumulate)
        finite = jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)] + [jnp.isfinite(value)])
        updates, opt = transforms[role].update(grads, state.opt[role], state.params[role])
        params = optax.apply_updates(state.params[role], updates)
        metrics = {"loss": value, **metrics, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        return {**state.params, role: params}, {**state.opt, role: opt}, metrics, finite

    def in_turn(player, state, frozen, batch, key):
        count = updates[player.role]
        if count == 1:
            return update(player, state, frozen, batch, key)

        def one(moved, part):
            *moved, metrics, finite = update(player, state.replace(params=moved[0], opt=moved[1]), frozen, *part)
            return tuple(moved), (metrics, finite)

        parts = slices(batch, count), jax.random.split(key, count)
        moved, (metrics, finite) = jax.lax.scan(one, (state.params, state.opt), parts)
        return *moved, jax.tree.map(lambda v: jnp.mean(v, 0), metrics), jnp.all(finite, 0)

    def body(state: State, frozen, batch):
        key = step_key(seed, state.step)
        start = state
        nets = nets_of(objective, roles, state.params, state.ema, frozen)
        batch = prepare(objective, nets, batch, rollout_key(seed, state.step), state.step)
        metrics, finite = {}, {}
        for i, player in enumerate(objective.players):
            key_player = jax.random.fold_in(key, i + 1)

            def act(state=state, player=player, key=key_player):
                return in_turn(player, state, frozen, batch, key)

            if every[player.role] == 1:
                params, opt, said, ok = act()
            else:
                silent = jax.eval_shape(act)

                def rest(state=state, silent=silent):
                    quiet = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), silent[2])
                    return state.params, state.opt, quiet, jnp.ones(silent[3].shape, bool)

                params, opt, said, ok = jax.lax.cond(state.step % every[player.role] == 0, act, rest)
            state = state.replace(params=params, opt=opt)
            prefix = "" if len(objective.players) == 1 else f"{player.role}/"
            metrics |= {prefix + k: v for k, v in said.items()}
            finite[player.role] = ok
        n = (state.step + 1).astype(jnp.float32)
        ema = {k: ema_lib.update(state.ema[k], state.params[of], decay(n)) for k, (decay, of) in averages.items()}
        # XLA writes a cheap scalar anew into whatever reads it, here every leaf of the state, and this one has a term for every leaf: the code
        # would grow with their square. It does not do that with roots.
        bad = jnp.sqrt(jnp.sum(~jnp.concatenate(list(finite.values())), dtype=jnp.float32))
        good = bad == 0
        state = jax.tree.map(lambda new, old: jnp.where(good, new, old), state.replace(ema=ema), start)
        return state.replace(step=start.step + 1), {**metrics, "finite": finite}

    def step(state, frozen, batch):
        if mesh is None:
            return body(state, frozen, batch)
        with sharding.use(mesh, rules or sharding.RULES):
            return body(state, frozen, batch)

    return step
