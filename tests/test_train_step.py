"""The train step: accumulation, players, randomness, the non-finite guard, one compilation, donation."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flowjax import models, objectives, paths
from flowjax.models import sharding
from flowjax.objectives.base import Objective, Player
from flowjax.train import ema, mesh as mesh_lib, optim
from flowjax.train import step as step_lib
from flowjax.train.assembly import Run
from flowjax.train.roles import Role
from train_runs import same, tiny

SGD = {"name": "sgd", "momentum": 0.0, "schedule": {"name": "constant", "rate": 1.0}}


def net(dropout=0.0, classes=4):
    return Role(models.build({"name": "mlp", "width": 16, "depth": 1, "num_classes": classes, "dropout": dropout}), paths.rectified(), "velocity")


def params_of(role, seed=0, x=(1, 2)):
    from flax.core import meta

    params = meta.unbox(role.init(jax.random.key(seed), jnp.zeros(x), {"label": jnp.zeros((1,), jnp.int32)}))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)])


def batch(n=16, seed=0, **more):
    x = jax.random.normal(jax.random.key(seed), (n, 2))
    return {"x": x, "cond": {"label": jnp.arange(n, dtype=jnp.int32) % 4}, **more}


def machine(objective, roles, params, optimizer=SGD, averages=None, frozen=None, steps=100, optimizers=None, **options):
    """(jitted step, state)."""
    averages = averages or {}
    transforms = {k: optim.build((optimizers or {}).get(k, optimizer), params[k], steps)[0] for k in params}
    state = step_lib.State(
        jnp.zeros((), jnp.int32), params, {k: transforms[k].init(params[k]) for k in params},
        {k: jax.tree.map(jnp.copy, params[of]) for k, (_, of) in averages.items()},
    )  # fmt: skip
    pure = step_lib.make_step(objective, roles, transforms, averages, seed=3, **options)
    return jax.jit(pure), state


def cases():
    flow = {"name": "flow_matching", "time": {"name": "uniform", "stratified": True}, "label_drop": 0.3}
    yield "flow_matching", flow, net(), batch(), {}, {}
    teacher = {"teacher": params_of(net(), 5)}
    yield "consistency", {"name": "consistency_distillation", "steps": 4}, net(), batch(), teacher, {"target": (ema.constant(0.5), "net")}
    pairs = {"win": batch(seed=1)["x"], "lose": batch(seed=2)["x"], "cond": batch()["cond"]}
    yield "dpo", {"name": "diffusion_dpo", "beta": 5.0}, net(), pairs, {"reference": params_of(net(), 6)}, {}


@pytest.mark.parametrize("name, section, role, data, frozen, averages", [pytest.param(*c, id=c[0]) for c in cases()])
def test_accumulation_equals_the_large_batch(name, section, role, data, frozen, averages):
    objective = objectives.build(section)
    roles = {k: role for k in ("net", *frozen)}
    results = {}
    for accumulate in (1, 4):
        step, state = machine(objective, roles, {"net": params_of(role)}, averages=averages, accumulate=accumulate)
        for _ in range(2):
            state, metrics = step(state, frozen, data)
        results[accumulate] = state, metrics
    (whole, told), (parts, told_parts) = results[1], results[4]
    # Plain SGD with rate 1: parameters differ from the start by the gradients.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, whole, parts)
    for k in told.keys() - {"finite"}:
        close(told[k], told_parts[k], err_msg=k)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), whole.params["net"], params_of(role))
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_accumulation_counts_one_optimizer_step():
    objective = objectives.build({"name": "flow_matching"})
    step, state = machine(objective, {"net": net()}, {"net": params_of(net())}, {"name": "adamw", "schedule": "constant"}, accumulate=4)
    for _ in range(3):
        state, _ = step(state, {}, batch())
    counts = [v for path, v in jax.tree.leaves_with_path(state.opt) if "count" in jax.tree_util.keystr(path)]
    assert counts and all(int(c) == 3 for c in counts) and int(state.step) == 3


# --- two players: a GAN on a line, small enough to do by hand


class Scalar(nn.Module):
    """x + w or w * x."""

    multiply: bool
    kind = "toy"

    @nn.compact
    def __call__(self, x):
        w = self.param("w", lambda k: jnp.asarray(0.5))
        return w * x if self.multiply else x + w


def generator_loss(nets, batch, key, *, weight: float = 1.0):
    """The critic should like what the generator makes."""
    return -weight * jnp.mean(nets["critic"](nets["net"](batch["z"]))), {"made": jnp.mean(nets["net"](batch["z"]))}


def critic_loss(nets, batch, key):
    return jnp.mean(nets["critic"](nets["net"](batch["z"]))) - jnp.mean(nets["critic"](batch["x"])), {}


def toy_rollout(nets, batch, key):
    return {**batch, "z": jnp.arange(batch["x"].shape[0], dtype=jnp.float32)[:, None]}


GAN = Objective(
    {"net": "trained", "critic": "trained"}, (Player("net", generator_loss), Player("critic", critic_loss, every=3)), toy_rollout
)


def gan(every=None, rate=0.1, averages=None, **options):
    objective = objectives.bind(GAN, {"weight": 2.0})
    roles = {"net": Role(Scalar(False)), "critic": Role(Scalar(True))}
    params = {"net": {"w": jnp.asarray(1.0)}, "critic": {"w": jnp.asarray(0.5)}}
    sections = {k: {**SGD, "schedule": {"name": "constant", "rate": r}} for k, r in (("net", rate), ("critic", 2 * rate))}
    return machine(objective, roles, params, optimizers=sections, every=every, averages=averages, **options)


def test_two_players_take_turns():
    """Generator g(z) = z + a, critic c w: the updates are a += rate 2 w and then, every 3rd step, w -= rate' (mean z + a - mean x)."""
    step, state = gan(averages={"slow": (ema.constant(0.5), "critic")})
    x = jnp.ones((4, 1))
    a, w, slow, z = 1.0, 0.5, 0.5, 1.5
    for n in range(7):
        state, metrics = step(state, {}, {"x": x, "cond": {}})
        assert float(metrics["net/loss"]) == pytest.approx(-2 * w * (z + a), rel=1e-5)
        assert float(metrics["net/made"]) == pytest.approx(z + a, rel=1e-5)
        a += 0.1 * 2 * w
        if n % 3 == 0:  # the second player sees the first one's new parameters
            assert float(metrics["critic/loss"]) == pytest.approx(w * (z + a - 1), rel=1e-5)
            w -= 0.2 * (z + a - 1)
            assert float(metrics["critic/update_norm"]) == pytest.approx(0.2 * abs(z + a - 1), rel=1e-5)
        else:
            assert np.isnan(metrics["critic/loss"]) and bool(metrics["finite"]["critic"].all())
        slow = 0.5 * slow + 0.5 * w
        assert float(state.params["net"]["w"]) == pytest.approx(a, rel=1e-5)
        assert float(state.params["critic"]["w"]) == pytest.approx(w, rel=1e-5)
        assert float(state.ema["slow"]["w"]) == pytest.approx(slow, rel=1e-5)


def test_every_of_the_config_overrides_the_objective():
    step, state = gan(every={"net": 2, "critic": 1})
    moved = []
    for _ in range(4):
        before = state.params
        state, _ = step(state, {}, {"x": jnp.ones((4, 1)), "cond": {}})
        moved.append([float(before[k]["w"]) != float(state.params[k]["w"]) for k in ("net", "critic")])
    assert moved == [[True, True], [False, True], [True, True], [False, True]]


def test_two_players_accumulate():
    results = []
    for accumulate in (1, 2):
        step, state = gan(accumulate=accumulate)
        for _ in range(4):
            state, _ = step(state, {}, {"x": jnp.arange(4.0)[:, None], "cond": {}})
        results.append(state.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *results)


# --- several updates on what was rolled out once


def pull(nets, batch, key):
    """x + w is pulled to the goal that the rollout set."""
    return jnp.mean(jnp.square(nets["net"](batch["x"]) - batch["goal"])) / 2, {"w": nets["net"](0.0)}


def set_goal(nets, batch, key):
    return {**batch, "goal": jnp.mean(nets["net"](batch["x"])) + batch["x"]}  # of the whole batch, and of the parameters before


PULL = Objective({"net": "trained"}, (Player("net", pull),), set_goal)


def pulled(updates, x, optimizer=SGD, **options):
    step, state = machine(objectives.bind(PULL, {}), {"net": Role(Scalar(False))}, {"net": {"w": jnp.asarray(0.5)}}, optimizer,
                          updates={"net": updates}, **options)  # fmt: skip
    return step(state, {}, {"x": x, "cond": {}})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_in_turn_each_on_its_slice(accumulate):
    """By hand: w += rate (goal - x - w) with the goals of the start, here mean x + w_0 + x, so w -> w + rate (mean x + w_0 - w)."""
    x = jnp.arange(8.0)[:, None]
    half = {**SGD, "schedule": {"name": "linear", "rate": 0.5}}  # 100 steps: each update counts as one
    state, metrics = pulled(4, x, half, accumulate=accumulate)
    w, seen = 0.5, []
    for n in range(4):
        seen.append(w)
        w += 0.5 * (1 - n / 100) * (3.5 + 0.5 - w)
    assert float(state.params["net"]["w"]) == pytest.approx(w, rel=1e-6) and int(state.step) == 1
    assert float(metrics["w"]) == pytest.approx(np.mean(seen), rel=1e-6) and metrics["finite"]["net"].tolist() == [True, True]


@pytest.mark.parametrize("bad", [False, True])
def test_every_update_sees_its_own_rows_and_one_that_is_not_finite_undoes_all(bad):
    """Rate 1 with goals that are the rows: w goes to the mean of rows 0 and 4, 1 and 5, 2 and 6, 3 and 7."""

    def rows(nets, batch, key):
        return jnp.mean(jnp.square(nets["net"](0.0) - batch["x"])) / 2, {}

    objective = objectives.bind(Objective({"net": "trained"}, (Player("net", rows),)), {})
    step, state = machine(objective, {"net": Role(Scalar(False))}, {"net": {"w": jnp.asarray(0.5)}}, updates={"net": 4})
    x = jnp.asarray([9.0, 8, 7, 1, 9, 8, jnp.nan if bad else 7, 4])[:, None]
    state, metrics = step(state, {}, {"x": x, "cond": {}})
    assert float(state.params["net"]["w"]) == pytest.approx(0.5 if bad else 2.5) and int(state.step) == 1
    assert metrics["finite"]["net"].tolist() == [not bad, not bad]
    assert bad or float(metrics["update_norm"]) == pytest.approx(np.mean([8.5, 1.0, 1.0, 4.5]))


def test_rows_that_are_compared_cannot_be_sliced():
    from flowjax.config import ConfigError

    with pytest.raises(ConfigError, match="roles.net.updates = 4: .* cannot be sliced"):
        step_lib.make_step(objectives.bind(PULL._replace(whole=True), {}), {}, {}, {}, seed=0, updates={"net": 4})


# --- the guard


@pytest.mark.parametrize("where", ["batch", "parameters", "second player"])
def test_nothing_moves_when_something_is_not_finite(where):
    if where == "batch":
        step, state = machine(objectives.build({"name": "flow_matching"}), {"net": net()}, {"net": params_of(net())},
                              {"name": "adamw", "schedule": "constant"}, {"ema": (ema.constant(0.5), "net")})  # fmt: skip
        data = batch()
        data["x"] = data["x"].at[3, 0].set(jnp.nan)
    else:
        step, state = gan(averages={"slow": (ema.constant(0.5), "net")})
        data = {"x": jnp.full((4, 1), jnp.inf if where == "second player" else 1.0), "cond": {}}
        if where == "parameters":
            state = state.replace(params={**state.params, "net": {"w": jnp.asarray(jnp.nan)}})
    new, metrics = step(state, {}, data)
    same(new.replace(step=state.step), state)
    assert int(new.step) == 1
    finite = metrics["finite"]
    if where == "batch":
        assert not finite["net"][-1]  # the loss
        assert len(finite["net"]) == len(jax.tree.leaves(state.params["net"])) + 1
    if where == "second player":
        assert finite["net"].all() and not finite["critic"].all()


def test_the_guard_tells_which_parameter():
    """sqrt(0) has an infinite derivative: the loss is finite, one gradient is not."""

    class Root(nn.Module):
        kind = "toy"

        @nn.compact
        def __call__(self, x):
            a, b = self.param("a", lambda k: jnp.ones(())), self.param("b", lambda k: jnp.zeros(()))
            return a * x + jnp.sqrt(b)

    objective = objectives.bind(Objective({"net": "trained"}, (Player("net", lambda nets, batch, key: (jnp.mean(nets["net"](batch["x"])), {})),)), {})
    step, state = machine(objective, {"net": Role(Root())}, {"net": {"a": jnp.ones(()), "b": jnp.zeros(())}})
    new, metrics = step(state, {}, {"x": jnp.ones((4, 1)), "cond": {}})
    assert metrics["finite"]["net"].tolist() == [True, False, True]
    same(new.params, state.params)


# --- randomness


def drawn(mesh=None, seed=3, at=0):
    """What the flow-matching rollout draws at step `at`, on a mesh."""
    objective, role = objectives.build({"name": "flow_matching", "label_drop": 0.5}), net()
    params = params_of(role)

    def prepare(data, n):
        with sharding.use(mesh) if mesh else contextlib.nullcontext():
            return step_lib.prepare(objective, {"net": role.net(params)}, data, step_lib.step_key(seed, n), n)

    data = batch(64)
    if mesh is not None:
        data = mesh_lib.place(data, mesh)
    return jax.jit(prepare)(data, jnp.int32(at))


def test_noise_differs_by_row_step_and_seed_but_not_by_mesh():
    one = drawn()
    z = np.asarray(one["z"])
    assert len(np.unique(z)) == z.size and len(np.unique(one["t"])) == 64
    assert abs(np.corrcoef(z[:, 0], z[:, 1])[0, 1]) < 0.5
    for other in (drawn(at=1), drawn(seed=4)):
        assert not np.isin(np.asarray(other["z"]), z).any()
    for sizes in ((8, 1, 1), (2, 2, 2)):
        same(drawn(mesh_lib.make_mesh(*sizes)), one)


def test_no_key_is_used_twice():
    """What rollout and player derive from their keys never meets: fold_in(key, 1) == split(key)[1], so this is easily wrong."""

    def told(name, key):
        """The key's own number and those of its first children, as float32-exact halves."""
        keys = jnp.concatenate([jax.random.key_data(key)[None], jax.random.key_data(jax.random.split(key, 4))])
        halves = jnp.stack([keys[:, 0] >> 16, keys[:, 0] & 0xFFFF, keys[:, 1] >> 16, keys[:, 1] & 0xFFFF], 1)
        return {f"{name}/{i}/{j}": halves[i, j].astype(jnp.float32) for i in range(5) for j in range(4)}

    def rollout(nets, batch, key):
        return {**batch, "told": told("rollout", key)}

    def loss(nets, batch, key):
        return jnp.mean(nets["net"](batch["x"])), batch["told"] | told("player", key)

    objective = objectives.bind(Objective({"net": "trained"}, (Player("net", loss),), rollout), {})
    step, state = machine(objective, {"net": Role(Scalar(True))}, {"net": {"w": jnp.ones(())}})
    seen = []
    for _ in range(3):
        state, metrics = step(state, {}, {"x": jnp.ones((2, 1)), "cond": {}})
        seen += [tuple(float(metrics[f"{who}/{i}/{j}"]) for j in range(4)) for who in ("rollout", "player") for i in range(5)]
    assert len(set(seen)) == len(seen) == 30


def test_dropout_is_drawn_anew_for_every_slice_and_step():
    role = net(dropout=0.5)
    objective = objectives.build({"name": "flow_matching"})
    data = batch()
    losses = []
    for accumulate in (1, 2):
        step, state = machine(objective, {"net": role}, {"net": params_of(role)}, accumulate=accumulate)
        losses.append(float(step(state, {}, data)[1]["loss"]))
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


# --- compilation and memory


def test_the_compiled_step_grows_in_proportion_to_the_leaves():
    """And not with their square, as it did when every leaf's fusion found out anew whether all of them are finite."""

    def lines(depth):
        run = Run(tiny(model={"name": "mlp", "width": 8, "depth": depth, "num_classes": 4}))
        return run.step().lower(run.target, run.frozen, run.batch()).compile().as_text().count("\n")

    few, more, many = lines(4), lines(8), lines(16)
    assert many - more == pytest.approx(2 * (more - few), rel=0.1)


def test_compiles_once_and_refuses_other_shapes():
    objective, role, count = objectives.build({"name": "flow_matching"}), net(), []
    params = {"net": params_of(role)}
    transform, _ = optim.build({"name": "adamw", "schedule": "constant"}, params["net"], 10)
    pure = step_lib.make_step(objective, {"net": role}, {"net": transform}, {}, seed=0)

    def counted(*args):
        count.append(1)
        return pure(*args)

    state = step_lib.State(jnp.zeros((), jnp.int32), params, {"net": transform.init(params["net"])}, {})
    step = jax.jit(counted, donate_argnums=0)
    compiled = step.lower(state, {}, batch()).compile()
    for n in range(3):
        old = state
        state, _ = compiled(state, {}, batch(seed=n))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt)))
    assert len(count) == 1
    with pytest.raises(TypeError):
        compiled(state, {}, batch(8))
