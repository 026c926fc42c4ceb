"""`flowjax.models.unet.UNet` <-> the state dict of diffusers' `UNet2DModel`.

diffusers counts up_blocks from the lowest resolution, we count levels from the highest. Settings that correspond:

| UNet                                  | UNet2DModel                                                     |
|---------------------------------------|-----------------------------------------------------------------|
| channels x multipliers, layers        | block_out_channels, layers_per_block                            |
| attention_levels                      | "Attn..." among down_block_types (up_block_types are reversed)  |
| head_dim = 0                          | attention_head_dim=None (its default of 8 is 8 channels a head) |
| down_padding "end", "symmetric"       | downsample_padding=0, 1                                         |
| frequency_order "sin_cos", "cos_sin"  | flip_sin_to_cos=False, True                                     |
| frequency_shift                       | freq_shift                                                      |
| resample = "resblock"                 | downsample_type="resnet", upsample_type="resnet", and the block |
|                                       | types "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"        |
| scale_shift                           | resnet_time_scale_shift="scale_shift", attn_norm_num_groups     |
| num_classes + null_class              | num_class_embeds                                                |
| time_scale * t                        | timestep                                                        |
"""

import re

from flowjax.interop import state_dict
from flowjax.models.unet import UNet

MODULES = {"res": "resnets", "attn": "attentions"}
PARTS = {
    # residual block
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    # attention
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    # resampling
    "conv": "conv",
}
TOP = {
    ("conv_in",): "conv_in",
    ("t_embed", "fc1"): "time_embedding.linear_1",
    ("t_embed", "fc2"): "time_embedding.linear_2",
    ("y_embed",): "class_embedding",
    ("norm_out",): "conv_norm_out",
    ("conv_out",): "conv_out",
}


def rename_block(path: tuple[str, str], levels: int) -> str:
    """Our (block, part), e.g. ("up_0_res_2", "conv_1"), as diffusers names it in a net of `levels` levels."""
    block, part = path
    if middle := re.fullmatch(r"mid_(res|attn)_(\d)", block):
        return f"mid_block.{MODULES[middle[1]]}.{middle[2]}.{PARTS[part]}"
    side, level, rest = re.fullmatch(r"(down|up)_(\d+)_(.+)", block).groups()
    level = int(level) if side == "down" else levels - 1 - int(level)
    if rest == "sample":
        return f"{side}_blocks.{level}.{side}samplers.0.{PARTS[part]}"
    kind, number = rest.split("_")
    return f"{side}_blocks.{level}.{MODULES[kind]}.{number}.{PARTS[part]}"


def rename(net: UNet):
    """The renaming of module paths that `flowjax.interop.state_dict` takes."""
    return lambda path: TOP[path] if path in TOP else rename_block(path, len(net.multipliers))


def from_torch(net: UNet, state, like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes."""
    return state_dict.from_torch(state, like, rename(net))


def to_torch(net: UNet, params):
    """State dict of NumPy arrays of (unboxed) parameters of `net`."""
    return state_dict.to_torch(params, rename(net))
