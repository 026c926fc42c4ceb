"""JiT: the published sizes, what enters where, and that without a condition it is a DiT with a patch embedding of low rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_sharded, close, count, randomise, shapes

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.models import MODELS, build, denoiser, flops

TEXT = {"vocab": 9, "length": 3, "width": 8, "depth": 1, "heads": 2}
TINY = {
    "name": "jit", "depth": 4, "width": 16, "heads": 2, "patch": 2, "bottleneck": 5, "attention": "xla",
}  # fmt: skip
LABELLED, CAPTIONED = {"num_classes": 4, "class_tokens": 3, "context_from": 2}, {"text_encoder": TEXT, "context_from": 2}
CONDITIONS = {"label": LABELLED, "text": CAPTIONED, "both": {**LABELLED, **CAPTIONED}, "none": {}}
X = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
T = jnp.asarray([0.2, 0.7])
LABEL, TOKENS = jnp.asarray([1, 3]), jnp.asarray([[3, 8, 0], [2, 1, 4]])


def cond_of(kind, label=LABEL, tokens=TOKENS):
    whole = {"label": label, "tokens": tokens}
    return {k: v for k, v in whole.items() if kind == "both" or k == {"label": "label", "text": "tokens"}.get(kind)}


@functools.cache
def case(kind, **fields):
    """(net, random parameters, jitted apply(params, x, t, cond))."""
    net = build({**TINY, **CONDITIONS[kind], **fields})
    params = randomise(shapes(net, X, T, cond_of(kind)))
    return net, params, jax.jit(lambda params, x, t, cond: net.apply({"params": params}, x, t, cond))


# Parameters and multiply-adds (1e9) of the paper, at 256 px for patches of 16 and 512 px for patches of 32.
PAPER = {
    "B/16": (131_123_712, 25.2), "B/32": (133_190_400, 25.8), "L/16": (458_877_664, 87.9), "L/32": (461_534_176, None),
    "H/16": (952_514_368, 181.9), "H/32": (956_055_616, None),
}  # fmt: skip


@pytest.mark.parametrize("preset", PAPER)
def test_sizes_of_the_paper(preset):
    assert set(PAPER) == set(MODELS["jit"].presets)
    net = build({"name": "jit", "preset": preset, "num_classes": 1000, "attention": "xla"})
    args = jnp.zeros((1, 16 * net.patch, 16 * net.patch, 3)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    parameters, macs = PAPER[preset]
    assert count(net, *args) == parameters
    if macs:
        variables = jax.eval_shape(net.init, jax.random.key(0), *args)
        assert flops.count(lambda v: net.apply(v, *args), variables) / 2e9 == pytest.approx(macs, abs=0.06)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_output_is_zero_at_init_and_shaped_like_the_input(kind):
    net = build({**TINY, **CONDITIONS[kind]})
    y, _ = jax.jit(net.init_with_output)(jax.random.key(0), X, T, cond_of(kind))
    assert y.shape == X.shape and y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0)
    wide = build({**TINY, "out_channels": 7})
    assert jax.eval_shape(lambda: wide.init_with_output(jax.random.key(0), X, T, {})[0]).shape == (2, 4, 6, 7)


def test_initialisation_of_the_paper():
    """N(0, 0.02^2) for embeddings of time and condition, Xavier for the patches'; adaLN and the head start at zero."""
    net = build({**TINY, **CONDITIONS["both"], "width": 128, "class_tokens": 32})
    params = meta.unbox(jax.jit(net.init)(jax.random.key(0), X, T, cond_of("both"))["params"])
    for name, leaf in (("y_embed", "embedding"), ("y_positions", "embedding"), ("pooled_embed", "kernel")):
        np.testing.assert_allclose(np.std(params[name][leaf]), 0.02, rtol=0.1)
    for name, shape in (("x_bottleneck", (12, 5)), ("x_embed", (5, 128)), ("text_embed", (8, 128))):
        bound = np.sqrt(6 / sum(shape))
        assert params[name]["kernel"].shape == shape and 0.9 * bound < np.abs(params[name]["kernel"]).max() <= bound
    assert not params["final"]["linear"]["kernel"].any() and not params["context_blocks"]["adaln"]["kernel"].any()


def test_without_a_condition_it_is_a_dit_whose_patch_embedding_has_low_rank():
    net, params, apply = case("none")
    dit = build({
        "name": "dit", "depth": 4, "width": 16, "heads": 2, "patch": 2, "norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True,
        "attention": "xla",
    })  # fmt: skip
    embed = {"kernel": params["x_bottleneck"]["kernel"] @ params["x_embed"]["kernel"], "bias": params["x_embed"]["bias"]}
    assert np.linalg.matrix_rank(embed["kernel"]) == 5 < min(embed["kernel"].shape)
    rest = {k: v for k, v in params.items() if k != "x_bottleneck"}
    close(apply(params, X, T, {}), dit.apply({"params": rest | {"x_embed": embed}}, X, T, {}), 1e-5)


@pytest.mark.parametrize("kind", ["label", "both"])
def test_scanned_equals_unrolled(kind):
    net, params, apply = case(kind)
    flat = {k: v for k, v in params.items() if "blocks" not in k}
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), params["blocks"], params["context_blocks"])
    flat |= {f"block_{i}": jax.tree.map(lambda v, i=i: v[i], both) for i in range(4)}
    expected = net.clone(scan=False).apply({"params": flat}, X, T, cond_of(kind))
    close(apply(params, X, T, cond_of(kind)), expected, 1e-5)


def test_the_condition_joins_after_the_named_layer():
    """Tokens of the class reach the state after layer 3 and not that after layer 2; the vector in adaLN reaches all."""
    for layer in (2, 3):
        net, params, _ = case("label")
        net = net.clone(projector={"layer": layer, "features": 5, "hidden": 7})
        params = randomise(shapes(net, X, T, cond_of("label")))
        run = jax.jit(lambda p, net=net: net.apply({"params": p}, X, T, cond_of("label"), project=True))
        y, projection = run(params)
        assert projection.shape == (2, 2, 3, 5)
        table = params["y_positions"]["embedding"]
        moved_y, moved = run(params | {"y_positions": {"embedding": table.at[0].add(1.0)}})
        assert jnp.abs(moved_y - y).max() > 1e-3
        assert (float(jnp.abs(moved - projection).max()) > 1e-4) == (layer == 3)
        embedding = params["y_embed"]["embedding"]
        assert jnp.abs(run(params | {"y_embed": {"embedding": embedding + 1.0}})[1] - projection).max() > 1e-3


def test_tokens_of_the_condition_have_no_place_and_those_of_the_image_have():
    _, params, apply = case("label")
    cond = cond_of("label")
    y = apply(params, X, T, cond)
    table = params["y_positions"]["embedding"]
    assert table.shape == (3, 16)
    close(apply(params | {"y_positions": {"embedding": table[::-1]}}, X, T, cond), y, 1e-5)
    assert jnp.abs(apply(params, X[:, ::-1], T, cond)[:, ::-1] - y).max() > 1e-2


@pytest.mark.parametrize("kind", ["label", "text", "both"])
def test_every_input_matters_and_samples_do_not_mix(kind):
    _, params, apply = case(kind)
    y = apply(params, X, T, cond_of(kind))
    changes = [(X.at[1].add(1.0), T, cond_of(kind)), (X, T.at[1].add(0.2), cond_of(kind))]
    changes += [(X, T, cond_of(kind, label=LABEL.at[1].set(2)))] * (kind != "text")
    changes += [(X, T, cond_of(kind, tokens=TOKENS.at[1, 1].set(5)))] * (kind != "label")
    for changed in changes:
        other = apply(params, *changed)
        np.testing.assert_array_equal(other[0], y[0])
        assert jnp.abs(other[1] - y[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["pooled_embed", "text_embed"])
def test_the_text_enters_as_tokens_and_as_a_vector(name):
    _, params, apply = case("text")
    without = params | {name: jax.tree.map(jnp.zeros_like, params[name])}
    y = apply(without, X, T, cond_of("text"))
    assert jnp.abs(apply(without, X, T, {"tokens": TOKENS.at[1].set(5)})[1] - y[1]).max() > 1e-3


def test_the_text_encoder_is_trained_along():
    net, params, _ = case("text")
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net.apply({"params": p}, X, T, cond_of("text"))))))(params)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads["encoder"]["blocks"]["mlp"]))


def test_null_condition():
    both = case("both")[0]
    null = both.null({**cond_of("both"), "other": 1})
    assert null["label"].tolist() == [4, 4] and null["tokens"].tolist() == [[0] * 3] * 2 and null["other"] == 1
    assert case("label")[0].null(cond_of("label")).keys() == {"label"}
    assert case("text")[0].null(cond_of("text")).keys() == {"tokens"}
    for kind in CONDITIONS:
        net, params, _ = case(kind)
        assert (denoiser(net, params, paths.rectified(), "x").null is None) == (kind == "none")


def test_dropout_is_in_the_middle_half_of_the_layers():
    net, params, _ = case("label", depth=8, context_from=3, dropout=0.5)
    quietly = jax.jit(lambda p: net.apply({"params": p}, X, T, cond_of("label")))
    run = jax.jit(lambda p, key: net.apply({"params": p}, X, T, cond_of("label"), train=True, rngs={"dropout": jax.random.key(key)}))
    quiet = quietly(params)
    assert jnp.abs(run(params, 0) - run(params, 1)).max() > 1e-2 and jnp.abs(run(params, 0) - quiet).max() > 1e-2

    def silent(layers):
        """Parameters whose gates are closed in these layers."""

        def close_gates(path, leaf):
            keys = [k.key for k in path]
            first = {"blocks": 0, "context_blocks": 3}.get(keys[0])
            if first is None or keys[1] != "adaln":
                return leaf
            closed = np.asarray([first + i in layers for i in range(len(leaf))])
            return jnp.where(closed.reshape(-1, *(1,) * (leaf.ndim - 1)), 0.0, leaf)

        return jax.tree_util.tree_map_with_path(close_gates, params)

    middle = silent({2, 3, 4, 5})
    close(run(middle, 0), quietly(middle), 1e-5)
    for layer in (2, 5):
        most = silent({2, 3, 4, 5} - {layer})
        assert jnp.abs(run(most, 0) - run(most, 1)).max() > 1e-3


def test_bfloat16_stays_near_float32():
    net, params, apply = case("both")
    low = net.clone(dtype="bfloat16").apply({"params": params}, X, T, cond_of("both"))
    y = apply(params, X, T, cond_of("both"))
    assert low.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(low - y) / jnp.linalg.norm(y)) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "text"])
def test_sharded_equals_one_device(kind):
    net = build({**TINY, **CONDITIONS[kind], "width": 32, "heads": 4, "bottleneck": 6})
    x = jax.random.normal(jax.random.key(1), (8, 4, 6, 3))
    cond = {"label": jnp.arange(8) % 5} if kind == "label" else {"tokens": jnp.arange(24).reshape(8, 3) % 9}
    check_sharded(net, x, jnp.linspace(0.1, 0.9, 8), cond)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 4}, "model.patch = 4 does not divide the image, 4 x 6"),
        ({"heads": 3}, "model.heads = 3 does not divide model.width = 16"),
        ({"context_from": 0}, "model.context_from = 0; valid: 1 to model.depth - 1 = 3"),
        ({"context_from": 4}, "model.context_from = 4; valid"),
        ({"remat": "some"}, "model.remat = 'some' is unknown"),
        ({"text_encoder": {**TEXT, "size": 3}}, "model.text_encoder.size is unknown"),
        ({"text_encoder": {"vocab": 9}}, "model.text_encoder lacks length"),
    ],
)
def test_bad_fields_are_named(fields, message):
    net = build({**TINY, **LABELLED, **fields})
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), X, T, cond_of("both"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_tokens": 3, "text_encoder": TEXT}, "model.class_tokens = 3 does nothing without model.num_classes"),
        ({"class_tokens": 3}, "model.class_tokens = 3 does nothing"),
        ({"context_from": 2}, "model.context_from = 2 does nothing without model.num_classes or model.text_encoder; leave it out"),
    ],
)
def test_fields_that_do_nothing_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        build({**TINY, **fields})


@pytest.mark.parametrize(("kind", "missing"), [("label", "label"), ("text", "tokens")])
def test_a_missing_condition_is_named(kind, missing):
    with pytest.raises(ConfigError, match=rf"needs cond\['{missing}'\]; cond has \['other'\]"):
        jax.eval_shape(build({**TINY, **CONDITIONS[kind]}).init, jax.random.key(0), X, T, {"other": 1})
