"""The text encoder: its size, what each token may see, and what padding does to the pooled vector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_sharded, count, randomise, shapes

from flowjax.config import ConfigError
from flowjax.models import build
from flowjax.models.text import TextTransformer

FIELDS = {"vocab": 11, "length": 6, "width": 16, "depth": 3, "heads": 2, "attention": "xla"}
TOKENS = jnp.asarray([[3, 9, 4, 0, 0, 0], [10, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0], [0, 7, 0, 0, 2, 0]])


@functools.cache
def case(**fields):
    net = TextTransformer(**{**FIELDS, **fields})
    params = randomise(shapes(net, TOKENS))
    return net, params, jax.jit(lambda tokens: net.apply({"params": params}, tokens))


def test_parameter_count():
    """Two tables; per block four square matrices, two of the MLP, their biases and two norms; the last norm."""
    d, hidden = 16, 48
    block = 4 * (d * d + d) + d * hidden + hidden + hidden * d + d + 4 * d
    assert count(TextTransformer(**FIELDS, mlp_ratio=3.0), TOKENS) == (11 + 6) * d + 3 * block + 2 * d


def test_registered_and_float32_out_of_bfloat16():
    net = build({"name": "text", **FIELDS, "dtype": "bfloat16"})
    assert net.kind == "text_encoder"
    sequence, pooled = jax.jit(net.init_with_output)(jax.random.key(0), TOKENS)[0]
    assert sequence.shape == (4, 6, 16) and sequence.dtype == jnp.float32
    assert pooled.shape == (4, 16) and pooled.dtype == jnp.float32
    exact, _ = jax.jit(net.clone(dtype="float32").init_with_output)(jax.random.key(0), TOKENS)[0]
    difference = float(jnp.abs(sequence - exact).max())
    assert 1e-4 < difference < 0.1


def test_pooled_is_the_mean_over_what_is_not_padding_and_over_everything_when_all_is():
    sequence, pooled = case()[2](TOKENS)
    assert np.isfinite(sequence).all()
    for row, kept in enumerate(([0, 1, 2], range(6), range(6), [1, 4])):
        np.testing.assert_allclose(pooled[row], np.asarray(sequence[row])[np.asarray(kept)].mean(0), atol=1e-6)


def test_gradient_of_an_empty_prompt_is_finite():
    net, params, _ = case()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net.apply({"params": p}, TOKENS[2:3])[1]))))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    used = np.abs(grads["token_embed"]["embedding"]).max(1) > 0
    assert used.tolist() == [True] + 10 * [False]


def test_causal_tokens_see_the_past_only_and_others_see_all():
    for fields, seen in (({"causal": True}, [0, 0, 1, 1, 1, 1]), ({}, 6 * [1])):
        apply = case(**fields)[2]
        change = jnp.abs(apply(TOKENS)[0] - apply(TOKENS.at[:, 2].set(8))[0]).max((0, 2))
        np.testing.assert_array_equal(np.asarray(change) > 1e-4, np.asarray(seen, bool))


def test_positions_matter_and_padding_is_read():
    apply = case()[2]
    one, other = apply(jnp.asarray([[1, 2, 3, 0, 0, 0], [0, 0, 0, 1, 2, 3]]))[1]
    assert np.abs(one - other).max() > 1e-2
    states = apply(jnp.asarray([[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 0, 0]]))[0]
    assert np.abs(states[0, :3] - states[1, :3]).max() > 1e-2


def test_remat_changes_nothing():
    net, params, _ = case()

    def grads(net):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net.apply({"params": p}, TOKENS)[1]))))(params)

    text = str(jax.make_jaxpr(jax.grad(lambda p: net.clone(remat="full").apply({"params": p}, TOKENS)[1].sum()))(params))
    assert "remat" in text or "checkpoint" in text
    for ours, theirs in zip(jax.tree.leaves(grads(net.clone(remat="full"))), jax.tree.leaves(grads(net)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sharded_equals_one_device():
    check_sharded(TextTransformer(**FIELDS), jnp.concatenate([TOKENS, jnp.maximum(TOKENS[::-1] - 1, 0)]))


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="length 6 was given 5"):
        jax.eval_shape(TextTransformer(**FIELDS).init, jax.random.key(0), TOKENS[:, :5])
    for fields, words in (({"heads": 3}, "heads = 3 does not divide model.width = 16"), ({"remat": "some"}, "model.remat = 'some'")):
        with pytest.raises(ConfigError, match=words):
            jax.eval_shape(TextTransformer(**{**FIELDS, **fields}).init, jax.random.key(0), TOKENS)


def test_initial_tables_are_small_and_the_norm_makes_unit_states():
    variables = meta.unbox(TextTransformer(**FIELDS).init(jax.random.key(0), TOKENS))
    assert 0.01 < float(jnp.std(variables["params"]["token_embed"]["embedding"])) < 0.03
    sequence, _ = TextTransformer(**FIELDS).apply(variables, TOKENS)
    np.testing.assert_allclose(jnp.mean(sequence, -1), 0, atol=1e-6)
    assert float(jnp.abs(jnp.std(sequence, axis=-1) - 1).max()) < 0.05
