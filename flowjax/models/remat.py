"""What the backward pass may keep of a block; everything else is recomputed from the block's input (model.remat)."""

import jax

_keep = jax.checkpoint_policies

# Names that layers give what they make. The product is inside a function with a derivative of its own, which policies that look
# for products do not see into.
LINEAR, ATTENTION, BLOCK = "linear", "attention", "block"  # outputs of matrix products and convolutions, of attention; inputs of blocks
FUSED = ("dot_product_attention_fwd_wrapper", "pallas_call")  # kernels of attention, which make what their backward pass reads too


def _products(prim, *args, **params):
    """What costs time to make again, and not the (T, S) matrix of an attention that is not fused, which costs memory to keep."""
    return prim.name in FUSED or _keep.save_only_these_names(LINEAR, ATTENTION)(prim, *args, **params)


REMAT = {
    "none": None,  # everything is kept
    "full": _keep.nothing_saveable,
    "dots": _products,
    "attention": _keep.save_only_these_names(ATTENTION),
    # As "full", and the inputs of the blocks wait in the host's memory.
    "offload": _keep.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[BLOCK], offload_src="device", offload_dst="pinned_host"
    ),
}
