"""Adapters in the files of diffusers and kohya: what a file says of each of their matrices is what the merged network's state
dict says."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta
from nets import randomise, shapes
from safetensors.numpy import load_file, save_file

from flowjax.config import ConfigError
from flowjax.interop import dit, files, flux, lora as interop, mmdit, unet
from flowjax.models.dit import DiT
from flowjax.models.flux import Flux
from flowjax.models.mmdit import MMDiT
from flowjax.models.unet import UNet
from flowjax.train import lora

SIZES = {"width": 24, "heads": 3, "attention": "xla"}
X, T = np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.float32)
CAPTION = {"text": np.zeros((2, 7, 20), np.float32), "pooled": np.zeros((2, 12), np.float32)}
INNER = r"(attn|mlp|image_mlp|text_mlp)/\w+/kernel$|adaln/kernel$|blocks/(q|k|v|fc1)/kernel$"
CASES = {
    "dit": (dit, DiT(depth=3, num_classes=5, frequency_shift=1.0, **SIZES), {"label": np.zeros(2, np.int32)}, INNER + "|x_embed/kernel"),
    "sd3": (mmdit, MMDiT(depth=4, dual=2, qk_norm=True, table=8, base=6, **SIZES), CAPTION, INNER + r"|x_embed/kernel|_embed/fc\d/kernel"),
    "flux": (
        flux, Flux(depth=2, single_depth=3, guidance_embed=True, rope_axes=(2, 2, 4), **SIZES), CAPTION | {"guidance": T},
        INNER + r"|single_blocks/.*kernel$",
    ),
    "unet": (unet, UNet(channels=8, multipliers=(1, 2), layers=1, attention_levels=(1,), groups=4), {}, "(query|conv_1|shortcut)/kernel$"),
}  # fmt: skip


@functools.cache
def case(name, dora=False, pattern=None, rank=2):
    """(module of names, net, parameters, adapter, Lora): every leaf of the adapter random."""
    names, net, cond, usual = CASES[name]
    params = jax.tree.map(np.asarray, randomise(shapes(net, X, T, cond)))
    made = lora.Lora(pattern or usual, rank, 3.0, dora)
    # Which axis counts layers is told by the axes' names; without them, by what the layers of a stack are called.
    flat = traverse_util.flatten_dict(params, sep="/")
    boxed = {k: meta.Partitioned(v, names=("layers",) + (None,) * (v.ndim - 1)) if re.search("^(\\w+_)?blocks/", k) else v for k, v in flat.items()}
    fresh = meta.unbox(made.init(jax.random.key(0), traverse_util.unflatten_dict(boxed, sep="/")))
    random = np.random.RandomState(0)
    return names, net, params, jax.tree.map(lambda v: 0.3 * random.standard_normal(v.shape).astype(np.float32), fresh), made


def changes(names, net, params, tree, made):
    """{key: change of their matrix}, of the state dicts of the network with and without the adapter."""
    new = jax.tree.map(np.asarray, lora.merge(params, [(tree, made.scale, 1.0)]))
    old, new = names.to_torch(net, params), names.to_torch(net, new)
    return {k: new[k] - old[k] for k in new if (new[k] != old[k]).any()}, new


def product(down, up, scale):
    return scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))


@pytest.mark.parametrize("name", CASES)
def test_files_of_diffusers_say_what_the_state_dict_says(name):
    names, net, params, tree, made = case(name)
    state, header = interop.to_file(net, params, tree, made, "diffusers")
    told = json.loads(header[interop.HEADER])
    prefix = "unet" if name == "unet" else "transformer"
    want, _ = changes(names, net, params, tree, made)
    modules = {k.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight") for k in state if "lora_A" in k}
    assert {f"{m}.weight" for m in modules} == want.keys() and len(modules) > 5
    assert told[f"{prefix}.r"] == 2 and told[f"{prefix}.lora_alpha"] == 3.0 and told[f"{prefix}.target_modules"] == sorted(modules)
    for module in modules:
        down, up = (state[f"{prefix}.{module}.lora_{x}.weight"] for x in "AB")
        rank = told[f"{prefix}.rank_pattern"].get(module, 2)
        assert down.shape[0] == up.shape[1] == rank == (4 if re.match(r"single.*proj_out", module) else 2)
        scale = told[f"{prefix}.alpha_pattern"].get(module, 3.0) / rank
        np.testing.assert_allclose(product(down, up, scale), want[f"{module}.weight"].reshape(len(up), -1), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_files_come_back_byte_for_byte(name, layout, tmp_path):
    _, net, params, tree, made = case(name)
    interop.write(tmp_path / "a", net, params, tree, made, layout)
    back, its = interop.read(tmp_path / "a", net, params)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert (its.rank, its.scale, its.dora) == (2, 1.5, False)
    interop.write(tmp_path / "b", net, params, back, its, layout)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # The library reads what we write.
    theirs, (ours, words) = load_file(tmp_path / "a"), interop.to_file(net, params, tree, made, layout)
    assert theirs.keys() == ours.keys() and files.metadata(tmp_path / "a") == words
    for key, value in ours.items():
        assert theirs[key].dtype == np.float32 and theirs[key].shape == np.shape(value)
        np.testing.assert_array_equal(theirs[key], value)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_magnitudes_are_the_norms_of_the_merged_matrices(name, layout, tmp_path):
    names, net, params, tree, made = case(name, dora=True, pattern=INNER if name != "unet" else None)
    _, new = changes(names, net, params, tree, made)
    state, _ = interop.to_file(net, params, tree, made, layout)
    if layout == "diffusers":
        found = {k: v for k, v in state.items() if k.endswith(".lora_magnitude_vector")}
        for key, m in found.items():
            weight = new[key.split(".", 1)[1].replace("lora_magnitude_vector", "weight")]
            np.testing.assert_allclose(np.abs(m.reshape(-1)), np.linalg.norm(weight.reshape(len(weight), -1), axis=1), rtol=1e-4)
            assert m.shape == ((len(weight),) if weight.ndim == 2 else (1, len(weight), 1, 1))
        assert found
    interop.write(tmp_path / "a", net, params, tree, made, layout)
    back, its = interop.read(tmp_path / "a", net, params)
    interop.write(tmp_path / "b", net, params, back, its, layout)
    assert its.dora and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, tree)


FUSED = {
    "dit": ("blocks_1_attn_qkv", [f"transformer_blocks.1.attn1.to_{x}" for x in "qkv"]),
    "sd3": ("joint_blocks_2_context_block_attn_qkv", [f"transformer_blocks.2.attn.add_{x}_proj" for x in "qkv"]),
    "flux": ("single_blocks_1_linear1", [f"single_transformer_blocks.1.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]),
}


@pytest.mark.parametrize("name", FUSED)
def test_kohya_fuses_what_the_models_own_code_fuses(name, tmp_path):
    names, net, params, tree, made = case(name)
    state, _ = interop.to_file(net, params, tree, made, "kohya")
    module, separate = FUSED[name]
    down, up, alpha = (state[f"lora_unet_{module}.{leaf}"] for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
    n = len(separate)
    assert down.shape[0] == 2 * n and alpha == 3.0 * n
    want, _ = changes(names, net, params, tree, made)
    np.testing.assert_allclose(product(down, up, alpha / len(down)), np.concatenate([want[f"{s}.weight"] for s in separate]), atol=1e-5)
    # A file trained elsewhere: one A for all of them, a B that is full. It is read as such and written as such.
    random = np.random.RandomState(1)
    dense = dict(state)
    dense[f"lora_unet_{module}.lora_down.weight"] = a = random.standard_normal((2 * n, down.shape[1])).astype(np.float32)
    dense[f"lora_unet_{module}.lora_up.weight"] = b = random.standard_normal((up.shape[0], 2 * n)).astype(np.float32)
    if net.scan:  # all layers alike
        other = re.compile(re.sub(r"_\d+_", r"_\\d+_", module, count=1))
        for key in [k for k in dense if other.match(k.removeprefix("lora_unet_").split(".")[0])]:
            dense[key] = {"lora_down.weight": a, "lora_up.weight": b}.get(key.split(".", 1)[1], dense[key])
    save_file({k: np.array(v, order="C") for k, v in dense.items()}, tmp_path / "foreign.safetensors")
    back, its = interop.read(tmp_path / "foreign.safetensors", net, params)
    found, _ = changes(names, net, params, back, its)
    np.testing.assert_allclose(np.concatenate([found[f"{s}.weight"] for s in separate]), product(a, b, 1.5), atol=2e-5)
    again, _ = interop.to_file(net, params, back, its, "kohya")
    assert again.keys() == dense.keys()
    for key in dense:
        np.testing.assert_array_equal(again[key], dense[key], err_msg=key)


def test_a_layout_becomes_the_other(tmp_path):
    _, net, params, tree, made = case("sd3")
    for i, (layout, where) in enumerate((("diffusers", "a"), ("kohya", "b"), ("diffusers", "c"))):
        interop.write(tmp_path / where, net, params, tree, made, layout)
        tree, made = interop.read(tmp_path / where, net, params)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_without_a_header_alpha_is_the_rank_unless_peft_says_otherwise_beside_it(tmp_path):
    _, net, params, tree, made = case("dit")
    state, _ = interop.to_file(net, params, tree, made, "diffusers")
    arrays = lambda prefix: {k.replace("transformer.", prefix, 1): np.array(v, order="C") for k, v in state.items()}  # noqa: E731
    save_file(arrays("transformer."), tmp_path / "plain.safetensors")
    assert interop.read(tmp_path / "plain.safetensors", net, params)[1].scale == 1.0
    # peft keeps the scale in a file of its own.
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(arrays("base_model.model."), file)
    with pytest.raises(ConfigError, match="adapter_config.json, which is missing"):
        interop.read(file, net, params)
    beside.write_text(json.dumps({"r": made.rank, "lora_alpha": 4 * made.rank}))
    back, its = interop.read(file, net, params)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert its.scale == 4.0
    beside.write_text(json.dumps({"r": made.rank, "lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(ConfigError, match="use_rslora"):
        interop.read(file, net, params)


def test_what_does_not_fit_is_named(tmp_path):
    _, net, params, tree, made = case("dit")
    for layout, pattern, message in (
        ("diffusers", "t_embed/fc1/kernel", "t_embed/fc1/kernel cannot be expressed in the layout of diffusers"),
        ("kohya", "attn/q/kernel", "block_0/attn/k/kernel, .* are one matrix in the layout of kohya: adapt all of them or none"),
        ("peft", "attn/q/kernel", "layout = 'peft' is unknown; valid: diffusers, kohya"),
    ):
        _, net, params, other, chosen = case("dit", pattern=pattern)
        with pytest.raises(ConfigError, match=message):
            interop.to_file(net, params, other, chosen, layout)
    state, _ = interop.to_file(net, params, tree, made, "kohya")

    def refused(message, **changed):
        save_file({k: np.array(v, order="C") for k, v in (state | changed).items() if v is not None}, tmp_path / "bad.safetensors")
        with pytest.raises(ConfigError, match=message):
            interop.read(tmp_path / "bad.safetensors", net, params)

    key = "lora_unet_blocks_0_mlp_fc1."
    wide = np.zeros((2, 25), np.float32)
    refused("adapts lora_unet_blocks_9_mlp_fc1, which a DiT of this size lacks", **{"lora_unet_blocks_9_mlp_fc1.lora_down.weight": wide})
    refused(r"adapts a kernel of shape \(25, 96\), and block_0/mlp/fc1/kernel is \(24, 96\)", **{key + "lora_down.weight": wide})
    refused("has only lora_up.weight, alpha", **{key + "lora_down.weight": None})
    refused("scales its kernels differently", **{key + "alpha": np.float32(9)})
    refused("no part of an adapter", **{key + "diff": wide})
    left = {k: None for k in state if k.startswith("lora_unet_blocks_0_mlp")}
    refused("does not adapt all layers alike, and blocks are one parameter here", **left)
    _, flux_net, flux_params, other, chosen = case("flux", dora=True)
    with pytest.raises(ConfigError, match="DoRA of it cannot be exchanged"):
        interop.to_file(flux_net, flux_params, other, chosen, "diffusers")


@pytest.mark.oracle
@pytest.mark.parametrize("dora", [False, True])
def test_merges_equal_those_of_peft(dora, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    names, net, params, tree, made = case("dit", dora, INNER)
    want, new = changes(names, net, params, tree, made)
    state, header = interop.to_file(net, params, tree, made, "diffusers")
    told = {k.removeprefix("transformer."): v for k, v in json.loads(header[interop.HEADER]).items()}
    model = torch.nn.Module()
    for key in want:
        *way, leaf = key.removesuffix(".weight").split(".")
        place = model
        for part in way:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        weight = torch.tensor(names.to_torch(net, params)[key])
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight.data = weight
        place.add_module(leaf, linear)
    settings = peft.LoraConfig(**{k: v for k, v in told.items() if k != "peft_type"})
    model = peft.PeftModel(model, settings)
    ours = {k.replace("transformer.", "base_model.model.", 1): torch.tensor(v) for k, v in state.items()}
    result = peft.set_peft_model_state_dict(model, ours)
    assert not result.unexpected_keys
    theirs = model.merge_and_unload().state_dict()
    for key in want:
        np.testing.assert_allclose(theirs[key].numpy(), new[key], atol=2e-5)
