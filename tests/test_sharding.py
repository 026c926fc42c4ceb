"""Rules -> layouts, and the promise that a layout changes no number: DiT on 1 device == DiT on 8, for every factorisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from nets import check_sharded

from flowjax.models import build, layers, sharding
from flowjax.train import mesh as mesh_lib


def make_mesh(*sizes):
    sizes += (1,) * (4 - len(sizes))
    return jax.make_mesh(sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4)


def test_spec_follows_the_rules():
    assert sharding.spec(("batch", None, "act_mlp")) == P(("data", "fsdp"), None, "tensor")
    assert sharding.spec(("batch", "seq", "act")) == P(("data", "fsdp"), "context", None)
    assert sharding.spec(("embed", "mlp"), {"embed": None, "mlp": "data"}) == P(None, "data")


def test_unknown_names_are_refused_inside_and_outside_a_mesh():
    with pytest.raises(KeyError, match="'bacth'; valid: batch, seq"):
        sharding.spec(("bacth",))
    with sharding.use(make_mesh(2, 2, 2)), pytest.raises(KeyError, match="'bacth'"):
        sharding.constrain(jnp.ones(8), "bacth")
    with pytest.raises(KeyError, match="'bacth'"):
        sharding.constrain(jnp.ones(8), "bacth")
    with pytest.raises(ValueError, match="2 names"):
        sharding.constrain(jnp.ones(8), "batch", "act")


def test_rules_must_name_axes_of_the_mesh():
    with pytest.raises(ValueError, match="'sequence'; the mesh has data, fsdp, tensor, context"), sharding.use(
        make_mesh(8, 1, 1), {"seq": "sequence"}
    ):
        pass


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 8), P("fsdp", "tensor")),
        (("embed", "mlp"), (6, 8), P(None, "tensor")),  # 4 does not divide 6
        (("batch",), (8,), P(("data", "fsdp"))),
        (("batch",), (2,), P("data")),  # nothing left for fsdp
        (("batch",), (4,), P("data")),  # 4 / 2 is not divisible by 4
        (("batch",), (3,), P(None)),
        (("embed", "embed"), (8, 8), P("fsdp", None)),  # an axis is used once
        (("embed", "batch"), (8, 8), P("fsdp", "data")),
        ((None, "conv_out"), (8, 12), P(None, "fsdp")),
    ],
)
def test_fit_drops_what_does_not_divide(names, shape, expected):
    mesh = jax.sharding.AbstractMesh((2, 4, 2, 1), mesh_lib.AXES)
    assert sharding.fit(names, shape, mesh) == expected


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 8), P("fsdp", "tensor")),
        (("layers", "embed", "mlp"), (4, 6, 32), P(None, None, ("tensor", "fsdp"))),  # 4 divides 32 / 2
        (("mlp", "embed"), (32, 6), P(("tensor", "fsdp"), None)),
        (("embed", "mlp"), (8, 7), P(("fsdp", "tensor"), None)),
        (("embed", "mlp"), (6, 6), P(None, "tensor")),  # nowhere for fsdp
        (("layers", "embed", "heads"), (4, 6, 6), P(None, None, "tensor")),  # layers and rows of tables are never split
        (("vocab", "embed"), (8, 6), P(None, None)),
        (("mlp",), (7,), P(None)),
    ],
)
def test_parameters_are_split_where_their_axis_divides(names, shape, expected):
    mesh = jax.sharding.AbstractMesh((2, 4, 2, 1), mesh_lib.AXES)
    assert sharding.fit_param(names, shape, mesh) == expected


def test_constrain_places_the_array_only_within_use():
    mesh, x = make_mesh(2, 2, 2), jnp.ones((8, 4, 6))

    def placed(x):
        with sharding.use(mesh):
            return sharding.constrain(x, "batch", "seq", "act_mlp")

    assert jax.jit(placed)(x).sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)
    assert sharding.constrain(x, "batch", "seq", "act_mlp") is x


def test_param_specs():
    boxed = jax.eval_shape(layers.SwiGLU(12).init, jax.random.key(0), jnp.ones((1, 2, 8)))["params"]
    specs = sharding.param_specs({**boxed, "plain": jax.ShapeDtypeStruct((8,), jnp.float32)}, make_mesh(1, 4, 2))
    assert specs["w1"]["kernel"].spec == P("fsdp", "tensor")
    assert specs["w3"]["kernel"].spec == P("tensor", "fsdp")
    assert specs["w1"]["bias"].spec == P("tensor")
    assert specs["plain"].spec == P()
    assert jax.tree.structure(specs) == jax.tree.structure({**nn.unbox(boxed), "plain": 0})


# A block with every kind of modulation, dropout, remat and a sequence that no mesh axis divides. All parameters are random:
# a freshly initialised DiT is the identity, and would agree with anything.
FIELDS = {"depth": 2, "width": 32, "heads": 4, "num_classes": 5, "dropout": 0.2, "remat": "dots", "attention": "xla"}
VARIANTS = {
    "adaln_zero": {},
    "modern": {"norm": "rms", "mlp": "swiglu", "mlp_ratio": 3.0, "rope": True, "qk_norm": True, "scan": False},
    "in_context": {"conditioning": "in_context"},
    "cross_attention": {"conditioning": "cross_attention"},
    "undivided": {"width": 34, "heads": 2, "sincos": False},  # what 4 or 8 does not divide is split elsewhere (fit_param)
    "ring": {"attention": "auto", "patch": 1},
    "gathered": {"patch": 1},  # tokens split over the context axis, with plain attention: keys are gathered
}
BATCH = 8


@functools.cache
def case(variant):
    """(module, boxed abstract parameters, random parameters, inputs, one-device loss and gradients)."""
    module = build({"name": "dit", **FIELDS, **VARIANTS[variant]})
    x = jax.random.normal(jax.random.key(1), (BATCH, *((8, 4, 3) if module.patch == 1 else (6, 10, 3))))
    t, label = jnp.linspace(0.05, 0.95, BATCH), jnp.arange(BATCH) % 6
    boxed = jax.eval_shape(module.init, jax.random.key(0), x, t, {"label": label})["params"]
    leaves, tree = jax.tree.flatten(nn.unbox(boxed))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten([0.15 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])
    inputs = x, t, label
    return module, boxed, params, inputs, jax.jit(functools.partial(loss_and_grad, module, None))(params, *inputs)


def loss_and_grad(module, mesh, params, x, t, label):
    def loss(params):
        y = module.apply({"params": params}, x, t, {"label": label}, train=True, rngs={"dropout": jax.random.key(3)})
        return jnp.mean(jnp.square(y - x)), y

    if mesh is None:
        return jax.value_and_grad(loss, has_aux=True)(params)
    with sharding.use(mesh):
        return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("adaln_zero", s) for s in [(2, 2, 2), (1, 4, 2), (1, 2, 4)]]
    + [("modern", (2, 2, 2)), ("modern", (1, 2, 4)), ("in_context", (2, 2, 2)), ("cross_attention", (2, 2, 2))]
    + [("undivided", (1, 4, 2)), ("undivided", (1, 8, 1)), ("ring", (2, 1, 2, 2)), ("ring", (1, 1, 1, 8)), ("gathered", (1, 2, 1, 4)), ("cross_attention", (2, 2, 1, 2))],
)
@pytest.mark.slow
def test_sharded_equals_one_device(variant, sizes):
    module, boxed, params, inputs, ((loss, y), grads) = case(variant)
    mesh = make_mesh(*sizes)
    shardings = sharding.param_specs(boxed, mesh)
    batch = NamedSharding(mesh, sharding.spec(("batch",)))
    step = jax.jit(
        functools.partial(loss_and_grad, module, mesh),
        in_shardings=(shardings, batch, batch, batch),
        out_shardings=((NamedSharding(mesh, P()), batch), shardings),
    )
    params = jax.device_put(params, shardings)
    (sharded_loss, sharded_y), sharded_grads = step(params, *inputs)

    # The layout is real: parameters and activations are cut as the mesh says.
    kernel = (params["blocks"] if module.scan else params["block_0"])["mlp"]["fc1" if module.mlp == "gelu" else "w1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])
    assert sharded_y.addressable_shards[0].data.shape[0] == BATCH // (sizes[0] * sizes[1])

    assert float(loss) == pytest.approx(float(sharded_loss), rel=1e-5)
    np.testing.assert_allclose(sharded_y, y, atol=2e-5 * float(jnp.abs(y).max()))
    for (path, expected), got in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(sharded_grads), strict=True):
        scale = float(jnp.abs(expected).max())
        # A key's bias shifts all logits of a query alike, so its gradient is zero but for rounding.
        floor = 1e-4 if path[-2:] == (jax.tree_util.DictKey("k"), jax.tree_util.DictKey("bias")) else 0.0
        np.testing.assert_allclose(got, expected, atol=1e-4 * scale + floor, err_msg=jax.tree_util.keystr(path))


def test_a_gated_branch_is_exact_where_the_partitioner_alone_is_wrong():
    """h + gate * (act @ w) of integers on 2 x 2 x 2, gate and weight cut over tensor.

    With only act and the sum constrained, XLA returned errors in the hundreds (jax 0.6 to 0.10); constraining branch and
    gate as well, as the networks here do, gives the exact result.
    """
    mesh = make_mesh(2, 2, 2)
    h, act, w, gate = np.random.RandomState(0).randint(-5, 6, (4, 8, 8)).astype(np.float32)

    @jax.jit
    def residual(h, act, w, gate):
        with sharding.use(mesh):
            branch = sharding.constrain(sharding.constrain(act, "batch", "act_mlp") @ w, "batch", "act")
            return sharding.constrain(h + sharding.constrain(gate, "batch", "act") * branch, "batch", "act")

    w_cut, gate_cut = (
        jax.device_put(a, NamedSharding(mesh, P(*axes))) for a, axes in ((w, ("tensor", "fsdp")), (gate, (None, "tensor")))
    )
    np.testing.assert_array_equal(residual(h, act, w_cut, gate_cut), h + gate * (act @ w))


def test_the_networks_constrain_only_within_use():
    module, _, params, inputs, _ = case("adaln_zero")
    inside = jax.make_jaxpr(functools.partial(loss_and_grad, module, make_mesh(2, 2, 2)))(params, *inputs)
    outside = jax.make_jaxpr(functools.partial(loss_and_grad, module, None))(params, *inputs)
    assert str(inside).count("sharding_constraint") > 30
    assert "sharding_constraint" not in str(outside)


@pytest.mark.slow
def test_small_networks_sharded_equal_one_device():
    points, images = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    mlp = build({"name": "mlp", "width": 16, "depth": 2, "num_classes": 3})
    check_sharded(mlp, points, jnp.linspace(0.1, 0.9, 8), {"label": jnp.arange(8) % 4})
    classifier = build({"name": "classifier", "num_classes": 4, "width": 8, "features": 12, "groups": 4})
    check_sharded(classifier, images)


def test_half_precision_products_leave_float32_gradients_to_the_sum():
    """bfloat16 layers on eight devices: kernels' gradients are those of float64 sums over the bfloat16 inputs, in the compiled
    text too; forward mode and vmap work."""
    mesh = make_mesh(8, 1, 1)
    random = np.random.RandomState(0)
    x = jnp.asarray(random.standard_normal((64, 24)), jnp.bfloat16)
    cotangent = jnp.asarray(random.standard_normal((64, 16)), jnp.bfloat16)
    kernel = jnp.asarray(random.standard_normal((24, 16)), jnp.float32)

    def loss(kernel, x):
        with sharding.use(mesh):
            y = sharding.constrain(layers.matmul(sharding.constrain(x, "batch", "act"), kernel, "bfloat16"), "batch", "act")
        assert y.dtype == jnp.bfloat16
        return jnp.vdot(cotangent.astype(jnp.float32), y.astype(jnp.float32))

    rows = NamedSharding(mesh, P("data"))
    grad = jax.jit(jax.grad(loss), in_shardings=(None, rows)).lower(kernel, x).compile()
    exact = np.asarray(x, np.float64).T @ np.asarray(cotangent, np.float64)
    got = np.asarray(grad(kernel, jax.device_put(x, rows)))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact).max() > 1e-3, "bfloat16 would have shown"
    (sums,) = (line for line in grad.as_text().splitlines() if " all-reduce(" in line)
    assert "= f32[" in sums
    vectors = jnp.stack([kernel, -kernel])
    out = jax.vmap(lambda v: jax.jvp(lambda k: layers.matmul(x, k, "bfloat16"), (kernel,), (v,))[1])(vectors)
    np.testing.assert_allclose(np.asarray(out[0], np.float32), np.asarray(x @ kernel.astype(jnp.bfloat16), np.float32), rtol=0.02, atol=0.05)
    np.testing.assert_array_equal(out[0], -out[1])
