"""Flux against diffusers' FluxTransformer2DModel through the state dict, with guidance as an input (dev) and without (schnell)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_round_trip, close, golden, random_arrays, shapes

from flowjax.interop import flux as interop
from flowjax.models.flux import Flux

SIZES = {"width": 36, "heads": 3, "rope_axes": (2, 4, 6), "attention": "xla"}
NETS = {
    "dev": Flux(depth=2, single_depth=3, guidance_embed=True, **SIZES),
    "schnell": Flux(depth=1, single_depth=2, **SIZES),
}
ORACLE = {
    "in_channels": 12,
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 4, 6),
}


@functools.cache
def case(name):
    """(inputs, state dict, our parameters), all random."""
    net, random = NETS[name], np.random.RandomState(0)
    x, text, pooled = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((2, 6, 10, 3), (2, 7, 20), (2, 10)))
    cond = {"text": text, "pooled": pooled} | ({"guidance": jnp.array([3.5, 1.2])} if net.guidance_embed else {})
    inputs = x, jnp.array([0.007, 0.83]), cond
    like = shapes(net, *inputs)
    plain = interop.to_torch(net, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like))
    state = random_arrays({key: value.shape for key, value in plain.items()}, seed=1)
    return inputs, state, interop.from_torch(net, state, like)


@pytest.mark.parametrize("name", NETS)
def test_output_equals_the_stored_output_of_diffusers(name):
    inputs, _, params = case(name)
    close(jax.jit(NETS[name].apply)({"params": params}, *inputs), golden(f"flux_{name}")["y"], 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NETS)
def test_output_and_all_gradients_equal_diffusers(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    net, ((x, t, cond), state, params) = NETS[name], case(name)
    settings = {"num_layers": net.depth, "num_single_layers": net.single_depth, "guidance_embeds": net.guidance_embed}
    oracle = diffusers.FluxTransformer2DModel(**ORACLE, **settings).eval()
    oracle.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    pipeline = diffusers.FluxPipeline
    x_torch = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    given = {k: torch.tensor(np.asarray(v)).requires_grad_() for k, v in cond.items()}
    y_torch = oracle(
        pipeline._pack_latents(x_torch, 2, 3, 6, 10),
        encoder_hidden_states=given["text"],
        pooled_projections=given["pooled"],
        timestep=torch.tensor(np.asarray(t)),
        guidance=given.get("guidance"),
        img_ids=pipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32),
        txt_ids=torch.zeros(7, 3),
    ).sample
    y_torch = pipeline._unpack_latents(y_torch, 6, 10, 1).permute(0, 2, 3, 1)
    projection = np.random.RandomState(3).standard_normal(y_torch.shape).astype(np.float32)
    (y_torch * torch.from_numpy(projection)).sum().backward()
    golden(f"flux_{name}", y=y_torch.detach().numpy())

    def loss(params, x, cond):
        y = net.apply({"params": params}, x, t, cond)
        return jnp.vdot(y, projection), y

    (_, y), (grads, grad_x, grad_cond) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, cond)
    close(y, y_torch.detach(), 1e-4)  # the two round a guidance of 3500 differently in its cosine
    close(grad_x, x_torch.grad.permute(0, 2, 3, 1), 1e-4)
    for k in ("text", "pooled"):
        close(grad_cond[k], given[k].grad, 1e-4)
    theirs = {key: value.grad.numpy() for key, value in oracle.named_parameters()}
    largest = max(np.abs(value).max() for value in theirs.values())
    ours = interop.to_torch(net, grads)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-3, atol=3e-5 * largest, err_msg=key)


@pytest.mark.parametrize("name", NETS)
def test_round_trip_and_unrolled(name):
    check_round_trip(interop, NETS[name], *case(name))


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    _, state, params = case("dev")
    net = NETS["dev"]
    with pytest.raises(ValueError, match=r"left over \['extra.weight'\]"):
        interop.from_torch(net, {**state, "extra.weight": np.zeros(3)}, params)
    with pytest.raises(ValueError, match=r"missing \['single_transformer_blocks.1.proj_out.attn.weight', 'single"):
        interop.from_torch(net, {k: v for k, v in state.items() if "blocks.1.proj_out.weight" not in k}, params)
    with pytest.raises(ValueError, match=r"left over \['time_text_embed.guidance_embedder"):
        rest = {k: v for k, v in params.items() if k != "g_embed"}
        interop.from_torch(net.clone(guidance_embed=False), state, rest)
    with pytest.raises(ValueError, match="no counterpart of extra/norm"):
        interop.to_torch(net, {**params, "extra": {"norm": {"scale": np.zeros(3)}}})
