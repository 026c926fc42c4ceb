"""InfoNCE at its closed forms, over repeated captions, on a mesh, and the refusal to slice it; the two towers that it trains."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_sharded, close, count, randomise, shapes

from flowjax import models, objectives
from flowjax.config import ConfigError
from flowjax.models.text import TextTransformer
from flowjax.models.two_tower import TwoTower, bounded
from flowjax.models.vit import ViT
from flowjax.objectives import contrastive
from flowjax.train import optim
from flowjax.train import step as step_lib
from flowjax.train.roles import Role, build_role


def loss(images, captions, scale=1.0, tokens=None):
    images, captions = jnp.asarray(images, float), jnp.asarray(captions, float)
    tokens = jnp.arange(len(images)) if tokens is None else jnp.asarray(tokens)
    tokens = jnp.stack([tokens, jnp.ones_like(tokens)], axis=1)  # captions that share a token are not yet equal
    net = lambda x, cond: (images, captions, scale)  # noqa: E731
    return contrastive.loss({"net": net}, {"x": images, "cond": {"tokens": tokens}}, None)


def test_equal_embeddings_give_log_of_the_batch_size():
    for rows in (2, 7):
        value, metrics = loss(np.full((rows, 3), 0.6), np.full((rows, 3), 0.2), scale=14.0)
        assert float(value) == pytest.approx(np.log(rows), rel=1e-6)
        assert float(metrics["accuracy"]) == pytest.approx(1 / rows) and float(metrics["scale"]) == 14.0


def test_orthogonal_pairs_give_the_closed_form_and_vanish_at_the_largest_scale():
    for rows, scale in ((2, 1.3), (5, 2.0)):
        value, metrics = loss(np.eye(rows), np.eye(rows), scale)
        assert float(value) == pytest.approx(np.log1p((rows - 1) * np.exp(-scale)), rel=1e-5)
        assert float(metrics["accuracy"]) == 1
    assert float(loss(np.eye(5), np.eye(5), 100.0)[0]) < 1e-6
    value, metrics = loss(np.eye(2), np.eye(2)[::-1], 100.0)  # every answer wrong
    assert float(value) == pytest.approx(100.0, rel=1e-6) and float(metrics["accuracy"]) == 0


def test_gradient_with_respect_to_the_scale():
    """Two orthogonal pairs: loss log(1 + e^-s), derivative -1 / (1 + e^s)."""
    gradient = jax.grad(lambda s: loss(np.eye(2), np.eye(2), s)[0])(1.7)
    assert float(gradient) == pytest.approx(-1 / (1 + np.exp(1.7)), rel=1e-5)


def test_both_directions_count_half():
    """Images 1 and 2 are equal and lie on caption 1: rows give log 2 of even chances apart from s, columns something else."""
    s = 2.0
    images, captions = np.array([[1.0, 0.0], [1.0, 0.0]]), np.eye(2)
    rows = np.mean([np.log1p(np.exp(-s)), np.log1p(np.exp(s))])
    columns = np.log(2)  # both images are equally near to either caption
    assert float(loss(images, captions, s)[0]) == pytest.approx((rows + columns) / 2, rel=1e-5)
    assert float(loss(captions, images, s)[0]) == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_equal_captions_are_all_right_answers():
    """Three pairs, of which two share a caption: at the largest scale each of those finds either with log 2, the third is certain."""
    embedded = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    value, metrics = loss(embedded, embedded, 100.0, tokens=[4, 4, 9])
    assert float(value) == pytest.approx(2 / 3 * np.log(2), rel=1e-5)
    assert float(metrics["accuracy"]) == 1
    # An image is not drawn to one of its equal captions more than to the other.
    apart = np.array([[1.0, 0.2], [1.0, -0.2], [0.0, 1.0]])
    value, _ = loss(np.eye(3)[:, :2], apart, 3.0, tokens=[4, 4, 9])
    logits = 3 * np.eye(3)[:, :2] @ apart.T
    assert float(value) == pytest.approx(_soft(logits, np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])), rel=1e-5)


def _soft(logits, goal):
    """Mean over both directions of sum_j goal_ij (log sum_k exp l_ik - l_ij), computed pair by pair."""
    total = 0.0
    for table in (logits, logits.T):
        for i, row in enumerate(table):
            total += sum(goal[i, j] * (np.log(np.exp(row).sum()) - row[j]) for j in range(len(row)) if goal[i, j])
    return total / (2 * len(logits))


# --- the towers -------------------------------------------------------------------------------------------------------

IMAGE = {"patch": 2, "width": 16, "depth": 1, "heads": 2, "grid": 2}
TEXT = {"vocab": 9, "length": 5, "width": 8, "depth": 1, "heads": 2}
NET = TwoTower(image=IMAGE, text=TEXT, features=6, attention="xla")
BATCH = {
    "x": jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (8, 4, 4, 3)), jnp.float32),
    "cond": {"tokens": jnp.asarray(np.random.RandomState(1).randint(0, 9, (8, 5)))},
}
ARGS = BATCH["x"], BATCH["cond"]


@functools.cache
def params():
    return randomise(shapes(NET, *ARGS))


def test_towers_are_the_encoders_and_their_projections():
    images, texts, scale = jax.jit(NET.apply)({"params": params()}, *ARGS)
    for which, embedded, arg in (("image", images, ARGS[0]), ("text", texts, ARGS[1]["tokens"])):
        assert embedded.shape == (8, 6)
        np.testing.assert_allclose(jnp.sum(embedded**2, 1), 1, rtol=1e-5)
        pooled = jax.jit(NET.tower(which).apply)({"params": params()[f"{which}_encoder"]}, arg)[1]
        projected = pooled @ params()[f"{which}_projection"]["kernel"]
        close(embedded, projected / jnp.linalg.norm(projected, axis=1, keepdims=True), 1e-5)
    assert isinstance(NET.tower("image"), ViT) and isinstance(NET.tower("text"), TextTransformer)
    assert float(scale) == pytest.approx(np.exp(params()["log_scale"]), rel=1e-6)
    assert count(NET, *ARGS) == count(NET.tower("image"), ARGS[0]) + count(NET.tower("text"), ARGS[1]["tokens"]) + 6 * (16 + 8) + 1


def test_temperature_starts_at_its_value_and_fields_reach_both_towers():
    net = models.build({"name": "two_tower", "image": IMAGE, "text": {**TEXT, "dtype": "float32"}, "dtype": "bfloat16"})
    assert (net.tower("image").dtype, net.tower("text").dtype) == ("bfloat16", "float32")
    assert NET.clone(remat="full").tower("text").remat == "full" and NET.tower("image").attention == "xla"
    start = meta.unbox(jax.jit(NET.init)(jax.random.key(0), *ARGS))["params"]["log_scale"]
    assert float(jnp.exp(start)) == pytest.approx(1 / 0.07, rel=1e-6)


def test_scale_is_bounded_and_finds_its_way_back():
    assert float(jnp.exp(bounded(jnp.float32(2.0)))) == pytest.approx(np.exp(2.0), rel=1e-6)
    assert float(jnp.exp(bounded(jnp.float32(7.0)))) == pytest.approx(100.0, rel=1e-5)
    gradient = lambda log_scale, sign: float(jax.grad(lambda v: sign * 3 * bounded(v))(log_scale))  # noqa: E731
    assert (gradient(2.0, 1), gradient(2.0, -1)) == (3.0, -3.0)
    assert (gradient(7.0, 1), gradient(7.0, -1)) == (3.0, 0.0)


def test_bad_settings_are_refused():
    init = lambda net: jax.eval_shape(net.init, jax.random.key(0), *ARGS)  # noqa: E731
    with pytest.raises(ConfigError, match="model.image.patches is unknown"):
        init(TwoTower(image={**IMAGE, "patches": 2}, text=TEXT))
    with pytest.raises(ConfigError, match="model.text lacks vocab"):
        init(TwoTower(image=IMAGE, text={k: v for k, v in TEXT.items() if k != "vocab"}))
    with pytest.raises(ConfigError, match="temperature = 0.005 is below"):
        init(NET.clone(temperature=0.005))


class Loss(nn.Module):
    """The loss as a network's output, for check_sharded."""

    @nn.compact
    def __call__(self, x, cond):
        return contrastive.loss({"net": NET.clone(parent=self, name="net")}, {"x": x, "cond": cond}, None)[0]


def test_loss_over_the_global_batch_is_the_same_on_a_mesh():
    check_sharded(Loss(), *ARGS)


def step(accumulate=1, rate=3e-3):
    objective = objectives.build("contrastive")
    role = build_role({"name": "two_tower", "image": IMAGE, "text": TEXT, "features": 6}, None, "", "model")
    params = {"net": meta.unbox(jax.jit(role.init)(jax.random.key(0), *ARGS))}
    transform = optim.build({"name": "adamw", "schedule": {"name": "constant", "rate": rate}}, params["net"], 100)[0]
    state = step_lib.State(jnp.zeros((), jnp.int32), params, {"net": transform.init(params["net"])}, {})
    return jax.jit(step_lib.make_step(objective, {"net": role}, {"net": transform}, {}, seed=0, accumulate=accumulate)), state


def test_training_learns_the_pairs_and_accumulation_is_refused():
    one, state = step()
    rows = []
    for _ in range(60):
        state, metrics = one(state, {}, BATCH)
        rows.append({k: float(metrics[k]) for k in ("loss", "accuracy")})
    assert rows[0]["loss"] > 0.8 * np.log(8)
    assert rows[-1]["loss"] < 0.1 and rows[-1]["accuracy"] == 1
    with pytest.raises(ConfigError, match="accumulate = 2: .* cannot be sliced"):
        step(accumulate=2)


def test_roles_of_encoders_are_initialised_by_what_they_take():
    for module, expected in ((NET.tower("image"), "patch"), (NET.tower("text"), "token_embed")):
        variables = jax.eval_shape(lambda key, module=module: Role(module).init(key, *ARGS), jax.random.key(0))
        assert expected in variables or expected in variables["embed"]
