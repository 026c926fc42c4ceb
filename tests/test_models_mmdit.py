"""MMDiT: published counts and operations, where tokens stand, what may and what may not change the output, ways to run it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_every_input_matters, check_sharded, close, count, randomise, shapes

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.models import build, denoiser, flops
from flowjax.models import layers as L
from flowjax.models.dit import patchify, unpatchify
from flowjax.models.mmdit import MMDiT, grid_sincos
from flowjax.models.remat import REMAT

TINY = {"name": "mmdit", "depth": 3, "width": 24, "heads": 3, "qk_norm": True, "attention": "xla"}
TABLE = {"table": 8, "base": 8}
ENCODER = {"vocab": 11, "length": 6, "width": 16, "depth": 1, "heads": 2}
B = 3


def tiny(**fields):
    return build({**TINY, **({} if fields.get("positions") == "rope" else TABLE), **fields})


def inputs(height=6, width=10, channels=3, tokens=False):
    keys = jax.random.split(jax.random.key(1), 3)
    x, t = jax.random.normal(keys[0], (B, height, width, channels)), jnp.array([0.1, 0.5, 0.9])
    if tokens:
        return x, t, {"tokens": jnp.array([[3, 9, 4, 0, 0, 0], [10, 1, 2, 3, 4, 5], [7, 7, 1, 0, 0, 0]])}
    return x, t, {"text": jax.random.normal(keys[1], (B, 7, 20)), "pooled": jax.random.normal(keys[2], (B, 12))}


@functools.cache
def cached(fields):
    fields = dict(fields)
    if fields.pop("encoder", False):
        fields["text_encoder"] = ENCODER
    net = tiny(**fields)
    params = randomise(shapes(net, *inputs(tokens=net.text_encoder is not None)))
    return net, params, jax.jit(lambda params, *args: net.apply({"params": params}, *args))


def make(**fields):
    """(net, random parameters, jitted apply)."""
    return cached(tuple(sorted(fields.items())))


# --- published numbers ------------------------------------------------------------------------------------------------


def published(text=333, latent=128, **fields):
    """(net, abstract inputs of one 1024-pixel image)."""
    shape = lambda *s: jax.ShapeDtypeStruct((1, *s), jnp.float32)  # noqa: E731
    return build({"name": "mmdit", **fields}), (shape(latent, latent, 16), shape(), {"text": shape(text, 4096), "pooled": shape(2048)})


COUNTS = {"sd3_medium": (2_028_328_000, 192), "sd35_medium": (2_243_171_520, 384), "sd35_large": (8_056_627_520, 192)}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_of_published_models(preset):
    """Those of the checkpoints less their table of positions, and with it."""
    assert set(COUNTS) == set(MMDiT.presets)
    plain, side = COUNTS[preset]
    net, given = published(preset=preset)
    assert count(net, *given) == plain
    assert count(net.clone(positions="table"), *given) == plain + side**2 * net.width


@pytest.mark.parametrize(("depth", "expected"), [(15, 496_066_624), (18, 856_159_552), (21, 1_358_950_720), (30, 3_962_392_384)])
def test_parameter_counts_of_the_paper(depth, expected):
    """2403.03206 section 5.3: width 64 depth, `depth` heads."""
    net, given = published(depth=depth, width=64 * depth, heads=depth)
    assert count(net, *given) == expected


@pytest.mark.parametrize("preset", ["sd3_medium", "sd35_large"])
def test_operations_of_published_models(preset):
    """Depth times the layer below, less what the last one leaves out of the text: query, output and MLP, and the query's attention."""
    net, given = published(preset=preset)
    params = shapes(net, *given)
    text, image, d = 333, 64**2, net.width
    macs = net.depth * (12 * d**2 * (text + image) + 2 * (text + image) ** 2 * d + 12 * d**2)
    macs -= 9 * d**2 * text + 2 * text * (text + image) * d + 4 * d**2
    ends = 2 * 64 * d * image + 4096 * d * text + (256 + 2048 + 2 * d) * d + 2 * d**2
    assert flops.count(lambda *a: net.apply({"params": a[0]}, *a[1:]), params, *given) / 2 == macs + ends


def test_operations_of_one_layer_more():
    """(4 + 8) D^2 a token, 2 T^2 D for the attention over all T, 12 D^2 for both modulations; a second attention of the image N:
    (4 D^2 + 2 N D) a token, and 3 D^2."""
    text, tokens, d = 7, 15, 24

    def macs(**fields):
        net = tiny(**fields)
        params = shapes(net, *inputs())
        return flops.count(lambda p: net.apply({"params": p}, *inputs()), params) / 2 / B

    layer = 12 * d**2 * (text + tokens) + 2 * (text + tokens) ** 2 * d + 12 * d**2
    assert macs(depth=4) - macs(depth=3) == layer
    assert macs(depth=4, dual=2) - macs(depth=4) == 2 * (tokens * (4 * d**2 + 2 * tokens * d) + 3 * d**2)
    assert macs(scan=False, remat="full", dual=1) == macs(dual=1)


# --- positions --------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_table_of_dit_where_places_are_whole():
    np.testing.assert_allclose(grid_sincos(8, range(2), range(3)), L.sincos_2d(8, 2, 3), atol=1e-6)
    half = grid_sincos(8, [0.5], [0.0, 1.5])
    row = [np.sin(0.5), np.sin(0.005), np.cos(0.5), np.cos(0.005)]
    np.testing.assert_allclose(half[0], [0, 0, 1, 1, *row], atol=1e-6)
    np.testing.assert_allclose(half[1], [np.sin(1.5), np.sin(0.015), np.cos(1.5), np.cos(0.015), *row], atol=1e-6)


def test_images_take_the_middle_of_the_table():
    """A table of 8 places from 0 to 4 has steps of 1/2: 3 rows begin at place 2, 5 columns at place 1."""
    places = MMDiT(depth=2, width=8, heads=2, table=8, base=4)._places
    np.testing.assert_allclose(places(3, 5), grid_sincos(8, [1.0, 1.5, 2.0], [0.5, 1.0, 1.5, 2.0, 2.5]), atol=1e-6)
    whole = places(8, 8).reshape(8, 8, 8)
    np.testing.assert_array_equal(places(4, 2).reshape(4, 2, 8), whole[2:6, 3:5])


def test_a_stored_table_begins_as_the_computed_one_and_is_cropped_like_it():
    net, params, apply = make()
    args = inputs()
    stored = net.clone(positions="table")
    fresh = jax.jit(stored.init)(jax.random.key(0), *args)["params"]
    table = meta.unbox(fresh)["positions"]["embedding"]
    assert table.shape == (64, 24)
    stored = jax.jit(stored.apply)({"params": params | {"positions": {"embedding": table}}}, *args)
    close(stored, apply(params, *args), 1e-5)


def shuffled(x, order):
    return unpatchify(patchify(x, 2)[:, order], 2, 6, 10)


def test_without_positions_the_image_is_a_set():
    order = np.array([7, 3, 11, 0, 14, 5, 9, 1, 12, 2, 8, 13, 4, 10, 6])
    x, t, cond = inputs()

    def equivariant(apply, params):
        y = apply(params, x, t, cond)
        moved = apply(params, shuffled(x, order), t, cond)
        return np.allclose(moved, shuffled(y, order), atol=1e-5 * float(jnp.abs(y).max()))

    _, params, apply = make(positions="table")
    assert not equivariant(apply, params)
    params = params | {"positions": {"embedding": jnp.zeros((64, 24))}}
    assert equivariant(apply, params)
    for positions in ("cropped", "rope"):
        _, params, apply = make(positions=positions)
        assert not equivariant(apply, params)


def test_rotary_positions_begin_in_the_corner():
    """One patch alone stands at (0, 0), unturned, as does the text; two patches are told apart."""
    x, t, cond = inputs(2, 4)
    _, params, turned = make(positions="rope")
    _, _, plain = make(positions="table")
    nowhere = params | {"positions": {"embedding": jnp.zeros((64, 24))}}
    close(plain(nowhere, x[:, :, :2], t, cond), turned(params, x[:, :, :2], t, cond), 1e-5)
    assert jnp.abs(plain(nowhere, x, t, cond) - turned(params, x, t, cond)).max() > 1e-2


def test_text_is_a_set_of_embeddings_whose_order_the_encoder_knows():
    order = jnp.array([4, 2, 6, 0, 1, 5, 3])
    x, t, cond = inputs()
    _, params, apply = make()
    y = apply(params, x, t, cond)
    close(apply(params, x, t, {**cond, "text": cond["text"][:, order]}), y, 1e-5)
    _, params, apply = make(encoder=True)
    x, t, cond = inputs(tokens=True)
    y, swapped = apply(params, x, t, cond), apply(params, x, t, {"tokens": cond["tokens"].at[0].set(jnp.array([9, 3, 4, 0, 0, 0]))})
    assert jnp.abs(swapped[0] - y[0]).max() > 1e-3
    np.testing.assert_array_equal(swapped[1:], y[1:])


# --- initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"dual": 1}, {"patch": 5, "positions": "rope", "qk_norm": False}, {"depth": 1, "out_channels": 4}],
)
def test_output_is_zero_at_init_and_shaped_like_the_input(fields):
    net = tiny(**fields)
    size = (10, 15) if net.patch == 5 else (6, 10)
    y = jax.jit(lambda: net.init_with_output(jax.random.key(0), *inputs(*size))[0])()
    assert y.shape == (B, *size, fields.get("out_channels", 3)) and y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0)


def test_what_is_zero_at_init_and_what_is_not():
    net = tiny(width=96, text_encoder=ENCODER)
    params = meta.unbox(jax.jit(net.init)(jax.random.key(0), *inputs(tokens=True))["params"])
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        zero = path[-1].key == "bias" or "adaln" in name or path[0].key == "final"
        assert leaf.any() != zero, name
    kernel = params["blocks"]["attn"]["text_q"]["kernel"]
    bound = math.sqrt(6 / (96 + 96))
    assert 0.98 * bound < jnp.abs(kernel).max() <= bound and not np.allclose(kernel[0], kernel[1])
    for name in ("t_embed", "pooled_embed"):
        for layer in ("fc1", "fc2"):
            np.testing.assert_allclose(params[name][layer]["kernel"].std(), 0.02, rtol=0.1)


def test_gradients_open_in_order():
    """Step 0 moves the last layer alone; once it is open the gates move; once they are open everything does, the text encoder
    too, but for the query of the text in the layer where the text ends."""
    net = build({**TINY, "text_encoder": ENCODER})
    x, t, cond = inputs(tokens=True)
    params = meta.unbox(jax.jit(net.init)(jax.random.key(0), x, t, cond)["params"])
    grad = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(net.apply({"params": p}, x, t, cond) - x))))

    def still(params):
        return {jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(grad(params)) if not jnp.abs(g).max() > 0}

    def open_up(params, path, noise):
        return jax.tree_util.tree_map_with_path(
            lambda p, a: a + noise * jax.random.normal(jax.random.key(9), a.shape) if path in jax.tree_util.keystr(p) else a, params
        )

    every = {jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)}
    assert every - still(params) == {"['final']['linear']['kernel']", "['final']['linear']['bias']"}
    params = open_up(params, "['final']['linear']", 0.1)
    moving = every - still(params)
    assert "['blocks']['image_adaln']['kernel']" in moving and not any("attn" in p or "mlp" in p or "text" in p for p in moving)
    params = open_up(params, "adaln']", 0.1)
    left = still(params)
    assert left == {f"['block_2']['attn']['text_q{end}" for end in ("']['kernel']", "']['bias']", "_norm']['scale']")}


# --- what changes the output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [False, True])
def test_every_input_matters_and_samples_do_not_mix(encoder):
    _, params, apply = make(encoder=encoder)
    check_every_input_matters(apply, params, *inputs(tokens=encoder))


def test_time_counts_thousand():
    net, params, apply = make()
    x, t, cond = inputs()
    _, _, other = make(time_scale=1.0)
    close(other(params, x, 1000.0 * t, cond), apply(params, x, t, cond), 1e-3)


def test_null_is_an_empty_prompt():
    net, params, apply = make()
    x, t, cond = inputs()
    null = net.null({**cond, "guidance": jnp.ones(B)})
    assert not null["text"].any() and not null["pooled"].any() and null["guidance"].all()
    assert jax.tree.map(lambda v: (v.shape, v.dtype), net.null(cond)) == jax.tree.map(lambda v: (v.shape, v.dtype), cond)
    tokens = net.null(inputs(tokens=True)[2])["tokens"]
    assert tokens.dtype == jnp.int32 and not tokens.any()
    model = denoiser(net, params, paths.rectified(), "velocity")
    close(model(x, t, model.null(cond)), apply(params, x, t, jax.tree.map(jnp.zeros_like, cond)), 1e-5)


@pytest.mark.parametrize(
    ("section", "has"),
    [
        (TINY, True),
        ({"name": "dit", "preset": "S/2", "num_classes": 3}, True),
        ({"name": "dit", "preset": "S/2"}, False),
        ({"name": "unet"}, False),
        ({"name": "unet", "num_classes": 3}, True),
        ({"name": "mlp", "width": 8, "depth": 1}, False),
        ({"name": "mlp", "width": 8, "depth": 1, "num_classes": 2}, True),
    ],
)
def test_a_model_has_a_null_condition_where_its_network_has_one(section, has):
    assert (denoiser(build(section), {}, paths.rectified(), "velocity").null is not None) == has


def test_dropout_only_when_training():
    net, params, apply = make(dropout=0.5)
    args = inputs()
    train = jax.jit(lambda seed: net.apply({"params": params}, *args, train=True, rngs={"dropout": jax.random.key(seed)}))
    _, _, plain = make()
    close(plain(params, *args), apply(params, *args), 1e-5)
    np.testing.assert_array_equal(train(0), train(0))
    assert jnp.abs(train(0) - train(1)).max() > 1e-2 and jnp.abs(train(0) - apply(params, *args)).max() > 1e-2


# --- ways to run it ---------------------------------------------------------------------------------------------------


def unrolled(params):
    stacks = [params[k] for k in ("dual_blocks", "blocks") if k in params]
    layers = [jax.tree.map(lambda v, i=i: v[i], s) for s in stacks for i in range(len(s["text_adaln"]["bias"]))]
    return params | {f"block_{i}": layer for i, layer in enumerate(layers)}


@pytest.mark.parametrize(("dual", "a", "b"), [(0, 0, 1), (1, 1, 2), (3, 0, 2)])
def test_scanned_equals_unrolled(dual, a, b):
    net, params, apply = make(depth=4, dual=dual)
    args, flat = inputs(), unrolled(params)
    plain = jax.jit(lambda params: net.clone(scan=False).apply({"params": params}, *args))
    y = apply(params, *args)
    close(plain(flat), y, 1e-5)
    assert jnp.abs(plain(flat | {f"block_{a}": flat[f"block_{b}"], f"block_{b}": flat[f"block_{a}"]}) - y).max() > 1e-3


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_the_image_after_a_layer_is_projected(layer):
    """In each kind of layers: those after it change the prediction alone, it and those before change both."""
    head = {"layer": layer, "features": 5, "hidden": 7}
    net, args = build({**TINY, "depth": 4, "dual": 1, "projector": head}), inputs()
    params = randomise(shapes(net, *args))
    both = jax.jit(lambda params: net.apply({"params": params}, *args, project=True))(params)
    flat = net.clone(scan=False)
    run = jax.jit(lambda params: flat.apply({"params": params}, *args, project=True))
    y, projection = run(unrolled(params))
    close(both[0], y, 1e-5)
    close(both[1], projection, 1e-5)
    assert projection.shape == (B, 3, 5, 5)
    for i in range(4):
        moved = jax.tree.map(lambda v: 1.3 * v, unrolled(params)[f"block_{i}"])
        other_y, other = run(unrolled(params) | {f"block_{i}": moved})
        assert jnp.abs(other_y - y).max() > 1e-3
        assert (float(jnp.abs(other - projection).max()) > 1e-3) == (i < layer)


@pytest.mark.slow
def test_remat_is_there_and_changes_nothing():
    net, params, _ = make(dropout=0.1, dual=1)
    args = inputs()

    def loss(remat, params):
        y = net.clone(remat=remat).apply({"params": params}, *args, train=True, rngs={"dropout": jax.random.key(4)})
        return jnp.mean(jnp.square(y - args[0]))

    work, expected = {}, jax.jit(jax.grad(functools.partial(loss, "none")))(params)
    for remat in REMAT:
        grad = jax.grad(functools.partial(loss, remat))
        work[remat] = flops.count(grad, params)
        if remat in ("full", "dots"):  # the others recompute a part of what "full" does
            for a, b in zip(jax.tree.leaves(jax.jit(grad)(params)), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)
    assert work["offload"] == work["full"]
    unread = 2 * B * 7 * 24**2  # the text's query in the last layer, which recomputation leaves out
    assert work["none"] - unread < work["dots"] < work["attention"] <= work["full"]


def test_bfloat16_stays_near_float32():
    net, params, apply = make(encoder=True)
    args = inputs(tokens=True)
    y = apply(params, *args)
    half = net.clone(dtype="bfloat16")
    low = jax.jit(half.apply)({"params": params}, *args)
    assert low.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(low - y) / jnp.linalg.norm(y)) < 3e-2
    text = str(jax.make_jaxpr(lambda p: half.apply({"params": p}, *args))(params))
    assert "bf16[3,15,24]" in text and "bf16[3,6,24]" in text and "bf16[3,21,3,8]" in text


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2)])  # splits parameters, heads and tokens
def test_sharded_equals_one_device(sizes):
    """Also with text and image split over the axis of contexts, where attention is a ring: 8 + 16 tokens."""
    net = build({**TINY, "width": 32, "heads": 4, "dual": 1, "attention": "auto", "remat": "dots"})
    keys = jax.random.split(jax.random.key(1), 3)
    cond = {"text": jax.random.normal(keys[1], (8, 8, 20)), "pooled": jax.random.normal(keys[2], (8, 12))}
    check_sharded(net, jax.random.normal(keys[0], (8, 8, 8, 3)), jnp.linspace(0.1, 0.9, 8), cond, sizes=sizes)


@pytest.mark.slow
def test_sharded_equals_one_device_with_its_own_text_encoder():
    net = build({**TINY, "width": 32, "heads": 4, "depth": 2, "positions": "rope", "text_encoder": {**ENCODER, "length": 8}})
    tokens = jax.random.randint(jax.random.key(2), (8, 8), 0, 11)
    check_sharded(net, jax.random.normal(jax.random.key(1), (8, 4, 6, 3)), jnp.linspace(0.1, 0.9, 8), {"tokens": tokens})


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 4}, "model.patch = 4 does not divide the image, 6 x 10"),
        ({"heads": 5}, "model.heads = 5 does not divide model.width = 24"),
        ({"width": 18}, "model.width = 18 must be divisible by 4"),
        ({"dual": 3}, "model.dual = 3 must be less than model.depth = 3"),
        ({"dual": -1}, "model.dual = -1"),
        ({"table": 4}, "model.table = 4 patches of 2 are less than the image, 6 x 10; .*'rope'"),
        ({"positions": "rope", "base": 32}, "model.base = 32 does nothing with model.positions = 'rope'; leave it out"),
        ({"positions": "sincos"}, "model.positions = 'sincos' is unknown; valid: cropped, rope, table"),
        ({"remat": "some"}, "model.remat = 'some' is unknown"),
        ({"text_encoder": {**ENCODER, "wdth": 3}}, "model.text_encoder.wdth is unknown; valid: vocab"),
        ({"text_encoder": ENCODER}, r"with a text_encoder needs cond\['tokens'\]; cond has \['pooled', 'text'\]"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(tiny(**fields).init, jax.random.key(0), *inputs())


def test_missing_text_is_named():
    x, t, cond = inputs()
    for name in cond:
        rest = {k: v for k, v in cond.items() if k != name}
        with pytest.raises(ConfigError, match=rf"without a text_encoder needs cond\['{name}'\]"):
            jax.eval_shape(build(TINY).init, jax.random.key(0), x, t, rest)
