"""Optimizers, schedules and per-parameter rules by name, against optax and hand-computed points."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowjax.config import ConfigError
from flowjax.models.stack import layer_numbers
from flowjax.train import optim

CONSTANT = {"name": "constant", "rate": 0.1}


def params():
    random = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "y_embed": {"embedding": make(5, 4)},
        "x_embed": {"kernel": make(2, 4), "bias": make(4)},
        "blocks": {"attn": {"kernel": make(3, 4, 4), "bias": make(3, 4)}, "norm": {"scale": make(3, 4)}},
        "out": {"kernel": make(4, 2), "bias": make(2)},
    }


def quadratic(p):
    return 0.5 * sum(jnp.sum(jnp.square(v - 0.3)) for v in jax.tree.leaves(p))


def descend(transform, p, steps, loss=quadratic):
    @jax.jit
    def step(p, state):
        updates, state = transform.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    state = transform.init(p)
    for _ in range(steps):
        p, state = step(p, state)
    return p, state


def build(section, p=None, steps=100):
    return optim.build(section, params() if p is None else p, steps)[0]


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-6} | tolerance)), a, b)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_reduces_a_quadratic(name):
    p = params()
    transform = build({"name": name, "schedule": {"name": "cosine", "rate": 0.1}})
    assert quadratic(descend(transform, p, 100)[0]) < 0.2 * quadratic(p)


@pytest.mark.parametrize(
    "section, theirs",
    [
        ({"name": "adamw", "b1": 0.8, "b2": 0.9, "eps": 1e-3}, lambda: optax.adam(0.1, b1=0.8, b2=0.9, eps=1e-3)),
        ({"name": "adamw"}, lambda: optax.adam(0.1)),
        ({"name": "radam"}, lambda: optax.radam(0.1)),
        ({"name": "lion"}, lambda: optax.lion(0.1, weight_decay=0.0)),
        ({"name": "sgd", "momentum": 0.5, "nesterov": True}, lambda: optax.sgd(0.1, momentum=0.5, nesterov=True)),
        ({"name": "sgd"}, lambda: optax.sgd(0.1, momentum=0.9)),
        ({"name": "sgd", "clip": 0.5}, lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))),
        (
            {"name": "adafactor", "min_dim": 2},
            lambda: optax.adafactor(0.1, min_dim_size_to_factor=2, multiply_by_parameter_scale=False),
        ),
    ],
)
def test_equals_plain_optax(section, theirs):
    ours, _ = descend(build({**section, "schedule": CONSTANT}), params(), 7)
    close(ours, descend(theirs(), params(), 7)[0])


def test_weight_decay_is_decoupled_and_spares_biases_and_tables():
    p = params()
    ours, _ = descend(build({"name": "adamw", "schedule": CONSTANT, "decay": 0.3}), p, 5)
    mask = jax.tree.map_with_path(lambda path, _: optim.name_of(path).endswith("kernel"), p)
    assert mask["blocks"]["attn"] == {"kernel": True, "bias": False} and not mask["y_embed"]["embedding"]
    close(ours, descend(optax.adamw(0.1, weight_decay=0.3, mask=mask), p, 5)[0])
    # Without a gradient only the decay moves: kernels shrink by rate * decay, everything else stays bitwise.
    idle, _ = descend(build({"name": "sgd", "schedule": CONSTANT, "decay": 0.3}), p, 1, lambda p: 0.0 * quadratic(p))
    close(idle["blocks"]["attn"]["kernel"], p["blocks"]["attn"]["kernel"] * (1 - 0.03))
    for a, b in ((idle["blocks"]["attn"]["bias"], p["blocks"]["attn"]["bias"]), (idle["y_embed"], p["y_embed"])):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rules_freeze_scale_and_override():
    p = params()
    section = {
        "name": "adamw", "schedule": CONSTANT, "decay": 0.3, "clip": 1e9,
        "rules": (
            {"match": "^blocks/", "rate": 0.5},
            {"match": "embed", "rate": 0.0},
            {"match": "out/kernel", "decay": 0.0},
            {"match": "out/bias", "decay": 0.7},
        ),
    }  # fmt: skip
    transform = build(section)
    new, state = descend(transform, p, 3)
    for frozen in ("x_embed", "y_embed"):
        jax.tree.map(np.testing.assert_array_equal, new[frozen], p[frozen])
    names = [optim.name_of(path) for path, leaf in jax.tree.leaves_with_path(state) if leaf.ndim]
    assert names and not any("embed" in n for n in names)
    # Each group against optax with its own rate and decay (the quadratic is separable; the clip never bites).
    rate = lambda r, d: optax.adamw(r, weight_decay=d)  # noqa: E731
    for group, r, d in ((("blocks", "attn", "kernel"), 0.05, 0.3), (("blocks", "norm", "scale"), 0.05, 0.0),
                        (("out", "kernel"), 0.1, 0.0), (("out", "bias"), 0.1, 0.7)):  # fmt: skip
        ours, theirs = new, p
        for key in group:
            ours, theirs = ours[key], theirs[key]
        close(ours, descend(rate(r, d), theirs, 3)[0])


def unrolled(p):
    """The same parameters with the layers one by one."""
    layer = lambda i: jax.tree.map(lambda v: v[i], p["blocks"])  # noqa: E731
    return {k: v for k, v in p.items() if k != "blocks"} | {f"block_{i}": layer(i) for i in range(3)}


@pytest.mark.parametrize(
    ("rules", "rates", "decays"),
    [
        (({"match": "block", "rate": 0.6, "layer_decay": 0.5},), (0.15, 0.3, 0.6), (0.3,) * 3),
        (({"match": "block", "rate": 0.5}, {"match": "block", "rate": 0.0, "decay": 0.1, "layers": (0, 2)}), (0.0, 0.5, 0.0), (0.1, 0.3, 0.1)),
        (({"match": "block", "layer_decay": 0.5, "layers": (0,)},), (0.25, 1.0, 1.0), (0.3,) * 3),
    ],
)
def test_layers_have_rates_of_their_own_scanned_or_not(rules, rates, decays):
    p = params()
    section = {"name": "adamw", "schedule": CONSTANT, "decay": 0.3, "rules": rules}
    scanned, _ = descend(build(section), p, 3)
    apart, _ = descend(build(section, unrolled(p)), unrolled(p), 3)
    close(unrolled(scanned), apart)
    for i, (rate, decay) in enumerate(zip(rates, decays)):
        theirs = optax.adamw(0.1 * rate, weight_decay=decay, mask={"attn": {"kernel": True, "bias": False}, "norm": {"scale": False}})
        close(apart[f"block_{i}"], descend(theirs, unrolled(p)[f"block_{i}"], 3)[0])
        if rate == 0:
            jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[i], old[i]), scanned["blocks"], p["blocks"])  # noqa: B023


def test_layers_count_through_the_stacks_of_a_network():
    """In the order in which an image passes them; a text encoder counts its own. Of an adapter of some layers, too."""
    shapes = {"encoder/blocks/k": (5, 2), "blocks/k": (2, 3), "context_blocks/k": (3, 3), "context_blocks/attn/k": (3, 1), "x_embed/k": (3,)}
    assert layer_numbers(shapes) == {
        "encoder/blocks/k": (range(5), 5), "blocks/k": (range(2), 5), "context_blocks/k": (range(2, 5), 5), "context_blocks/attn/k": (range(2, 5), 5),
    }  # fmt: skip
    three = layer_numbers({"dual_blocks/k": (2, 1), "blocks/k": (3, 1), "block_5/k": (1,)})
    assert three == {"dual_blocks/k": (range(2), 6), "blocks/k": (range(2, 5), 6), "block_5/k": (5, 6)}
    assert layer_numbers({"block_2/k/up": (1,), "block_3/k/up": (1,)}) == {"block_2/k/up": (2, 4), "block_3/k/up": (3, 4)}


def test_the_card_says_what_rules_do():
    section = {"name": "adamw", "schedule": CONSTANT, "rules": ({"match": "embed", "rate": 0.0}, {"match": "blocks", "layer_decay": 0.5})}
    told = optim.described(section, params())
    assert told["frozen"] == "32 parameters: x_embed/bias, x_embed/kernel, y_embed/embedding"
    assert told["rate x 0.25, 0.5, 1"].startswith("72 parameters: blocks/attn/bias, ") and told["rate x 1"].startswith("10 parameters")
    assert optim.described(section | {"rules": ()}, params()) == {}


def test_frozen_parameters_do_not_count_for_the_clip():
    p = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.zeros((2, 2))}}
    loss = lambda p: jnp.sum(p["a"]["kernel"]) + 1000 * jnp.sum(p["b"]["kernel"])  # noqa: E731
    section = {"name": "sgd", "momentum": 0.0, "schedule": CONSTANT, "clip": 1.0, "rules": ({"match": "^b", "rate": 0.0},)}
    new, _ = descend(build(section, p), p, 1, loss)
    close(new["a"]["kernel"], np.full((2, 2), -0.05))  # unit norm over four equal entries, times 0.1


def test_clip_bounds_the_global_norm():
    p = {"kernel": jnp.zeros((4,)), "bias": jnp.zeros((5,))}
    section = {"name": "sgd", "momentum": 0.0, "schedule": {"name": "constant", "rate": 1.0}, "clip": 1.5}
    steep, _ = descend(build(section, p), p, 1, lambda p: 100 * sum(jnp.sum(v) for v in jax.tree.leaves(p)))
    assert float(optax.tree.norm(steep)) == pytest.approx(1.5, rel=1e-5)
    flat, _ = descend(build(section, p), p, 1, lambda p: 0.1 * sum(jnp.sum(v) for v in jax.tree.leaves(p)))
    close(flat, jax.tree.map(lambda v: v - 0.1, p))


def test_muon_takes_stacked_matrices_and_only_them():
    p = params()
    transform = build({"name": "muon", "schedule": {"name": "constant", "rate": 1.0}})
    updates, state = transform.update(jax.grad(quadratic)(p), transform.init(p), p)
    # Each layer's update is orthogonal up to a scale (Newton-Schulz brings singular values close to one another) ...
    for layer in updates["blocks"]["attn"]["kernel"]:
        s = np.linalg.svd(layer, compute_uv=False)
        assert s.max() / s.min() < 2.5
    # ... while the raw gradient is not, and everything else is Adam's sign-like first step.
    s = np.linalg.svd(p["blocks"]["attn"]["kernel"][0] - 0.3, compute_uv=False)
    assert s.max() / s.min() > 2.5
    for name in ("y_embed", "x_embed", "out"):
        for v in jax.tree.leaves(updates[name]):
            np.testing.assert_allclose(np.abs(v), 1.0, rtol=1e-3)
    np.testing.assert_allclose(np.abs(updates["blocks"]["attn"]["bias"]), 1.0, rtol=1e-3)
    # Every layer on its own equals optax's muon of one matrix.
    single = {"w": p["blocks"]["attn"]["kernel"][1]}
    theirs = optax.contrib.scale_by_muon(weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(0, 1)})
    want, _ = theirs.update(jax.grad(quadratic)(single), theirs.init(single), single)
    close(updates["blocks"]["attn"]["kernel"][1], -want["w"], rtol=1e-4)


def test_muon_takes_the_matrices_of_every_kind_of_layer():
    """Unrolled layers and the stacks of MMDiT as well, each as optax's own muon moves one matrix, wide and tall."""
    p = {"block_0": {"up": {"kernel": make_matrix(1, 4, 8)}}, "double_blocks": {"down": {"kernel": make_matrix(2, 2, 8, 4)}}}
    p["out"] = make_matrix(3, 4, 2)
    transform = build({"name": "muon", "schedule": {"name": "constant", "rate": 1.0}}, p)
    updates, _ = transform.update(jax.grad(quadratic)(p), transform.init(p), p)
    theirs = optax.contrib.muon(1.0)
    pairs = *zip(*(t["double_blocks"]["down"]["kernel"] for t in (updates, p))), (updates["block_0"]["up"]["kernel"], p["block_0"]["up"]["kernel"])
    for mine, at in pairs:
        single = {"w": at}
        want, _ = theirs.update(jax.grad(quadratic)(single), theirs.init(single), single)
        close(mine, want["w"], rtol=1e-4)
    np.testing.assert_allclose(np.abs(updates["out"]), 1.0, rtol=1e-3)


def make_matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_muon_with_frozen_parts_and_decay():
    p = params()
    section = {"name": "muon", "schedule": CONSTANT, "decay": 0.1, "rules": ({"match": "bias|norm", "rate": 0.0},)}
    new, _ = descend(build(section), p, 2)
    np.testing.assert_array_equal(new["blocks"]["attn"]["bias"], p["blocks"]["attn"]["bias"])
    assert np.abs(new["blocks"]["attn"]["kernel"] - p["blocks"]["attn"]["kernel"]).min() > 0


@pytest.mark.parametrize(
    "section, points",
    [
        ({"name": "constant", "rate": 0.2}, {0: 0.2, 50: 0.2, 99: 0.2}),
        ({"name": "constant", "rate": 0.2, "warmup": 4}, {0: 0.05, 1: 0.1, 3: 0.2, 4: 0.2}),
        ({"name": "cosine", "rate": 0.2}, {0: 0.2, 25: 0.1 * (1 + np.sqrt(0.5)), 50: 0.1, 100: 0.0, 150: 0.0}),
        ({"name": "cosine", "rate": 0.2, "warmup": 20, "final": 0.1}, {9: 0.1, 19: 0.2, 20: 0.2, 60: 0.11, 100: 0.02}),
        ({"name": "linear", "rate": 0.2}, {0: 0.2, 25: 0.15, 100: 0.0, 200: 0.0}),
        ({"name": "linear", "rate": 0.2, "warmup": 20, "final": 0.5}, {9: 0.1, 20: 0.2, 60: 0.15, 100: 0.1}),
        ({"name": "inverse_sqrt", "rate": 0.2, "reference": 10}, {0: 0.2, 10: 0.2, 40: 0.1, 90: 0.2 / 3}),
        ({"name": "inverse_sqrt", "rate": 0.2, "reference": 10, "warmup": 40}, {0: 0.005, 39: 0.2 / np.sqrt(3.9), 90: 0.2 / 3}),
    ],
)
def test_schedules_at_hand_computed_points(section, points):
    schedule = optim.schedule_of({"name": "adamw", "schedule": section}, 100)
    for n, want in points.items():
        assert float(schedule(jnp.asarray(n, jnp.float32))) == pytest.approx(want, rel=1e-5, abs=1e-7), n


def test_schedule_defaults():
    rates = [float(optim.schedule_of({"name": "adamw", "schedule": name}, 10)(jnp.float32(0))) for name in optim.SCHEDULES]
    assert rates == pytest.approx([1e-3] * len(rates))


def test_schedule_spans_the_steps_of_a_slow_player():
    section = {"name": "sgd", "schedule": {"name": "linear", "rate": 1.0}}
    _, schedule = optim.build(section, params(), 100, every=4)
    assert float(schedule(jnp.float32(24))) == pytest.approx(1 / 25)
    _, schedule = optim.build(section, params(), 10, every=4)  # steps 0, 4 and 8
    assert float(schedule(jnp.float32(3))) == pytest.approx(0.0) and float(schedule(jnp.float32(2))) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "adam", "schedule": "constant"}, "optimizer.name = 'adam' is unknown; valid: adafactor, adamw"),
        ({"name": "adamw"}, "optimizer lacks schedule"),
        ("adamw", "optimizer lacks schedule"),
        ({"name": "adamw", "schedule": "cosin"}, "optimizer.schedule.name = 'cosin' is unknown; valid: constant, cosine"),
        ({"name": "adamw", "schedule": {"name": "constant", "steps": 3}}, "optimizer.schedule.steps is unknown; valid: rate, warmup"),
        ({"name": "adamw", "schedule": "constant", "momentum": 0.9}, "momentum is unknown for adamw; valid: schedule, clip, decay, rules, b1"),
        ({"name": "adamw", "schedule": "constant", "clip": "1"}, "optimizer.clip = '1' should be float"),
        ({"name": "adamw", "schedule": "constant", "clip": -1.0}, "clip = -1.0 should not be negative"),
        ({"name": "adamw", "schedule": "constant", "decay": -1.0}, "decay = -1.0 should not be negative"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"match": "nope"},)}, "rules.0..match = 'nope' matches no parameter; .*blocks/attn/kernel"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"match": "["},)}, "not a regular expression"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"rate": 0.0},)}, "rules.0. lacks match"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"match": "out", "lr": 0.0},)}, "lr is unknown; valid: match, rate, decay"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"match": "out", "layer_decay": 0.5},)}, "finds out/bias, which belongs to no layer"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"match": "blocks", "layer_decay": 0.0},)}, r"layer_decay = 0.0 should lie in \(0, 1\]"),
        ({"name": "adamw", "schedule": "constant", "rules": ({"match": "blocks", "rate": 0.0, "layers": (3,)},)}, "3 is no layer; valid: 0 to 2"),
    ],
)  # fmt: skip
def test_bad_sections_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        build(section)
