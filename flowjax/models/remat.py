"""What the backward pass may keep of a block; everything else is recomputed from the block's input (model.remat)."""

import jax

_keep = jax.checkpoint_policies

# Blocks name their input "block" and the output of the attention "attention".
REMAT = {
    "none": None,  # everything is kept
    "full": _keep.nothing_saveable,
    "dots": _keep.checkpoint_dots,
    "dots_no_batch": _keep.checkpoint_dots_with_no_batch_dims,
    "attention": _keep.save_only_these_names("attention"),
    # As "full", and the inputs of the blocks wait in the host's memory.
    "offload": _keep.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block"], offload_src="device", offload_dst="pinned_host"
    ),
}
