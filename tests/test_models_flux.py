"""Flux: published counts and operations, packing, where tokens stand, what may and what may not change the output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_every_input_matters, check_sharded, close, count, randomise, shapes

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.models import build, denoiser, flops
from flowjax.models.flux import Flux, pack, rope_angles, unpack

TINY = {
    "name": "flux", "depth": 2, "single_depth": 2, "width": 36, "heads": 3, "rope_axes": (2, 4, 6), "guidance_embed": True,
    "attention": "xla",
}  # fmt: skip
B = 3


def inputs(height=6, width=10):
    keys = jax.random.split(jax.random.key(1), 3)
    cond = {"text": jax.random.normal(keys[1], (B, 7, 20)), "pooled": jax.random.normal(keys[2], (B, 12))}
    x, t = jax.random.normal(keys[0], (B, height, width, 3)), jnp.array([0.1, 0.5, 0.9])
    return x, t, cond | {"guidance": jnp.array([1.0, 3.5, 7.0])}


@functools.cache
def case(**fields):
    net = build({**TINY, **fields})
    params = randomise(shapes(net, *inputs()))
    return net, params, jax.jit(lambda params, *args: net.apply({"params": params}, *args))


# --- published numbers ------------------------------------------------------------------------------------------------


def published(text=512, **fields):
    """(net, abstract inputs of one 1024-pixel image)."""
    shape = lambda *s: jax.ShapeDtypeStruct((1, *s), jnp.float32)  # noqa: E731
    cond = {"text": shape(text, 4096), "pooled": shape(768), "guidance": shape()}
    return build({"name": "flux", **fields}), (shape(128, 128, 16), shape(), cond)


@pytest.mark.parametrize(("preset", "expected"), [("flux1_dev", 11_901_408_320), ("flux1_schnell", 11_891_178_560)])
def test_parameter_counts_of_published_models(preset, expected):
    net, given = published(preset=preset)
    assert count(net, *given) == expected


def test_operations_of_the_published_model():
    """74.38 TFLOP for 1024 pixels and 512 tokens; 12 D^2 a token and 2 T^2 D in either kind of layer, 12 or 3 D^2 of modulation."""
    assert len(Flux.presets) == 2
    net, given = published(preset="flux1_dev")
    work = flops.count(lambda p, *a: net.apply({"params": p}, *a), shapes(net, *given), *given)
    assert work / 1e12 == pytest.approx(74.38, rel=1e-3)
    d, tokens = 3072, 64**2 + 512
    macs = (19 + 38) * (12 * d**2 * tokens + 2 * tokens**2 * d) + (19 * 12 + 38 * 3) * d**2
    macs += 64 * d * 2 * 64**2 + 4096 * d * 512 + (2 * 256 + 768 + 3 * d) * d + 2 * d**2
    assert work == 2 * macs


# --- packing and positions --------------------------------------------------------------------------------------------


def test_a_token_is_read_channel_by_channel():
    x = jnp.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    tokens = pack(x, 2)
    assert tokens.shape == (1, 6, 12)
    np.testing.assert_array_equal(tokens[0, 4], x[0, 2:4, 2:4].transpose(2, 0, 1).ravel())  # row 1, column 1 of 2 x 3
    np.testing.assert_array_equal(unpack(tokens, 2, 4, 6), x)


def test_angles_of_the_three_axes():
    """Head of 12 as 2 + 4 + 6: nothing turns with the first; the second has 1, 10^-2 of the row; the third 10^(-4k/3) of the column."""
    angles = rope_angles((2, 4, 6), 2, 4)
    assert angles.shape == (8, 6)
    np.testing.assert_allclose(angles[3], [0, 0, 0, 3, 3 * 10 ** (-4 / 3), 3 * 10 ** (-8 / 3)], rtol=1e-12)
    np.testing.assert_allclose(angles[5], [0, 1, 0.01, 1, 10 ** (-4 / 3), 10 ** (-8 / 3)], rtol=1e-12)
    published = rope_angles((16, 56, 56), 64, 64)
    assert published.shape == (4096, 64) and not published[:, :8].any()
    np.testing.assert_allclose(published[64 * 5 + 9, [8, 9, 36, 37]], [5, 5 * 10 ** (-1 / 7), 9, 9 * 10 ** (-1 / 7)], rtol=1e-12)


def test_text_is_a_set_and_the_image_is_not():
    x, t, cond = inputs()
    _, params, apply = case()
    y = apply(params, x, t, cond)
    close(apply(params, x, t, {**cond, "text": cond["text"][:, jnp.array([4, 2, 6, 0, 1, 5, 3])]}), y, 1e-5)
    order = np.array([7, 3, 11, 0, 14, 5, 9, 1, 12, 2, 8, 13, 4, 10, 6])
    shuffle = lambda v: unpack(pack(v, 2)[:, order], 2, 6, 10)  # noqa: E731
    assert jnp.abs(apply(params, shuffle(x), t, cond) - shuffle(y)).max() > 1e-2


@pytest.mark.parametrize(("size", "axis"), [((10, 2), 1), ((2, 10), 2)])
def test_image_tokens_know_their_row_and_their_column(size, axis):
    x, t, cond = inputs(*size)
    _, params, apply = case()
    y, mirrored = apply(params, x, t, cond), jnp.flip(apply(params, jnp.flip(x, axis), t, cond), axis)
    assert jnp.abs(y - mirrored).max() > 1e-2


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 10), (2, 4)])
def test_output_is_zero_at_init_and_shaped_like_the_input(size):
    net, args = build(TINY), inputs(*size)
    y, variables = jax.jit(net.init_with_output)(jax.random.key(0), *args)
    assert y.shape == (B, *size, 3) and y.dtype == jnp.float32 and not y.any()
    for path, leaf in jax.tree.leaves_with_path(meta.unbox(variables["params"])):
        name = jax.tree_util.keystr(path)
        zero = path[-1].key == "bias" or "adaln" in name or path[0].key == "final" or "['g_embed']['fc2']" in name
        assert leaf.any() != zero, name


def test_every_input_matters_and_samples_do_not_mix():
    _, params, apply = case()
    check_every_input_matters(apply, params, *inputs())


def test_time_and_guidance_count_thousand():
    net, params, apply = case()
    _, _, other = case(time_scale=1.0)
    x, t, cond = inputs()
    y = apply(params, x, t, cond)
    close(other(params, x, 1000.0 * t, {**cond, "guidance": 1000.0 * cond["guidance"]}), y, 1e-3)


def test_null_keeps_the_guidance():
    net, params, apply = case()
    x, t, cond = inputs()
    model = denoiser(net, params, paths.rectified(), "velocity")
    null = model.null(cond)
    assert not null["text"].any() and not null["pooled"].any()
    np.testing.assert_array_equal(null["guidance"], cond["guidance"])
    plain, rest, without = case(guidance_embed=False)
    assert "g_embed" in params and "g_embed" not in rest
    two = {k: v for k, v in cond.items() if k != "guidance"}
    np.testing.assert_array_equal(without(rest, x, t, two), without(rest, x, t, cond))


def test_scanned_equals_unrolled():
    net, params, apply = case()
    args = inputs()
    y = apply(params, *args)
    flat = params | {
        f"block_{first + i}": jax.tree.map(lambda v, i=i: v[i], params[name])
        for first, name in ((0, "double_blocks"), (2, "single_blocks"))
        for i in range(2)
    }
    plain = jax.jit(lambda params: net.clone(scan=False, remat="full").apply({"params": params}, *args))
    close(plain(flat), y, 1e-5)
    for a, b in ((0, 1), (2, 3)):
        assert jnp.abs(plain(flat | {f"block_{a}": flat[f"block_{b}"], f"block_{b}": flat[f"block_{a}"]}) - y).max() > 1e-3


def test_bfloat16_stays_near_float32():
    net, params, apply = case()
    args = inputs()
    y, half = apply(params, *args), net.clone(dtype="bfloat16")
    low = jax.jit(half.apply)({"params": params}, *args)
    assert low.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(low - y) / jnp.linalg.norm(y)) < 3e-2
    text = str(jax.make_jaxpr(lambda p: half.apply({"params": p}, *args))(params))
    assert "bf16[3,15,36]" in text and "bf16[3,22,36]" in text and "bf16[3,22,3,12]" in text


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2)])  # splits parameters, heads and tokens
def test_sharded_equals_one_device(sizes):
    """Also with tokens split over the axis of contexts, where attention is a ring: 8 + 16 tokens."""
    net = build({**TINY, "width": 48, "heads": 4, "attention": "auto", "remat": "dots"})
    keys = jax.random.split(jax.random.key(1), 3)
    cond = {"text": jax.random.normal(keys[1], (8, 8, 20)), "pooled": jax.random.normal(keys[2], (8, 12))}
    cond["guidance"] = jnp.linspace(1, 5, 8)
    check_sharded(net, jax.random.normal(keys[0], (8, 8, 8, 3)), jnp.linspace(0.1, 0.9, 8), cond, sizes=sizes)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 4}, "model.patch = 4 does not divide the image, 6 x 10"),
        ({"heads": 5}, "model.heads = 5 does not divide model.width = 36"),
        ({"rope_axes": (2, 4, 4)}, r"model.rope_axes = \(2, 4, 4\) must be three even sizes that add up to 12"),
        ({"rope_axes": (3, 3, 6)}, "three even sizes"),
        ({"rope_axes": (6, 6)}, "three even sizes"),
        ({"single_depth": 0}, "model.single_depth = 0 must be at least 1"),
        ({"depth": 0}, "model.depth = 0 and"),
        ({"remat": "some"}, "model.remat = 'some' is unknown"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(build({**TINY, **fields}).init, jax.random.key(0), *inputs())


def test_missing_conditions_are_named():
    x, t, cond = inputs()
    for name in cond:
        rest = {k: v for k, v in cond.items() if k != name}
        with pytest.raises(ConfigError, match=rf"needs cond\['{name}'\]"):
            jax.eval_shape(build(TINY).init, jax.random.key(0), x, t, rest)
