"""Where a convolution's time goes on this device, ours beside PyTorch's: python -m tools.convolutions [--channels=16,32 --size=32 --batch=64]

Forward, gradient by the input and gradient by the kernel of a 3x3 convolution (NHWC in XLA, channels_last in PyTorch, float32), each alone and
in turn; the ratio is theirs / ours of the median times: above 1 we are faster. Needs the extra `oracle`.
"""

import itertools
import time

import jax
import numpy as np
from absl import flags

from experiments import shell
from flowjax.train import runtime

CHANNELS = flags.DEFINE_list("channels", ["16", "32", "64"], "Numbers of channels, in and out.")
SIZE = flags.DEFINE_integer("size", 32, "Height and width.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 64, "Images.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 9, "How often the two sides take turns.", lower_bound=1)


def ours(x, kernel, g):
    """{name: a function of no arguments that returns when it is done}."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    by_input = jax.jit(lambda x, kernel, g: jax.vjp(lambda x: conv(x, kernel), x)[1](g)[0])
    by_kernel = jax.jit(lambda x, kernel, g: jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](g)[0])
    forward = jax.jit(lambda x, kernel, g: conv(x, kernel))
    given = [jax.device_put(v) for v in (x, kernel, g)]
    run = lambda fn: lambda: jax.block_until_ready(fn(*given))  # noqa: E731
    return {"forward": run(forward), "by the input": run(by_input), "by the kernel": run(by_kernel)}


def theirs(x, kernel, g):
    """The same in PyTorch."""
    import torch

    from tools import bench

    torch.set_num_threads(bench.threads())
    nchw = lambda v: torch.from_numpy(v.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, g, kernel = nchw(x), nchw(g), torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    backward = torch.ops.aten.convolution_backward

    def gradient(mask):
        return lambda: backward(g, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

    forward = lambda: torch.nn.functional.conv2d(x, kernel, padding=1)  # noqa: E731
    return {"forward": forward, "by the input": gradient([True, False, False]), "by the kernel": gradient([False, True, False])}


def main():
    runtime.setup()
    rng = np.random.default_rng(0)
    print(f"3x3, {BATCH.value} images of {SIZE.value}x{SIZE.value}, float32, median of {ROUNDS.value} rounds")
    for channels in map(int, CHANNELS.value):
        x, g = rng.standard_normal((2, BATCH.value, SIZE.value, SIZE.value, channels), np.float32)
        kernel = rng.standard_normal((3, 3, channels, channels), np.float32)
        sides = {"ours": ours(x, kernel, g), "torch": theirs(x, kernel, g)}
        gflop = 2 * x.size * 9 * channels / 1e9
        for name in sides["ours"]:
            seconds = {side: [] for side in sides}
            for _, side in itertools.product(range(ROUNDS.value + 1), sides):
                start = time.perf_counter()
                sides[side][name]()
                seconds[side].append(time.perf_counter() - start)
            middle = {side: float(np.median(v[1:])) for side, v in seconds.items()}  # the first compiles
            told = "  ".join(f"{side} {1e3 * s:7.2f} ms {gflop / s:6.1f} GFLOP/s" for side, s in middle.items())
            print(f"{channels:4} channels  {name:13}  {told}  ratio {middle['torch'] / middle['ours']:.2f}")
    return 0


if __name__ == "__main__":
    shell.run(main)
