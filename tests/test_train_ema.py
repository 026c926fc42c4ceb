"""Averages against closed forms, and the post-hoc reconstruction against averages that were tracked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.train import ema, posthoc
from train_runs import flip


def run(decay, values):
    """The average after each of values[0], values[1], ... (updates 1, 2, ...), in float64."""
    with jax.enable_x64(True):
        average, out = jnp.asarray(0.0, jnp.float64), []
        for n, v in enumerate(values, 1):
            average = ema.update(average, jnp.asarray(v, jnp.float64), jnp.asarray(decay(jnp.asarray(n, jnp.float64)), jnp.float64))
            out.append(float(average))
    return np.array(out)


def test_constant_forgets_geometrically():
    decay, _ = ema.build({"name": "constant", "decay": 0.75}, "ema.a")
    # From 0 towards the constant 1: 1 - decay^n.
    np.testing.assert_allclose(run(decay, [1.0] * 8), 1 - 0.75 ** np.arange(1, 9), rtol=1e-6)
    copy, _ = ema.build({"name": "constant", "decay": 0.0}, "ema.a")
    np.testing.assert_array_equal(run(copy, [3.0, 5.0]), [3.0, 5.0])


def test_warmup_is_the_published_ramp_until_the_constant():
    decay = ema.warmup(0.9)
    ramp = [2 / 11, 3 / 12, 4 / 13]
    np.testing.assert_allclose([float(decay(jnp.asarray(n, jnp.float32))) for n in (1, 2, 3)], ramp, rtol=1e-6)
    # (1 + n)/(10 + n) = 0.9 at n = 80.
    assert float(decay(jnp.float32(79))) < 0.9 == pytest.approx(float(decay(jnp.float32(81))))


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_profile_moments(std):
    """Averaging theta(k) = k gives the mean of the profile, theta(k) = k^2 its second moment: both known in closed form."""
    n = 2000
    k = np.arange(1, n + 1, dtype=np.float64)
    decay = ema.power(std)
    with jax.enable_x64(True):
        d = np.array([float((1 - 1 / m) ** (ema.gamma_of_std(std) + 1)) for m in k])
        np.testing.assert_allclose(np.asarray(decay(jnp.asarray(k, jnp.float32))), d, rtol=2e-6)
    mean, second = 0.0, 0.0
    for m, dm in zip(k, d):
        mean, second = dm * mean + (1 - dm) * m, dm * second + (1 - dm) * m**2
    gamma = ema.gamma_of_std(std)
    assert mean / n == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
    # The defining property: the standard deviation is `std` of the training length.
    assert np.sqrt(second - mean**2) / n == pytest.approx(std, rel=5e-3)


def test_gamma_of_the_published_widths():
    # EDM2 names gamma = 16.97 for 5% and 6.94 for 10%.
    assert ema.gamma_of_std(0.05) == pytest.approx(16.97, abs=0.01)
    assert ema.gamma_of_std(0.10) == pytest.approx(6.94, abs=0.01)


def test_power_copies_the_first_parameters():
    assert float(ema.power(0.1)(jnp.float32(1))) == 0.0


def test_update_is_float32_and_leafwise():
    average = {"a": jnp.ones((2,), jnp.float32), "b": jnp.zeros((), jnp.float32)}
    params = {"a": jnp.full((2,), 3.0, jnp.bfloat16), "b": jnp.asarray(4.0, jnp.float32)}
    out = ema.update(average, params, jnp.float32(0.25))
    assert out["a"].dtype == jnp.float32
    np.testing.assert_allclose(out["a"], 2.5)
    np.testing.assert_allclose(out["b"], 3.0)


def test_half_life():
    assert ema.half_life(ema.constant(0.5), 10) == pytest.approx(1.0)
    assert ema.half_life(ema.constant(0.5**0.1), 10) == pytest.approx(10.0, rel=1e-5)
    assert ema.half_life(ema.constant(0.0), 10) == 0.0
    # A power average's half-life grows in proportion to the training.
    assert ema.half_life(ema.power(0.1), 4000) == pytest.approx(2 * ema.half_life(ema.power(0.1), 2000), rel=1e-3)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "polyak"}, "valid: constant, power, ramp, warmup"),
        ({"name": "constant", "decay": 1.0}, "must lie in"),
        ({"name": "constant", "decay": -0.1}, "must lie in"),
        ({"name": "power", "std": 0.3}, "0.2887"),
        ({"name": "power", "decay": 0.9}, "decay is unknown; valid: std, of, snapshot_every"),
        ({"name": "power", "snapshot_every": 1.5}, "should be int"),
        ({"decay": 0.9}, "name is missing"),
    ],
)
def test_bad_sections_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        ema.build(section, "ema.a")


def test_snapshots_are_for_power_averages():
    assert ema.snapshots({"name": "power", "snapshot_every": 5}, "ema.a") == (0.1, 5)
    assert ema.snapshots({"name": "power", "std": 0.07, "snapshot_every": 5}, "ema.a") == (0.07, 5)
    assert ema.snapshots("power", "ema.a") is None
    assert ema.build({"name": "power", "of": "critic"}, "ema.a")[1] == "critic"
    for section in ({"name": "constant", "snapshot_every": 5}, {"name": "power", "snapshot_every": -1}):
        with pytest.raises(ConfigError, match="snapshot_every"):
            ema.snapshots(section, "ema.a")


# --- post-hoc reconstruction


def trajectory(steps, dim=5, seed=0):
    """A random walk with drift, like parameters: (steps, dim) float64."""
    random = np.random.default_rng(seed)
    return np.cumsum(random.standard_normal((steps, dim)), 0) / np.sqrt(steps) + np.linspace(0, 3, steps)[:, None]


def tracked(theta, std):
    """The power average after every step, in float64, from the profile's exact weights (k^(g+1) - (k-1)^(g+1)) / n^(g+1)."""
    g = ema.gamma_of_std(std)
    n = np.arange(1, len(theta) + 1, dtype=np.float64)
    weight = n ** (g + 1) - (n - 1) ** (g + 1)
    return np.cumsum(weight[:, None] * theta, 0) / n[:, None] ** (g + 1)


def test_updates_follow_the_profile_exactly():
    theta = trajectory(300, 1)
    decay = lambda n: (1 - 1 / n) ** (ema.gamma_of_std(0.1) + 1)  # noqa: E731
    np.testing.assert_allclose(run(decay, theta[:, 0]), tracked(theta, 0.1)[:, 0], rtol=1e-10)


def test_inner_product_is_the_integral():
    for ta, ga, tb, gb in [(100, 6.9, 100, 16.9), (60, 6.9, 100, 16.9), (100, 2.0, 40, 3.0)]:
        tau = np.linspace(0, min(ta, tb), 400_001)
        pa, pb = (ga + 1) * tau**ga / ta ** (ga + 1), (gb + 1) * tau**gb / tb ** (gb + 1)
        assert posthoc.inner(ta, ga, tb, gb) == pytest.approx(np.trapezoid(pa * pb, tau), rel=1e-6)
        assert posthoc.inner(ta, ga, tb, gb) == pytest.approx(posthoc.inner(tb, gb, ta, ga), rel=1e-12)
    assert np.isfinite(posthoc.inner(1, 900.0, 10**6, 900.0))


STEPS, KEEP = 2048, 128


def snapshots(theta, stds=(0.05, 0.10)):
    averages = {std: tracked(theta, std) for std in stds}
    return [(n, std, {"w": averages[std][n - 1]}) for n in range(KEEP, STEPS + 1, KEEP) for std in stds]


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_a_tracked_width_is_reconstructed():
    theta = trajectory(STEPS)
    kept = snapshots(theta)
    for step, std in ((STEPS, 0.05), (STEPS, 0.10), (STEPS // 2, 0.10)):
        assert error(posthoc.reconstruct(kept, step, std)["w"], tracked(theta, std)[step - 1]) < 1e-6


@pytest.mark.parametrize("std", [0.06, 0.08, 0.12, 0.15])
def test_a_width_between_is_reconstructed(std):
    theta = trajectory(STEPS)
    want = tracked(theta, std)[-1]
    got = posthoc.reconstruct(snapshots(theta), STEPS, std)["w"]
    nearest = min(error(tracked(theta, s)[-1], want) for s in (0.05, 0.10))
    assert error(got, want) < 1e-3 < nearest
    # The weights of an average sum to one.
    assert posthoc.reconstruct([(n, s, np.ones(1)) for n, s, _ in snapshots(theta)], STEPS, std)[0] == pytest.approx(1, abs=1e-3)


def test_reconstruction_keeps_the_dtype_and_sums_in_float64():
    tree = posthoc.combine([0.5, 0.5], [{"w": np.float32([1.0])}, {"w": np.float32([1.0 + 2**-23])}])
    assert tree["w"].dtype == np.float32
    assert tree["w"][0] in (np.float32(1.0), np.float32(1.0 + 2**-23))
    # 1e8 + 1 - 1e8 is lost in float32.
    tree = posthoc.combine([1.0, 1.0, -1.0], [np.float32([1e8]), np.float32([1.0]), np.float32([1e8])])
    assert tree[0] == 1.0


def test_snapshots_on_disk(tmp_path):
    theta = trajectory(STEPS).astype(np.float32)
    for n, std, tree in snapshots(theta)[-8:]:
        posthoc.save(tmp_path, f"p{std:g}", n, std, {"w": jnp.asarray(tree["w"], jnp.float32)})
    target = {"w": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    got, step = posthoc.load(tmp_path, ["p0.05", "p0.1"], target, None, 0.1)
    assert step == STEPS
    assert error(got["w"], tracked(theta, 0.1)[-1]) < 1e-5
    # Later snapshots are not looked at.
    got, step = posthoc.load(tmp_path, ["p0.05", "p0.1"], target, STEPS - KEEP, 0.1)
    assert error(got["w"], tracked(theta, 0.1)[STEPS - KEEP - 1]) < 1e-5
    with pytest.raises(ConfigError, match=f"there are {STEPS - 3 * KEEP}, .*{STEPS}"):
        posthoc.load(tmp_path, ["p0.05", "p0.1"], target, 7, 0.1)
    with pytest.raises(ConfigError, match="no snapshots of other"):
        posthoc.load(tmp_path, ["other"], target, None, 0.1)
    with pytest.raises(ConfigError, match="0.2887"):
        posthoc.load(tmp_path, ["p0.1"], target, None, 0.5)


def test_damaged_snapshots_are_named(tmp_path):
    tree = {"w": jax.random.normal(jax.random.key(0), (4096,))}
    target = {"w": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    posthoc.save(tmp_path, "p", 10, 0.1, tree)
    np.testing.assert_allclose(posthoc.load(tmp_path, ["p"], target, None, 0.1)[0]["w"], tree["w"], rtol=1e-6)
    flip(tmp_path / "snapshots" / "p-10")
    with pytest.raises(ConfigError, match="p-10 is damaged"):
        posthoc.load(tmp_path, ["p"], target, None, 0.1)
