"""`flowjax.models.vae.AutoencoderKL` <-> the state dict of diffusers' `AutoencoderKL`.

channels x multipliers is block_out_channels, layers is layers_per_block, quant_conv is both use_quant_conv and
use_post_quant_conv, mid_attention is mid_block_add_attention; groups is norm_num_groups. Latent scale and shift are settings
there and measured statistics here (`LatentStats`), so they are not part of the state dict.
"""

from flowjax.interop import state_dict
from flowjax.interop.unet import rename_block
from flowjax.models.vae import AutoencoderKL

TOP = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
QUANT = {"quant": "quant_conv", "post_quant": "post_quant_conv"}


def rename(net: AutoencoderKL):
    """The renaming of module paths that `flowjax.interop.state_dict` takes."""

    def one(path):
        half, *rest = path
        if not rest:
            return QUANT[half]
        if len(rest) == 1:
            return f"{half}.{TOP[rest[0]]}"
        if rest[0] == "mid":
            rest = [f"mid_{rest[1]}", rest[2]]
        return f"{half}.{rename_block(tuple(rest), len(net.multipliers))}"

    return one


def from_torch(net: AutoencoderKL, state, like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes."""
    return state_dict.from_torch(state, like, rename(net))


def to_torch(net: AutoencoderKL, params):
    """State dict of NumPy arrays of (unboxed) parameters of `net`."""
    return state_dict.to_torch(params, rename(net))
