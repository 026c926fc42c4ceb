"""Endless two-dimensional data: example number `index` is a function of (seed, split, index), so any one can be read.

mix4 is the standard small problem of this project: four equal Gaussians at (+-1, +-1) with standard deviation 0.25.
"""

import numpy as np

from flowjax.data import counter


def mix4(index, key):
    """Four Gaussians at (+-1, +-1), std 0.25; label 2 [x > 0] + [y > 0]. Returns x (n, 2) float32, label (n,) int32."""
    label = (counter.uniform(counter.make_key(int(key), 0), index) * 4).astype(np.int32)
    centre = np.stack([label // 2, label % 2], -1) * 2.0 - 1.0
    x = centre + 0.25 * counter.normal_pairs(counter.make_key(int(key), 1), index)
    return {"x": x.astype(np.float32), "label": label}


def moons(index, key):
    """scikit-learn's two half circles with noise 0.05; label 0 is the upper one. x (n, 2) float32, label (n,) int32."""
    label = (counter.uniform(counter.make_key(int(key), 0), index) * 2).astype(np.int32)
    angle = np.pi * counter.uniform(counter.make_key(int(key), 1), index)
    upper = np.stack([np.cos(angle), np.sin(angle)], -1)
    curve = np.where(label[:, None] == 0, upper, np.array([1.0, 0.5]) - upper)
    x = curve + 0.05 * counter.normal_pairs(counter.make_key(int(key), 2), index)
    return {"x": x.astype(np.float32), "label": label}


def checkerboard(index, key):
    """Uniform on the 8 dark unit cells (floor x + floor y even) of [-2, 2]^2; no labels. x (n, 2) float32."""
    u = [counter.uniform(counter.make_key(int(key), j), index) for j in range(2)]
    x = 4 * u[0] - 2
    column = np.floor(x)
    # y runs over the two cells of this column: a cell of height 1 every 2, starting where the parities agree.
    cell, inside = np.divmod(2 * u[1], 1.0)
    y = -2 + column % 2 + 2 * cell + inside
    return {"x": np.stack([x, y], -1).astype(np.float32)}


# name -> (function, class names)
TOYS = {
    "mix4": (mix4, ["(-1,-1)", "(-1,+1)", "(+1,-1)", "(+1,+1)"]),
    "moons": (moons, ["upper", "lower"]),
    "checkerboard": (checkerboard, []),
}
