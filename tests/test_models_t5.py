"""T5: the published sizes, the buckets of relative positions, and what padding does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_sharded, close, count, randomise, shapes

from flowjax import models
from flowjax.config import ConfigError
from flowjax.models.t5 import T5Encoder, relative_buckets

FIELDS = {"width": 16, "depth": 2, "heads": 2, "head_dim": 6, "hidden": 20, "vocab": 13}
TOKENS = jnp.asarray([[3, 9, 4, 0, 0, 0], [10, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0], [7, 7, 0, 2, 2, 0]])


@pytest.mark.parametrize("preset", T5Encoder.presets)
def test_parameter_counts(preset):
    net = models.build({"name": "t5", "preset": preset})
    published = {"v1.1-xxl": 4_762_310_656, "umt5-xxl": 5_680_910_336, "byt5-small": 217_657_472}
    inner = net.heads * 64
    layer = 4 * net.width * inner + 3 * net.width * net.hidden + 2 * net.width
    tables = 1 if net.shared_bias else net.depth
    counted = count(net, TOKENS)
    assert counted == net.vocab * net.width + net.depth * layer + net.width + tables * 32 * net.heads
    assert counted == published.get(preset, counted)


def test_buckets():
    table = relative_buckets(600)
    for offset, bucket in {0: 0, 1: 17, -1: 1, 7: 23, -7: 7, 8: 24, -8: 8, 20: 26, -20: 10, 127: 31, -127: 15, 500: 31, -500: 15}.items():
        assert table[max(0, -offset), max(0, offset)] == bucket
        assert len(set(np.diagonal(table, offset))) == 1  # it depends on the difference alone
    # Beyond the nearest 8 the bounds grow by the square root of two: 8, 11.3, 16, 22.6, 32, ...
    bounds = [int(np.argmax(table[:, 0] == k)) for k in range(8, 16)]
    assert bounds == [int(np.ceil(8 * 2 ** (k / 2) - 1e-9)) for k in range(8)]
    small = relative_buckets(40, 8, 16)  # two exact places, then 2, 2 * 8^(1/2) = 5.7
    assert [int(v) for v in small[:8, 0]] == [0, 1, 2, 2, 2, 2, 3, 3] and small[0, 39] == 7 and small[39, 0] == 3


@functools.cache
def made(**fields):
    net = T5Encoder(**{**FIELDS, **fields})
    params = randomise(shapes(net, TOKENS))
    return params, jax.jit(functools.partial(net.apply, {"params": params}))


def test_masked_padding_is_not_seen_however_long_it_is():
    masked = T5Encoder(**FIELDS, mask_padding=True)
    params, plain = made()
    apply = jax.jit(functools.partial(masked.apply, {"params": params}))
    longer = jnp.pad(TOKENS, ((0, 0), (0, 3)))
    full, pooled = apply(TOKENS)
    close(apply(longer)[0][0, :3], full[0, :3], 1e-5)
    close(apply(longer)[1][:2], pooled[:2], 1e-5)
    assert float(jnp.abs(plain(longer)[0][0, :3] - plain(TOKENS)[0][0, :3]).max()) > 1e-2
    close(full[1], plain(TOKENS)[0][1], 1e-5)  # nothing to mask
    close(full[2], plain(TOKENS)[0][2], 1e-5)  # nothing but padding: all of it is read
    assert np.isfinite(full).all()


def test_pooled_leaves_padding_out():
    sequence, pooled = made()[1](TOKENS)
    for row, kept in enumerate(([0, 1, 2], range(6), range(6), [0, 1, 3, 4])):
        np.testing.assert_allclose(pooled[row], np.asarray(sequence[row])[np.asarray(kept)].mean(0), atol=1e-6)


def test_attention_knows_places_by_their_difference_only():
    """Tokens a b before other tokens: shifting both by one place leaves the logits of the pair alone."""
    params, apply = made(depth=1)
    same = jnp.full((1, 6), 5)
    np.testing.assert_allclose(apply(same)[0], jnp.broadcast_to(apply(same)[0][:, :1], (1, 6, 16)), atol=1e-5)
    reverse = apply(TOKENS[1:2, ::-1])[0][:, ::-1]
    assert float(jnp.abs(reverse - apply(TOKENS[1:2])[0]).max()) > 1e-2  # but left is not right
    table = params["bias"]["table"]["embedding"]
    alike = {**params, "bias": {"table": {"embedding": jnp.concatenate([table[:16], table[:16]])}}}
    apply = jax.jit(functools.partial(T5Encoder(**{**FIELDS, "depth": 1}).apply, {"params": alike}))
    close(apply(TOKENS[1:2, ::-1])[0][:, ::-1], apply(TOKENS[1:2])[0], 1e-5)


def test_bfloat16_gives_float32_and_remat_is_used():
    params, apply = made()
    sequence, pooled = jax.jit(T5Encoder(**FIELDS, dtype="bfloat16").apply)({"params": params}, TOKENS)
    assert sequence.dtype == pooled.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(sequence - apply(TOKENS)[0]).max()) < 0.5
    net = T5Encoder(**FIELDS, remat="full")
    text = str(jax.make_jaxpr(lambda p: net.apply({"params": p}, TOKENS)[1])(params))
    assert "remat" in text or "checkpoint" in text
    with pytest.raises(ConfigError, match="model.remat = 'most'"):
        jax.eval_shape(T5Encoder(**FIELDS, remat="most").init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize("shared", [True, False])
def test_sharded_equals_one_device(shared):
    check_sharded(T5Encoder(**FIELDS, shared_bias=shared, mask_padding=True), jnp.concatenate([TOKENS, TOKENS]))
