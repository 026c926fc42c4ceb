"""The attention entry against float64 numpy, and its choice of implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.models import sharding
from flowjax.models import attention as module
from flowjax.models.attention import attention
from flowjax.samplers.likelihood import hutchinson_divergence
from flowjax.train import mesh as mesh_lib


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
    with pytest.raises(ConfigError, match="valid: cudnn, ring, splash, xla"):
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
def test_what_cudnn_is_asked_to_do(monkeypatch, expected, backend, dtype, head_dim, lengths, masked):
    monkeypatch.setattr(module.sharding, "platform", lambda: backend)
    q, k = (jax.ShapeDtypeStruct((2, n, 4, head_dim), dtype) for n in lengths)
    refusal = module._cudnn_refusal(q, k, jnp.ones(lengths, bool) if masked else None)
    assert refusal is None if expected is None else expected in refusal


def test_auto_follows_the_backend(monkeypatch):
    q, k, v = draw(jnp.bfloat16)
    monkeypatch.setitem(module.IMPLEMENTATIONS, "cudnn", lambda *_: "cudnn")
    assert not isinstance(attention(q, k, v), str)
    monkeypatch.setattr(module.sharding, "platform", lambda: "gpu")
    assert attention(q, k, v) == "cudnn"
    assert not isinstance(attention(*draw(jnp.float32)), str)


def test_auto_takes_splash_on_a_tpu_for_long_sequences(monkeypatch):
    monkeypatch.setitem(module.IMPLEMENTATIONS, "splash", lambda *_: "splash")
    monkeypatch.setattr(module.sharding, "platform", lambda: "tpu")
    long = [jnp.zeros((1, module.SPLASH_FROM, 1, 8))] * 3
    assert attention(*long) == "splash"
    assert not isinstance(attention(*long, jnp.ones((), bool)), str)  # a mask
    assert not isinstance(attention(*draw()), str)  # short
    assert attention(*draw(), implementation="splash") == "splash"


@pytest.mark.parametrize(("backend", "name"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_what_is_differentiated_forward_avoids_kernels_that_cannot(monkeypatch, caplog, backend, name):
    """jax.jvp of a fused kernel fails; flows' likelihoods, mean velocities and continuous consistency need it of the network."""
    tokens = module.SPLASH_FROM if name == "splash" else 6
    x = jax.random.normal(jax.random.key(0), (1, tokens, 8)).astype(jnp.bfloat16)
    kernel = jax.custom_vjp(module._xla)
    kernel.defvjp(lambda *a: (module._xla(*a), None), lambda *_: None)
    monkeypatch.setitem(module.IMPLEMENTATIONS, name, kernel)
    monkeypatch.setattr(module.sharding, "platform", lambda: backend)
    velocity = lambda x, how="auto": attention(*[x.reshape(1, tokens, 1, 8)] * 3, implementation=how).reshape(x.shape)  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(velocity, (x,), (x,))
    with caplog.at_level("INFO", "flowjax.attention"):
        divergence = hutchinson_divergence(velocity, x, x)
    want = jnp.sum(x * jax.jvp(lambda x: velocity(x, "xla"), (x,), (x,))[1], axis=(1, 2))
    np.testing.assert_array_equal(divergence, want)
    assert f"{name} has no derivatives in forward mode" in caplog.messages[-1]
    with pytest.raises(ConfigError, match=f"'{name}' has no derivatives in forward mode, .*; use 'xla'"):
        module.jvp(lambda x: velocity(x, name), (x,), (x,))
    assert not module._forward.get()


def test_the_choice_is_logged_once_with_its_reasons(caplog):
    module._say.cache_clear()
    with caplog.at_level("INFO", "flowjax.attention"):
        for _ in range(2):
            attention(*draw())
    (line,) = (r.getMessage() for r in caplog.records)
    assert line.startswith("attention of 5 over 7 tokens, float32: xla (ring needs a mesh") and "cudnn needs a GPU, not cpu" in line


@pytest.mark.parametrize("lengths", [(256, 256), (200, 300)])
def test_splash_equals_xla_also_with_padding(lengths):
    """The TPU kernel, interpreted: values and all three gradients, where lengths fill whole blocks and where they do not."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, n, 2, 16)) for key, n in zip(keys, (lengths[0], lengths[1], lengths[1])))
    weight = jax.random.normal(keys[3], q.shape)

    def run(compute):
        return jax.value_and_grad(lambda *a: jnp.vdot(weight, compute(*a, None)), argnums=(0, 1, 2))(q, k, v)

    (ours, grads), (theirs, wanted) = run(lambda *a: module._splash(*a, interpret=True)), run(module._xla)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
    for a, b in zip(grads, wanted):
        np.testing.assert_allclose(a, b, atol=3e-5)


# --- over the context axis


def on_mesh(sizes, implementation):
    mesh = mesh_lib.make_mesh(**sizes)

    @jax.jit
    def run(q, k, v):
        with sharding.use(mesh):
            q, k, v = (sharding.constrain(x, *module.LAYOUT) for x in (q, k, v))
            return attention(q, k, v, implementation=implementation)

    return run


@pytest.mark.parametrize("sizes", [{"context": 8, "data": 1}, {"context": 2, "tensor": 2, "fsdp": 2, "data": 1}])
def test_ring_is_exact(sizes):
    """Against float64 NumPy; first, second and forward derivatives against the plain implementation, all in float64."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v = (3 * jax.random.normal(key, (2, n, 2, 4), "float64") for key, n in zip(keys, (16, 24, 24)))
        ring = on_mesh(sizes, "ring")
        np.testing.assert_allclose(ring(q, k, v), numpy_attention(q, k, v), atol=1e-13)
        weight = jax.random.normal(keys[3], q.shape, "float64")
        plain = lambda *a: module._xla(*a, None)  # noqa: E731
        reverse = lambda f: jax.grad(lambda *a: jnp.vdot(weight, f(*a)), argnums=(0, 1, 2))  # noqa: E731
        for wrap in (reverse, lambda f: lambda *a: jax.jvp(f, a, (v[:, :16], q[:, :1] + k, k))[1:]):
            for a, b in zip(wrap(ring)(q, k, v), wrap(plain)(q, k, v), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12)


def test_ring_never_holds_all_keys():
    q = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    both = {name: on_mesh({"context": 8, "data": 1}, name).lower(q, q, q).compile() for name in ("ring", "xla")}
    text = both["ring"].as_text()
    assert "collective-permute" in text and "all-gather" not in text
    # Of the (T, S) logits a device holds a (T/8, S/8) block instead of (T/8, S).
    temporary = {name: c.memory_analysis().temp_size_in_bytes for name, c in both.items()}
    assert temporary["ring"] < temporary["xla"] / 3


def test_auto_goes_round_the_ring_where_tokens_are_split(monkeypatch):
    monkeypatch.setitem(module.IMPLEMENTATIONS, "ring", lambda q, k, v, mask: q + 100)
    q = jnp.zeros((2, 16, 2, 4))
    assert on_mesh({"context": 2}, "auto")(q, q, q).max() == 100
    assert on_mesh({"context": 1}, "auto")(q, q, q).max() == 0
    odd = jnp.zeros((2, 15, 2, 4))
    assert on_mesh({"context": 2}, "auto")(odd, odd, odd).max() == 0
    with pytest.raises(ConfigError, match="lengths that mesh.context = 2 divides, not 15 and 15"):
        on_mesh({"context": 2}, "ring")(odd, odd, odd)
    with pytest.raises(ConfigError, match="needs a mesh whose axis 'context'"):
        attention(q, q, q, implementation="ring")
