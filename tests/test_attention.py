"""The attention entry against float64 numpy, and its choice of implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.models import attention as module
from flowjax.models.attention import attention


def numpy_attention(q, k, v, mask=None):
    """One query at a time, as a probability-weighted mean of the values."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        scores = k[b, :, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max())
        if mask is not None:
            p = p * np.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))[b, h, i]
        out[b, i, h] = (p / p.sum()) @ v[b, :, h]
    return out


def draw(dtype=jnp.float32, queries=5, keys=7):
    kq, kk, kv = jax.random.split(jax.random.key(0), 3)
    q = 2 * jax.random.normal(kq, (2, queries, 3, 8))
    k, v = 2 * jax.random.normal(kk, (2, keys, 3, 8)), jax.random.normal(kv, (2, keys, 3, 8))
    return tuple(a.astype(dtype) for a in (q, k, v))


@pytest.mark.parametrize("masked", [False, True])
def test_matches_float64_softmax(masked):
    q, k, v = draw()
    mask = np.arange(7) < np.array([4, 7])[:, None, None, None] if masked else None
    np.testing.assert_allclose(attention(q, k, v, mask), numpy_attention(q, k, v, mask), atol=2e-6)


def test_a_masked_key_has_no_influence():
    q, k, v = draw()
    mask = jnp.arange(7) != 3
    changed = attention(q, k.at[:, 3].set(50.0), v.at[:, 3].set(1e4), mask)
    np.testing.assert_array_equal(attention(q, k, v, mask), changed)
    assert not np.allclose(attention(q, k, v), changed)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    q, k, v = draw(jnp.bfloat16, keys=512)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), numpy_attention(q, k, v), atol=2e-2)
    text = str(jax.make_jaxpr(attention)(q, k, v))
    assert "f32[2,3,5,512] = exp" in text  # the exponentials of the softmax, not their rounding, are float32


def test_float64_stays_exact():
    with jax.enable_x64(True):
        q, k, v = draw(jnp.float64)
        np.testing.assert_allclose(attention(q, k, v), numpy_attention(q, k, v), atol=1e-14)


def test_unknown_and_unsupported_are_plain_errors():
    q, k, v = draw()
    with pytest.raises(ConfigError, match="valid: cudnn, xla"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ConfigError, match="needs a GPU, not cpu"):
        attention(q, k, v, implementation="cudnn")


@pytest.mark.parametrize(
    ("expected", "backend", "dtype", "head_dim", "lengths", "masked"),
    [
        (None, "gpu", jnp.bfloat16, 72, (256, 256), False),
        (None, "gpu", jnp.float16, 128, (255, 77), False),
        (None, "gpu", jnp.bfloat16, 64, (256, 78), True),
        ("GPU", "tpu", jnp.bfloat16, 64, (256, 256), False),
        ("bfloat16 or float16", "gpu", jnp.float32, 64, (256, 256), False),
        ("divisible by 8", "gpu", jnp.bfloat16, 68, (256, 256), False),
        ("at most 128", "gpu", jnp.bfloat16, 136, (256, 256), False),
        ("even lengths", "gpu", jnp.bfloat16, 64, (255, 256), True),
        ("even lengths", "gpu", jnp.bfloat16, 64, (256, 77), True),
    ],
)
def test_what_cudnn_is_asked_to_do(expected, backend, dtype, head_dim, lengths, masked):
    q, k = (jax.ShapeDtypeStruct((2, n, 4, head_dim), dtype) for n in lengths)
    refusal = module._cudnn_refusal(q, k, jnp.ones(lengths, bool) if masked else None, backend)
    assert refusal is None if expected is None else expected in refusal


def test_auto_follows_the_backend(monkeypatch):
    q, k, v = draw(jnp.bfloat16)
    monkeypatch.setitem(module.IMPLEMENTATIONS, "cudnn", lambda *_: "cudnn")
    assert not isinstance(attention(q, k, v), str)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention(q, k, v) == "cudnn"
    assert not isinstance(attention(*draw(jnp.float32)), str)
