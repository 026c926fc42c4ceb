"""CLIP: the published sizes, what the text tower may see and where it pools, positions of other images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_sharded, close, count, randomise, shapes

from flowjax import models
from flowjax.config import ConfigError
from flowjax.models.clip import CLIP, CLIPText, CLIPVision

TOKENS = jnp.asarray([[5, 9, 30, 0, 0, 0, 0], [7, 30, 3, 30, 30, 30, 30], [1, 2, 3, 4, 5, 6, 30], [30, 1, 1, 1, 1, 1, 1]])
ENDS = [2, 1, 6, 0]
TEXT = {"width": 16, "depth": 3, "heads": 2, "vocab": 31, "length": 7, "eos": 30, "attention": "xla"}
IMAGE = {"patch": 2, "width": 16, "depth": 2, "heads": 2, "grid": 3, "attention": "xla"}
X = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (4, 6, 6, 3)), jnp.float32)


def test_parameter_counts():
    tokens, x = jnp.zeros((1, 77), jnp.int32), jnp.zeros((1, 224, 224, 3))
    text = lambda **fields: count(models.build({"name": "clip_text", **fields}), tokens)  # noqa: E731
    assert text(preset="ViT-L/14") == 123_060_480
    assert text(preset="ViT-L/14", features=768) == 123_650_304
    assert text(preset="bigG") == 694_659_840
    both = lambda preset: count(models.build({"name": "clip", "preset": preset}), x, {"tokens": tokens})  # noqa: E731
    assert both("ViT-B/32") == 151_277_313
    assert both("ViT-L/14") == 427_616_513
    # A patch of 16 instead of 32: fewer pixels in each, more places.
    assert both("ViT-B/16") == 151_277_313 - 768 * 3 * (32**2 - 16**2) + 768 * (14**2 - 7**2)
    vision = models.build({"name": "clip_vision", "preset": "ViT-L/14", "features": 768})
    assert count(vision, x) == 427_616_513 - 123_650_304 - 1


@functools.cache
def made(**fields):
    net = CLIPText(**{**TEXT, **fields})
    params = randomise(shapes(net, TOKENS))
    return params, jax.jit(functools.partial(net.apply, {"params": params}))


def test_text_is_causal():
    apply = made()[1]
    change = jnp.abs(apply(TOKENS)[0] - apply(TOKENS.at[:, 3].set(12))[0]).max((0, 2))
    np.testing.assert_array_equal(np.asarray(change) > 1e-4, [0, 0, 0, 1, 1, 1, 1])
    close(apply(TOKENS[:, :5])[0], apply(TOKENS)[0][:, :5], 1e-5)  # shorter prompts


def test_pooled_at_the_first_end_token():
    for eos in (30, 2):  # 30 is the largest id, which is what the legacy rule looks for
        sequence, pooled = made(eos=eos)[1](TOKENS)
        close(pooled, np.asarray(sequence)[np.arange(4), ENDS], 1e-6)
    tokens = TOKENS.at[0, 4].set(29)
    sequence, pooled = made(eos=29)[1](tokens)
    close(pooled[0], sequence[0, 4], 1e-6)  # the given id, not the largest
    close(pooled[1], sequence[1, 0], 1e-6)  # none at all: the first place, as the library


def test_projection_and_penultimate_state():
    params, apply = made(features=5)
    plain = {name: leaf for name, leaf in params.items() if name != "projection"}
    unprojected = jax.jit(CLIPText(**TEXT).apply)({"params": plain}, TOKENS)[1]
    close(apply(TOKENS)[1], unprojected @ params["projection"]["kernel"], 1e-5)
    params, apply = made()
    before, pooled = jax.jit(CLIPText(**TEXT, penultimate=True).apply)({"params": params}, TOKENS)
    close(pooled, apply(TOKENS)[1], 1e-6)
    # A network of two layers, made of the first two of three, and undone of its norm.
    cut = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])}
    last, _ = jax.jit(CLIPText(**{**TEXT, "depth": 2}).apply)({"params": cut}, TOKENS)
    centred = before - before.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    close(normed, last, 1e-5)


def test_vision_pools_the_normed_class_token_and_stretches_positions():
    net = CLIPVision(**IMAGE, features=5)
    params = randomise(shapes(net, X))
    apply = jax.jit(functools.partial(net.apply, {"params": params}))
    tokens, pooled = apply(X)
    assert tokens.shape == (4, 9, 16) and pooled.shape == (4, 5) and tokens.dtype == jnp.float32
    tall = apply(jnp.tile(X, (1, 2, 1, 1)))[0]
    assert tall.shape == (4, 18, 16)
    # Scale of the last norm reaches the pooled vector alone.
    more = {**params, "norm": {**params["norm"], "scale": 2 * params["norm"]["scale"], "bias": 2 * params["norm"]["bias"]}}
    changed = jax.jit(net.apply)({"params": more}, X)
    close(changed[1], 2 * pooled, 1e-5)
    np.testing.assert_array_equal(changed[0], tokens)


def test_both_towers_with_the_temperature():
    net = CLIP(image=IMAGE, text=TEXT, features=5)
    start = jax.jit(net.init)(jax.random.key(0), X, {"tokens": TOKENS})["params"]
    assert float(jnp.exp(start["log_scale"])) == pytest.approx(14.2857, rel=1e-5)
    params = randomise(shapes(net, X, {"tokens": TOKENS}))
    images, texts, scale = jax.jit(net.apply)({"params": params}, X, {"tokens": TOKENS})
    for which, embedded, arg in (("image", images, X), ("text", texts, TOKENS)):
        pooled = jax.jit(net.tower(which).apply)({"params": params[f"{which}_encoder"]}, arg)[1]
        close(embedded, pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-5)
    assert float(scale) == pytest.approx(np.exp(params["log_scale"]), rel=1e-6)
    assert net.clone(dtype="bfloat16").tower("text").dtype == "bfloat16"


def test_bfloat16_gives_float32():
    params, apply = made(penultimate=True)
    half = jax.jit(CLIPText(**TEXT, penultimate=True, dtype="bfloat16").apply)({"params": params}, TOKENS)
    assert half[0].dtype == half[1].dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(half[0] - apply(TOKENS)[0]).max()) < 0.5


def test_sharded_equals_one_device():
    check_sharded(CLIP(image=IMAGE, text={**TEXT, "penultimate": True}, features=6), jnp.tile(X, (2, 1, 1, 1)), {"tokens": jnp.tile(TOKENS, (2, 1))})


def test_bad_settings_are_refused():
    init = lambda net, arg: jax.eval_shape(net.init, jax.random.key(0), arg)  # noqa: E731
    with pytest.raises(ConfigError, match="length 7 was given 8"):
        init(CLIPText(**TEXT), jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(ConfigError, match="penultimate needs"):
        init(CLIPText(**{**TEXT, "depth": 1}, penultimate=True), TOKENS)
    with pytest.raises(ConfigError, match="model.text.size is unknown"):
        CLIP(image=IMAGE, text={**TEXT, "size": 3}, features=5).tower("text")
