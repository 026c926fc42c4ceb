"""Files of libraries in and out: bit for bit for every kind, through the library's classes where they are installed, and refusals."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from binaries import shell_in
from nets import close, randomise

from flowjax.config import ConfigError
from flowjax.interop import diffusers_configs, files, library, original
from flowjax.interop.dit import unstack
from flowjax.models.layers import sincos_2d
from flowjax.train import export
from flowjax.train.roles import Latents
from tools import parity

def network(name, seed=0, **options):
    """(case, role, random parameters as NumPy arrays, info)."""
    case = parity.CASES[name]
    info = library.describe(*case, **options)
    role = export.role_of(info, name)
    return case, role, jax.tree.map(np.asarray, randomise(export.abstract(role, info), seed)), info


def write(out, case, role, params, info, **options):
    return library.save(out, case.library, case.model, role.module, params, info, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- round trips


@pytest.mark.parametrize("name", parity.CASES)
def test_every_kind_comes_back_bit_for_bit(name, tmp_path):
    case, role, params, info = network(name)
    config = write(tmp_path / "out", case, role, params, info)
    back, again = library.load(tmp_path / "out", case.library, case.model)
    same(back, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(back))
    for part in ("model", "shape", "conditions", "num_classes", "path", "prediction", "input_scaling", "latents"):
        assert again.get(part) == info.get(part), part
    assert again["source"]["dtypes"] == ["float32"]
    # What the library said of itself is what we say, wherever both say something.
    for key, value in case.config.items():
        assert config.get(key, value) == value or isinstance(value, dict), key
    write(tmp_path / "twice", case, role, back, again)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / place).iterdir()} for place in ("out", "twice"))
    assert first == second


@pytest.mark.oracle
@pytest.mark.parametrize("name", parity.CASES)
def test_the_librarys_own_class_agrees_both_ways(name):
    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module)
    found = parity.run(name)
    assert found.same and max(found.read, found.written) < 3e-5


@pytest.mark.parametrize("name", parity.PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name):
    case, count = parity.PUBLISHED[name]
    assert parity.parameters(case) == count


@pytest.mark.parametrize(("dtype", "numpy"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision_is_read_without_loss_and_comes_back(dtype, numpy, tmp_path):
    case, role, params, info = network("sd35")
    write(tmp_path / "half", case, role, params, info, dtype=dtype)
    back, again = library.load(tmp_path / "half", case.library, case.model)
    assert again["source"]["dtypes"] == [dtype]
    same(back, jax.tree.map(lambda leaf: leaf.astype(numpy).astype(np.float32), params))
    write(tmp_path / "again", case, role, back, again, dtype=dtype)
    first, second = (files.read(tmp_path / place, "diffusion_pytorch_model") for place in ("half", "again"))
    assert all(v.dtype == numpy for v in first.values())
    same(first, second)


def test_shards_and_their_index(tmp_path):
    case, role, params, info = network("t5")
    write(tmp_path / "whole", case, role, params, info)
    write(tmp_path / "parts", case, role, params, info, shard=8000)
    parts = sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors"))
    assert parts == [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)] and len(parts) > 3
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    held = {name: files.tensors(tmp_path / "parts" / name) for name in parts}
    assert index["weight_map"] == {key: name for name in parts for key in held[name]}
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    for state in held.values():
        assert sum(v.nbytes for v in state.values()) <= 8000 or len(state) == 1
    same(files.read(tmp_path / "parts", "model"), files.read(tmp_path / "whole", "model"))
    same(library.load(tmp_path / "parts", "transformers", "t5")[0], params)


def test_one_file_with_a_config_from_elsewhere(tmp_path):
    case, role, params, info = network("clip_vision")
    write(tmp_path / "out", case, role, params, info)
    file = tmp_path / "out/model.safetensors"
    same(library.load(file, case.library, case.model)[0], params)
    (tmp_path / "out/config.json").unlink()
    same(library.load(file, case.library, case.model, case.config)[0], params)
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        library.load(file, case.library, case.model)


@pytest.mark.oracle
def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    case, role, params, info = network("paper_sit")
    _, state = library.state_of(case.library, case.model, role.module, params, info)
    state = {k: torch.tensor(v) for k, v in state.items()}
    torch.save({"ema": state, "opt": {}}, tmp_path / "a.pt")
    torch.save({k: v.to(torch.bfloat16) for k, v in state.items()}, tmp_path / "b.pt")
    same(library.load(tmp_path / "a.pt", case.library, case.model, case.config)[0], params)
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    same(library.load(tmp_path / "b.pt", case.library, case.model, case.config)[0], half)
    torch.save({"model": state}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="no state dict: model are no tensors"):
        library.load(tmp_path / "c.pt", case.library, case.model, case.config)


# --- meanings


def test_sit_runs_the_other_way():
    """Its own network u(x_tau, tau) = x - z at tau = 1 - t is minus our velocity."""
    case, role, params, info = network("paper_sit")
    assert (info["path"]["name"], info["prediction"]) == ("rectified", "velocity")
    _, state = library.state_of(case.library, case.model, role.module, params, info)
    theirs = original.from_torch(role.module, state, params)  # as a DiT's, nothing folded in
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    tau, cond = jnp.array([0.1, 0.8]), {"label": jnp.array([1, 4])}
    u = role.module.apply({"params": theirs}, x, tau, cond)
    close(role.net(params)(x, 1 - tau, cond), -u, 1e-6)
    # Straight path: from x_t, the data are at x_t - t v, which is x_tau + (1 - tau) u.
    close(role.net(params).x_and_z(x, 1 - tau, cond)[0], x + (1 - tau)[:, None, None, None] * u, 1e-5)
    np.testing.assert_array_equal(state["pos_embed"][0], sincos_2d(24, 4, 4).astype(np.float32))
    assert state["blocks.1.attn.qkv.weight"].shape == (72, 24)


def test_ddpm_networks_are_given_the_step_of_their_noise_level():
    _, role, params, info = network("dit")
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    sigma = np.sqrt((1 - kept) / kept)[[20, 600]]
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    t, cond = role.path.time_of_sigma(jnp.asarray(sigma, jnp.float32)), {"label": jnp.array([1, 5])}
    close(role.net(params)(x, t, cond), role.module.apply({"params": params}, x, jnp.array([0.02, 0.6]), cond), 1e-3)
    assert info["prediction"] == "eps" and role.net(params)(x, t, cond).shape == x.shape  # without the variance


def test_scaling_of_latents_becomes_statistics():
    """z = (latent - shift) scale; with latents_mean and latents_std, (latent - mean) scale / std, as the pipelines of diffusers."""
    latent = np.random.RandomState(0).standard_normal((2, 4, 4, 16)).astype(np.float32)
    for more, wanted in (
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (latent - 0.1159) * 0.3611),
        ({"scaling_factor": 0.13025}, latent * 0.13025),
        ({}, latent * 0.18215),
        (
            {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": [*range(16)], "latents_std": [*range(1, 17)]},
            (latent - np.arange(16)) * 0.5 / np.arange(1, 17),
        ),
    ):
        config = {k: v for k, v in parity.CASES["vae_flux"].config.items() if k not in ("scaling_factor", "shift_factor")} | more
        info = library.describe("diffusers", "autoencoder_kl", config)
        role = export.role_of(info, "vae")
        codec = role.net(randomise(export.abstract(role, info)))
        assert isinstance(codec, Latents)
        mean, std = codec.stats
        np.testing.assert_allclose((latent - mean) / std, wanted, rtol=1e-5, atol=1e-6)
        close(codec.decode(jnp.asarray(wanted, jnp.float32)), codec.net.decode(jnp.asarray(latent)), 1e-4)
        back = diffusers_configs.write_autoencoder(role.module, info)
        again = library.describe("diffusers", "autoencoder_kl", back)
        np.testing.assert_allclose(again["latents"]["std"], info["latents"]["std"], rtol=1e-15)
        assert again["latents"]["mean"] == info["latents"]["mean"]
        if "latents_mean" not in more:
            assert (back["scaling_factor"], back["shift_factor"] or 0) == (more.get("scaling_factor", 0.18215), more.get("shift_factor", 0))


def test_the_fewest_digits_with_the_same_inverse():
    for value in (0.18215, 0.13025, 1.5305, 0.3611, 1.0, 1 / 3):
        assert 1 / diffusers_configs.inverse(1 / value) == 1 / value
    assert diffusers_configs.inverse(1 / 0.3611) == 0.3611


def test_defaults_of_text_to_image():
    _, role, _, info = network("flux_dev")
    assert (role.path.name, role.prediction, role.scaling) == ("rectified", "velocity", None)
    assert info["config"]["sample"]["grid"]["shift"] == pytest.approx(math.exp(1.15))
    assert info["conditions"] == {"text": [512, 20], "pooled": [10], "guidance": []} and info["shape"] == [128, 128, 3]
    assert info["config"]["sample"]["guidance"] == {"name": "embedded", "scale": 3.5}
    schnell = network("flux_schnell")[3]["config"]["sample"]
    assert schnell["steps"] == 4 and schnell["guidance"] == "none"
    _, role, _, info = network("sd3")
    assert (role.path.name, role.prediction, role.scaling) == ("rectified", "velocity", None)
    assert info["config"]["sample"]["grid"] == {"name": "uniform", "shift": 3.0} and info["shape"] == [12, 12, 3]


def test_what_their_config_does_not_say_can_be_given():
    more = {"dtype": "bfloat16", "penultimate": True}
    info = library.describe(*parity.CASES["clip_text"], fields=more)
    assert {k: info["model"][k] for k in more} == more
    meaning = {"path": "rectified", "prediction": "x", "input_scaling": {"name": "edm"}}
    info = library.describe(*parity.CASES["unet_ddpm"], size=(16, 32), meaning=meaning)
    assert {k: info[k] for k in meaning} == meaning and info["shape"] == [16, 32, 3]
    case, role, _, info = network("unet_adm", fields={"num_classes": 4, "null_class": True})
    assert role.module.has_null and diffusers_configs.write_unet(role.module, info)["num_class_embeds"] == 5
    with pytest.raises(ConfigError, match="model.penultimat is unknown"):
        export.role_of(library.describe(*parity.CASES["clip_text"], fields={"penultimat": True}), "here")


# --- files of other versions


def test_attention_of_older_diffusers(tmp_path):
    case, role, params, info = network("vae_sd1")
    _, state = library.state_of(case.library, case.model, role.module, params, info)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in state.items()}
    assert sum("proj_attn" in key for key in state) == 4
    files.write(tmp_path, "diffusion_pytorch_model", state)
    same(library.load(tmp_path, case.library, case.model, case.config)[0], params)


def test_configs_of_older_transformers():
    """A nested config of version 4 repeats everything that a config may hold, and each section twice."""
    base = {"num_beams": 1, "torch_dtype": None, "id2label": {"0": "LABEL_0"}, "_name_or_path": "", "dropout": 0.0, "top_p": 1.0}
    text, vision = (parity.TEXT | base | {"eos_token_id": 2}), parity.VISION | base
    case = parity.CASES["clip"].config
    old = case | {"text_config": text, "vision_config": vision, "text_config_dict": text, "vision_config_dict": None}
    info = library.describe("transformers", "clip", old)
    assert info["model"]["text"]["eos"] == 2
    tower = library.describe("transformers", "clip_text", old)
    assert tower["model"] == {"name": "clip_text", "features": 10, **info["model"]["text"]}
    assert library.describe("transformers", "clip_vision", old)["shape"] == [6, 6, 3]
    whole = parity.T5 | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "n_positions": 512}
    whole = library.describe("transformers", "t5", whole)
    assert whole["model"]["shared_bias"]


# --- refusals


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", {"extra_gate": 1, "a": None}, "config.json: unknown a = None, extra_gate = 1"),
        ("sd3", {"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not supported; supported: None, 'rms_norm'"),
        ("sd3", {"dual_attention_layers": [1]}, r"dual_attention_layers = \(1,\) is not supported"),
        ("sd3", {"caption_projection_dim": 20}, "caption_projection_dim = 20 is not supported; supported: 24"),
        ("sd3", {"_class_name": "FluxTransformer2DModel"}, "is of a FluxTransformer2DModel; --model=sd3 of diffusers is SD3Transformer2DModel"),
        ("sd3", {"num_attention_heads": None}, "a field is not what it should be"),
        ("dit", {"norm_type": "ada_norm"}, "norm_type = 'ada_norm' is not supported"),
        ("paper_dit", {"class_dropout_prob": 0}, "class_dropout_prob = 0 is not supported"),
        ("flux_dev", {"in_channels": 10}, "should be four times"),
        ("unet_ddpm", {"sample_size": None}, "does not say the size of the images: give --size"),
        ("unet_ddpm", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "for this attention it would be"),
        ("unet_ddpm", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups = None is not supported; supported: 4"),
        ("unet_ddpm", {"block_out_channels": [8, 12]}, "should be multiples of the first"),
        ("vae_flux", {"use_post_quant_conv": True}, "use_post_quant_conv = True is not supported; supported: False"),
        ("vae_flux", {"latents_mean": [0.0] * 16}, "latents_mean and latents_std belong together"),
        ("clip_text", {"architectures": ["BertModel"]}, "architectures = .*BertModel.* is not supported"),
        ("clip_text", {"intermediate_size": 10}, "intermediate_size = 10 is not supported; supported: 96"),
        ("clip", {"text_config": 3}, "text_config should be an object"),
        ("clip", {"text_config": {"extra": 1}}, "text_config: unknown extra = 1"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu' is not supported; supported: 'gated-gelu'"),
        ("t5", {"model_type": "bart"}, "model_type = 'bart' is not supported"),
        ("vit", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("dinov2", {"layerscale_value": 0}, "layerscale_value = 0 is not supported"),
    ],
)
def test_configs_that_are_refused_by_name(name, change, message):
    case = parity.CASES[name]
    with pytest.raises(ConfigError, match=message):
        library.describe(case.library, case.model, {**case.config, **change})


def test_unknown_kinds():
    with pytest.raises(ConfigError, match="library = 'timm' is unknown; valid: diffusers, original, transformers"):
        library.describe("timm", "vit", {})
    with pytest.raises(ConfigError, match="model of diffusers = 'vit' is unknown; valid: autoencoder_kl, dit, flux"):
        library.describe("diffusers", "vit", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"extra.weight": np.zeros(3, np.float32)}, r"left over \['extra.weight'\]"),
        (lambda s: {k: v for k, v in s.items() if k != "proj_out.bias"}, r"missing \['proj_out.bias'\]"),
        (lambda s: s | {"proj_out.bias": np.zeros(5, np.float32)}, r"wrong shapes: proj_out.bias \(5,\)"),
    ],
)
def test_weights_that_do_not_fit(change, message, tmp_path):
    case, role, params, info = network("sd3")
    _, state = library.state_of(case.library, case.model, role.module, params, info)
    files.write(tmp_path, "diffusion_pytorch_model", change(state))
    with pytest.raises(ConfigError, match=message):
        library.load(tmp_path, case.library, case.model, case.config)


def test_another_table_of_positions_than_the_papers():
    case, role, params, info = network("paper_dit")
    _, state = library.state_of(case.library, case.model, role.module, params, info)
    table = state["pos_embed"]
    for wrong in (table + 0.01, np.swapaxes(table.reshape(4, 4, 24), 0, 1).reshape(1, 16, 24), table[:, :15]):
        with pytest.raises(ValueError, match="pos_embed is not the fixed sin-cos table"):
            original.from_torch(role.module, state | {"pos_embed": wrong}, params)
    half = state["pos_embed"].astype(ml_dtypes.bfloat16)
    same(original.from_torch(role.module, state | {"pos_embed": half}, params), params)
    with pytest.raises(ValueError, match="no counterpart of blocks/adaln"):
        original.to_torch(role.module.clone(scan=False), params)


def test_the_papers_names_with_layers_that_are_not_stacked():
    case, role, params, info = network("paper_dit")
    state = original.to_torch(role.module, params)
    flat = original.from_torch(role.module.clone(scan=False), state, unstack(params))
    same(flat, unstack(params))
    same(original.to_torch(role.module.clone(scan=False), flat), state)


def test_networks_that_a_library_does_not_have():
    for name, change, message in (
        ("dit", {"rope": True}, "model.rope = True cannot be expressed in diffusers' DiTTransformer2DModel, which has False"),
        ("dit", {"frequency_shift": 0.0}, "model.frequency_shift = 0.0"),
        ("dit", {"num_classes": 0}, "num_classes = 0 cannot be expressed"),
        ("sd3", {"positions": "rope"}, "'rope' cannot be expressed"),
        ("sd3", {"mlp_ratio": 3.0}, "model.mlp_ratio = 3.0"),
        ("unet_ddpm", {"time_scale": 1.0}, "model.time_scale = 1.0"),
        ("clip_text", {"penultimate": True}, "model.penultimate = True"),
        ("vit", {"mlp": "swiglu"}, "model.mlp = 'swiglu' cannot be expressed"),
        ("dinov2", {"registers": 2}, "model.antialias = False"),
    ):
        case, role, params, info = network(name)
        with pytest.raises(ConfigError, match=message):
            library.state_of(case.library, case.model, role.module.clone(**change), params, info)
    for name, change, message in (
        ("sd3", {"prediction": "eps"}, "prediction = 'eps': the users of diffusers' SD3Transformer2DModel expect"),
        ("flux_dev", {"path": {"name": "vp_linear"}}, "path = .*vp_linear.*: the users of"),
        ("paper_sit", {"input_scaling": "none"}, "input_scaling = 'none': the users of the paper's SiT expect"),
        ("unet_ddpm", {"input_scaling": {"name": "edm"}}, "input_scaling = .*edm.* cannot be expressed"),
        ("dit", {"shape": [8, 12, 3]}, "8 x 12"),
    ):
        case, role, params, info = network(name)
        with pytest.raises(ConfigError, match=message):
            library.state_of(case.library, case.model, role.module, params, info | change)
    case, role, params, info = network("dit")
    with pytest.raises(ConfigError, match="the network is a DiT; --model=sd3 of diffusers is a MMDiT"):
        library.state_of("diffusers", "sd3", role.module, params, info)


def test_a_projector_is_left_out():
    case, role, params, info = network("dit")
    _, plain = library.state_of(case.library, case.model, role.module, params, info)
    aligned = role.module.clone(projector={"layer": 1, "features": 4})
    _, state = library.state_of(case.library, case.model, aligned, params | {"projector": {"fc": {"bias": np.zeros(3)}}}, info)
    same(state, plain)


def test_an_autoencoder_that_does_not_match():
    dit, vae = network("dit")[3], network("vae_sd1")[3]
    with pytest.raises(ConfigError, match="its latents have 4 channels, the network makes 3"):
        library.decoded(dit, vae)
    with pytest.raises(ConfigError, match="not an autoencoder with measured latents"):
        library.decoded(dit, {k: v for k, v in vae.items() if k != "latents"})
    with pytest.raises(ConfigError, match="not an autoencoder"):
        library.decoded(dit, dit)
    assert library.decoded(dit | {"shape": [8, 6, 4]}, vae)["image_shape"] == [16, 12, 3]


# --- files


def test_files_that_are_damaged_or_incomplete(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float32), "c": np.zeros((0, 2), np.float32)}
    files.write(tmp_path, "model", state)
    same(files.read(tmp_path, "model"), state)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-3], content[:20], b"", b"\xff" * 40, content.replace(b"[2,3]", b"[2,4]"), content + b"\0"):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match="is no safetensors file, or a damaged one"):
            files.read(tmp_path, "model")
    file.write_bytes(content.replace(b'"F32"', b'"F64"'))
    with pytest.raises(ConfigError, match="dtype of .* = 'F64' is unknown; valid: BF16, F16, F32"):
        files.read(tmp_path, "model")
    with pytest.raises(ConfigError, match=r"has neither other.safetensors nor other.safetensors.index.json: \['model.safetensors'\]"):
        files.read(tmp_path, "other")
    with pytest.raises(ConfigError, match="no such file or folder"):
        files.read(tmp_path / "absent", "model")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds both"):
        files.read(tmp_path, "model")


def test_an_index_that_its_shards_contradict(tmp_path):
    state = {k: np.full(4, i, np.float32) for i, k in enumerate("abcd")}
    files.write(tmp_path, "m", state, shard=32)
    index = tmp_path / "m.safetensors.index.json"
    content = json.loads(index.read_text())
    one, two = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    assert content == {"metadata": {"total_size": 64}, "weight_map": {"a": one, "b": one, "c": two, "d": two}}
    for change, message in (
        ({"e": one}, "disagree on e"),
        ({"a": two}, "disagree on a"),
        ({"a": "m-00003-of-00002.safetensors"}, "names 'm-00003-of-00002.safetensors', which is not in"),
        ({"a": f"../{tmp_path.name}/{one}"}, "which is not in"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        with pytest.raises(ConfigError, match=message):
            files.read(tmp_path, "m")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in content["weight_map"].items() if k != "d"}}))
    with pytest.raises(ConfigError, match="disagree on d"):
        files.read(tmp_path, "m")
    index.write_text("[]")
    with pytest.raises(ConfigError, match="should hold one JSON object"):
        files.read(tmp_path, "m")
    index.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        files.read(tmp_path, "m")
    index.write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        files.read(tmp_path, "m")


def test_nothing_is_left_half_written(tmp_path):
    case, role, params, info = network("clip_vision")
    params["norm"]["bias"] = params["norm"]["bias"] + 1e6
    with pytest.raises(ConfigError, match="post_layernorm.bias has values beyond float16"):
        write(tmp_path / "out", case, role, params, info, dtype="float16")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "out", case, role, params, info, dtype="bfloat16")
    with pytest.raises(ConfigError, match="out exists"):
        write(tmp_path / "out", case, role, params, info)
    assert files.read(tmp_path / "out", "model")["vision_model.post_layernorm.bias"].dtype == ml_dtypes.bfloat16
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", case, role, params, info)
    with pytest.raises(ConfigError, match="dtype = 'int8' is unknown"):
        write(tmp_path / "other", case, role, params, info, dtype="int8")


# --- the tool


@pytest.mark.slow
def test_published_files_become_samples_and_come_back(tmp_path):
    """A DiT on the latents of a VAE, both as diffusers has them: converted, sampled, converted back, by the binaries."""
    run = shell_in(tmp_path)
    convert = lambda *given, code=0: run("tools.convert_weights", *given, code=code)  # noqa: E731
    for name, change in (("vae_sd1", {}), ("dit", {"in_channels": 4, "out_channels": 8})):
        case = parity.CASES[name]
        info = library.describe(case.library, case.model, case.config | change)
        role = export.role_of(info, name)
        write(tmp_path / name, case, role, randomise(export.abstract(role, info)), info)
    said = convert("--from=diffusers", "--model=autoencoder_kl", "vae_sd1", "vae")
    assert "vae: autoencoder_kl, 43,711 parameters, float32 -> float32" in said
    convert("--from=diffusers", "--model=dit", "--vae=vae", "dit", "net")
    run("experiments.sample", "--checkpoint=net", "--out=samples", "--count=2", "--steps=2", "--labels=3")
    assert np.load(tmp_path / "samples/samples.npz")["x"].shape == (2, 16, 16, 3) and (tmp_path / "samples/grid.png").exists()
    said = convert("--to=diffusers", "--model=dit", "net", "back", "--shard_gb=0.00005")
    assert "back: DiTTransformer2DModel" in said and (tmp_path / "back/diffusion_pytorch_model.safetensors.index.json").exists()
    same(*(files.read(tmp_path / place, "diffusion_pytorch_model") for place in ("dit", "back")))
    refused = convert("--from=diffusers", "--model=sd3", "dit", "no", code=1)
    assert "is of a DiTTransformer2DModel" in refused and not (tmp_path / "no").exists()
    assert "give either --from or --to" in convert("--model=dit", "dit", "no", code=1)
    assert "--fields takes a section" in convert("--from=diffusers", "--model=dit", "--fields=bfloat16", "dit", "no", code=1)
    assert "--vae means nothing for --to" in convert("--to=diffusers", "--model=dit", "--vae=vae", "net", "no", code=1)
    assert "--dtype means nothing for --from" in convert("--from=diffusers", "--model=dit", "--dtype=bfloat16", "dit", "no", code=1)
    assert "gs://b/no is in a bucket" in convert("--from=diffusers", "--model=dit", "dit", "gs://b/no", code=1)
