"""Sampling from a role: exact flows end where they should, and sample i is a function of (seed, i) alone."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax import exact, generate
from flowjax.config import ConfigError
from flowjax.guidance import cfg
from flowjax.paths import edm, rectified

PAIR = exact.mixture([0.5, 0.5], [-3.0, 3.0], [0.5, 0.5])


def role(data=PAIR, path=rectified(), prediction="velocity", conditional=True, kind="denoiser"):
    """A role whose parameter scales the output of the exact network."""

    def net(params):
        model = data.model(path, prediction, conditional)
        return model.replace(apply=lambda *inputs: params * model.apply(*inputs))

    return types.SimpleNamespace(module=types.SimpleNamespace(kind=kind), path=path, prediction=prediction, net=net)


def samples(n=8, seed=0, label=None, indices=None, params=1.0, of=None, **settings):
    sample = generate.make(of or role(), (1,), **settings)
    indices = np.arange(n) if indices is None else np.asarray(indices)
    cond = {"label": jnp.full(len(indices), 2 if label is None else label)}
    return np.asarray(sample(params, seed, indices, cond))[:, 0]


def test_samples_follow_the_data_of_their_label():
    for label, mean in ((0, -3.0), (1, 3.0)):
        x = samples(1000, label=label)
        assert stats.kstest(x, stats.norm(mean, 0.5).cdf).pvalue > 1e-3
    both = samples(1000)
    assert abs((both > 0).mean() - 0.5) < 0.06 and np.abs(np.abs(both) - 3).max() < 2.5


def test_steps_and_sampler_are_used():
    """Euler with 2 and 4 steps multiplies the noise by 0.2 and 0.34054 for data N(0, 1/4)."""
    line = role(exact.gaussian([0.0], 0.25), conditional=False)
    two, four = (samples(of=line, steps=n, sampler="euler") for n in (2, 4))
    np.testing.assert_allclose(four / two, 0.34054 / 0.2, rtol=1e-4)
    np.testing.assert_array_equal(samples(of=line), samples(of=line, steps=50, sampler="heun", grid="uniform"))
    assert not np.allclose(four, samples(of=line, steps=4, sampler="euler", grid={"name": "uniform", "shift": 3.0}))
    assert not np.allclose(two, samples(of=line, steps=2, sampler="euler", params=0.5))
    # One step ends at the mean of the data; none is not asked for.
    np.testing.assert_allclose(samples(of=line, steps=1, sampler="euler"), 0.0, atol=1e-6)
    with pytest.raises(ConfigError, match="sample.steps = 0 should be at least 1"):
        samples(of=line, steps=0)


def test_start_has_the_noise_of_the_path_and_the_grid_avoids_what_the_prediction_leaves_open():
    x = samples(1000, of=role(path=edm(), prediction="edm"), label=1, grid="karras", steps=20)
    assert stats.kstest(x, stats.norm(3.0, 0.5).cdf).pvalue > 1e-3
    # eps on the rectified path says nothing of x at t = 1.
    assert np.isfinite(samples(of=role(prediction="eps"), steps=5)).all()


@pytest.mark.parametrize("sampler", ["heun", "euler_maruyama"])
def test_a_sample_depends_on_seed_and_index_only(sampler):
    settings = {"sampler": sampler, "steps": 5}
    x = samples(6, **settings)
    np.testing.assert_allclose(samples(indices=[4, 2, 5], **settings), x[[4, 2, 5]], rtol=1e-6)
    assert len(np.unique(x)) == 6
    assert not np.isin(samples(6, seed=1, **settings), x).any()


def test_walk_is_independent_of_the_start():
    """One Euler-Maruyama step with diffusion 1 from t = 1: were the noises equal, the result would be a multiple of the start."""
    line = role(exact.gaussian([0.0], 0.25), conditional=False)
    settings = {"of": line, "steps": 2, "n": 500}
    drift = samples(sampler="euler", **settings)
    walked = samples(sampler={"name": "euler_maruyama", "diffusion": "constant"}, **settings)
    assert abs(np.corrcoef(drift, walked)[0, 1]) < 0.9 and np.std(walked) > 0.1


def test_guidance_wraps_the_model():
    unconditional = samples(label=2)
    np.testing.assert_allclose(samples(label=1, guidance={"name": "cfg", "scale": 0.0}), unconditional, rtol=1e-5)
    assert samples(label=1, guidance={"name": "cfg", "scale": 3.0}, steps=20).mean() > samples(label=1, steps=20).mean()
    worse = exact.mixture([0.5, 0.5], [-1.0, 1.0], [2.0, 2.0]).model(rectified(), conditional=True)
    guided = samples(label=1, guidance={"name": "autoguidance", "scale": 0.0}, besides={"bad": worse}, n=500)
    assert stats.kstest(guided, stats.norm(1.0, 2.0).cdf).pvalue > 1e-3


def test_a_distilled_network_is_sampled_as_the_guided_one():
    def net(params):
        model = PAIR.model(rectified(), conditional=True)
        apply = lambda x_t, t, cond, key: cfg(model, cond["guidance"]).apply(x_t, t, {"label": cond["label"]}, key)  # noqa: E731
        return model.replace(apply=apply, null=None, guidance_embed=True)

    student = types.SimpleNamespace(**{**vars(role()), "net": net})
    for scale in (1.0, 2.5):
        two, one = ({"guidance": {"name": name, "scale": scale}, "label": 1, "steps": 10} for name in ("cfg", "embedded"))
        np.testing.assert_allclose(samples(of=student, **one), samples(**two), rtol=1e-5)
    with pytest.raises(ConfigError, match="'embedded' needs a network that takes the scale"):
        samples(guidance={"name": "embedded", "scale": 2.0})
    with pytest.raises(ConfigError, match="a negative prompt changes nothing with guidance"):
        samples(of=student, guidance={"name": "embedded", "scale": 2.0}, negative={"label": jnp.zeros((1,), jnp.int32)}, steps=2)


def test_a_codec_decodes_the_samples():
    codec = types.SimpleNamespace(decode=lambda x: 10 + x)
    np.testing.assert_allclose(samples(codec=codec), 10 + samples(), rtol=1e-6)


def test_run_pads_the_last_batch_and_cuts_the_rest_off():
    calls = []

    def sample(params, seed, indices, cond):
        calls.append((params, seed, list(indices), list(cond["label"])))
        return np.stack([indices, 10 * cond["label"]], axis=1)

    labels = np.arange(7) + 100
    out = generate.run(sample, "params", {"label": labels}, 7, seed=5, batch=3)
    np.testing.assert_array_equal(out, np.stack([np.arange(7), 10 * labels], axis=1))
    assert calls == [
        ("params", 5, [0, 1, 2], [100, 101, 102]), ("params", 5, [3, 4, 5], [103, 104, 105]), ("params", 5, [6, 7, 8], [106, 106, 106]),
    ]  # fmt: skip
    calls.clear()
    assert len(generate.run(sample, "params", {"label": labels}, 7)) == 7
    assert [(c[1], len(c[2])) for c in calls] == [(0, 7)]  # one batch, no larger than the count
    calls.clear()
    assert len(generate.run(sample, "params", {"label": np.zeros(251)}, 251)) == 251
    assert [len(c[2]) for c in calls] == [250, 250]


def test_balanced_labels_go_round():
    labels = generate.balanced_labels(7, 3)
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 0])
    assert labels.dtype == np.int32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"of": role(kind="classifier")}, "kind 'classifier' cannot be sampled"),
        ({"steps": 0}, "sample.steps = 0 should be at least 1"),
        ({"guidance": {"name": "cgf", "scale": 2.0}}, "sample.guidance.name = 'cgf' is unknown"),
        ({"sampler": "hein"}, "'hein' is unknown"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        samples(**settings)


def test_a_negative_prompt_is_what_guidance_leads_away_from():
    """Away from class 0 towards both is away from the left mode; the null condition is still what the negative does not name."""
    cfg = {"name": "cfg", "scale": 2.0}
    plain = samples(64, label=2, guidance=cfg, steps=20)
    negative = samples(64, label=2, guidance=cfg, steps=20, negative={"label": jnp.zeros((1,), jnp.int32)})
    assert abs((plain > 0).mean() - 0.5) < 0.2 and (negative > 0).mean() > 0.8
    with pytest.raises(ConfigError, match="a negative prompt needs guidance"):
        samples(negative={"label": jnp.zeros((1,), jnp.int32)})
    with pytest.raises(ConfigError, match="a negative prompt changes nothing with guidance"):
        samples(guidance={"name": "cfg", "scale": 1.0}, negative={"label": jnp.zeros((1,), jnp.int32)}, steps=2)
