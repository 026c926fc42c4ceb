"""The 8-bit rule, PSNR and SSIM: boundaries, closed forms."""

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.evals import image
from flowjax.evals.image import dequantise, psnr, quantise, reconstruction, ssim


def images(*values):
    return np.array(values, np.float64).reshape(1, 1, -1, 1)


def test_rounding_rule():
    got = quantise(images(-1, 1, 0, 1.3, -7, (10.49 / 127.5) - 1, (10.51 / 127.5) - 1))
    assert got.dtype == np.uint8
    assert got.ravel().tolist() == [0, 255, 128, 255, 0, 10, 11]


def test_grey_from_an_untrained_network_is_an_image():
    assert (quantise(np.zeros((1, 2, 2, 1))) == 128).all()


def test_eight_bit_images_survive():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    y = dequantise(x)
    assert y.dtype == np.float32 and y.min() == -1 and y.max() == 1
    np.testing.assert_array_equal(quantise(y), x)


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((2, 4, 4)), "N, H, W, C"),
        (np.zeros((2, 4, 4, 1), np.uint8), "uint8"),
        (np.full((2, 4, 4, 1), 0.5), "negative"),
        (np.arange(16.0).reshape(1, 4, 4, 1) / 15, "negative"),
        (np.full((2, 4, 4, 1), np.inf), "2 of 2"),
        (np.where(np.arange(3)[:, None, None, None] == 1, np.nan, -np.ones((3, 4, 4, 1))), "1 of 3 .* number 1"),
    ],
)
def test_what_is_no_image_is_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        quantise(bad)


def test_psnr():
    a = np.zeros((3, 4, 4, 2))
    b = a + np.array([0.2, 0.02, 0])[:, None, None, None]
    # range 2, error 0.2: 20 log10(2 / 0.2) = 20 dB
    np.testing.assert_allclose(psnr(a, b, 2.0), [20, 40, np.inf])
    np.testing.assert_allclose(psnr(a, b, 1.0)[:2], [20 - 20 * np.log10(2), 40 - 20 * np.log10(2)])
    with pytest.raises(ConfigError, match="one shape"):
        psnr(a, b[:2], 2.0)


def test_ssim_of_constants_is_the_luminance_term():
    a, b = np.full((1, 12, 13, 1), 0.2), np.full((1, 12, 13, 1), 0.6)
    assert ssim(a, b, 1.0)[0] == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4))
    assert ssim(a, b, 2.0)[0] == pytest.approx((2 * 0.12 + 4e-4) / (0.04 + 0.36 + 4e-4))


@pytest.mark.parametrize("axis", [1, 2])
def test_ssim_of_ramps(axis):
    """On a ramp of slope g the window sees the centre's value and variance g^2 sum(w i^2), so every pixel is known."""
    w = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    spread = (w * np.arange(-5, 6) ** 2).sum() / w.sum()
    position = np.arange(14.0)
    ramp = np.broadcast_to(position[:, None] if axis == 1 else position, (14, 14))[None, ..., None]
    a, b = 0.02 * ramp, 0.4 - 0.01 * ramp
    seen = position[5:-5]  # the valid region
    ma, mb = 0.02 * seen, 0.4 - 0.01 * seen
    luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    structure = (2 * -0.02 * 0.01 * spread + 9e-4) / ((0.02**2 + 0.01**2) * spread + 9e-4)
    assert ssim(a, b, 1.0)[0] == pytest.approx((luminance * structure).mean(), rel=1e-9)
    assert ssim(5 * a, 5 * b, 5.0)[0] == pytest.approx((luminance * structure).mean(), rel=1e-9)


def test_ssim_of_itself_and_of_small_images():
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    np.testing.assert_allclose(ssim(x, x, 2.0), 1)
    with pytest.raises(ConfigError, match="11x11"):
        ssim(x[:, :10], x[:, :10], 2.0)


@pytest.mark.oracle
def test_torchmetrics_ssim_agrees_inside_the_border():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.image")
    rng = np.random.default_rng(1)
    a = rng.uniform(0, 1, (2, 20, 24, 3))
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1)
    ta, tb = (torch.from_numpy(z).permute(0, 3, 1, 2) for z in (a, b))
    _, full = functional.structural_similarity_index_measure(ta, tb, data_range=1.0, return_full_image=True)
    expected = full[:, :, 5:-5, 5:-5].mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(ssim(a, b, 1.0), expected, rtol=1e-6)


def test_reconstruction_leaves_identical_images_out_of_the_mean():
    rng = np.random.default_rng(2)
    x = dequantise(rng.integers(0, 200, (3, 12, 12, 1), np.uint8))
    y = x.copy()
    y[0] += 2 * 51 / 255  # 51 of 255 grey levels: 20 log10(5)
    report = reconstruction(y, x)
    assert report["identical"] == 2 and report["psnr"] == pytest.approx(20 * np.log10(5), rel=1e-6)
    assert 2 / 3 < report["ssim"] < 1
    assert reconstruction(x[:, :11], x[:, :11])["ssim"] == pytest.approx(1)
    assert reconstruction(x[:, :8], x[:, :8]) == {"psnr": None, "ssim": None, "identical": 3}


def test_fine_share():
    """A wave counts or does not; a wave of each kind by their variances; a shift of brightness nothing; blur takes it away."""
    n = np.arange(16)
    slow, fast = np.cos(2 * np.pi * 3 * n / 16)[:, None], np.cos(2 * np.pi * 7 * n / 16)[None]
    both = (2 * slow + fast)[None, :, :, None]
    assert image.fine_share(both) == pytest.approx(1 / 5) and image.fine_share(both + 9) == pytest.approx(1 / 5)
    assert image.fine_share(both.swapaxes(1, 2)) == pytest.approx(1 / 5)
    noise = np.random.default_rng(0).standard_normal((50, 16, 16, 3))
    blurred = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2) + np.roll(noise, (1, 1), (1, 2))) / 4
    assert image.fine_share(noise) == pytest.approx(1 - 80 / 255, abs=0.02)  # 9 x 9 of 16 x 16 frequencies are low, the mean not counted
    assert image.fine_share(blurred) < 0.6 * image.fine_share(noise)


def test_images_without_a_negative_value_are_judged_only_where_their_range_is_known():
    white = np.full((2, 4, 4, 1), 0.5)
    with pytest.raises(ConfigError, match="not a single negative value"):
        image.quantise(white)
    np.testing.assert_array_equal(image.quantise(white, sampled=True), np.full(white.shape, 191, np.uint8))  # floor(127.5 x 1.5 + 1/2)
    with pytest.raises(ConfigError, match="2 of 2 hold NaN"):
        image.quantise(white * np.nan, sampled=True)
