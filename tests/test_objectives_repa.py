"""REPA: the alignment of hand-made features, what the encoder is shown, and when the whole is plain flow matching."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from nets import close, randomise, shapes

from flowjax import models, objectives, paths
from flowjax.config import ConfigError
from flowjax.models import attention
from flowjax.objectives import flow_matching, repa
from flowjax.predictions import Model
from flowjax.train import optim
from flowjax.train import step as step_lib
from flowjax.train.mesh import AXES
from flowjax.train.roles import Role

RF = paths.rectified()
KEY = jax.random.key(0)
GUESS = jax.random.normal(jax.random.key(5), (2, 2, 3, 4))


def model(guess=GUESS, output=0.5):
    """A network that answers `output` x_t and the features `guess`."""
    return Model(lambda x_t, t, cond, key: output * x_t, RF, "velocity", project=lambda x_t, t, cond, key: (output * x_t, guess))


def batch(features=GUESS, step=0):
    x, z = jax.random.normal(jax.random.key(1), (2, 2, 4, 6, 1))
    return {"x": x, "z": z, "t": jnp.asarray([0.3, 0.8]), "cond": {}, "features": features, "step": jnp.asarray(step)}


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (7.0, 1.0), (-0.2, -1.0)])
def test_alignment_is_the_cosine_whatever_the_lengths(factor, expected):
    plain, told = flow_matching.loss({"net": model()}, batch(), None, weight="x")
    value, metrics = repa.loss({"net": model()}, batch(factor * GUESS), None, weight="x", align=0.7)
    assert float(metrics["alignment"]) == pytest.approx(expected, abs=1e-6)
    assert float(value) == pytest.approx(float(plain) - 0.7 * expected, abs=1e-6)
    assert float(metrics["mse"]) == pytest.approx(float(told["mse"]), rel=1e-6)


def test_each_token_counts_alike():
    """Cosines 1, 0, -1 and 0.6 of tokens of very different lengths: their mean, not the cosine of a mean."""
    y = jnp.asarray([[[[1.0, 0], [1, 0]], [[1, 0], [1, 0]]]])
    guess = jnp.asarray([[[[100.0, 0], [0, 1]], [[-0.01, 0], [3, 4]]]])
    assert float(jnp.mean(repa.cosine(guess, y))) == pytest.approx(0.15, abs=1e-6)
    assert repa.cosine(guess.astype(jnp.bfloat16), y).dtype == jnp.float32
    np.testing.assert_array_equal(repa.cosine(0 * guess, y), 0)
    assert np.isfinite(jax.grad(lambda v: repa.cosine(v, y).sum())(0 * guess)).all()


def test_without_weight_it_is_flow_matching():
    for key in ("value", "gradient"):
        of = lambda loss, **settings: lambda scale: loss({"net": model(GUESS * scale, scale)}, batch(1 - GUESS), KEY, **settings)[0]  # noqa: E731
        read = (lambda f: f(0.4)) if key == "value" else (lambda f: jax.grad(f)(0.4))
        assert float(read(of(repa.loss, align=0.0))) == pytest.approx(float(read(of(flow_matching.loss))), rel=1e-6)
    assert repa.loss({"net": model()}, batch(), None)[0] == pytest.approx(float(flow_matching.loss({"net": model()}, batch(), None)[0]) - 0.5)


@pytest.mark.parametrize(("step", "on"), [(0, True), (4, True), (5, False), (99, False)])
def test_the_alignment_stops_at_that_step(step, on):
    def loss(guess):
        return repa.loss({"net": model(guess)}, batch(1 - GUESS, step), None, stop=5)[0]

    plain = float(flow_matching.loss({"net": model()}, batch(), None)[0])
    value, gradient = jax.value_and_grad(loss)(GUESS)
    assert (abs(float(value) - plain) > 1e-2) == on
    assert bool(jnp.any(gradient)) == on
    if not on:
        assert float(value) == plain


def test_the_encoders_grid_is_brought_to_the_nets():
    """A finer or coarser grid is interpolated by rows and columns; an equal one is left alone."""
    down = jnp.arange(6.0)[None, :, None, None] * jnp.asarray([1.0, 0.0]) + jnp.asarray([0.0, 3.0])  # turns from row to row
    fine = jnp.broadcast_to(down, (2, 6, 4, 2))
    coarse = fine.reshape(2, 3, 2, 2, 2, 2).mean((2, 4))
    wrong = jnp.broadcast_to(coarse[:, ::-1], coarse.shape)
    aligned = lambda guess, y: float(repa.loss({"net": model(guess)}, batch(y), None)[1]["alignment"])  # noqa: E731
    assert aligned(coarse, fine) == pytest.approx(1, abs=5e-3)
    assert aligned(fine, coarse) == pytest.approx(1, abs=2e-2)
    assert aligned(wrong, fine) < 0.9
    assert aligned(coarse, coarse) == pytest.approx(1, abs=1e-6)


def test_plain_errors():
    with pytest.raises(ConfigError, match="repa needs model.projector"):
        repa.loss({"net": model().replace(project=None)}, batch(), None)
    with pytest.raises(ConfigError, match="model.projector.features = 4, but the encoder's tokens have 3"):
        repa.loss({"net": model()}, batch(GUESS[..., :3]), None)
    with pytest.raises(ConfigError, match="objective.target.name = 'hog' is unknown; valid: spatial_norm, tokens"):
        drawn(target="hog")
    with pytest.raises(ConfigError, match="7 tokens of an image of 4 x 6 form no grid"):
        repa.features(lambda x: (jnp.zeros((2, 7, 3)), None), jnp.zeros((2, 4, 6, 1)), 1.0, "tokens")


# --- the targets ------------------------------------------------------------------------------------------------------


def patches(x):
    """An "encoder": the mean and the first pixel of each 2 x 2 patch."""
    cut = models.dit.patchify(x, 2)
    return jnp.stack([cut.mean(-1), cut[..., 0]], axis=-1), None


def drawn(encoder=patches, image=None, step=0, **settings):
    x = jax.random.normal(jax.random.key(2), (2, 4, 6, 1))
    data = {"x": x, "cond": {}, "step": jnp.asarray(step)} | ({} if image is None else {"image": image})
    return x, repa.rollout({"net": model(), "encoder": encoder}, data, KEY, **settings)


def test_rollout_draws_what_flow_matching_draws_and_encodes_the_clean_image():
    x, out = drawn(time="cosmap")
    plain = flow_matching.rollout({"net": model()}, {"x": x, "cond": {}, "step": 0}, KEY, time="cosmap")
    for k in ("x", "z", "t"):
        np.testing.assert_array_equal(out[k], plain[k])
    np.testing.assert_allclose(out["features"][:, 1, 2, 0], x[:, 2:, 4:].mean((1, 2, 3)), rtol=1e-5)
    assert out["features"].shape == (2, 2, 3, 2)


def test_the_encoder_sees_the_pixels_where_x_are_latents():
    image = jnp.arange(2 * 8 * 12.0).reshape(2, 8, 12, 1)
    _, out = drawn(image=image)
    assert "image" not in out
    np.testing.assert_array_equal(out["features"][:, :, :, 1], image[:, ::2, ::2, 0])


def test_the_step_keeps_the_pixels_for_an_encoder_only():
    class Codec:
        def encode(self, x):
            return x[:, ::2, ::2]

    x = jnp.ones((2, 4, 4, 1))
    data = {"x": x, "cond": {}}
    kept = step_lib.encode({"vae": Codec(), "encoder": patches}, data)
    assert kept["x"].shape == (2, 2, 2, 1) and kept["image"] is x
    assert step_lib.encode({"vae": Codec()}, data).keys() == {"x", "cond"}
    assert step_lib.encode({"encoder": patches}, data).keys() == {"x", "cond"}


def test_tokens_form_the_grid_of_their_image():
    for image, count, grid in (((4, 6), 6, (2, 3)), ((6, 4), 6, (3, 2)), ((8, 8), 16, (4, 4)), ((1, 9), 1, (1, 1))):
        encoder = lambda x, count=count: (jnp.broadcast_to(jnp.arange(count)[:, None], (2, count, 5)), None)  # noqa: E731
        y = repa.features(encoder, jnp.zeros((2, *image, 1)), 1.0, "tokens")
        np.testing.assert_array_equal(y[1, :, :, 3], np.arange(count).reshape(grid))


def test_images_are_resized_before_the_encoder():
    seen = []

    def encoder(x):
        seen.append(x)
        return patches(x)

    ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None, None], (2, 16, 32, 1))
    drawn(encoder, image=ramp, resize=0.875)
    assert seen[0].shape == (2, 14, 28, 1)
    np.testing.assert_allclose(seen[0][0, 3:-3, 5, 0], (np.arange(3, 11) + 0.5) / 0.875 - 0.5, atol=0.05)


def test_spatial_norm():
    y = jax.random.normal(KEY, (2, 5, 7, 3)) * jnp.asarray([1.0, 10, 0.1]) + jnp.asarray([3.0, -2, 0.5])
    normed = repa.spatial_norm(y)
    np.testing.assert_allclose(normed.mean((1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normed.std((1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(repa.spatial_norm(y, 0.0) / y, 1 / jnp.broadcast_to(y.std((1, 2), keepdims=True), y.shape), rtol=1e-4)
    np.testing.assert_array_equal(repa.spatial_norm(jnp.full((1, 2, 2, 1), 3.0)), 0)
    np.testing.assert_allclose(repa.spatial_norm(jnp.asarray([[[[-1e-6], [1e-6]]]])).ravel(), [-0.5, 0.5], rtol=1e-5)
    _, out = drawn(target={"name": "spatial_norm", "gamma": 0.5})
    x, tokens = drawn()
    np.testing.assert_allclose(out["features"], repa.spatial_norm(tokens["features"], 0.5), rtol=1e-6)


@pytest.mark.parametrize(("step", "runs"), [(0, 1), (4, 1), (5, 0)])
def test_after_the_stop_the_encoder_does_not_run(step, runs):
    calls = []

    def encoder(x):
        jax.debug.callback(lambda: calls.append(1))
        return patches(x)

    _, out = jax.block_until_ready(jax.jit(lambda: drawn(encoder, step=step, stop=5))())
    jax.effects_barrier()
    assert len(calls) == runs and bool(jnp.any(out["features"])) == bool(runs)
    assert out["features"].shape == (2, 2, 3, 2)


# --- attention (HASTE) ------------------------------------------------------------------------------------------------


def looks(seed, heads=2, tokens=6):
    q, k = jax.random.normal(jax.random.key(seed), (2, 3, 2, tokens, heads, 4))
    return {"q": q, "k": k}


def test_attention_is_nearest_to_itself():
    """Cross-entropy with oneself is the entropy; of equal weights, log N; and no other attention is as near."""
    mine, other = looks(0), looks(1)
    flat = jax.tree.map(jnp.zeros_like, mine)
    assert float(repa.attention_term(flat, mine)) == pytest.approx(np.log(6), rel=1e-6)
    weights = jax.nn.softmax(jnp.einsum("blnhd,blmhd->blhnm", mine["q"], mine["k"]) / 2, axis=-1)
    entropy = float(-jnp.sum(weights * jnp.log(weights), axis=-1).mean())
    assert float(repa.attention_term(mine, mine)) == pytest.approx(entropy, rel=1e-5)
    assert float(repa.attention_term(other, mine)) > entropy + 0.1
    slope = jax.grad(lambda s: repa.attention_term(s, mine))(mine)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope)) < 1e-6
    more = jax.tree.map(lambda v: jnp.concatenate([v, 5 + v], axis=3), mine)  # heads that the other does not have
    assert float(repa.attention_term(mine, more)) == pytest.approx(entropy, rel=1e-5)


def test_what_attention_is_made_of_is_seen_without_a_change():
    """Scanned or not, layers come in order; what they show gives the weights that they use; the output stays."""
    for scan in (True, False):
        net = models.build({**DIT, "scan": scan, "depth": 3, "conditioning": "in_context"})
        params = randomise(shapes(net, *INPUTS))
        plain = net.apply({"params": params}, *INPUTS)
        out, state = net.apply({"params": params}, *INPUTS, mutable=[attention.SEEN])
        np.testing.assert_array_equal(out, plain)
        found = attention.seen(state[attention.SEEN])
        assert [q.shape for q, _ in found] == [(8, 6, 2, 8)] * 3  # 4 of the image, 2 of the condition
    first = params["block_0"]["attn"]
    other = jax.tree.map(lambda v: v, params) | {"block_0": params["block_0"] | {"attn": first | {"q": jax.tree.map(lambda v: 2 * v, first["q"])}}}
    changed = attention.seen(net.apply({"params": other}, *INPUTS, mutable=[attention.SEEN])[1][attention.SEEN])
    np.testing.assert_allclose(changed[0][0], 2 * found[0][0], rtol=1e-5, atol=1e-6)


def test_networks_of_text_show_their_image_alone():
    net = models.build({"name": "mmdit", "depth": 3, "dual": 1, "width": 16, "heads": 2, "patch": 2, "projector": DIT["projector"]})
    cond = {"text": jnp.ones((8, 5, 4)), "pooled": jnp.ones((8, 3))}
    params = randomise(shapes(net, DATA["x"], jnp.zeros(8), cond))
    (_, projected), state = net.apply({"params": params}, DATA["x"], jnp.zeros(8), cond, project=True, mutable=[attention.SEEN])
    assert projected.shape == (8, 2, 2, 8) and [q.shape for q, _ in attention.seen(state[attention.SEEN])] == [(8, 4, 2, 8)] * 3


HASTE = {"name": "repa", "align": 0.5, "attention": 0.5, "layers": (1, 2), "encoder_layers": (1, 1)}


def test_attention_is_aligned_by_training():
    _, before = train(HASTE, steps=1)
    _, after = train(HASTE, steps=12)
    assert float(after["attention"]) < float(before["attention"]) - 1e-3


def test_attention_counts_until_the_stop():
    """Of a network of two layers, whose last one is compared with what an encoder showed."""
    q, k = jax.random.normal(jax.random.key(7), (2, 2, 2, 6, 2, 4))
    shown = {attention.SEEN: {"blocks": {"attn": {"qk": (q, k)}}}}
    net = model().replace(project=lambda x_t, t, cond, key, mutable: ((0.5 * x_t, GUESS), shown))
    seen = {"looks": jax.tree.map(lambda v: v[:2, :1], looks(0))}
    plain = float(flow_matching.loss({"net": model()}, batch(), None)[0])
    apart = float(repa.attention_term({"q": q[1][:, None], "k": k[1][:, None]}, seen["looks"]))
    for step, on in ((4, 1.0), (5, 0.0)):
        settings = {"stop": 5, "attention": 0.25, "layers": (2,), "encoder_layers": (1,)}
        value, metrics = repa.loss({"net": net}, batch(GUESS, step) | seen, None, **settings)
        assert float(value) == pytest.approx(plain + on * (0.25 * apart - 0.5), rel=1e-5)
        assert float(metrics["attention"]) == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "go together"), ({"attention": 0.0}, "go together"), ({"encoder_layers": (1,)}, "go together"),
        ({"layers": (1, 3)}, "objective.layers = .*layers 1 to 2"), ({"encoder_layers": (0, 1)}, "encoder_layers = .*layers 1 to 1"),
    ],
)
def test_attention_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        train(HASTE | change, steps=1)


# --- the whole step ---------------------------------------------------------------------------------------------------

DIT = {
    "name": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2, "num_classes": 4, "attention": "xla",
    "projector": {"layer": 1, "features": 8, "hidden": 16},
}  # fmt: skip
VIT = {"name": "vit", "patch": 2, "width": 8, "depth": 1, "heads": 2, "positions": "sincos", "mean": (0.5,), "std": (0.5,), "attention": "xla"}
DATA = {"x": jax.random.normal(jax.random.key(3), (8, 4, 4, 1)), "cond": {"label": jnp.arange(8, dtype=jnp.int32) % 4}}
INPUTS = DATA["x"], jnp.zeros(8), DATA["cond"]


@functools.cache
def parts():
    """(roles, random parameters of net and encoder)."""
    net, encoder = models.build(DIT), models.build(VIT)
    params = randomise(shapes(net, *INPUTS))
    roles = {"net": Role(net, RF, "velocity"), "encoder": Role(encoder)}
    return roles, params, randomise(shapes(encoder, DATA["x"]), 1)


@functools.cache
def machine(settings, **options):
    """(jitted step of SGD, state at its start)."""
    roles, params, _ = parts()
    transform = optim.build({"name": "sgd", "momentum": 0.0, "schedule": {"name": "constant", "rate": 0.1}}, params, 10)[0]
    state = step_lib.State(jnp.zeros((), jnp.int32), {"net": params}, {"net": transform.init(params)}, {})
    return jax.jit(step_lib.make_step(objectives.build(dict(settings)), roles, {"net": transform}, {}, seed=3, **options)), state


def train(section, steps=2, **options):
    """(parameters, metrics) after some steps."""
    step, state = machine(tuple(section.items()), **options)
    for _ in range(steps):
        state, metrics = step(state, {"encoder": parts()[2]} if section["name"] == "repa" else {}, DATA)
    return state.params["net"], metrics


@pytest.mark.slow
def test_without_weight_or_after_the_stop_training_is_that_of_flow_matching():
    plain, _ = train({"name": "flow_matching", "label_drop": 0.2})
    start = parts()[1]["projector"]
    for settings, same in (({"align": 0.0}, True), ({"align": 0.5}, False), ({"stop": 1}, False)):
        params, metrics = train({"name": "repa", "label_drop": 0.2, **settings})
        differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, plain)
        moved = differences.pop("projector")
        assert max(jax.tree.leaves(moved)) < 1e-7 if same else max(jax.tree.leaves(moved)) > 1e-4
        assert (max(jax.tree.leaves(differences)) < 1e-6) == same
        assert -1 < float(metrics["alignment"]) < 1
    # Once it is over, the projector rests.
    once, twice = (train({"name": "repa", "label_drop": 0.2, "stop": 1}, steps)[0]["projector"] for steps in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), once, start))) > 1e-4


def test_no_gradient_reaches_the_encoder():
    roles, params, encoder = parts()
    objective = objectives.build({"name": "repa"})

    def loss(encoder):
        nets = {"net": roles["net"].net(params), "encoder": roles["encoder"].net(encoder)}
        prepared = step_lib.prepare(objective, nets, DATA, KEY, jnp.asarray(0))
        return objective.players[0].loss(nets, prepared, None)[0], prepared["features"]

    (value, features), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(encoder)
    assert not any(jnp.any(g) for g in jax.tree.leaves(gradient))
    other, moved = jax.jit(loss)(jax.tree.map(lambda p: 1.2 * p, encoder))
    assert jnp.abs(moved - features).max() > 1e-3 and abs(float(other - value)) > 1e-5


@pytest.mark.slow
def test_descending_aligns():
    """Twenty steps of plain gradient descent raise the cosine; the encoder's tokens are a function of the image alone."""
    first, last = (float(train({"name": "repa", "align": 5.0}, steps)[1]["alignment"]) for steps in (1, 20))
    assert last > first + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"mesh": (2, 2, 2, 1)}, {"mesh": (1, 2, 1, 4)}])
def test_slices_and_meshes_change_nothing(options):
    section = {"name": "repa", "align": 2.0, "stop": 5, "target": "spatial_norm"}
    whole, told = train(section)
    if "mesh" in options:
        options = {"mesh": jax.make_mesh(options["mesh"], AXES, axis_types=(AxisType.Auto,) * 4)}
    params, metrics = train(section, **options)
    close(metrics["loss"], told["loss"], 1e-5)
    close(metrics["alignment"], told["alignment"], 1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), params, whole)
