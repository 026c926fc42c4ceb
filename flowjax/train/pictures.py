"""Pictures in the workdir: sample grids, scatter plots of 2-D data, training curves."""

import numpy as np

from flowjax import storage
from flowjax.evals.image import to_uint8


def grid(images, path, columns: int = 10, least: int = 32):
    """Write (N, H, W, C) images in [-1, 1] as one PNG, enlarged by nearest neighbour until a side is at least `least`."""
    from PIL import Image

    images = to_uint8(np.nan_to_num(images))
    n, h, w, c = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    factor = max(1, -(-least // max(h, w)))
    images = np.concatenate([images, np.full((rows * columns - n, h, w, c), 255, np.uint8)])
    images = images.repeat(factor, 1).repeat(factor, 2)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    sheet = images.reshape(rows, columns, *images.shape[1:]).swapaxes(1, 2).reshape(rows * images.shape[1], columns * images.shape[2], c)
    image = Image.fromarray(sheet[..., 0] if c == 1 else sheet[..., :3])
    _write(path, lambda file: image.save(file, format="PNG"))


def _write(path, draw):
    path = storage.path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        draw(file)


def _figure(*size, layout="constrained"):
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=size, layout=layout)


def scatter(points, path, labels=None, limit: float | None = None):
    """Write points (N, 2) as a scatter plot, coloured by label."""
    points = np.asarray(points)
    figure = _figure(4, 4)
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1], s=2, c=labels, cmap="tab10")
    limit = limit or float(np.quantile(np.abs(points), 0.999) * 1.2)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    _write(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def samples(x, path, labels=None, columns: int = 10):
    """A grid for images, a scatter plot for points."""
    x = np.asarray(x)
    if x.ndim == 4:
        grid(x, path, columns)
    elif x.ndim == 2 and x.shape[1] >= 2:
        scatter(x[:, :2], path, labels)


def curves(rows, path):
    """Plot every metric of metrics.jsonl rows over the step, one panel each; of the clock, goodput alone."""
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in ("step", "wall")]
    names = [k for k in names if not k.startswith("seconds/") and any(isinstance(row.get(k), (int, float)) for row in rows)]
    names.sort(key=lambda name: name.startswith("panel/"))  # which is measured before the first step, and still comes last
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    # Fixed margins: working out the best ones takes as long as drawing.
    wide, high = 4.2 * columns, 2.6 * lines
    figure = _figure(wide, high, layout=None)
    figure.subplots_adjust(0.5 / wide, 0.3 / high, 1 - 0.15 / wide, 1 - 0.3 / high, wspace=0.18, hspace=0.3)
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        axes.plot(*zip(*pairs), lw=1, marker="." if len(pairs) < 30 else None)
        values = [v for _, v in pairs]
        if "loss" in name and min(values) > 0 and max(values) / min(values) > 10:
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    _write(path, lambda file: figure.savefig(file, dpi=100, format="png"))
