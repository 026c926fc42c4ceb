"""Operation counts against the papers' tables and against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import build, flops
from flowjax.models.layers import Conv


def macs(fn, *args):
    return flops.count(fn, *args) / 2


def dit_gmacs(size=32, **fields):
    module = build({"name": "dit", "num_classes": 1000, "learn_sigma": True, **fields})
    shape = jax.ShapeDtypeStruct
    inputs = (
        shape((1, size, size, 4), jnp.float32),
        shape((1,), jnp.float32),
        {"label": shape((1,), jnp.int32)},
    )
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return macs(module.apply, params, *inputs) / 1e9


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        ("S/8", 32, 0.358),
        ("S/4", 32, 1.413),
        ("S/2", 32, 6.056),
        ("B/2", 32, 23.005),
        ("L/2", 32, 80.698),
        ("XL/8", 32, 7.392),
        ("XL/4", 32, 29.044),
        ("XL/2", 32, 118.621),
        ("XL/2", 64, 524.538),
    ],
)
def test_dit_table(preset, size, expected):
    """2212.09748 table 4 prints these as Gflops."""
    assert dit_gmacs(size, preset=preset) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("conditioning", "expected"), [("in_context", 119.37), ("cross_attention", 137.62), ("adaln", 118.56)])
def test_conditioning_variants(conditioning, expected):
    """2212.09748 figure 5: 119.4, 137.6 and 118.6 for DiT-XL/2."""
    assert dit_gmacs(preset="XL/2", conditioning=conditioning) == pytest.approx(expected, rel=1e-3)


def test_scan_unrolled_and_remat_count_alike():
    counts = {dit_gmacs(preset="S/8", scan=scan, remat=remat) for scan in (True, False) for remat in ("none", "full")}
    assert len(counts) == 1


A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))


def test_matrix_product_is_two_operations_per_element():
    assert flops.count(jnp.matmul, A, B) == 2 * 3 * 5 * 7
    batched = jnp.zeros((2, 3, 5)), jnp.zeros((2, 5, 7))
    assert macs(jnp.matmul, *batched) == 2 * 3 * 5 * 7
    assert flops.count(lambda a: a + 1, A) == 0


def test_gradient_is_three_forwards():
    def loss(a, b):
        return jnp.sum(jnp.square(a @ b))

    assert macs(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * macs(loss, A, B)


def with_custom_jvp(f):
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: (primals[0] @ primals[1], tangents[0] @ primals[1]))
    return f


def with_custom_vjp(f):
    f = jax.custom_vjp(f)
    f.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    return f


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_custom_jvp, with_custom_vjp])
def test_recursion(wrap):
    assert macs(wrap(lambda a, b: a @ b), A, B) == 3 * 5 * 7


def test_scan_cond_while():
    square = jnp.zeros((4, 4))
    turns = lambda x: jax.lax.scan(lambda h, _: (h @ x, None), x, length=6)[0]
    assert macs(turns, square) == 6 * 64
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)
    assert macs(branches, square) == 2 * 64
    endless = lambda x: jax.lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ x, x)
    with pytest.raises(ValueError, match="while loop"):
        macs(endless, square)
    assert macs(lambda x: jax.lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h + 1, x), square) == 0


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    sharded = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)
    assert macs(sharded, jnp.zeros((8, 5)), B) == 8 * 5 * 7


def test_convolution():
    """Two stride-2 windows by hand, groups, and the gradients, which are convolutions with the same products."""
    image = jnp.zeros((2, 8, 6, 4))

    def conv_macs(**fields):
        layer = Conv(10, **fields)
        params = nn.unbox(layer.init(jax.random.key(0), image))
        return macs(layer.apply, params, image)

    assert conv_macs() == 2 * (8 * 6) * 10 * (3 * 3 * 4)
    assert conv_macs(stride=2) == 2 * (4 * 3) * 10 * (3 * 3 * 4)
    assert conv_macs(groups=2) == 2 * (8 * 6) * 10 * (3 * 3 * 2)

    layer = Conv(10, kernel=(2, 2), stride=2, padding=((0, 0), (0, 0)))
    params = nn.unbox(layer.init(jax.random.key(0), image))
    forward = macs(layer.apply, params, image)
    both = jax.grad(lambda p, x: jnp.sum(jnp.square(layer.apply(p, x))), argnums=(0, 1))
    np.testing.assert_equal(macs(both, params, image), 3 * forward)
