"""Tiles: exact where the network sees no further than a position, between the tiles and without steps everywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, randomise, shapes

from flowjax.config import ConfigError
from flowjax.models.tiling import starts, tiled, weights
from flowjax.models.vae import AutoencoderKL


def image(height, width, batch=2, channels=3, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal((batch, height, width, channels)), jnp.float32)


def double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2) ** 2


def halve(x):
    return x[:, 1::2, ::2] - 3.0


@pytest.mark.parametrize("size, tile, overlap, want", [(8, 8, 0, [0]), (16, 8, 0, [0, 8]), (16, 8, 2, [0, 6, 8]), (14, 8, 2, [0, 6]), (9, 8, 4, [0, 1])])
def test_few_tiles_cover_everything(size, tile, overlap, want):
    assert starts(size, tile, overlap).tolist() == want


@pytest.mark.parametrize("size, tile, overlap", [(8, 8, 0), (16, 8, 0), (14, 8, 2), (30, 8, 3), (17, 8, 7), (9, 8, 4)])
def test_weights_sum_to_one_and_are_nowhere_negative(size, tile, overlap):
    at = starts(size, tile, overlap)
    w, total = weights(size, tile, at), np.zeros(size)
    assert w.min() >= 0
    for i, start in enumerate(at):
        total[start : start + tile] += w[i]
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_two_tiles_meet_in_the_middle_of_what_they_share():
    w = weights(14, 8, np.array([0, 6]))
    np.testing.assert_allclose(w[0], [1, 1, 1, 1, 1, 1, 0.75, 0.25])
    np.testing.assert_allclose(w[1], [0.25, 0.75, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("fn", [lambda x: x, double, halve], ids=["same", "double", "halve"])
@pytest.mark.parametrize("sides, tile, overlap", [((16, 24), 8, 2), ((20, 8), 8, 4), ((24, 18), 6, 0), ((16, 16), 16, 8)])
def test_a_network_of_single_positions_does_not_notice(fn, sides, tile, overlap):
    x = image(*sides)
    close(jax.jit(lambda x: tiled(fn, x, tile, overlap))(x), fn(x), 1e-6)


def vae():
    net = AutoencoderKL(channels=4, multipliers=(1, 2), layers=1, groups=2, latent_channels=2)
    return net, randomise(shapes(net, image(8, 8), jax.random.key(0)))


def test_one_tile_is_the_network_itself():
    net, params = vae()
    decode = lambda z: net.apply({"params": params}, z, method="decode")  # noqa: E731
    z = image(6, 4, channels=2)
    for tile in (6, 64):
        np.testing.assert_array_equal(jax.jit(lambda z, tile=tile: tiled(decode, z, tile, 2))(z), jax.jit(decode)(z))


def test_a_seam_is_a_ramp_between_what_the_tiles_say():
    """A network that answers each tile with its own mean: the output never leaves their range, and never jumps further than a step
    of the ramp, whatever the tiles."""

    def mean(x):
        return jnp.broadcast_to(jnp.mean(x, axis=(1, 2), keepdims=True), x.shape)

    x = image(8, 20, batch=1, channels=1).at[:, :, 10:].add(3.0)
    y = np.asarray(tiled(mean, x, 8, 4))
    at = starts(20, 8, 4)
    means = [float(jnp.mean(x[:, :, s : s + 8])) for s in at]
    assert y.min() >= min(means) - 1e-6 and y.max() <= max(means) + 1e-6 and np.ptp(means) > 2
    largest = max(abs(a - b) for a, b in zip(means, means[1:]))
    assert 0.2 * largest < np.abs(np.diff(y[0], axis=1)).max() <= largest / 4 + 1e-6
    hard = np.asarray(tiled(mean, x[:, :, :16], 8, 0))
    assert np.abs(np.diff(hard[0], axis=1)).max() > 1.0  # without overlap there is a step


def test_a_convolution_errs_only_where_a_tile_ends_and_less_the_more_they_share():
    """Radius 2: every position further than that from the edges of tiles inside the image is exact."""
    kernel = jnp.asarray(np.random.RandomState(1).standard_normal((5, 5, 3, 3)), jnp.float32)
    fn = lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    x, errors = image(12, 36), {}
    for overlap in (0, 4, 8):
        error = np.abs(np.asarray(tiled(fn, x, 12, overlap) - fn(x))).max((0, 1, 3))
        edges = [e for start in starts(36, 12, overlap) for e in (start, start + 12) if 0 < e < 36]
        near = {p for e in edges for p in range(e - 2, e + 2)}
        far = sorted({*range(36)} - near)
        assert far and error[far].max() < 1e-4 and error[sorted(near)].max() > 1e-1
        errors[overlap] = error.max()
    assert errors[8] < 0.6 * errors[4] < 0.6 * 0.6 * errors[0]


@pytest.mark.parametrize(
    "fn, sides, tile, overlap, message",
    [
        (double, (16, 16), 8, 8, "tiles of 8 cannot overlap by 8; valid: 0 to 7"),
        (double, (16, 16), 8, -1, "cannot overlap by -1"),
        (halve, (16, 16), 8, 3, "must be multiples of 2"),
        (halve, (15, 16), 8, 2, "must be multiples of 2"),
        (lambda x: x[:, :5], (16, 16), 8, 2, "tiles of 8 x 8 become 5 x 8, which is no whole factor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fn, sides, tile, overlap, message):
    with pytest.raises(ConfigError, match=message):
        tiled(fn, image(*sides), tile, overlap)
