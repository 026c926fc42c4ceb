"""Guidance against closed forms and invariances; two-class Gaussian data gives exact conditional and unconditional models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import config, exact
from flowjax.config import ConfigError
from flowjax.guidance import GUIDANCE, apg, autoguidance, cfg, cfg_zero, classifier, embedded, interval, rescale
from flowjax.paths import PATHS, edm, rectified
from flowjax.predictions import PREDICTIONS, Model
from flowjax.samplers import sample

pytestmark = pytest.mark.usefixtures("float64")

RF = rectified()
KEY = jax.random.key(0)
COND, UNCOND = exact.gaussian([1.0], 0.25), exact.gaussian([0.0], 1.0)


def model_of(conditional, unconditional, path=RF, prediction="velocity"):
    """A Model from two functions (x_t, t) -> y, with label 0 for the condition and 1 for none."""

    def apply(x_t, t, cond, key):
        drop = cond["label"].reshape((-1,) + (1,) * (x_t.ndim - 1)) == 1
        return jnp.where(drop, unconditional(x_t, t), conditional(x_t, t))

    return Model(apply, path, prediction, lambda cond: {"label": jnp.ones_like(cond["label"])})


def gaussians(path=RF, prediction="velocity"):
    return model_of(*(lambda x, t, d=d: d.predict(path, prediction, x, t) for d in (COND, UNCOND)), path, prediction)


def constants(c, u, prediction="velocity", path=RF):
    """A model whose two outputs are given arrays without a batch axis."""
    rows = lambda v: lambda x, t: jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape)
    return model_of(rows(c), rows(u), path, prediction)


def labels(n):
    return {"label": jnp.zeros(n, jnp.int32)}


def call(model, x, t):
    return model(jnp.asarray(x), t, labels(len(x)))


def counting(model):
    """The model, and a list that receives the number of rows of each evaluation as it runs."""
    rows = []

    def apply(x_t, t, cond, key):
        jax.debug.callback(lambda n: rows.append(int(n)), jnp.asarray(len(x_t)))
        return model.apply(x_t, t, cond, key)

    return model.replace(apply=apply), rows


X = np.asarray([[0.4], [-1.0], [2.0]])
IMAGES = np.random.default_rng(5).standard_normal((3, 4, 4, 5)).astype(np.float32)


def nets(prediction="velocity", path=RF):
    """Two smooth functions without symmetry, on images."""
    return model_of(
        lambda x, t: jnp.sin(2 * x) + 0.3 + t.reshape(-1, 1, 1, 1), lambda x, t: 0.5 * jnp.cos(x) - 0.2 * x, path, prediction
    )


def worse():
    return nets().replace(apply=lambda x_t, t, cond, key: 0.5 * jnp.cos(x_t) - 0.2 * x_t)


def distilled(model):
    """A network that takes the scale as an input and is, in one call, what `cfg` makes of the model in two."""

    def apply(x_t, t, cond, key):
        return cfg(model, cond["guidance"]).apply(x_t, t, {"label": cond["label"]}, key)

    return model.replace(apply=apply, null=None, guidance_embed=True)


ALL = {
    "cfg": lambda model, scale: cfg(model, scale),
    "interval": lambda model, scale: interval(model, scale, 0.2, 0.8),
    "rescale": lambda model, scale: rescale(model, scale),
    "autoguidance": lambda model, scale: autoguidance(model, scale, worse()),
    "apg": lambda model, scale: apg(model, scale, norm=3.0),
    "cfg_zero": lambda model, scale: cfg_zero(model, scale),
    "classifier": lambda model, scale: classifier(model, scale, lambda x, t, cond: -jnp.sum((x - 1) ** 2, (1, 2, 3))),
    "embedded": lambda model, scale: embedded(distilled(model), scale),
}


def test_the_table_is_covered():
    assert set(ALL) == set(GUIDANCE)


# Classifier-free guidance.


def test_guided_gaussians():
    """t = .5, N(1, .25) against N(0, 1), w = 3: precision 5.6, mean .857143, score 2.56 and velocity -3.36 at x = .4."""
    x, t = X[:1], 0.5
    velocity = cfg(gaussians(), 3.0)
    score = cfg(gaussians(prediction="score"), 3.0)
    assert float(call(velocity, x, t)[0, 0]) == pytest.approx(-3.36, abs=1e-12)
    assert float(call(score, x, t)[0, 0]) == pytest.approx(2.56, abs=1e-12)
    at = lambda x: call(score, jnp.asarray([[x]]), t)[0, 0]
    precision = -jax.grad(at)(0.4)
    assert float(precision) == pytest.approx(5.6)
    assert float(0.4 + at(0.4) / precision) == pytest.approx(6 / 7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_cfg_is_the_same_in_every_prediction(prediction):
    goal = cfg(gaussians(), 3.0).get("velocity", jnp.asarray(X), 0.6, labels(3))
    found = cfg(gaussians(RF, prediction), 3.0).get("velocity", jnp.asarray(X), 0.6, labels(3))
    np.testing.assert_allclose(found, goal, rtol=1e-10)


def test_cfg_ends_of_the_scale_take_one_call_and_are_exact():
    model, rows = counting(nets())
    conditional = call(nets(), IMAGES, 0.3)
    unconditional = nets()(jnp.asarray(IMAGES), 0.3, {"label": jnp.ones(3, jnp.int32)})
    np.testing.assert_array_equal(call(cfg(model, 1.0), IMAGES, 0.3), conditional)
    np.testing.assert_array_equal(call(cfg(model, 0.0), IMAGES, 0.3), unconditional)
    jax.effects_barrier()
    assert rows == [3, 3]
    guided = call(cfg(model, 2.0), IMAGES, 0.3)
    jax.effects_barrier()
    assert rows == [3, 3, 6]  # one call on the doubled batch
    np.testing.assert_allclose(guided, 2 * conditional - unconditional, atol=1e-6)


def test_cfg_with_a_scale_per_row():
    scale = jnp.asarray([0.0, 1.0, 4.0])
    found = call(cfg(nets(), scale), IMAGES, 0.3)
    for i, w in enumerate((0.0, 1.0, 4.0)):
        np.testing.assert_allclose(found[i], call(cfg(nets(), w), IMAGES, 0.3)[i], atol=1e-5)


def test_conditions_of_several_arrays_and_mixed_times():
    def apply(x_t, t, cond, key):
        return cond["text"].sum(1) * 10.0 + cond["label"][:, None] + t[:, None] + 0 * x_t

    null = lambda cond: {"text": jnp.zeros_like(cond["text"]), "label": jnp.full_like(cond["label"], 7)}
    cond = {"text": jnp.asarray([[[1.0]], [[2.0]]]), "label": jnp.asarray([3, 4])}
    out = cfg(Model(apply, RF, "velocity", null), 2.0)(jnp.zeros((2, 1)), jnp.asarray([0.1, 0.2]), cond)
    np.testing.assert_allclose(out[:, 0], [2 * 13 - 7 + 0.1, 2 * 24 - 7 + 0.2], atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_all_channels_are_guided_and_rows_are_independent(name):
    guided = ALL[name](nets(), 3.0)
    out, plain = call(guided, IMAGES, 0.5), call(nets(), IMAGES, 0.5)
    assert float(jnp.abs(out - plain).max(axis=(0, 1, 2)).min()) > 0.01
    order = np.asarray([2, 0, 1])
    np.testing.assert_allclose(call(guided, IMAGES[order], 0.5), out[order], atol=1e-6)
    np.testing.assert_allclose(call(guided, IMAGES[:1], 0.5), out[:1], atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"classifier", "cfg_zero", "embedded"}))
def test_scale_one_is_the_conditional_model_to_the_bit(name):
    model, rows = counting(nets())
    np.testing.assert_array_equal(call(ALL[name](model, 1.0), IMAGES, 0.5), call(nets(), IMAGES, 0.5))
    jax.effects_barrier()
    assert rows == [3]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_guided_trajectories_are_finite(name, prediction):
    guided = ALL[name](nets(prediction), 2.5)
    end = sample(guided, IMAGES, KEY, [1.0, 0.6, 0.3, 0.0], "heun", labels(3))
    assert np.isfinite(end).all()


@pytest.mark.parametrize("name", sorted(set(ALL) - {"autoguidance", "classifier", "embedded"}))
def test_a_null_condition_is_needed_and_used_up(name):
    with pytest.raises(ConfigError, match=f"'{name}' needs a model with a null"):
        ALL[name](nets().replace(null=None), 2.0)
    with pytest.raises(ConfigError, match="guided already"):
        ALL[name](cfg(nets(), 2.0), 2.0)


def test_selection_by_config():
    guided = config.build(GUIDANCE, {"name": "cfg", "scale": 3}, "guidance", model=gaussians())
    assert float(call(guided, X[:1], 0.5)[0, 0]) == pytest.approx(-3.36)
    with pytest.raises(ConfigError, match="guidance.phi is unknown"):
        config.build(GUIDANCE, {"name": "cfg", "scale": 3, "phi": 0.5}, "guidance", model=gaussians())


# The scale as an input.


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_an_embedded_scale_reaches_every_row_in_one_call(scale):
    seen = []

    def apply(x_t, t, cond, key):
        seen.append((cond, key))
        return distilled(nets()).apply(x_t, t, cond, key)

    guided = embedded(distilled(nets()).replace(apply=apply), scale)
    np.testing.assert_allclose(guided(jnp.asarray(IMAGES), 0.3, labels(3), KEY), call(cfg(nets(), scale), IMAGES, 0.3), atol=1e-6)
    (cond, key), = seen
    assert cond["guidance"].dtype == jnp.float32 and (cond["guidance"] == scale).all() and cond["guidance"].shape == (3,)
    assert (cond["label"] == 0).all() and key is KEY


def test_an_embedded_scale_needs_a_network_that_takes_it_and_is_given_once():
    bare = Model(lambda x_t, t, cond, key: cond["guidance"][:, None] * x_t, RF, "velocity", guidance_embed=True)
    np.testing.assert_allclose(embedded(bare, 2.0)(jnp.asarray(X), 0.5), 2 * X)  # without any other condition
    for model in (nets(), embedded(bare, 2.0)):
        with pytest.raises(ConfigError, match="'embedded' needs a network that takes the scale as an input"):
            embedded(model, 2.0)
    with pytest.raises(ConfigError, match="'cfg' needs a model with a null"):
        cfg(embedded(distilled(nets()), 2.0), 2.0)


# Interval.


def test_full_interval_is_cfg_to_the_bit():
    for t in (0.0, 0.3, 1.0):
        full, plain = interval(nets(), 2.5), cfg(nets(), 2.5)
        run = lambda model: jax.jit(lambda x: call(model, x, t))(IMAGES)
        np.testing.assert_array_equal(run(full), run(plain))


def test_interval_skips_the_unconditional_half_outside():
    model, rows = counting(nets())
    guided = interval(model, 2.5, 0.3, 0.6)
    run = jax.jit(lambda x, t: call(guided, x, t))
    for t, expected in ((0.29, 3), (0.31, 6), (0.59, 6), (0.61, 3)):
        rows.clear()
        out = run(IMAGES, t)
        jax.effects_barrier()
        assert rows == [expected]
        goal = call(cfg(nets(), 2.5), IMAGES, t) if expected == 6 else call(nets(), IMAGES, t)
        np.testing.assert_allclose(out, goal, atol=1e-6)


def test_interval_decides_for_every_evaluation_and_row():
    """Heun from .7 to .5 evaluates outside and then inside of [.4, .6]; a batch may straddle the bound."""
    model, rows = counting(nets())
    sample(interval(model, 2.5, 0.4, 0.6), IMAGES, KEY, [0.7, 0.5], "heun", labels(3))
    jax.effects_barrier()
    assert rows == [3, 6]
    t = jnp.asarray([0.7, 0.5, 0.3])
    out = interval(nets(), 2.5, 0.4, 0.6)(jnp.asarray(IMAGES), t, labels(3))
    np.testing.assert_array_equal(out[::2], nets()(jnp.asarray(IMAGES), t, labels(3))[::2])
    np.testing.assert_allclose(out[1], cfg(nets(), 2.5)(jnp.asarray(IMAGES), t, labels(3))[1], atol=1e-6)


def test_interval_by_noise_level():
    """sigma in [.19, 1.61] is t in [.15966, .61686] on the rectified path."""
    guided = interval(nets(), 2.5, sigma_low=0.19, sigma_high=1.61)
    run = jax.jit(lambda t: call(guided, IMAGES, t))
    for t, inside in ((0.1596, False), (0.1597, True), (0.6168, True), (0.6169, False)):
        goal = call(cfg(nets(), 2.5), IMAGES, t) if inside else call(nets(), IMAGES, t)
        np.testing.assert_allclose(run(t), goal, atol=1e-6)
    # Also when built while tracing.
    traced = jax.jit(lambda x: call(interval(nets(), 2.5, sigma_low=0.19), x, 0.5))(IMAGES)
    np.testing.assert_allclose(traced, call(cfg(nets(), 2.5), IMAGES, 0.5), atol=1e-6)


def test_bad_intervals():
    for bounds in ({"t_low": 0.6, "t_high": 0.4}, {"t_low": 0.5, "t_high": 0.5}, {"sigma_low": 2.0, "sigma_high": 1.0}):
        with pytest.raises(ConfigError, match="not below"):
            interval(nets(), 2.0, **bounds)
    for bounds in ({"t_low": 0.1, "sigma_low": 0.2}, {"t_high": 0.9, "sigma_high": 0.2}):
        with pytest.raises(ConfigError, match="not both"):
            interval(nets(), 2.0, **bounds)


# Rescale.


def test_rescale():
    plain, conditional = call(cfg(nets(), 5.0), IMAGES, 0.4), call(nets(), IMAGES, 0.4)
    std = lambda v: np.asarray(v).std(axis=(1, 2, 3))
    np.testing.assert_array_equal(call(rescale(nets(), 5.0, 0.0), IMAGES, 0.4), plain)
    full = call(rescale(nets(), 5.0, 1.0), IMAGES, 0.4)
    np.testing.assert_allclose(std(full), std(conditional), rtol=1e-6)
    assert (std(plain) > 1.5 * std(conditional)).all()
    correlation = [np.corrcoef(np.ravel(f), np.ravel(p))[0, 1] for f, p in zip(full, plain)]
    np.testing.assert_allclose(correlation, 1.0, atol=1e-6)  # only the scale of each row changes
    between = call(rescale(nets(), 5.0, 0.3), IMAGES, 0.4)
    np.testing.assert_allclose(between, 0.3 * full + 0.7 * plain, atol=1e-5)
    np.testing.assert_array_equal(call(rescale(nets(), 5.0), IMAGES, 0.4), call(rescale(nets(), 5.0, 0.7), IMAGES, 0.4))


def test_rescale_of_a_constant_output():
    flat = constants(2.0, 1.0)
    assert np.isfinite(call(rescale(flat, 3.0), IMAGES, 0.4)).all()


# Autoguidance.


def test_autoguidance():
    good, bad = gaussians(), gaussians(RF, "x")
    bad = bad.replace(apply=lambda x, t, cond, key: UNCOND.predict(RF, "x", x, t))
    guided = autoguidance(good, 3.0, bad)
    assert float(call(guided, X[:1], 0.5)[0, 0]) == pytest.approx(-3.36, abs=1e-12)
    np.testing.assert_allclose(call(autoguidance(good, 0.0, bad), X, 0.5), UNCOND.velocity(RF, jnp.asarray(X), 0.5), atol=1e-12)
    with pytest.raises(ConfigError, match="'edm'"):
        autoguidance(good, 2.0, bad.replace(path=edm()))


@pytest.mark.parametrize("guidance", ["cfg", "cfg_zero", "autoguidance"])
def test_scale_two_lies_midway_between_one_and_three(guidance):
    """They are straight lines in the scale, also where a scale of one takes a short cut."""
    more = {"bad": nets("velocity").replace(apply=lambda x, t, cond, key: -x)} if guidance == "autoguidance" else {}
    one, two, three = (call(GUIDANCE[guidance](nets(), w, **more), IMAGES.astype(jnp.float64), 0.4) for w in (1.0, 2.0, 3.0))
    np.testing.assert_allclose(two, (one + three) / 2, atol=1e-12)
    assert not np.allclose(one, three)


def test_autoguidance_at_scale_zero_does_not_call_the_good_model():
    good, rows = counting(nets())
    call(autoguidance(good, 0.0, nets()), IMAGES, 0.5)
    jax.effects_barrier()
    assert rows == []


# Adaptive projected guidance.

C, U = [1.0, 2.0], [2.0, 0.0]  # D = (-1, 2): along C (.6, 1.2), across (-1.6, .8)
POINT = np.asarray([[0.3, -0.4]])


def test_projection():
    for settings, step in (({}, (-1.6, 0.8)), ({"eta": 1.0}, (-1.0, 2.0)), ({"eta": 0.5}, (-1.3, 1.4))):
        out = call(apg(constants(C, U, "x"), 3.0, **settings), POINT, 0.5)
        np.testing.assert_allclose(out, np.asarray([C]) + 2 * np.asarray(step), atol=1e-12)


@pytest.mark.parametrize("norm", [0.5, math.sqrt(5.0), 10.0])
def test_norm_is_a_ceiling(norm):
    out = call(apg(constants(C, U, "x"), 3.0, eta=1.0, norm=norm), POINT, 0.5)
    length = float(jnp.linalg.norm(out - jnp.asarray([C]))) / 2
    assert length == pytest.approx(min(norm, math.sqrt(5.0)))


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_apg_with_eta_one_is_cfg(prediction):
    model = nets(prediction)
    x, t = IMAGES.astype(jnp.float64), 0.4
    np.testing.assert_allclose(call(apg(model, 3.0, eta=1.0), x, t), call(cfg(model, 3.0), x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["velocity", "eps", "v", "score"])
def test_apg_works_in_x_prediction(prediction):
    """The guided x is the same whatever the network predicts; a length limit and angles in eps would differ."""
    path = PATHS["vp_linear"]()
    x, t = jnp.asarray([[0.4, 1.0]]), 0.3
    pairs = exact.gaussian([1.0, -0.5], [0.25, 0.5]), exact.gaussian([0.0, 0.2], 1.0)
    build = lambda p: model_of(*(lambda x, t, d=d: d.predict(path, p, x, t) for d in pairs), path, p)
    settings = dict(eta=0.3, norm=0.4, momentum=-0.5)
    goal = apg(build("x"), 4.0, **settings).get("x", x, t, labels(1))
    np.testing.assert_allclose(apg(build(prediction), 4.0, **settings).get("x", x, t, labels(1)), goal, rtol=1e-9)
    assert not np.allclose(goal, cfg(build("x"), 4.0).get("x", x, t, labels(1)))


def test_apg_without_noise():
    """At t = 0 a velocity still has a guided value."""
    model = nets()
    np.testing.assert_allclose(call(apg(model, 3.0, eta=1.0), IMAGES, 0.0), call(cfg(model, 3.0), IMAGES, 0.0), atol=1e-5)
    assert np.isfinite(call(apg(model, 3.0, norm=1.0, momentum=-0.5), IMAGES, 0.0)).all()


def test_momentum_without_noise_changes_nothing():
    """At t = 0 no x-update says anything of the velocity, so neither does the memory of one."""
    model = nets()
    x, t, cond = IMAGES.astype(jnp.float64), jnp.zeros(3), labels(3)
    guided = apg(model, 3.0, momentum=-0.5).memory.apply
    fresh, kept = (guided(x, t, cond, None, previous)[0] for previous in (jnp.zeros_like(x), jnp.ones_like(x)))
    np.testing.assert_array_equal(fresh, kept)
    later = [guided(x, t + 0.4, cond, None, previous)[0] for previous in (jnp.zeros_like(x), jnp.ones_like(x))]
    assert not np.allclose(*later)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "renoise", "ancestral", "dpmpp_2m"])
def test_momentum_is_carried_by_the_driver(sampler):
    """Constant D: after N steps the running update is (1 + beta + ... + beta^(N-1)) D, and the last step returns x_hat."""
    beta, w = -0.5, 3.0
    guided = apg(constants(C, U, "x"), w, eta=1.0, momentum=beta)
    for n, total in ((1, 1.0), (2, 0.5), (3, 0.75)):
        end = sample(guided, POINT, KEY, np.linspace(1, 0, n + 1), sampler, labels(1))
        np.testing.assert_allclose(end, [np.asarray(C) + (w - 1) * total * np.asarray([-1.0, 2.0])], atol=1e-9)


def test_momentum_of_a_velocity_model():
    """D = -t (v_c - v_u) and the guided velocity adds beta D_prev / -t; two Euler steps by hand."""
    guided = apg(constants(C, U), 3.0, eta=1.0, momentum=-0.5)
    end = sample(guided, jnp.zeros((1, 2)), KEY, [1.0, 0.5, 0.0], "euler", labels(1))
    v, difference = np.asarray(C), np.asarray([-1.0, 2.0])
    first = v + 2 * difference
    second = v + 2 * (difference - 0.5 * difference * 1.0 / 0.5)
    np.testing.assert_allclose(end, [-(first + second) / 2], atol=1e-12)


def test_norm_applies_to_the_update_with_its_momentum():
    guided = apg(constants(C, U, "x"), 3.0, eta=1.0, norm=1.0, momentum=-0.9)
    end = sample(guided, POINT, KEY, [1.0, 0.5, 0.0], "ddim", labels(1))
    # The second update is (1 - .9) D, of length .2236 < 1: the first is remembered at its full length.
    np.testing.assert_allclose(end, [np.asarray(C) + 2 * 0.1 * np.asarray([-1.0, 2.0])], atol=1e-12)


def test_momentum_is_per_row_and_starts_anew():
    guided = apg(nets(), 3.0, momentum=-0.5)
    run = lambda x: sample(guided, x, KEY, [1.0, 0.6, 0.3], "heun", labels(len(x)))
    whole = run(IMAGES)
    np.testing.assert_allclose(run(IMAGES[1:2]), whole[1:2], atol=1e-6)
    np.testing.assert_array_equal(run(IMAGES), whole)
    assert not np.allclose(whole, sample(apg(nets(), 3.0), IMAGES, KEY, [1.0, 0.6, 0.3], "heun", labels(3)), atol=1e-3)
    assert apg(nets(), 3.0).memory is None


# CFG-Zero*.


def test_cfg_zero():
    """s* = <v_c, v_u> / |v_u|^2 = .5 for (1, 2), (2, 0)."""
    out = call(cfg_zero(constants(C, U), 3.0), POINT, 0.5)
    residual = np.asarray(C) - 0.5 * np.asarray(U)
    np.testing.assert_allclose(out, [0.5 * np.asarray(U) + 3 * residual], atol=1e-12)
    assert residual @ np.asarray(U) == 0


def test_cfg_zero_residual_is_orthogonal_per_row():
    x = IMAGES.astype(jnp.float64)
    low, high = (call(cfg_zero(nets(), w), x, 0.4) for w in (2.0, 3.0))
    v_u = nets()(x, 0.4, {"label": jnp.ones(3, jnp.int32)})
    np.testing.assert_allclose(jnp.sum((high - low) * v_u, axis=(1, 2, 3)), 0.0, atol=1e-10)
    np.testing.assert_allclose(call(cfg_zero(nets(), 1.0), x, 0.4), call(nets(), x, 0.4), atol=1e-12)


def test_cfg_zero_projects_velocities_whatever_the_network_predicts():
    goal = cfg_zero(gaussians(), 3.0).get("velocity", jnp.asarray(X), 0.6, labels(3))
    found = cfg_zero(gaussians(RF, "x"), 3.0).get("velocity", jnp.asarray(X), 0.6, labels(3))
    np.testing.assert_allclose(found, goal, rtol=1e-10)


def test_cfg_zero_stands_still_at_first():
    for scale in (3.0, 1.0):
        guided = cfg_zero(constants(C, U), scale, zero_above=0.8)
        np.testing.assert_array_equal(call(guided, POINT, 0.81), [[0.0, 0.0]])
        assert (call(guided, POINT, 0.8) != 0).all()
        states = sample(guided, POINT, KEY, [1.0, 0.9, 0.8, 0.7], "euler", labels(1), return_trajectory=True)[1]
        np.testing.assert_array_equal(states[2], states[0])
        assert not np.allclose(states[3], states[2])
    assert np.isfinite(call(cfg_zero(constants(C, [0.0, 0.0]), 3.0), POINT, 0.5)).all()


# Classifier guidance.


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_classifier_guidance_with_the_exact_classifier(prediction):
    """Mixture score + grad log p(k | x_t) is the score of component k, in every prediction."""
    data = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])
    cond = {"label": jnp.asarray([0, 1, 1])}

    def log_prob(x_t, t, cond):
        return jnp.log(data.responsibilities(RF, x_t, t)[jnp.arange(3), cond["label"]])

    guided = classifier(data.model(RF, prediction), 1.0, log_prob)
    found = guided.get("score", jnp.asarray(X), 0.6, cond)
    np.testing.assert_allclose(found, data.score(RF, jnp.asarray(X), 0.6, cond["label"]), rtol=1e-9, atol=1e-9)
    plain = data.score(RF, jnp.asarray(X), 0.6)
    twice = classifier(data.model(RF, prediction), 2.0, log_prob).get("score", jnp.asarray(X), 0.6, cond)
    np.testing.assert_allclose(twice - plain, 2 * (found - plain), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_cosine"])
def test_classifier_guidance_where_there_is_no_signal(path):
    data, path = exact.gaussian([0.2], 0.25), PATHS[path]()
    log_prob = lambda x_t, t, cond: -jnp.sum((x_t - 1) ** 2, axis=1)
    with jax.enable_x64(False):
        x = X.astype(jnp.float32)
        guided = classifier(data.model(path), 2.0, log_prob)
        np.testing.assert_array_equal(guided(x, 1.0), data.model(path)(x, 1.0))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(guided(X, 0.9), data.model(path)(X, 0.9))


def test_classifier_guidance_at_scale_zero_needs_no_classifier():
    np.testing.assert_array_equal(call(classifier(nets(), 0.0, None), IMAGES, 0.5), call(nets(), IMAGES, 0.5))


# The guiders of diffusers 0.42.


def _outputs():
    rng = np.random.default_rng(7)
    c, u = rng.standard_normal((2, 3, 4, 4, 5))

    def apply(x_t, t, cond, key):
        drop = cond["label"].reshape(-1, 1, 1, 1) == 1
        # The doubled batch alternates condition and null, so the stored arrays are looked up by row.
        row = cond["row"]
        return jnp.where(drop, jnp.asarray(u)[row], jnp.asarray(c)[row])

    null = lambda cond: {**cond, "label": jnp.ones_like(cond["label"])}
    cond = {"label": jnp.zeros(3, jnp.int32), "row": jnp.arange(3)}
    return c, u, Model(apply, RF, "x", null), cond


@pytest.mark.oracle
def test_diffusers_guiders():
    torch, guiders = pytest.importorskip("torch"), pytest.importorskip("diffusers.guiders")
    c, u, model, cond = _outputs()
    x = jnp.zeros(c.shape)
    theirs = {
        "cfg": guiders.ClassifierFreeGuidance(guidance_scale=3.5),
        "rescale": guiders.ClassifierFreeGuidance(guidance_scale=3.5, guidance_rescale=0.6),
        "cfg_zero": guiders.ClassifierFreeZeroStarGuidance(guidance_scale=3.5, zero_init_steps=0),
    }
    ours = {
        "cfg": cfg(model, 3.5),
        "rescale": rescale(model, 3.5, 0.6),
        "cfg_zero": cfg_zero(model.replace(prediction="velocity"), 3.5),
    }
    for name, guider in theirs.items():
        guider.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(500))
        goal = guider.forward(torch.tensor(c), torch.tensor(u)).pred.numpy()
        np.testing.assert_allclose(ours[name](x, 0.5, cond), goal, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.oracle
def test_diffusers_projected_guidance_with_momentum():
    """Two steps; use_original_formulation with w - 1 is the paper's base x_c."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    c, u, model, cond = _outputs()
    settings = dict(eta=0.3, norm_threshold=2.0, use_original_formulation=True)
    buffer = theirs.MomentumBuffer(-0.5)
    memory = apg(model, 4.0, eta=0.3, norm=2.0, momentum=-0.5).memory
    state = memory.init(jnp.zeros(c.shape))
    for _ in range(2):
        goal = theirs.normalized_guidance(torch.tensor(c), torch.tensor(u), 3.0, buffer, **settings).numpy()
        out, state = memory.apply(jnp.zeros(c.shape), jnp.full(3, 0.5), cond, None, state)
        np.testing.assert_allclose(out, goal, atol=1e-9)
