"""The projector: which state it reads, what it computes, and that a network that is not asked to project does nothing for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_sharded, close, randomise, shapes

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.models import build, denoiser
from flowjax.models.projector import Projector

HEAD = {"layer": 2, "features": 5, "hidden": 7}
NETS = {
    "dit": {"name": "dit", "depth": 3, "width": 16, "heads": 2, "num_classes": 4, "attention": "xla"},
}
NETS["jit"] = {**NETS["dit"], "name": "jit", "patch": 2, "context_from": 1, "class_tokens": 2, "bottleneck": 5}
NETS["dit_in_context"] = {**NETS["dit"], "conditioning": "in_context"}
X = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
INPUTS = X, jnp.asarray([0.2, 0.7]), {"label": jnp.asarray([1, 3])}


@functools.cache
def case(name, layer=2, **fields):
    """(net, random parameters, jitted (params) -> (y, projection))."""
    net = build({**NETS[name], "projector": {**HEAD, "layer": layer}, **fields})
    params = randomise(shapes(net, *INPUTS))
    return net, params, jax.jit(lambda params: net.apply({"params": params}, *INPUTS, project=True))


def test_counts_of_the_paper():
    """SiT-XL/2 (width 1152) to DINOv2-B (768)."""
    for fields, expected in (({}, 8_131_328), ({"conv": True}, 9 * 1152 * 768 + 768)):
        net = Projector(8, 768, **fields)
        made = jax.eval_shape(lambda net=net: net.init(jax.random.key(0), {8: jnp.zeros((1, 4, 1152))}, (2, 2)))
        assert sum(leaf.size for leaf in jax.tree.leaves(made)) == expected


def test_the_three_maps_of_a_token_by_hand():
    eye = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    params = {"fc1": eye, "fc2": {"kernel": 2 * jnp.eye(2), "bias": jnp.ones(2)}, "fc3": {"kernel": jnp.eye(2), "bias": jnp.full(2, 10.0)}}
    h = np.asarray([[[0.5, -1.0], [2.0, 0.0]]], np.float32)
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    y = Projector(1, 2, hidden=2).apply({"params": params}, {1: jnp.asarray(h)}, (2, 1))
    assert y.shape == (1, 2, 1, 2)
    np.testing.assert_allclose(y[:, :, 0], silu(2 * silu(h) + 1) + 10, rtol=1e-6)


def test_the_convolution_sees_the_neighbours_on_the_grid():
    net = Projector(1, 1, conv=True)
    params = {"conv": {"kernel": jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9.0]])[..., None, None], "bias": jnp.ones(1)}}
    h = jnp.zeros((1, 12, 1)).at[0, 5].set(1.0)  # row 1, column 1 of 3 x 4
    y = net.apply({"params": params}, {1: h}, (3, 4))[0, :, :, 0]
    np.testing.assert_array_equal(y - 1, [[9, 8, 7, 0], [6, 5, 4, 0], [3, 2, 1, 0]])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_state_after_that_layer_is_read(name, scan, layer):
    """Layers after it change the prediction alone, it and those before it change both."""
    _, params, apply = case(name, scan=scan, layer=layer)
    y, projection = apply(params)
    assert projection.shape == (2, 2, 3, 5) and projection.dtype == jnp.float32
    for i in range(3):

        def moved(path, leaf, i=i):
            keys = [k.key for k in path]
            if keys[0] == f"block_{i}":
                return leaf * 1.3
            first = {"blocks": 0, "context_blocks": 1}.get(keys[0])
            here = first is not None and first <= i < first + len(leaf)
            return leaf.at[i - first].multiply(1.3) if here else leaf

        other_y, other = apply(jax.tree_util.tree_map_with_path(moved, params))
        assert jnp.abs(other_y - y).max() > 1e-3
        assert (float(jnp.abs(other - projection).max()) > 1e-3) == (i < layer)


@pytest.mark.parametrize("name", NETS)
def test_scanned_equals_unrolled(name):
    _, params, apply = case(name)
    _, _, unrolled = case(name, scan=False)
    flat = {k: v for k, v in params.items() if "blocks" not in k}
    stacked = [v for k, v in sorted(params.items()) if "blocks" in k]
    layers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacked)
    flat |= {f"block_{i}": jax.tree.map(lambda v, i=i: v[i], layers) for i in range(3)}
    for ours, theirs in zip(apply(params), unrolled(flat), strict=True):
        close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scan", [True, False])
def test_several_layers_have_a_head_each(name, scan):
    """The networks that read one of them, with its head, make the same features, in the order in which the layers were named."""
    _, params, apply = case(name, layer=(3, 1), scan=scan)
    y, both = apply(params)
    assert both.shape == (2, 2, 3, 10)
    for i, layer in enumerate((3, 1)):
        _, _, alone = case(name, layer=layer, scan=scan)
        head = {k.removesuffix(f"_{layer}"): v for k, v in params["projector"].items() if k.endswith(f"_{layer}")}
        assert len(head) == 3
        same_y, one = alone(params | {"projector": head})
        close(same_y, y, 1e-5)
        close(both[..., 5 * i : 5 * i + 5], one, 1e-5)


def test_the_token_of_a_patch_stands_at_its_place():
    """With layers that mix no tokens (attention's output zero), a changed patch changes the projection there alone."""
    net, params, _ = case("dit")
    params = jax.tree_util.tree_map_with_path(lambda p, v: 0 * v if "'attn']['out'" in jax.tree_util.keystr(p) else v, params)
    run = jax.jit(lambda x: net.apply({"params": params}, x, *INPUTS[1:], project=True)[1])
    change = np.abs(run(X.at[:, 2:, 4:].add(1.0)) - run(X)).max((0, 3))
    np.testing.assert_array_equal(change > 1e-4, [[False, False, False], [False, False, True]])


def test_without_asking_nothing_is_computed_and_nothing_changes():
    net, params, apply = case("dit")
    plain = build(NETS["dit"])
    rest = {k: v for k, v in params.items() if k != "projector"}
    alone = jax.make_jaxpr(lambda p: plain.apply({"params": p}, *INPUTS))(rest)
    assert str(jax.make_jaxpr(lambda p: net.apply({"params": p | {"projector": {}}}, *INPUTS))(rest)) == str(alone)
    close(apply(params)[0], plain.apply({"params": rest}, *INPUTS), 1e-6)


def test_a_model_projects_what_its_network_sees():
    net, params, apply = case("dit")
    model = denoiser(net, params, paths.rectified(), "velocity")
    for ours, theirs in zip(model.project(*INPUTS, None), apply(params), strict=True):
        close(ours, theirs, 1e-6)
    close(model(*INPUTS), apply(params)[0], 1e-6)
    scaled = denoiser(net, params, paths.rectified(), "velocity", lambda path, t: (2.0, t / 2))
    for ours, theirs in zip(scaled.project(X / 2, 2 * INPUTS[1], INPUTS[2], None), apply(params), strict=True):
        close(ours, theirs, 1e-5)
    assert denoiser(build(NETS["dit"]), params, paths.rectified(), "velocity").project is None


def test_dropout_reaches_the_projected_state():
    net, params, apply = case("dit", dropout=0.5)
    model = denoiser(net, params, paths.rectified(), "velocity")
    a, b = (model.project(*INPUTS, jax.random.key(seed))[1] for seed in (0, 1))
    assert jnp.abs(a - b).max() > 1e-3 and jnp.abs(a - apply(params)[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"projector": {**HEAD, "hidden": 8}}, {"projector": {"layer": 2, "conv": True, "features": 6}}])
def test_sharded_equals_one_device(fields):
    net = build({**NETS["dit"], **fields})

    class Both:
        init = net.init

        @staticmethod
        def apply(*arguments):
            return net.apply(*arguments, project=True)

    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    check_sharded(Both, x, jnp.linspace(0.1, 0.9, 8), {"label": jnp.arange(8) % 5})


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        ({**HEAD, "layer": 0}, "model.projector.layer = 0; valid: 1 to 3"),
        ({**HEAD, "layer": 4}, "model.projector.layer = 4; valid: 1 to 3"),
        ({**HEAD, "layer": (1, 4)}, r"model.projector.layer = \(1, 4\); valid: 1 to 3, or several of them, each once"),
        ({**HEAD, "layer": (1, 1)}, r"model.projector.layer = \(1, 1\); valid: 1 to 3"),
        ({**HEAD, "layer": ()}, r"model.projector.layer = \(\); valid: 1 to 3"),
        ({**HEAD, "size": 4}, "model.projector.size is unknown; valid: layer, features, hidden, conv"),
        ({"layer": 1}, "model.projector lacks features"),
        ({**HEAD, "conv": True, "hidden": 8}, "model.projector.hidden = 8 does nothing with model.projector.conv"),
        ({**HEAD, "dtype": "float32"}, "model.projector.dtype is unknown"),
    ],
)
def test_bad_sections_are_named(projector, message):
    net = build({**NETS["dit"], "projector": projector})
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), *INPUTS)


def test_asking_a_network_without_a_projector_is_an_error():
    net = build(NETS["dit"])
    with pytest.raises(ConfigError, match="model.projector is missing"):
        jax.eval_shape(functools.partial(net.init, project=True), jax.random.key(0), *INPUTS)


def test_parameters_are_those_of_every_precision():
    net = build({**NETS["dit"], "projector": HEAD, "dtype": "bfloat16"})
    params = meta.unbox(jax.jit(net.init)(jax.random.key(0), *INPUTS)["params"])
    assert params["projector"]["fc1"]["kernel"].dtype == jnp.float32
    assert "bf16[2,6,7]" in str(jax.make_jaxpr(lambda p: net.apply({"params": p}, *INPUTS, project=True))(params))
