"""Pixels on the host: decode, convert, resize, pad. All images are uint8 (H, W, C)."""

import math
import struct
import zlib

import numpy as np

from flowjax.config import ConfigError
from flowjax.data.records import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(stream, where: str, channels: int = 0) -> np.ndarray:
    """Decode an image file (a path or a binary stream) to uint8 (H, W, C); `channels` as in `convert`.

    **Errors:** DataError that names `where` if the file is truncated, unreadable or deeper than 8 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(stream) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as e:
        raise DataError(f"{where}: unreadable image ({e})") from None
    if image.mode in ("P", "LA", "PA", "La") or "transparency" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    elif image.mode in ("CMYK", "YCbCr", "HSV", "LAB", "RGBX"):
        image = image.convert("RGB")
    elif image.mode not in ("RGB", "RGBA"):
        raise DataError(f"{where}: pixels of mode {image.mode!r} are not 8-bit; convert the file to 8 bits")
    return convert(_array(image), channels)


def convert(image: np.ndarray, channels: int) -> np.ndarray:
    """`image` with 1 (grey), 3 (RGB) or 4 (RGBA) channels; 0 leaves it. Transparency is laid over white."""
    if channels in (0, image.shape[-1]):
        return image
    from PIL import Image

    pil = _pil(image)
    if pil.mode == "RGBA":
        pil = Image.alpha_composite(Image.new("RGBA", pil.size, "white"), pil)
    return _array(pil.convert(_MODES[channels]))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` by antialiased bicubic interpolation, then the central size x size square."""
    return fit(image, size, size)


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled until it covers height x width (antialiased bicubic), then the middle of it."""
    from PIL import Image

    scale = max(height / image.shape[0], width / image.shape[1])
    h, w = max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale))
    if (h, w) != image.shape[:2]:
        image = _array(_pil(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = (h - height) // 2, (w - width) // 2
    return image[top : top + height, left : left + width]


def bucket_sizes(area: int, step: int, least: int = 0, most: int = 0) -> list[tuple[int, int]]:
    """Heights and widths, multiples of `step` in least..most, that hold at most `area` pixels, and as many as one side leaves the other.

    least and most are by default half and twice the side of a square. These are the buckets of kohya-ss/sd-scripts: 512^2 in steps
    of 64 makes 17 of them, 1024^2 from 256 to 2048 makes 41.
    """
    side = math.isqrt(max(area, 0))
    least, most = least or -(-side // 2), most or 2 * side
    square = side // max(step, 1) * step
    if step < 1 or not 0 < least <= square or side > most:
        raise ConfigError(
            f"--area = {area}, --step = {step} and --sides = {least},{most} do not fit: a square of the area, of side {side}, should be at "
            "least a step long and within the sides"
        )
    most = most // step * step
    found = {(square, square)}
    for width in range(-(-least // step) * step, most + 1, step):
        height = min(most, area // width) // step * step
        if height >= least:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_bucket(shape, sizes) -> tuple[int, int]:
    """The size whose ratio of height to width is nearest, on a logarithmic scale, to that of an image; of several the largest."""
    ratio = math.log(shape[0] / shape[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - ratio), 9), -s[0] * s[1]))


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """(..., H, W, C) with a border up to size x size, as even as possible: 0 for uint8, -1 (the same black) for floats."""
    height, width = images.shape[-3:-1]
    widths = [(0, 0)] * (images.ndim - 3) + [((size - n) // 2, size - n - (size - n) // 2) for n in (height, width)] + [(0, 0)]
    return np.pad(images, widths, constant_values=0 if images.dtype == np.uint8 else -1)


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 (H, W, C) image."""
    import io

    stream = io.BytesIO()
    _pil(image).save(stream, "PNG")
    return stream.getvalue()


def _pil(image: np.ndarray):
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _array(pil) -> np.ndarray:
    image = np.asarray(pil)
    return image[..., None] if image.ndim == 2 else image
