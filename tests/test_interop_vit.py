"""ViT, DINOv2 with and without registers, and MAE's encoder against transformers through the state dict, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, golden, random_arrays, shapes

from flowjax.interop import vit as interop
from flowjax.models.vit import IMAGENET, ViT

SIZES = {"patch": 2, "width": 24, "depth": 3, "heads": 3, "grid": 3, "attention": "xla"}
DINO = {**SIZES, **IMAGENET, "layerscale": 0.1, "mask_token": True}
NETS = {
    "vit": ViT(**SIZES, eps=1e-12),
    "dinov2": ViT(**DINO),
    "dinov2_swiglu": ViT(**DINO, mlp="swiglu"),
    "registers": ViT(**DINO, registers=2, antialias=True),
    "mae": ViT(**SIZES, eps=1e-12, positions="sincos", **IMAGENET),
}
# Height and width: at the trained grid of 3 x 3, above it and below it, so that positions are stretched and shrunk.
IMAGES = {"vit": (10, 6), "dinov2": (8, 4), "dinov2_swiglu": (6, 6), "registers": (10, 4), "mae": (6, 6)}
SHARED = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 6, "patch_size": 2}


def like_arrays(like):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)


@functools.cache
def case(name):
    """(x, what else the network is called with, state dict, our parameters)."""
    net, random = NETS[name], np.random.RandomState(0)
    x = jnp.asarray(random.uniform(-1, 1, (2, *IMAGES[name], 3)), jnp.float32)
    more = {}
    if name == "dinov2_swiglu":
        more = {"mask": jnp.asarray(random.uniform(size=(2, 9)) < 0.4)}
    if name == "mae":
        more = {"keep": jnp.asarray([[4, 0, 7, 2], [8, 1, 3, 5]])}
    like = shapes(net, x)
    state = interop.to_torch(net, like_arrays(like))
    table = {key: state[key] for key in state if name == "mae" and key == interop.POSITIONS}
    state = random_arrays({key: value.shape for key, value in state.items()}, seed=1) | table
    return x, more, state, interop.from_torch(net, state, like)


@pytest.mark.parametrize("name", NETS)
def test_output_equals_the_stored_output_of_transformers(name):
    x, more, _, params = case(name)
    tokens, pooled = jax.jit(NETS[name].apply)({"params": params}, x, **more)
    stored = golden("vit")
    close(tokens, stored[f"{name}_tokens"], 1e-4)
    close(pooled, stored[f"{name}_pooled"], 1e-4)


def oracle(name):
    transformers = pytest.importorskip("transformers")
    if name == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**SHARED, intermediate_size=96), add_pooling_layer=False)
    if name == "mae":
        config = transformers.ViTMAEConfig(**SHARED, intermediate_size=96, mask_ratio=0.5, attn_implementation="eager")
        return transformers.ViTMAEModel(config)
    if name == "registers":
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SHARED, num_register_tokens=2))
    return transformers.Dinov2Model(transformers.Dinov2Config(**SHARED, use_swiglu_ffn=name == "dinov2_swiglu"))


@pytest.mark.oracle
def test_output_and_all_gradients_equal_transformers():
    torch = pytest.importorskip("torch")
    stored = {}
    for name, net in NETS.items():
        x, more, state, params = case(name)
        model = oracle(name).eval()
        assert (model.config.layer_norm_eps, model.config.hidden_act) == (net.eps, "gelu")
        model.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
        x_torch = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
        pixels = ((x_torch + 1) / 2 - torch.tensor(net.mean).reshape(3, 1, 1)) / torch.tensor(net.std).reshape(3, 1, 1)
        options = {"interpolate_pos_encoding": True} if name == "vit" else {}
        if "mask" in more:
            options["bool_masked_pos"] = torch.tensor(np.asarray(more["mask"]))
        if "keep" in more:  # the places of the least noise are kept, in its order
            noise = np.full((2, 9), 9.0, np.float32)
            np.put_along_axis(noise, np.asarray(more["keep"]), np.arange(4, dtype=np.float32)[None], axis=1)
            options["noise"] = torch.tensor(noise)
        y = model(pixels, **options).last_hidden_state
        outputs = y[:, 1 + net.registers :], y[:, 0]
        ours = jax.jit(net.apply)({"params": params}, x, **more)
        for part, a, b in zip(("tokens", "pooled"), ours, outputs, strict=True):
            close(a, b.detach(), 1e-4)
            stored[f"{name}_{part}"] = b.detach().numpy()

        projections = [np.random.RandomState(3).standard_normal(v.shape).astype(np.float32) for v in outputs]
        sum((v * torch.from_numpy(p)).sum() for v, p in zip(outputs, projections)).backward()

        def loss(params, x, net=net, more=more, projections=projections):
            return sum(jnp.vdot(v, p) for v, p in zip(net.apply({"params": params}, x, **more), projections))

        grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
        close(grad_x, x_torch.grad.permute(0, 2, 3, 1), 1e-4)
        theirs = {key: value.grad.numpy() for key, value in model.named_parameters() if value.grad is not None}
        largest = max(np.abs(value).max() for value in theirs.values())
        grads = interop.to_torch(net, grads)
        assert set(grads) - set(theirs) <= {interop.POSITIONS if name == "mae" else interop.MASK}
        for key, value in theirs.items():
            np.testing.assert_allclose(grads[key], value, rtol=1e-3, atol=3e-5 * largest, err_msg=f"{name} {key}")
    golden("vit", **stored)


@pytest.mark.parametrize("name", NETS)
def test_round_trip(name):
    _, _, state, params = case(name)
    back = interop.to_torch(NETS[name], params)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_names_of_older_files_heads_and_prefixes():
    _, _, state, params = case("vit")
    old = {}
    for key, value in state.items():
        key = key.replace("layers.", "encoder.layer.").replace("attention.o_proj", "attention.output.dense")
        for name in ("query", "key", "value"):
            key = key.replace(f"attention.{name[0]}_proj", f"attention.attention.{name}")
        old["vit." + key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = value
    same(interop.from_torch(NETS["vit"], {**old, "classifier.weight": np.zeros((5, 24))}, params), params)
    _, _, state, params = case("dinov2_swiglu")
    old = {k: v for k, v in state.items() if "_proj" not in k or "mlp" not in k}
    for i in range(3):
        prefix = f"encoder.layer.{i}.mlp"
        for leaf in ("weight", "bias"):
            old[f"{prefix}.weights_in.{leaf}"] = np.concatenate([state[f"{prefix}.{k}_proj.{leaf}"] for k in ("gate", "up")])
            old[f"{prefix}.weights_out.{leaf}"] = state[f"{prefix}.down_proj.{leaf}"]
    assert len(old) < len(state)
    same(interop.from_torch(NETS["dinov2_swiglu"], old, params), params)


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    _, _, state, params = case("vit")
    with pytest.raises(ValueError, match=r"left over \['extra.weight'\]"):
        interop.from_torch(NETS["vit"], {**state, "extra.weight": np.zeros(3)}, params)
    with pytest.raises(ValueError, match=r"missing \['layernorm.bias'\]"):
        interop.from_torch(NETS["vit"], {key: value for key, value in state.items() if key != "layernorm.bias"}, params)
    with pytest.raises(ValueError, match="two entries of the state dict mean 'layernorm.bias'"):
        interop.from_torch(NETS["vit"], {**state, "vit.layernorm.bias": state["layernorm.bias"]}, params)
    _, _, state, params = case("mae")
    with pytest.raises(ValueError, match="not the fixed table"):
        interop.from_torch(NETS["mae"], {**state, interop.POSITIONS: state[interop.POSITIONS] + 0.01}, params)
