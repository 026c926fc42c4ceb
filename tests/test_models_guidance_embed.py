"""The scale of guidance as an input of DiT, JiT, MMDiT and Flux: what it adds, that it adds nothing at first, where it matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_every_input_matters, count, randomise, shapes

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.interop import diffusers_configs
from flowjax.models import build, denoiser

SIZES = {"depth": 2, "width": 16, "heads": 2, "patch": 2, "attention": "xla"}
NETS = {
    "dit": {"name": "dit", **SIZES, "num_classes": 4},
    "dit_in_context": {"name": "dit", **SIZES, "num_classes": 4, "conditioning": "in_context"},
    "dit_cross_attention": {"name": "dit", **SIZES, "num_classes": 4, "conditioning": "cross_attention"},
    "jit": {"name": "jit", **SIZES, "num_classes": 4, "context_from": 1, "class_tokens": 2, "bottleneck": 5},
    "mmdit": {"name": "mmdit", **SIZES, "table": 8, "base": 4},
    "flux": {"name": "flux", **SIZES, "single_depth": 1, "rope_axes": (2, 2, 4)},
}
KEYS = jax.random.split(jax.random.key(0), 3)
X, T = jax.random.normal(KEYS[0], (3, 4, 6, 3)), jnp.asarray([0.1, 0.5, 0.9])
TEXT = {"text": jax.random.normal(KEYS[1], (3, 5, 7)), "pooled": jax.random.normal(KEYS[2], (3, 6))}
SCALE = {"guidance": jnp.asarray([1.0, 2.5, 7.0])}


def given(name):
    """The inputs of the network without the scale."""
    return X, T, TEXT if name in ("mmdit", "flux") else {"label": jnp.asarray([0, 2, 4])}


@functools.cache
def case(name, **fields):
    """(net with the input, random parameters, jitted apply)."""
    net = build({**NETS[name], "guidance_embed": True, **fields})
    x, t, cond = given(name)
    return net, randomise(shapes(net, x, t, cond | SCALE)), jax.jit(lambda params, *args: net.apply({"params": params}, *args))


@pytest.mark.parametrize("name", NETS)
def test_what_is_added(name):
    """Two matrices, 256 sinusoids to the width to the width, under a name of their own; nothing else differs, and nothing without."""
    x, t, cond = given(name)
    plain, (net, params, _) = build(NETS[name]), case(name)
    assert count(net, x, t, cond | SCALE) == count(plain, x, t, cond) + 256 * 16 + 16 + 16 * 16 + 16
    rest = {k: v for k, v in params.items() if k != "g_embed"}
    assert jax.tree.map(jnp.shape, rest) == jax.tree.map(jnp.shape, shapes(plain, x, t, cond))
    assert not plain.guidance_embed


@pytest.mark.parametrize("name", NETS)
def test_at_first_every_scale_gives_the_network_without_the_input(name):
    x, t, cond = given(name)
    net, params, apply = case(name)
    first = meta.unbox(jax.jit(net.init)(jax.random.key(0), x, t, cond | SCALE)["params"])["g_embed"]
    assert first["fc1"]["kernel"].any() and not first["fc2"]["kernel"].any() and not first["fc2"]["bias"].any()
    rest = {k: v for k, v in params.items() if k != "g_embed"}
    want = jax.jit(build(NETS[name]).apply)({"params": rest}, x, t, cond)
    np.testing.assert_array_equal(apply(rest | {"g_embed": first}, x, t, cond | SCALE), want)
    assert jnp.abs(apply(params, x, t, cond | SCALE) - want).max() > 1e-3


@pytest.mark.parametrize("name", NETS)
def test_every_row_has_a_scale_of_its_own(name):
    x, t, cond = given(name)
    _, params, apply = case(name)
    check_every_input_matters(apply, params, x, t, cond | SCALE)


@pytest.mark.parametrize("name", ["dit", "jit", "mmdit"])
def test_the_scale_counts_in_units_of_time(name):
    _, params, apply = case(name)
    _, _, other = case(name, time_scale=10.0)
    x, t, cond = given(name)
    y = apply(params, x, t, cond | SCALE)
    np.testing.assert_allclose(other(params, x, 100 * t, cond | {"guidance": 100 * SCALE["guidance"]}), y, atol=2e-3 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("name", NETS)
def test_null_keeps_the_scale_and_the_model_says_that_it_takes_one(name):
    _, _, cond = given(name)
    net, params, _ = case(name)
    model = denoiser(net, params, paths.rectified(), "velocity")
    np.testing.assert_array_equal(model.null(cond | SCALE)["guidance"], SCALE["guidance"])
    assert model.guidance_embed and not denoiser(build(NETS[name]), params, paths.rectified(), "velocity").guidance_embed


@pytest.mark.parametrize("name", NETS)
def test_a_missing_scale_is_named_with_what_supplies_it(name):
    x, t, cond = given(name)
    net, params, _ = case(name)
    with pytest.raises(ConfigError, match=r"guidance_embed .sampled with guidance = .*'embedded'.* needs cond\['guidance'\]; cond has \["):
        net.apply({"params": params}, x, t, cond)


def test_libraries_without_the_input_are_told():
    info = {"shape": [4, 4, 3], "input_scaling": "none", "path": {"name": "rectified"}, "prediction": "velocity"}
    for write, fields in ((diffusers_configs.write_dit, {"frequency_shift": 1.0}), (diffusers_configs.write_sd3, {})):
        net, _, _ = case("dit" if fields else "mmdit", **fields)
        with pytest.raises(ConfigError, match="model.guidance_embed = True cannot be expressed in diffusers'"):
            write(net, info)
