"""DiT against diffusers' DiTTransformer2DModel through the state dict, and the state dict's own round trip and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, golden, random_arrays, shapes

from flowjax.interop import dit as interop
from flowjax.models.dit import DiT

NET = DiT(depth=3, width=24, heads=3, num_classes=5, learn_sigma=True, return_sigma=True, frequency_shift=1.0, attention="xla")
ORACLE = {
    "num_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_eps": 1e-6,
}


@functools.cache
def case():
    """(x, t, cond, state dict, our parameters): all random, the embedders of all blocks tied."""
    x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 8, 8, 3)), jnp.float32)
    t, cond = jnp.array([0.007, 0.5, 0.999]), {"label": jnp.array([4, 0, 5])}
    like = shapes(NET, x, t, cond)
    state = random_arrays({key: value.shape for key, value in interop.to_torch(NET, like_arrays(like)).items()}, seed=1)
    for key in state:
        if interop.EMBEDDERS in key:
            state[key] = state[f"transformer_blocks.0.{key.split('.', 2)[2]}"]
    return x, t, cond, state, interop.from_torch(NET, state, like)


def like_arrays(like):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)


def test_output_equals_the_stored_output_of_diffusers():
    x, t, cond, _, params = case()
    close(jax.jit(NET.apply)({"params": params}, x, t, cond), golden("dit")["y"], 1e-4)


@pytest.mark.oracle
def test_output_and_all_gradients_equal_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    x, t, cond, state, params = case()
    oracle = diffusers.DiTTransformer2DModel(**ORACLE).eval()
    oracle.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    # One embedder for all blocks, so that its gradient sums over them as ours does.
    for block in oracle.transformer_blocks:
        block.norm1.emb = oracle.transformer_blocks[0].norm1.emb
    x_torch = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    labels, steps = torch.tensor(np.asarray(cond["label"])), 1000.0 * torch.tensor(np.asarray(t))
    y_torch = oracle(x_torch, timestep=steps, class_labels=labels).sample.permute(0, 2, 3, 1)
    projection = np.random.RandomState(3).standard_normal(y_torch.shape).astype(np.float32)
    (y_torch * torch.from_numpy(projection)).sum().backward()
    golden("dit", y=y_torch.detach().numpy())

    def loss(params, x):
        y = NET.apply({"params": params}, x, t, cond)
        return jnp.vdot(y, projection), y

    (_, y), (grads, grad_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    close(y, y_torch.detach(), 1e-4)
    close(grad_x, x_torch.grad.permute(0, 2, 3, 1), 1e-4)
    theirs = {key: value.grad.numpy() for key, value in oracle.named_parameters()}
    largest = max(np.abs(value).max() for value in theirs.values())
    ours = interop.to_torch(NET, grads)
    assert set(theirs) <= set(ours)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-3, atol=3e-5 * largest, err_msg=key)


def test_round_trip_and_unrolled():
    x, t, cond, state, params = case()
    back = interop.to_torch(NET, params)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
        assert back[key].flags.c_contiguous
    unrolled = NET.clone(scan=False)
    like = shapes(unrolled, x, t, cond)
    close(
        unrolled.apply({"params": interop.from_torch(unrolled, state, like)}, x, t, cond),
        NET.apply({"params": params}, x, t, cond),
        1e-5,
    )


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    x, t, cond, state, params = case()
    with pytest.raises(ValueError, match=r"left over \['extra.weight'\]"):
        interop.from_torch(NET, {**state, "extra.weight": np.zeros(3)}, params)
    with pytest.raises(ValueError, match=r"missing \['proj_out_1.bias'\]"):
        interop.from_torch(NET, {key: value for key, value in state.items() if key != "proj_out_1.bias"}, params)
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match=rf"differ from those of block 0.*{key}"):
        interop.from_torch(NET, {**state, key: state[key] + 1}, params)
    deeper = "transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match=rf"left over \['{deeper}'\]"):
        interop.from_torch(NET, {**state, deeper: state[key]}, params)
    modern = NET.clone(norm="rms")
    with pytest.raises(ValueError, match="no counterpart of final/norm"):
        interop.to_torch(modern, like_arrays(shapes(modern, x, t, cond)))
