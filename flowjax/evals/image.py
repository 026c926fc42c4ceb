"""Pixels: the 8-bit rounding rule, and the pairwise fidelity measures PSNR and SSIM."""

import numpy as np

from flowjax.config import ConfigError
from flowjax.evals import processes

QUANTISATION = "clip(floor(127.5*(x+1)+0.5),0,255)"


def to_uint8(x: np.ndarray) -> np.ndarray:
    """floor(127.5 (x + 1) + 0.5), clipped to 0..255."""
    return np.clip(np.floor(127.5 * (np.asarray(x, np.float64) + 1) + 0.5), 0, 255).astype(np.uint8)


def quantise(x: np.ndarray, where: str = "images", sampled: bool = False) -> np.ndarray:
    """uint8 (N, H, W, C) of float images in [-1, 1]: applied ONCE, so that samples are judged as the 8-bit files they become.

    A model may overshoot [-1, 1] and is clipped. What cannot be in this range (integers, NaN) is refused, and so are images without one
    negative value, which most likely are in [0, 1]; unless they are `sampled` here, by a network that may have come to draw nothing else.
    """
    x = np.asarray(x)
    if x.ndim != 4:
        raise ConfigError(f"{where} must be (N, H, W, C), got shape {x.shape}")
    if x.dtype.kind != "f":
        raise ConfigError(f"{where} must be float in [-1, 1], got dtype {x.dtype}")
    bad = ~np.isfinite(x).all(axis=(1, 2, 3))
    if bad.any():
        raise ConfigError(f"{where}: {bad.sum()} of {len(x)} hold NaN or infinite values, the first is number {bad.argmax()}")
    if not sampled and x.size and x.min() >= 0 and x.max() > 0:
        raise ConfigError(f"{where} must be in [-1, 1], got [{x.min():g}, {x.max():g}]: not a single negative value")
    return to_uint8(x)


def dequantise(x: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] of uint8 images; `quantise` undoes it exactly."""
    return (np.asarray(x).astype(np.float64) / 127.5 - 1).astype(np.float32)


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 4:
        raise ConfigError(f"expected two (N, H, W, C) arrays of one shape, got {a.shape} and {b.shape}")
    return a.astype(np.float64), b.astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:
    """PSNR (N,) in dB per image, 10 log10(range^2 / MSE), inf where identical; data_range: 2 for [-1, 1], 255 for uint8."""
    a, b = _pair(a, b)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / ((a - b) ** 2).mean(axis=(1, 2, 3)))


def fine_share(x: np.ndarray) -> float:
    """Share of the variance within images (N, H, W, C) at frequencies above half of the highest along either axis: what blur takes away.

    White noise has about three quarters of it there.
    """
    power = np.square(np.abs(np.fft.fft2(np.asarray(x, np.float64), axes=(1, 2)))).mean((0, 3))
    power[0, 0] = 0.0  # the mean
    rows, columns = (np.abs(np.fft.fftfreq(n)) for n in power.shape)
    return float(power[np.maximum(rows[:, None], columns) > 0.25].sum() / power.sum())


def ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:
    """SSIM (N,) per image (Wang et al. 2004): Gaussian window 11x11 of sigma 1.5, population covariance, valid region only.

    Per channel, then averaged. The valid region is what the paper and scikit-image's gaussian_weights=True use; libraries that
    average over a reflect-padded map give other numbers.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < 11:
        raise ConfigError(f"SSIM's window is 11x11, the images are {a.shape[1]}x{a.shape[2]}")
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def blur(x):
        for axis in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, 11, axis) @ window
        return x

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean(axis=(1, 2, 3))


def reconstruction(images: np.ndarray, targets: np.ndarray) -> dict[str, float | int | None]:
    """Mean PSNR over images (not the PSNR of the mean error) and SSIM of reconstructions in [-1, 1], both as 8-bit images.

    Of several processes, each gives its share of the images (flowjax.evals.processes) and gets the numbers of all.
    Images that come back exactly have no finite PSNR: they are left out of its mean and counted. None where nothing is left, or
    where the images are smaller than SSIM's window.
    """
    a, b = quantise(images, "reconstructions"), quantise(targets, "targets")
    values = processes.gather(psnr(a, b, 255.0))
    finite = values[np.isfinite(values)]
    return {
        "psnr": float(finite.mean()) if len(finite) else None,
        "ssim": float(processes.gather(ssim(a, b, 255.0)).mean()) if min(a.shape[1:3]) >= 11 else None,
        "identical": int(len(values) - len(finite)),
    }
