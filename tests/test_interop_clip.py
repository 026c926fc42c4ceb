"""CLIP's towers, alone and together, against transformers through the state dict, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, golden, random_arrays, shapes

from flowjax.interop import clip as interop
from flowjax.models.clip import CLIP, CLIPText, CLIPVision

TEXT = {"width": 24, "depth": 3, "heads": 3, "vocab": 31, "length": 7}
IMAGE = {"patch": 2, "width": 16, "depth": 2, "heads": 2, "grid": 3}
NETS = {
    "text": CLIPText(**TEXT, eos=30, attention="xla"),
    "text_projected": CLIPText(**TEXT, eos=2, mlp="gelu", features=10, penultimate=True, attention="xla"),
    "vision": CLIPVision(**IMAGE, attention="xla"),
    "both": CLIP(image=IMAGE, text={**TEXT, "eos": 30}, features=10, attention="xla"),
}
# End tokens: one, two of which the first counts, at the last place; behind it other padding than ours.
TOKENS = jnp.asarray([[5, 9, 30, 0, 0, 0, 0], [7, 30, 3, 30, 30, 30, 30], [1, 2, 3, 4, 5, 6, 30]])
X = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (3, 6, 6, 3)), jnp.float32)
INPUTS = {"text": (TOKENS,), "text_projected": (TOKENS,), "vision": (X,), "both": (X, {"tokens": TOKENS})}


@functools.cache
def case(name):
    """(state dict, our parameters)."""
    like = shapes(NETS[name], *INPUTS[name])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    state = random_arrays({key: value.shape for key, value in interop.to_torch(NETS[name], zeros).items()}, seed=1)
    return state, interop.from_torch(NETS[name], state, like)


@functools.cache
def ours(name):
    return jax.jit(NETS[name].apply)({"params": case(name)[1]}, *INPUTS[name])


@pytest.mark.parametrize("name", NETS)
def test_output_equals_the_stored_output_of_transformers(name):
    stored = golden("clip")
    for i, value in enumerate(ours(name)):
        close(value, stored[f"{name}_{i}"], 1e-4)


def oracle(name):
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 31,
        "max_position_embeddings": 7, "projection_dim": 10,
    }  # fmt: skip
    image = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 6, "patch_size": 2,
    }  # fmt: skip
    if name == "text":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, eos_token_id=30))
    if name == "text_projected":
        return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text, eos_token_id=2, hidden_act="gelu"))
    if name == "vision":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**image))
    config = transformers.CLIPConfig(text_config={**text, "eos_token_id": 30}, vision_config=image, projection_dim=10)
    return transformers.CLIPModel(config)


@pytest.mark.oracle
def test_output_and_all_gradients_equal_transformers():
    torch = pytest.importorskip("torch")
    stored = {}
    for name, net in NETS.items():
        state, params = case(name)
        model = oracle(name).eval()
        model.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
        vision = CLIPVision(**IMAGE)
        pixels = torch.tensor(np.asarray((X + 1) / 2 - jnp.asarray(vision.mean)) / np.asarray(vision.std, np.float32))
        pixels, tokens = pixels.permute(0, 3, 1, 2), torch.tensor(np.asarray(TOKENS))
        if name == "text":
            out = model(tokens)
            outputs = out.last_hidden_state, out.pooler_output
        elif name == "text_projected":
            out = model(tokens, output_hidden_states=True)
            outputs = out.hidden_states[-2], out.text_embeds
        elif name == "vision":
            out = model(pixels)
            outputs = out.last_hidden_state[:, 1:], out.pooler_output
        else:
            out = model(tokens, pixels)
            outputs = out.image_embeds, out.text_embeds, model.logit_scale.exp()
        for i, (a, b) in enumerate(zip(ours(name), outputs, strict=True)):
            close(a, b.detach(), 1e-4)
            stored[f"{name}_{i}"] = b.detach().numpy()

        projections = [np.random.RandomState(3 + i).standard_normal(v.shape).astype(np.float32) for i, v in enumerate(outputs)]
        projections = [np.asarray(p, np.float32) for p in projections] if name != "both" else [*projections[:2], np.float32(0.7)]
        sum((v * torch.as_tensor(p)).sum() for v, p in zip(outputs, projections)).backward()

        def loss(params, net=net, name=name, projections=projections):
            return sum(jnp.vdot(v, p) for v, p in zip(net.apply({"params": params}, *INPUTS[name]), projections))

        grads = interop.to_torch(net, jax.jit(jax.grad(loss))(params))
        theirs = {key: value.grad.numpy() for key, value in model.named_parameters() if value.grad is not None}
        largest = max(np.abs(value).max() for value in theirs.values())
        for key, value in grads.items():
            wanted = theirs.get(key, np.zeros_like(value))
            np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=3e-5 * largest, err_msg=f"{name} {key}")
        assert set(theirs) <= set(grads)
    golden("clip", **stored)


@pytest.mark.parametrize("name", NETS)
def test_round_trip(name):
    state, params = case(name)
    back = interop.to_torch(NETS[name], params)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_towers_are_read_from_both_and_from_older_files():
    state, params = case("text")
    old = {f"text_model.{key}": value for key, value in state.items()}
    old["text_model.embeddings.position_ids"] = np.arange(7)[None]
    same(interop.from_torch(NETS["text"], old, params), params)
    state, params = case("both")
    for which in ("text", "image"):
        same(interop.from_torch(NETS["both"].tower(which), state, params[f"{which}_encoder"]), params[f"{which}_encoder"])


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    state, params = case("text")
    with pytest.raises(ValueError, match=r"left over \['text_projection.weight'\]"):
        interop.from_torch(NETS["text"], {**state, "text_projection.weight": np.zeros((3, 24))}, params)
    with pytest.raises(ValueError, match=r"missing \['final_layer_norm.bias'\]"):
        interop.from_torch(NETS["text"], {key: value for key, value in state.items() if key != "final_layer_norm.bias"}, params)
    state, params = case("both")
    with pytest.raises(ValueError, match=r"missing \['logit_scale'\]"):
        interop.from_torch(NETS["both"], {key: value for key, value in state.items() if key != "logit_scale"}, params)
    with pytest.raises(ValueError, match=r"left over \['vision_model.extra'\]|left over \['extra'\]"):
        interop.from_torch(NETS["both"], {**state, "vision_model.extra": np.zeros(1)}, params)
