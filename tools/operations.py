"""Where a network's time goes on this device, ours beside PyTorch's, one operation at a time.

    python -m tools.operations --widths=96,384 [--rows=2048]               # y = x W and its gradients, (rows, width) x (width, 4 width)
    python -m tools.operations --channels=16,32 [--size=32 --batch=64]     # 3x3 convolutions (NHWC in XLA, channels_last in PyTorch)

Forward, gradient by the input and gradient by the kernel in float32, each alone and in turn; the ratio is theirs / ours of the median
times: above 1 we are faster. Needs the extra `oracle`.
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import shell
from flowjax.config import ConfigError
from flowjax.train import runtime
from tools import bench

WIDTHS = flags.DEFINE_list("widths", [], "Widths of matrix products.")
ROWS = flags.DEFINE_integer("rows", 2048, "Rows of a matrix product: images times tokens.", lower_bound=1)
CHANNELS = flags.DEFINE_list("channels", [], "Numbers of channels of convolutions, in and out.")
SIZE = flags.DEFINE_integer("size", 32, "Height and width of what is convolved.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 64, "Images that are convolved.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 9, "How often the two sides take turns.", lower_bound=1)

PARTS = ("forward", "by the input", "by the kernel")


def ours(operation, x, kernel, g):
    """{part: a function of no arguments that returns when it is done} of operation(x, kernel) with the cotangent g."""
    by_input = jax.jit(lambda x, kernel, g: jax.vjp(lambda x: operation(x, kernel), x)[1](g)[0])
    by_kernel = jax.jit(lambda x, kernel, g: jax.vjp(lambda kernel: operation(x, kernel), kernel)[1](g)[0])
    forward = jax.jit(lambda x, kernel, g: operation(x, kernel))
    given = [jax.device_put(v) for v in (x, kernel, g)]
    run = lambda fn: lambda: jax.block_until_ready(fn(*given))  # noqa: E731
    return dict(zip(PARTS, map(run, (forward, by_input, by_kernel)), strict=True))


def convolve(x, kernel):
    """3x3, as many channels out as in."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def their_product(torch, x, kernel, g):
    """What `ours` does with jnp.matmul, in PyTorch."""
    x, kernel, g = (torch.from_numpy(v) for v in (x, kernel, g))
    return dict(zip(PARTS, (lambda: x @ kernel, lambda: g @ kernel.T, lambda: x.T @ g), strict=True))


def their_convolution(torch, x, kernel, g):
    """What `ours` does with `convolve`, in PyTorch."""
    nchw = lambda v: torch.from_numpy(v.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, g, kernel = nchw(x), nchw(g), torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    backward = torch.ops.aten.convolution_backward

    def gradient(mask):
        return lambda: backward(g, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

    forward = lambda: torch.nn.functional.conv2d(x, kernel, padding=1)  # noqa: E731
    return dict(zip(PARTS, (forward, gradient([True, False, False]), gradient([False, True, False])), strict=True))


def cases(rng):
    """(what, FLOP of one part, our operation, theirs, x, kernel, g) of everything asked for."""
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    for width in map(int, WIDTHS.value):
        arrays = normal(ROWS.value, width), normal(width, 4 * width), normal(ROWS.value, 4 * width)
        yield f"width {width}", 8 * ROWS.value * width**2, jnp.matmul, their_product, *arrays
    for channels in map(int, CHANNELS.value):
        image = BATCH.value, SIZE.value, SIZE.value, channels
        arrays = normal(*image), normal(3, 3, channels, channels), normal(*image)
        yield f"{channels} channels", 18 * arrays[0].size * channels, convolve, their_convolution, *arrays


def main():
    if not WIDTHS.value and not CHANNELS.value:
        raise ConfigError("name what to measure: --widths=96,384 of matrix products, --channels=16,32 of convolutions, or both")
    runtime.setup()
    torch = bench.reference("tools.operations").torch
    print(f"float32, {bench.threads()} CPU threads, median of {ROUNDS.value} rounds")
    for what, flop, operation, theirs, *arrays in cases(np.random.default_rng(0)):
        sides = {"ours": ours(operation, *arrays), "torch": theirs(torch, *arrays)}
        for part in PARTS:
            seconds = {side: [] for side in sides}
            for _, side in itertools.product(range(ROUNDS.value + 1), sides):
                start = time.perf_counter()
                sides[side][part]()
                seconds[side].append(time.perf_counter() - start)
            middle = {side: float(np.median(v[1:])) for side, v in seconds.items()}  # the first compiles
            told = "  ".join(f"{side} {1e3 * s:7.2f} ms {flop / s / 1e9:6.1f} GFLOP/s" for side, s in middle.items())
            print(f"{what:12}  {part:13}  {told}  ratio {middle['torch'] / middle['ours']:.2f}")
    return 0


if __name__ == "__main__":
    shell.run(main)
