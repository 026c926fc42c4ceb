"""`flowjax.models.perceptual.LPIPS` <- torchvision's VGG16 and the channel weights of the `lpips` package (version 0.1, net "vgg").

torchvision numbers `features` through: convolutions, ReLUs and poolings count alike. The classifier's layers are left out. The
channel weights are lin0.model.1.weight ... lin4.model.1.weight, each (1, C, 1, 1).
"""

from collections.abc import Mapping

import numpy as np

from flowjax.interop import state_dict
from flowjax.models.perceptual import LPIPS


def rename(net: LPIPS):
    """The renaming of module paths that `flowjax.interop.state_dict` takes."""
    starts = np.cumsum([0, *(2 * len(block) + 1 for block in net.widths)])

    def one(path):
        kind, block, *rest = path[0].split("_")
        if kind == "weight":
            return f"lin{block}.model.1"
        return f"features.{starts[int(block)] + 2 * int(rest[0])}"

    return one


def from_torch(net: LPIPS, vgg: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray], like):
    """Parameters for `net` from two state dicts of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError where keys are missing, left over or of another shape, or a channel weight is negative.
    """
    if negative := [k for k, v in weights.items() if np.min(v) < 0]:
        raise ValueError(f"channel weights must not be negative, but {', '.join(negative)} have such")
    features = {k: v for k, v in vgg.items() if k.startswith("features.")}
    return state_dict.from_torch({**features, **weights}, like, rename(net))


def to_torch(net: LPIPS, params) -> dict[str, np.ndarray]:
    """One state dict of both, the inverse of `from_torch`."""
    return state_dict.to_torch(params, rename(net))
