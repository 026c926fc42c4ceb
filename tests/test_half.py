"""Products of half precision: values and derivatives against float64, in both modes, to second order, and mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models.half import half_dot

MATRIX = (((1,), (0,)), ((), ()))
TOKENS = (((2,), (0,)), ((), ()))
# a (2, 5, 3, 4) and b (4, 5, 6, 3): a batch axis each in the middle, two axes summed in another order.
MIXED = (((2, 3), (3, 0)), ((1,), (1,)))
CASES = [((7, 3), (3, 5), MATRIX), ((2, 7, 3), (3, 5), TOKENS), ((2, 5, 3, 4), (4, 5, 6, 3), MIXED)]


def arrays(*shapes):
    """Values that bfloat16 holds."""
    draws = np.random.default_rng(0)
    return [np.asarray(jnp.asarray(draws.standard_normal(shape), jnp.bfloat16), np.float64) for shape in shapes]


def exact(a, b, dims):
    """dot_general of float64 arrays, by einsum."""
    (ca, cb), (ba, bb) = dims
    names_a, names_b = [f"a{i}" for i in range(a.ndim)], [f"b{i}" for i in range(b.ndim)]
    for i, j in (*zip(ca, cb, strict=True), *zip(ba, bb, strict=True)):
        names_b[j] = names_a[i]
    rest = [n for i, n in enumerate(names_a) if i not in (*ca, *ba)] + [n for j, n in enumerate(names_b) if j not in (*cb, *bb)]
    kept = [names_a[i] for i in ba] + rest
    number = {n: i for i, n in enumerate(dict.fromkeys(names_a + names_b))}
    return np.einsum(a, [number[n] for n in names_a], b, [number[n] for n in names_b], [number[n] for n in kept])


@pytest.mark.parametrize(("shape_a", "shape_b", "dims"), CASES)
def test_values_and_gradients_are_those_of_float64(shape_a, shape_b, dims):
    a, b = arrays(shape_a, shape_b)
    want = exact(a, b, dims)
    (cotangent,) = arrays(want.shape)
    x, kernel, g = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.float32), jnp.asarray(cotangent, jnp.bfloat16)
    y, pull = jax.vjp(lambda x, kernel: half_dot(x, kernel, dims, "bfloat16", "bfloat16"), x, kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=1e-2, atol=1e-2)
    dx, dkernel = pull(g)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
    # <g, a . db> is linear in db: its gradient by single entries.
    unit = lambda shape, i: np.eye(int(np.prod(shape)))[i].reshape(shape)  # noqa: E731
    want_b = np.array([(cotangent * exact(a, unit(b.shape, i), dims)).sum() for i in range(b.size)]).reshape(b.shape)
    want_a = np.array([(cotangent * exact(unit(a.shape, i), b, dims)).sum() for i in range(a.size)]).reshape(a.shape)
    np.testing.assert_allclose(dkernel, want_b, rtol=1e-5, atol=1e-5)  # float32: bfloat16 would be off by 1e-2
    np.testing.assert_allclose(np.asarray(dx, np.float64), want_a, rtol=1e-2, atol=1e-2)


def test_kernel_gradient_reads_half_and_writes_float32():
    x, kernel = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((4, 2))
    gradient = jax.grad(lambda k: half_dot(x, k, MATRIX, "bfloat16", "bfloat16").astype(jnp.float32).sum())
    product = [line for line in jax.jit(gradient).lower(kernel).as_text().splitlines() if "dot_general" in line][-1]
    assert product.count("xbf16>") == 2 and product.endswith("xf32>")
    assert "f32[8,4]" not in str(jax.make_jaxpr(gradient)(kernel)), "a copy of the input in float32"


def test_forward_mode_and_second_order():
    """d/ds of the gradient of sum((x k)^2) along a direction of both inputs, exact for integers that bfloat16 holds."""
    x, k = jnp.array([[1.0, 2.0], [3.0, -1.0]], jnp.bfloat16), jnp.array([[2.0, -1.0], [1.0, 3.0]])
    dx, dk = jnp.array([[1.0, 0.0], [-1.0, 1.0]], jnp.bfloat16), jnp.array([[0.0, 1.0], [1.0, -1.0]])
    gradient = jax.grad(lambda x, k: jnp.square(half_dot(x, k, MATRIX, "bfloat16", "float32")).sum(), argnums=1)
    got = jax.jvp(gradient, (x, k), (dx, dk))
    a, b, da, db = (np.asarray(v, np.float64) for v in (x, k, dx, dk))
    np.testing.assert_array_equal(got[0], 2 * a.T @ a @ b)
    np.testing.assert_array_equal(got[1], 2 * (da.T @ a @ b + a.T @ (da @ b + a @ db)))


@pytest.mark.parametrize(("shape_a", "shape_b", "dims"), CASES)
@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 0)])
def test_mapped_is_one_by_one(axes, shape_a, shape_b, dims):
    def loss(a, b):
        return jnp.square(half_dot(a.astype(jnp.bfloat16), b, dims, "bfloat16", "float32")).sum()

    a, b = arrays(*(shape if axis is None else (*shape[:axis], 3, *shape[axis:]) for shape, axis in zip((shape_a, shape_b), axes, strict=True)))
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    every = lambda fn: jax.vmap(fn, axes)(a, b)  # noqa: E731
    outside = jax.grad(lambda a, b: jax.vmap(loss, axes)(a, b).sum(), argnums=(0, 1))(a, b)
    for i in range(3):
        one = [v if axis is None else jnp.take(v, i, axis) for v, axis in zip((a, b), axes, strict=True)]
        np.testing.assert_allclose(every(loss)[i], loss(*one), rtol=1e-5)
        inside = jax.grad(loss, argnums=(0, 1))(*one)
        for grads, want in zip(every(jax.grad(loss, argnums=(0, 1))), inside, strict=True):
            np.testing.assert_allclose(grads[i], want, rtol=2e-2, atol=1e-1)  # cotangents are rounded to bfloat16
        for grads, want, axis in zip(outside, inside, axes, strict=True):
            if axis is not None:
                np.testing.assert_allclose(jnp.take(grads, i, axis), want, rtol=2e-2, atol=1e-1)
