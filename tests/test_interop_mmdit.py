"""MMDiT against diffusers' SD3Transformer2DModel through the state dict: SD3, SD3.5 medium and SD3.5 large, made tiny."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_round_trip, close, golden, random_arrays, shapes

from flowjax.interop import mmdit as interop
from flowjax.models.mmdit import MMDiT

SIZES = {"width": 24, "heads": 3, "table": 8, "base": 6, "attention": "xla"}
NETS = {
    "sd3": MMDiT(depth=3, **SIZES),
    "sd35_medium": MMDiT(depth=4, dual=2, qk_norm=True, positions="table", **SIZES),
    "sd35_large": MMDiT(depth=3, qk_norm=True, **SIZES),
}
ORACLE = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 8,
}


@functools.cache
def case(name):
    """(inputs, state dict, our parameters), all random; a computed table of positions stays."""
    net, random = NETS[name], np.random.RandomState(0)
    x, text, pooled = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((2, 6, 10, 3), (2, 7, 20), (2, 12)))
    inputs = x, jnp.array([0.007, 0.83]), {"text": text, "pooled": pooled}
    like = shapes(net, *inputs)
    plain = interop.to_torch(net, zeros(like))
    state = random_arrays({key: value.shape for key, value in plain.items()}, seed=1)
    if net.positions != "table":
        state[interop.TABLE] = plain[interop.TABLE]
    return inputs, state, interop.from_torch(net, state, like)


def zeros(like):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)


def oracle_settings(net):
    return ORACLE | {"num_layers": net.depth, "dual_attention_layers": tuple(range(net.dual)), "qk_norm": "rms_norm" if net.qk_norm else None}


@pytest.mark.parametrize("name", NETS)
def test_output_equals_the_stored_output_of_diffusers(name):
    inputs, _, params = case(name)
    close(jax.jit(NETS[name].apply)({"params": params}, *inputs), golden(f"mmdit_{name}")["y"], 1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NETS)
def test_output_and_all_gradients_equal_diffusers(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    net, ((x, t, cond), state, params) = NETS[name], case(name)
    oracle = diffusers.SD3Transformer2DModel(**oracle_settings(net)).eval()
    if net.positions != "table":  # the table that diffusers computes is ours
        np.testing.assert_allclose(oracle.state_dict()[interop.TABLE], state[interop.TABLE], atol=1e-6)
    oracle.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    x_torch = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    text, pooled = (torch.tensor(np.asarray(cond[k])).requires_grad_() for k in ("text", "pooled"))
    y_torch = oracle(x_torch, text, pooled, 1000.0 * torch.tensor(np.asarray(t))).sample.permute(0, 2, 3, 1)
    projection = np.random.RandomState(3).standard_normal(y_torch.shape).astype(np.float32)
    (y_torch * torch.from_numpy(projection)).sum().backward()
    golden(f"mmdit_{name}", y=y_torch.detach().numpy())

    def loss(params, x, cond):
        y = net.apply({"params": params}, x, t, cond)
        return jnp.vdot(y, projection), y

    (_, y), (grads, grad_x, grad_cond) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, cond)
    close(y, y_torch.detach(), 1e-5)
    close(grad_x, x_torch.grad.permute(0, 2, 3, 1), 1e-4)
    close(grad_cond["text"], text.grad, 1e-4)
    close(grad_cond["pooled"], pooled.grad, 1e-4)
    ours = interop.to_torch(net, grads)
    theirs = {key: value.grad.numpy() for key, value in oracle.named_parameters() if value.grad is not None}
    largest = max(np.abs(value).max() for value in theirs.values())
    for key, value in theirs.items():
        np.testing.assert_allclose(ours.pop(key), value, rtol=1e-3, atol=3e-5 * largest, err_msg=key)
    # What is left has no gradient: the query of the text where the text ends, and a stored table.
    for key, value in ours.items():
        assert f"transformer_blocks.{net.depth - 1}.attn.add_q_proj" in key or "norm_added_q" in key or key == interop.TABLE, key
        assert key == interop.TABLE and net.positions != "table" or not value.any(), key


@pytest.mark.parametrize("name", NETS)
def test_round_trip_and_unrolled(name):
    check_round_trip(interop, NETS[name], *case(name))


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    inputs, state, params = case("sd3")
    net = NETS["sd3"]
    with pytest.raises(ValueError, match=r"left over \['extra.weight'\]"):
        interop.from_torch(net, {**state, "extra.weight": np.zeros(3)}, params)
    with pytest.raises(ValueError, match=r"missing \['proj_out.bias'\]"):
        interop.from_torch(net, {key: value for key, value in state.items() if key != "proj_out.bias"}, params)
    with pytest.raises(ValueError, match="not the sin-cos table of model.table = 8 and model.base = 6.*'table' takes any"):
        interop.from_torch(net, {**state, interop.TABLE: state[interop.TABLE] + 0.01}, params)
    half = {**state, interop.TABLE: state[interop.TABLE].astype(np.float16)}
    assert interop.from_torch(net, half, params).keys() == params.keys()
    held = NETS["sd35_medium"]
    with pytest.raises(ValueError, match=r"missing \['pos_embed.table.weight'\]"):
        like = shapes(held, *inputs)
        interop.from_torch(held, {k: v for k, v in case("sd35_medium")[1].items() if k != interop.TABLE}, like)
    with pytest.raises(ValueError, match="'rope' cannot be expressed"):
        interop.to_torch(net.clone(positions="rope"), params)
    with pytest.raises(ValueError, match="no counterpart of encoder/"):
        interop.to_torch(net, {**params, "encoder": {"norm": {"scale": np.zeros(3)}}})
