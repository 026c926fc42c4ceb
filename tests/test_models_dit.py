"""DiT and its layers: the paper's counts, golden values of the tables, invariances, and equivalences of the ways to run it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.models import MODELS, build, denoiser, flops
from flowjax.models import dit as dit_module
from flowjax.models import layers as L
from flowjax.models.remat import REMAT

TINY = {"depth": 2, "width": 32, "heads": 4, "num_classes": 5}
B = 3


def inputs(height=6, width=10, channels=3, classes=5):
    x = jax.random.normal(jax.random.key(1), (B, height, width, channels))
    t = jnp.array([0.1, 0.5, 0.9])
    return x, t, {"label": jnp.array([0, 3, 5])} if classes else {}


def randomised(tree, seed=2, std=0.15):
    """Every leaf drawn N(0, std^2): at init a DiT is the identity and agrees with anything."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([std * jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])


@functools.cache
def cached(fields):
    fields = dict(fields)
    module = build({"name": "dit", **TINY, **fields})
    args = inputs(classes=module.num_classes)
    return module, randomised(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))), jax.jit(module.apply)


def make(**fields):
    """(module, random variables, jitted apply)."""
    return cached(tuple(sorted(fields.items())))


# --- parameter counts -------------------------------------------------------------------------------------------------

PAPER = {
    "S/2": 32_865_056, "S/4": 32_920_448, "S/8": 33_142_016,
    "B/2": 130_315_808, "B/4": 130_426_496, "B/8": 130_869_248,
    "L/2": 457_840_672, "L/4": 457_988_224, "L/8": 458_578_432,
    "XL/2": 674_834_720, "XL/4": 675_000_704, "XL/8": 675_664_640,
}  # fmt: skip
WITHOUT_SIGMA = {"S/2": 32_858_896, "B/2": 130_303_504, "L/2": 457_824_272, "XL/2": 674_816_272}
LIGHTNING = {"preset": "LightningXL/1"}


def parameters(size=32, channels=4, **fields):
    module = build({"name": "dit", "num_classes": 1000, **fields})
    args = jnp.zeros((1, size, size, channels)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    return sum(math.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), *args)))


@pytest.mark.parametrize("preset", PAPER)
def test_parameter_counts_of_the_paper(preset):
    assert {*PAPER, *LIGHTNING.values()} == set(MODELS["dit"].presets)
    assert parameters(preset=preset, learn_sigma=True) == PAPER[preset]


@pytest.mark.parametrize("preset", WITHOUT_SIGMA)
def test_parameter_counts_without_sigma(preset):
    assert parameters(preset=preset) == WITHOUT_SIGMA[preset]


def test_parameter_counts_of_variants():
    """LightningDiT-XL/1 of 2501.01423; and what a conditioning adds or leaves out, from the shapes of its layers."""
    assert parameters(size=16, channels=32, **LIGHTNING) == 674_961_824
    per_head_norms = 28 * 2 * 72
    assert parameters(size=16, channels=32, qk_norm=True, **LIGHTNING) == 674_961_824 + per_head_norms
    depth, width = 28, 1152
    gates = depth * 2 * (width * width + width)
    assert parameters(preset="XL/2", conditioning="adaln") == WITHOUT_SIGMA["XL/2"] - gates
    modulations = depth * 6 * (width * width + width) + 2 * (width * width + width)
    norms = (2 * depth + 1) * 2 * width
    in_context = WITHOUT_SIGMA["XL/2"] - modulations + norms
    assert parameters(preset="XL/2", conditioning="in_context") == in_context
    cross = depth * (4 * (width * width + width) + 2 * width)
    assert parameters(preset="XL/2", conditioning="cross_attention") == in_context + cross
    table = 1001 * width
    assert parameters(preset="XL/2", num_classes=0) == WITHOUT_SIGMA["XL/2"] - table


# --- tables and layers ------------------------------------------------------------------------------------------------


def test_timestep_embedding_golden_values():
    """Frequencies 64 and 127 of 128, and two of their sinusoids at step 500, for both shifts."""
    embed = lambda t, **kw: L.timestep_embedding(jnp.array([t]), 256, scale=1000.0, **kw)[0]
    np.testing.assert_allclose(embed(0.5)[jnp.array([64, 192])], [0.2836622, -0.9589243], atol=1e-5)
    np.testing.assert_allclose(embed(0.5, shift=1.0)[jnp.array([64, 192])], [0.1093339, -0.9940051], atol=1e-5)
    small = 1e-3  # at step 1 the sine of a low frequency is the frequency
    np.testing.assert_allclose(embed(small)[255], 1.0746078e-4, rtol=1e-5)
    np.testing.assert_allclose(embed(small, shift=1.0)[255], 1e-4, rtol=1e-5)
    np.testing.assert_array_equal(embed(0.0), np.repeat([1.0, 0.0], 128))
    np.testing.assert_array_equal(embed(0.3, order="sin_cos"), np.roll(embed(0.3), 128))
    np.testing.assert_allclose(L.timestep_embedding(jnp.array([500.0]), 256, scale=1.0)[0], embed(0.5), atol=1e-6)
    assert embed(jnp.bfloat16(0.5)).dtype == jnp.float32
    with pytest.raises(ConfigError, match="even"):
        L.timestep_embedding(jnp.zeros(1), 255)
    with pytest.raises(ConfigError, match="valid: cos_sin, sin_cos"):
        L.timestep_embedding(jnp.zeros(1), 256, order="sin")


def test_sincos_table_golden_values():
    s1, s2, c1, c2 = np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)
    table = L.sincos_2d(8, 2, 3)
    np.testing.assert_allclose(table[1], [s1, s2, c1, c2, 0, 0, 1, 1], atol=1e-12)  # row 0, column 1
    np.testing.assert_allclose(table[3], [0, 0, 1, 1, s1, s2, c1, c2], atol=1e-12)  # row 1, column 0
    np.testing.assert_allclose(table[2, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], atol=1e-12)
    with pytest.raises(ConfigError, match="divisible by 4"):
        L.sincos_2d(6, 2, 2)


def test_rope_golden_values():
    """Row first; adjacent pairs; frequency k of head size 8 is 100^-k."""
    angles = L.rope_2d(8, [0, 2], [0, 3])
    np.testing.assert_allclose(angles, [[0, 0, 0, 0], [0, 0, 3, 0.03], [2, 0.02, 0, 0], [2, 0.02, 3, 0.03]], atol=1e-12)
    unit = jnp.zeros((1, 4, 1, 8)).at[..., 0].set(1.0)
    expected = [np.cos(2), np.sin(2), 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(L.rotate(unit, angles)[0, 2, 0], expected, atol=1e-6)
    odd = jnp.zeros((1, 4, 1, 8)).at[..., 5].set(1.0)
    np.testing.assert_allclose(L.rotate(odd, angles)[0, 1, 0], [0, 0, 0, 0, -np.sin(3), np.cos(3), 0, 0], atol=1e-6)
    with pytest.raises(ConfigError, match="divisible by 4"):
        L.rope_2d(6, [0], [0])


def test_rope_logits_depend_on_differences_of_position_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 12, 2, 16))

    def logits(row, column):
        angles = L.rope_2d(16, np.arange(3) + row, np.arange(4) + column)
        return jnp.einsum("bthd,bshd->bhts", L.rotate(q, angles), L.rotate(k, angles))

    np.testing.assert_allclose(logits(5, 0), logits(0, 0), atol=2e-5)
    np.testing.assert_allclose(logits(0, 7), logits(0, 0), atol=2e-5)
    assert not np.allclose(logits(0, 0), jnp.einsum("bthd,bshd->bhts", q, k), atol=0.1)


def test_norms_standardise_in_float32():
    x = 1000.0 + jax.random.normal(jax.random.key(0), (2, 6, 8))
    layer = L.LayerNorm(1e-6, affine=False).apply({}, x)
    np.testing.assert_allclose(layer.mean(-1), 0, atol=1e-3)
    np.testing.assert_allclose(layer.std(-1), 1, atol=1e-3)
    affine = {"params": {"scale": jnp.full(8, 3.0), "bias": jnp.full(8, 2.0)}}
    np.testing.assert_allclose(L.LayerNorm(1e-6, affine=True).apply(affine, x), 3 * layer + 2, atol=1e-5)
    rms = L.RMSNorm(1e-6).apply({"params": {"scale": jnp.full(8, 3.0)}}, x)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(rms**2, -1)), 3, rtol=1e-5)
    group = L.GroupNorm(2, 1e-6).apply(affine, x) - 2
    np.testing.assert_allclose(group.reshape(2, 6, 2, 4).mean((1, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(group.reshape(2, 6, 2, 4).std((1, 3)), 3, atol=2e-3)
    assert not np.allclose(group.reshape(2, 6, 2, 4).mean((1, 2)), 0, atol=1e-2)
    # eps is added to the variance: constant rows stay finite, small ones shrink by sqrt(v / (v + eps)).
    small = jnp.array([[-1e-3, 1e-3]])
    np.testing.assert_allclose(L.LayerNorm(3e-6, affine=False).apply({}, small), [[-0.5, 0.5]], rtol=1e-5)
    np.testing.assert_allclose(L.RMSNorm(3e-6).apply({"params": {"scale": jnp.ones(2)}}, small), [[-0.5, 0.5]], rtol=1e-5)
    ones = {"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}
    np.testing.assert_allclose(L.GroupNorm(1, 3e-6).apply(ones, small[:, None]), [[[-0.5, 0.5]]], rtol=1e-5)
    assert L.LayerNorm(1e-6, affine=False, dtype="bfloat16").apply({}, x).dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="8 channels in 3 groups"):
        L.GroupNorm(3, 1e-6).init(jax.random.key(0), x)


def test_modulate_and_mlps_by_hand():
    x = jnp.array([[[1.0, -2.0]]])
    np.testing.assert_array_equal(L.modulate(x, jnp.array([[10.0, 20.0]]), jnp.array([[1.0, 2.0]])), [[[12.0, 14.0]]])
    eye, none = jnp.eye(2), jnp.zeros(2)
    linear = {"kernel": eye, "bias": none}
    gelu = L.GeluMLP(2).apply({"params": {"fc1": linear, "fc2": {"kernel": 2 * eye, "bias": none + 1}}}, x)
    np.testing.assert_allclose(gelu, [[[2 * 0.841192 + 1, 2 * -0.045402 + 1]]], atol=1e-5)  # tanh form, not erf
    w2 = {"kernel": 3 * eye, "bias": none}
    swiglu = L.SwiGLU(2).apply({"params": {"w1": linear, "w2": w2, "w3": {"kernel": eye, "bias": none + 1}}}, x)
    silu = x / (1 + np.exp(-x))
    np.testing.assert_allclose(swiglu, silu * 3 * x + 1, atol=1e-5)


def test_conv_in_one_and_three_dimensions():
    x = jnp.arange(6.0).reshape(1, 6, 1)
    variables = {"params": {"kernel": jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1), "bias": jnp.ones(1)}}
    same = L.Conv(1, kernel=(3,), padding=((1, 1),)).apply(variables, x)[0, :, 0]
    np.testing.assert_array_equal(same, [101, 211, 322, 433, 544, 55])
    strided = L.Conv(1, kernel=(3,), stride=2, padding=((0, 1),)).apply(variables, x)[0, :, 0]
    np.testing.assert_array_equal(strided, [211, 433, 55])
    causal = L.Conv(2, kernel=(3, 3, 3), padding=((2, 0), (1, 1), (1, 1)))
    video = jax.random.normal(jax.random.key(0), (1, 4, 5, 5, 3))
    params = causal.init(jax.random.key(0), video)
    changed = causal.apply(params, video.at[:, 2].add(1.0)) - causal.apply(params, video)
    assert changed.shape == (1, 4, 5, 5, 2)
    assert not changed[:, :2].any() and changed[:, 2:].any()


def test_patches_are_cut_row_by_row_and_put_back():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = dit_module.patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())  # row 1, column 1 of 2 x 3
    np.testing.assert_array_equal(dit_module.unpatchify(tokens, 2, 4, 6), x)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", dit_module.CONDITIONINGS)
def test_output_is_zero_at_init_and_shaped_like_the_input(conditioning):
    module = build({"name": "dit", **TINY, "conditioning": conditioning, "attention": "xla"})
    y, _ = jax.jit(module.init_with_output)(jax.random.key(0), *inputs())
    assert y.shape == (B, 6, 10, 3) and y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0)


def test_initialisation_of_the_paper():
    """Xavier-uniform matrices (bound sqrt(6 / (in + out))), N(0, 0.02^2) embeddings, zero biases; layers differ."""
    module = build({"name": "dit", **TINY, "width": 128})
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs())["params"])
    for path, shape in (("q", (128, 128)), ("out", (128, 128))):
        kernel = params["blocks"]["attn"][path]["kernel"]
        bound = math.sqrt(6 / sum(shape))
        assert 0.98 * bound < jnp.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.03)
        assert not np.allclose(kernel[0], kernel[1])
    bound = math.sqrt(6 / (128 + 512))
    assert 0.98 * bound < jnp.abs(params["blocks"]["mlp"]["fc1"]["kernel"]).max() <= bound
    assert 0.95 * math.sqrt(6 / (12 + 128)) < jnp.abs(params["x_embed"]["kernel"]).max() <= math.sqrt(6 / (12 + 128))
    for kernel in (params["t_embed"]["fc1"]["kernel"], params["t_embed"]["fc2"]["kernel"], params["y_embed"]["embedding"]):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == "bias" or "adaln" in jax.tree_util.keystr(path) or path[0].key == "final":
            assert not leaf.any(), path


def test_gradients_open_in_order():
    """Step 0 moves the last layer alone; once it is open the gates move; once they are open everything does."""
    module = build({"name": "dit", **TINY})
    x, t, cond = inputs()
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, t, cond)["params"])
    grad = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(module.apply({"params": p}, x, t, cond) - x))))

    def moving(params):
        return {jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(grad(params)) if jnp.abs(g).max() > 0}

    def open_up(params, path, noise):
        return jax.tree_util.tree_map_with_path(
            lambda p, a: a + noise * jax.random.normal(jax.random.key(9), a.shape) if path in jax.tree_util.keystr(p) else a,
            params,
        )

    head = {"['final']['linear']['kernel']", "['final']['linear']['bias']"}
    assert moving(params) == head
    params = open_up(params, "['final']['linear']", 0.1)
    second = moving(params)
    assert {"['blocks']['adaln']['kernel']", "['final']['adaln']['kernel']"} | head <= second
    assert not any("attn" in path or "mlp" in path for path in second)
    params = open_up(params, "['adaln']", 0.1)
    assert len(moving(params)) == len(jax.tree.leaves(params))


def unstacked(variables, depth):
    """The same parameters for scan = False."""
    params = dict(variables["params"])
    blocks = params.pop("blocks")
    return {"params": params | {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(depth)}}


@pytest.mark.parametrize("conditioning", dit_module.CONDITIONINGS)
def test_scanned_equals_unrolled(conditioning):
    module, variables, apply = make(conditioning=conditioning, depth=3)
    args = inputs()
    unrolled = unstacked(variables, 3)
    y = apply(variables, *args)
    np.testing.assert_allclose(module.clone(scan=False).apply(unrolled, *args), y, atol=2e-5 * float(jnp.abs(y).max()))
    swapped = unrolled["params"] | {"block_0": unrolled["params"]["block_1"], "block_1": unrolled["params"]["block_0"]}
    assert not np.allclose(module.clone(scan=False).apply({"params": swapped}, *args), y, atol=1e-2)


def test_loop_written_out_is_the_loop():
    """scan = "unrolled": the parameters and gradients of a scan, with no loop and no stack of what the backward pass reads."""
    (module, variables, _), args = make(), inputs()

    def gradient(scan, variables):
        return jax.grad(lambda v: jnp.square(module.clone(scan=scan).apply(v, *args)).mean())(variables)

    loop, written = (jax.jit(functools.partial(gradient, scan)).lower(variables) for scan in (True, "unrolled"))
    assert "stablehlo.while" in loop.as_text() and "stablehlo.while" not in written.as_text()
    for a, b in zip(jax.tree.leaves(written.compile()(variables)), jax.tree.leaves(loop.compile()(variables)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_remat_is_there_and_changes_nothing(scan):
    """Every policy gives the gradients of "none", and really recomputes: products in the backward pass, fewest first."""
    module, variables, _ = make(dropout=0.1)
    variables = variables if scan else unstacked(variables, 2)
    args = inputs()

    def loss(remat, variables):
        network = module.clone(remat=remat, scan=scan)
        y = network.apply(variables, *args, train=True, rngs={"dropout": jax.random.key(4)})
        return jnp.mean(jnp.square(y - args[0]))

    work, grads = {}, {}
    for remat in REMAT:
        grad = jax.grad(functools.partial(loss, remat))
        assert ("remat" in str(jax.make_jaxpr(grad)(variables))) == (remat != "none")
        work[remat] = flops.count(grad, variables)
        grads[remat] = jax.jit(grad)(variables)
        assert ("<host>" in str(jax.make_jaxpr(grad)(variables))) == (remat == "offload")
        for got, expected in zip(jax.tree.leaves(grads[remat]), jax.tree.leaves(grads["none"]), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-7)
    assert work["offload"] == work["full"]
    assert work["none"] < work["dots"] < work["attention"] <= work["full"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_dots_keeps_products_and_nothing_else(dtype):
    """It repeats the queries' products with the keys and no others, and holds what linear layers and attention make, in their type."""
    module, variables, _ = make(dtype=dtype, attention="xla")
    x, *args = inputs()
    (b, height, width, _), layer = x.shape, module.width
    tokens = height * width // module.patch**2

    def loss(remat, variables):
        return jnp.mean(jnp.square(module.clone(remat=remat).apply(variables, x, *args)))

    counts = {remat: flops.count(jax.grad(functools.partial(loss, remat)), variables) for remat in ("none", "dots")}
    assert counts["dots"] - counts["none"] == module.depth * 2 * b * tokens**2 * layer
    held = jax.eval_shape(lambda v: jax.vjp(functools.partial(loss, "dots"), v)[1], variables)
    stacks = [v for v in jax.tree.leaves(held) if v.shape[:2] == (module.depth, b) and v.size >= module.depth * b * tokens * layer]
    # q, k, v, attention and its projection, the block's input, the outputs of the MLP's two layers, the hidden one being wider.
    assert {v.dtype.name for v in stacks} == {dtype}
    assert sum(v.size for v in stacks) == module.depth * b * tokens * layer * (7 + module.mlp_ratio)


def test_permuting_classes_in_table_and_labels_changes_nothing():
    module, variables, apply = make()
    x, t, cond = inputs()
    order = jnp.array([2, 0, 4, 5, 1, 3])
    table = variables["params"]["y_embed"]["embedding"]
    permuted = {"params": variables["params"] | {"y_embed": {"embedding": table[order]}}}
    y = apply(variables, x, t, cond)
    np.testing.assert_allclose(apply(permuted, x, t, {"label": jnp.argsort(order)[cond["label"]]}), y, atol=1e-6)
    assert not np.allclose(apply(permuted, x, t, cond), y, atol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"conditioning": "in_context"}, {"mlp": "swiglu", "norm": "rms", "qk_norm": True}])
def test_without_positions_tokens_are_a_set(fields):
    order = np.array([7, 3, 11, 0, 14, 5, 9, 1, 12, 2, 8, 13, 4, 10, 6])
    x, t, cond = inputs()
    shuffled = dit_module.unpatchify(dit_module.patchify(x, 2)[:, order], 2, 6, 10)
    for positions, equivariant in (({"sincos": False}, True), ({}, False), ({"sincos": False, "rope": True}, False)):
        _, variables, apply = make(**fields, **positions)
        y = apply(variables, x, t, cond)
        expected = dit_module.unpatchify(dit_module.patchify(y, 2)[:, order], 2, 6, 10)
        assert np.allclose(apply(variables, shuffled, t, cond), expected, atol=1e-5 * float(jnp.abs(y).max())) == equivariant


@pytest.mark.parametrize("conditioning", dit_module.CONDITIONINGS)
def test_every_input_matters_and_samples_do_not_mix(conditioning):
    _, variables, apply = make(conditioning=conditioning)
    x, t, cond = inputs()
    y = apply(variables, x, t, cond)
    for changed in (
        apply(variables, x.at[1].add(1.0), t, cond),
        apply(variables, x, t.at[1].add(0.2), cond),
        apply(variables, x, t, {"label": cond["label"].at[1].set(2)}),
    ):
        np.testing.assert_array_equal(changed[0], y[0])
        np.testing.assert_array_equal(changed[2], y[2])
        assert jnp.abs(changed[1] - y[1]).max() > 1e-3


def test_null_condition_is_the_extra_row():
    module, variables, apply = make()
    x, t, cond = inputs()
    assert module.null(cond)["label"].tolist() == [5, 5, 5]
    assert module.null({**cond, "other": 1})["other"] == 1
    assert module.clone(num_classes=0).null({}) == {}
    np.testing.assert_allclose(
        apply(variables, x, t, module.null(cond))[2], apply(variables, x, t, cond)[2], atol=1e-5
    )  # sample 2 asks for class 5


def test_sizes_and_channels():
    for fields in ({"patch": 1}, {"out_channels": 7}, {"num_classes": 0}, {"mlp_ratio": 2.0}):
        module = build({"name": "dit", **TINY, **fields})
        shape = jax.eval_shape(lambda m=module: m.init_with_output(jax.random.key(0), *inputs()))[0].shape
        assert shape == (B, 6, 10, fields.get("out_channels", 3))
    assert build({"name": "dit", **TINY, "mlp": "swiglu", "width": 1152}).hidden == 3072


def test_learned_sigma_is_the_second_half():
    module, variables, apply = make(learn_sigma=True)
    args = inputs()
    both = module.clone(return_sigma=True).apply(variables, *args)
    assert both.shape[-1] == 6
    np.testing.assert_allclose(apply(variables, *args), both[..., :3], atol=1e-5)


def test_time_scale_and_frequency_shift():
    module, variables, apply = make()
    x, t, cond = inputs()
    scaled = module.clone(time_scale=1.0).apply(variables, x, 1000.0 * t, cond)
    np.testing.assert_allclose(scaled, apply(variables, x, t, cond), atol=2e-3)
    shifted = module.clone(frequency_shift=1.0).apply(variables, x, t, cond)
    assert not np.allclose(shifted, apply(variables, x, t, cond), atol=1e-2)


@pytest.mark.parametrize("fields", [{}, {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True}])
def test_bfloat16_stays_near_float32(fields):
    module, variables, apply = make(**fields)
    args = inputs()
    y = apply(variables, *args)
    low = module.clone(dtype="bfloat16").apply(variables, *args)
    assert low.dtype == jnp.float32
    error = float(jnp.linalg.norm(low - y) / jnp.linalg.norm(y))
    assert 1e-4 < error < 3e-2
    text = str(jax.make_jaxpr(module.clone(dtype="bfloat16").apply)(variables, *args))
    assert "bf16[3,15,32]" in text


def test_dropout_only_when_training():
    module, variables, apply = make(dropout=0.5)
    args = inputs()
    y = apply(variables, *args)
    train = lambda seed: module.apply(variables, *args, train=True, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_allclose(module.clone(dropout=0.0).apply(variables, *args), y, atol=1e-5)
    np.testing.assert_array_equal(train(0), train(0))
    assert not np.allclose(train(0), train(1), atol=1e-2) and not np.allclose(train(0), y, atol=1e-2)


def test_denoiser_binds_parameters_and_switches_dropout_with_the_key():
    module, variables, apply = make(dropout=0.5)
    x, t, cond = inputs()
    model = denoiser(module, variables["params"], paths.rectified(), "velocity")
    np.testing.assert_allclose(model(x, t, cond), apply(variables, x, t, cond), atol=1e-5)
    np.testing.assert_allclose(model(x, 0.5, cond)[1], model(x, t, cond)[1], atol=1e-5)
    assert not np.allclose(model(x, t, cond, jax.random.key(0)), model(x, t, cond), atol=1e-2)
    assert model.prediction == "velocity" and model.null(cond)["label"].tolist() == [5, 5, 5]
    plain = build({"name": "dit", **TINY, "num_classes": 0})
    variables = nn.unbox(jax.jit(plain.init)(jax.random.key(0), x, t, {}))
    assert denoiser(plain, variables["params"], paths.rectified(), "x")(x, t).shape == x.shape


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 4}, "model.patch = 4 does not divide the image, 6 x 10"),
        ({"patch": 5}, "model.patch = 5 does not divide"),
        ({"heads": 5}, "model.heads = 5 does not divide model.width = 32"),
        ({"width": 30, "heads": 3}, "divisible by 4"),
        ({"width": 24, "heads": 4, "rope": True}, "divisible by 4, not 6"),
        ({"norm": "batch"}, "model.norm = 'batch' is unknown; valid: layer, rms"),
        ({"mlp": "relu"}, "model.mlp = 'relu' is unknown; valid: gelu, swiglu"),
        ({"scan": "some"}, "model.scan = 'some' is unknown; valid: True, False, 'unrolled'"),
        ({"remat": "some"}, "model.remat = 'some' is unknown; valid: attention, dots, full, none, offload"),
        ({"conditioning": "film"}, "model.conditioning = 'film' is unknown"),
        ({"attention": "flash"}, "attention implementation = 'flash' is unknown"),
        ({"return_sigma": True}, "needs model.learn_sigma"),
    ],
)
def test_bad_fields_are_named(fields, message):
    module = build({"name": "dit", **TINY, **fields})
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), *inputs())


def test_missing_label_is_named():
    x, t, _ = inputs()
    with pytest.raises(ConfigError, match=r"needs cond\['label'\]"):
        jax.eval_shape(build({"name": "dit", **TINY}).init, jax.random.key(0), x, t, {})


def test_build_refuses_what_it_cannot_mean():
    assert build({"name": "dit", "preset": "S/2", "num_classes": 3, "depth": 12}).width == 384
    for section, message in (
        ({"name": "dti"}, "model.name = 'dti' is unknown; valid: .*dit"),
        ({"name": "dit"}, "model lacks depth, width, heads"),
        ({"name": "dit", "preset": "M/2"}, "model.preset = 'M/2' is unknown"),
        ({"name": "dit", "preset": "S/2", "depth": 6}, "model.depth = 6 contradicts preset 'S/2', where it is 12"),
        ({"name": "dit", **TINY, "dpeth": 6}, "model.dpeth is unknown"),
        ({"name": "dit", **TINY, "parent": 6}, "model.parent is unknown"),
        ({"name": "dit", **TINY, "depth": "6"}, "model.depth = '6' should be int"),
        ({"name": "mlp", "preset": "S/2"}, "model.preset = 'S/2' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(section)


# --- the two small networks -------------------------------------------------------------------------------------------


def test_mlp():
    module = build({"name": "mlp", "width": 16, "depth": 2, "num_classes": 4, "dropout": 0.5})
    x, t, cond = jax.random.normal(jax.random.key(0), (3, 2)), jnp.array([0.1, 0.5, 0.9]), {"label": jnp.arange(3)}
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x, t, cond)
    assert y.shape == (3, 2) and y.dtype == jnp.float32 and not y.any()
    variables = randomised(nn.unbox(variables), std=0.5)
    apply = jax.jit(module.apply)
    y = apply(variables, x, t, cond)
    assert module.null(cond)["label"].tolist() == [4, 4, 4]
    for args in ((x.at[1].add(1.0), t, cond), (x, t.at[1].add(0.2), cond), (x, t, {"label": cond["label"].at[1].set(3)})):
        changed = apply(variables, *args)
        np.testing.assert_array_equal(changed[jnp.array([0, 2])], y[jnp.array([0, 2])])
        assert jnp.abs(changed[1] - y[1]).max() > 1e-3
    assert not np.allclose(module.apply(variables, x, t, cond, train=True, rngs={"dropout": jax.random.key(0)}), y)
    with pytest.raises(ConfigError, match=r"needs cond\['label'\]"):
        module.apply(variables, x, t, {})
    assert module.clone(num_classes=0).null({}) == {}


def test_classifier():
    module = build({"name": "classifier", "num_classes": 4, "width": 8, "features": 12, "groups": 4, "dropout": 0.5})
    x = jax.random.normal(jax.random.key(0), (3, 9, 7, 1))
    variables = randomised(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)), std=0.5)
    logits, features = module.apply(variables, x), module.apply(variables, x, features=True)
    assert logits.shape == (3, 4) and features.shape == (3, 12)
    head = variables["params"]["logits"]
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-4)
    assert not np.allclose(module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)}), logits)
    with pytest.raises(ConfigError, match="with t"):
        module.apply(variables, x, t=jnp.zeros(3))
    timed = module.clone(time=True)
    t = jnp.array([0.1, 0.5, 0.9])
    variables = randomised(nn.unbox(jax.eval_shape(lambda: timed.init(jax.random.key(0), x, t=t))), std=0.5)
    moved = timed.apply(variables, x, t=t.at[1].set(0.7)) - timed.apply(variables, x, t=t)
    assert not moved[0].any() and jnp.abs(moved[1]).max() > 1e-3
    with pytest.raises(ConfigError, match="without t"):
        timed.apply(variables, x)
    assert module.kind == "classifier"
