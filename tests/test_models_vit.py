"""ViT: the published sizes, the interpolation of positions, and what each option does to the tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_sharded, close, count, randomise, shapes

from flowjax.config import ConfigError
from flowjax.models import build
from flowjax.models.vit import ViT, resize_matrix

TINY = {"patch": 2, "width": 16, "depth": 2, "heads": 2, "grid": 3, "attention": "xla"}
X = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (2, 6, 6, 3)), jnp.float32)

# transformers' counts with a classifier of 1000 classes, whose head is no part of the encoder; DINOv2 without any head.
WITH_HEAD = {"Ti/16": 5_717_416, "S/16": 22_050_664, "B/16": 86_567_656, "L/16": 304_326_632, "H/14": 632_045_800}
DINO = {
    "dinov2-S/14": 22_056_576, "dinov2-B/14": 86_580_480, "dinov2-L/14": 304_368_640, "dinov2-g/14": 1_136_480_768,
    "dinov2-B/14-registers": 86_583_552,
}  # fmt: skip


@pytest.mark.parametrize("preset", ViT.presets)
def test_parameter_counts_of_the_presets(preset):
    net = build({"name": "vit", "preset": preset})
    counted = count(net, jnp.zeros((1, 112, 112, 3)))
    if preset in WITH_HEAD:
        assert counted == WITH_HEAD[preset] - 1000 * (net.width + 1)
    elif preset in DINO:
        assert counted == DINO[preset]
    elif preset == "mae-B/16":  # less the decoder: 8 blocks of width 512 between two Linears, a mask token and a norm
        decoder = (768 * 512 + 512) + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + (512 * 768 + 768)
        assert counted == 111_655_680 - decoder
    elif preset.startswith("mae-"):
        assert counted == count(build({"name": "vit", "preset": preset.removeprefix("mae-")}), jnp.zeros((1, 112, 112, 3))) - (
            1 + net.grid**2
        ) * net.width
    else:
        assert counted == DINO[preset.removesuffix("-registers")] + 4 * net.width


def test_presets_meet_the_pretrained_grid_and_pixels():
    net = build({"name": "vit", "preset": "dinov2-g/14-registers"})
    assert (net.grid, net.hidden, net.registers, net.antialias) == (37, 4096, 4, True)
    assert build({"name": "vit", "preset": "H/14"}).grid == 16
    assert build({"name": "vit", "preset": "mae-B/16"}).mean == (0.485, 0.456, 0.406)
    assert ViT(**{**TINY, "width": 20, "mlp": "swiglu"}).hidden == 56  # 53 rounded up


# --- interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_keeps_what_it_must(antialias):
    np.testing.assert_allclose(resize_matrix(5, 5, antialias), np.eye(5), atol=1e-12)
    for old, new in ((5, 9), (9, 4), (3, 3), (7, 20)):
        matrix = resize_matrix(old, new, antialias)
        assert matrix.shape == (new, old)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-12)  # left and right alike


def test_interpolation_without_antialias_is_keys_kernel_of_three_quarters():
    """Halfway between samples the four weights are a/8, 1/2 - a/8, and their mirror images, a = -3/4; edges repeat."""
    matrix = resize_matrix(9, 3)  # the middle of three: place 4 is sample 4
    np.testing.assert_allclose(matrix[1], np.eye(9)[4], atol=1e-12)
    matrix = resize_matrix(8, 4)  # every place lies halfway
    a = -0.75
    np.testing.assert_allclose(matrix[1, 1:5], [a / 8, 0.5 - a / 8, 0.5 - a / 8, a / 8], atol=1e-12)
    np.testing.assert_allclose(matrix[0, :3], [0.5 - a / 8 + a / 8, 0.5 - a / 8, a / 8], atol=1e-12)
    # A quarter from a sample: the two polynomials at 5/4, 1/4, 3/4 and 7/4.
    near, far = ((a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (0.25, 0.75))
    np.testing.assert_allclose(resize_matrix(4, 8)[3], [a * 9 / 64, near, far, a * 3 / 64], atol=1e-12)


def test_interpolation_with_antialias_is_that_of_jax():
    samples = np.random.RandomState(0).standard_normal((7, 4)).astype(np.float32)
    for new in (3, 5, 7, 12):
        theirs = jax.image.resize(samples, (new, 4), "cubic", antialias=True)
        np.testing.assert_allclose(resize_matrix(7, new, antialias=True) @ samples, theirs, atol=2e-6)


def test_positions_are_interpolated_for_other_images_only():
    net = ViT(**TINY)
    params = randomise(shapes(net, X))
    table = params["embed"]["positions"]["embedding"]
    # A table that depends on the column alone: images that are taller see the same columns.
    columns = jnp.concatenate([table[:1], jnp.tile(table[1:4], (3, 1))])
    params["embed"]["positions"]["embedding"] = columns
    tall = jnp.tile(X[:, :2], (1, 5, 1, 1))
    tokens, _ = jax.jit(net.apply)({"params": params}, tall)
    np.testing.assert_allclose(tokens.reshape(2, 5, 3, 16), jnp.broadcast_to(tokens[:, None, :3], (2, 5, 3, 16)), atol=2e-5)
    wide = jnp.tile(X[:, :, :2], (1, 1, 5, 1))
    tokens = jax.jit(net.apply)({"params": params}, wide)[0].reshape(2, 3, 5, 16)
    assert float(jnp.abs(tokens[:, :, 1:] - tokens[:, :, :1]).max()) > 0.1


# --- tokens -----------------------------------------------------------------------------------------------------------


@functools.cache
def made(**fields):
    net = ViT(**{**TINY, **fields})
    params = randomise(shapes(net, X))
    return net, params, jax.jit(functools.partial(net.apply, {"params": params}))


def test_patches_are_tokens_and_the_class_token_is_pooled():
    for fields in ({}, {"registers": 3}):
        tokens, pooled = made(**fields)[2](X)
        assert tokens.shape == (2, 9, 16) and pooled.shape == (2, 16)
        assert tokens.dtype == pooled.dtype == jnp.float32
    tokens, pooled = made(pooling="mean")[2](X)
    np.testing.assert_allclose(pooled, np.asarray(tokens).mean(1), atol=1e-6)
    close(made()[2](X)[0], tokens, 1e-6)
    assert float(jnp.abs(made()[2](X)[1] - pooled).max()) > 0.1


def test_patches_that_are_permuted_with_their_positions_permute_the_tokens():
    net, params, apply = made(registers=2)
    order = np.random.RandomState(1).permutation(9)
    table = params["embed"]["positions"]["embedding"]
    moved = {**params, "embed": {**params["embed"], "positions": {"embedding": jnp.concatenate([table[:1], table[1:][order]])}}}
    patches = X.reshape(2, 3, 2, 3, 2, 3).swapaxes(2, 3).reshape(2, 9, 2, 2, 3)[:, order]
    x = patches.reshape(2, 3, 3, 2, 2, 3).swapaxes(2, 3).reshape(2, 6, 6, 3)
    tokens, pooled = apply(X)
    tokens_moved, pooled_moved = jax.jit(net.apply)({"params": moved}, x)
    close(tokens_moved, tokens[:, order], 1e-5)
    close(pooled_moved, pooled, 1e-5)


def test_an_encoder_that_sees_all_patches_in_another_order_permutes_them():
    for positions in ("learned", "sincos"):
        apply = made(positions=positions)[2]
        order = jnp.asarray([np.random.RandomState(i).permutation(9) for i in range(2)])
        tokens, pooled = apply(X)
        kept, pooled_kept = apply(X, keep=order)
        close(kept, jnp.take_along_axis(tokens, order[..., None], 1), 1e-5)
        close(pooled_kept, pooled, 1e-5)
        # What is not kept is not seen.
        hidden = X.at[:, :2, :2].set(0.9)
        few = jnp.asarray([[8, 3, 1, 2], [4, 5, 6, 7]])
        close(apply(hidden, keep=few)[0], apply(X, keep=few)[0], 1e-7)


def test_masked_patches_are_not_seen():
    apply = made(mask_token=True)[2]
    mask = jnp.zeros((2, 9), bool).at[:, 0].set(True)
    hidden = X.at[:, :2, :2].set(0.9)
    assert float(jnp.abs(apply(hidden)[1] - apply(X)[1]).max()) > 1e-2
    close(apply(hidden, mask)[0], apply(X, mask)[0], 1e-7)
    assert float(jnp.abs(apply(X, mask)[0] - apply(X)[0]).max()) > 1e-2
    with pytest.raises(ConfigError, match="needs model.mask_token"):
        made()[2](X, mask)


def test_pixels_are_normalised_by_channel():
    net, params, apply = made(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    plain = made()[2]
    # (v - mean) / std of v in [0, 1] is (2 u - 1 - ...) for the u that the default would see.
    v = (X + 1) / 2
    same = (v - jnp.asarray([0.1, 0.2, 0.3])) / jnp.asarray([0.5, 1.0, 2.0])
    close(apply(X)[0], plain(same)[0], 1e-5)


def test_layerscale_starts_at_its_value_and_scales_the_branches():
    net = ViT(**TINY, layerscale=1e-5)
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    scale = params["blocks"]["attn_scale"]["scale"].value
    np.testing.assert_allclose(scale, np.full((2, 16), 1e-5), rtol=1e-6)
    assert ViT.presets["dinov2-B/14"]["layerscale"] == 1e-5


def test_bfloat16_and_remat():
    net, params, apply = made()
    half = jax.jit(net.clone(dtype="bfloat16").apply)({"params": params}, X)[0]
    assert half.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(half - apply(X)[0]).max()) < 0.3
    text = str(jax.make_jaxpr(lambda p: net.clone(remat="full").apply({"params": p}, X)[1])(params))
    assert "remat" in text or "checkpoint" in text


def test_sharded_equals_one_device():
    check_sharded(ViT(**TINY, registers=2, layerscale=0.1, mlp="swiglu"), jnp.tile(X, (4, 1, 1, 1)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patch": 4}, "model.patch = 4 does not divide the image, 6 x 6"),
        ({"positions": "rope"}, "model.positions = 'rope'"),
        ({"pooling": "max"}, "model.pooling = 'max'"),
        ({"mlp": "relu"}, "model.mlp = 'relu'"),
    ],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(ViT(**{**TINY, **fields}).init, jax.random.key(0), X)
