"""T5 and UMT5 encoders against transformers through the state dict, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, golden, random_arrays, shapes

from flowjax.interop import t5 as interop
from flowjax.models.t5 import T5Encoder, relative_buckets

# heads * head_dim is not the width, and there are more places than buckets.
FIELDS = {"width": 24, "depth": 3, "heads": 3, "head_dim": 6, "hidden": 40, "vocab": 13}
NETS = {"t5": T5Encoder(**FIELDS), "umt5": T5Encoder(**FIELDS, shared_bias=False, mask_padding=True)}
TOKENS = jnp.asarray(np.random.RandomState(0).randint(1, 13, (2, 40))).at[0, 31:].set(0)


@functools.cache
def case(name):
    """(state dict, our parameters)."""
    like = shapes(NETS[name], TOKENS)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    state = random_arrays({key: value.shape for key, value in interop.to_torch(NETS[name], zeros).items()}, seed=1)
    for key in state:
        if key.endswith("relative_attention_bias.weight"):
            state[key] *= 3.0
    state[interop.TOKENS] = state[interop.SHARED]
    return state, interop.from_torch(NETS[name], state, like)


@pytest.mark.parametrize("name", NETS)
def test_output_equals_the_stored_output_of_transformers(name):
    sequence, _ = jax.jit(NETS[name].apply)({"params": case(name)[1]}, TOKENS)
    close(sequence, golden("t5")[name], 1e-4)


@pytest.mark.oracle
def test_output_and_all_gradients_equal_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    stored = {}
    for name, net in NETS.items():
        state, params = case(name)
        module, config = {
            "t5": (transformers.T5EncoderModel, transformers.T5Config),
            "umt5": (transformers.UMT5EncoderModel, transformers.UMT5Config),
        }[name]
        model = module(config(
            d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=3, vocab_size=13, feed_forward_proj="gated-gelu",
        )).eval()  # fmt: skip
        model.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
        tokens = torch.tensor(np.asarray(TOKENS))
        y = model(tokens, attention_mask=(tokens != 0) if net.mask_padding else None).last_hidden_state
        close(jax.jit(net.apply)({"params": params}, TOKENS)[0], y.detach(), 1e-4)
        stored[name] = y.detach().numpy()
        projection = np.random.RandomState(3).standard_normal(y.shape).astype(np.float32)
        (y * torch.from_numpy(projection)).sum().backward()
        loss = lambda p, net=net, projection=projection: jnp.vdot(net.apply({"params": p}, TOKENS)[0], projection)  # noqa: E731
        grads = interop.to_torch(net, jax.jit(jax.grad(loss))(params))
        theirs = {key: value.grad.numpy() for key, value in model.named_parameters() if value.grad is not None}
        largest = max(np.abs(value).max() for value in theirs.values())
        assert set(theirs) <= set(grads) and len(grads) - len(theirs) == 1  # the token table has two names
        for key, value in theirs.items():
            np.testing.assert_allclose(grads[key], value, rtol=1e-3, atol=3e-5 * largest, err_msg=f"{name} {key}")
    attention = transformers.models.t5.modeling_t5.T5Attention
    offset = torch.arange(700)[None] - torch.arange(700)[:, None]
    np.testing.assert_array_equal(relative_buckets(700), attention._relative_position_bucket(offset))
    golden("t5", **stored)


@pytest.mark.parametrize("name", NETS)
def test_round_trip(name):
    state, params = case(name)
    back = interop.to_torch(NETS[name], params)
    assert back.keys() == state.keys()
    assert sum("relative_attention_bias" in key for key in back) == (1 if name == "t5" else 3)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_one_token_table_is_enough_and_two_must_agree():
    state, params = case("t5")
    like = jax.tree.map(np.zeros_like, params)
    for absent in (interop.SHARED, interop.TOKENS):
        part = {key: value for key, value in state.items() if key != absent} | {"decoder.final_layer_norm.weight": np.ones(24)}
        jax.tree.map(np.testing.assert_array_equal, interop.from_torch(NETS["t5"], part, like), params)
    with pytest.raises(ValueError, match="differ; they should be one table"):
        interop.from_torch(NETS["t5"], {**state, interop.SHARED: state[interop.SHARED] + 1}, like)
    with pytest.raises(ValueError, match=r"left over \['extra.weight'\]"):
        interop.from_torch(NETS["t5"], {**state, "extra.weight": np.zeros(3)}, like)
