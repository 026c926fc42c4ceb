"""The U-Net against parameter counts of the papers, closed forms of its parts, symmetries, and diffusers' implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from nets import check_sharded, close, count, golden, random_arrays, randomise, shapes

from flowjax.config import ConfigError
from flowjax.interop import unet as interop
from flowjax.models import flops
from flowjax.models.layers import zeros
from flowjax.models.resblock import AttentionBlock, Downsample, ResBlock, Upsample, double, halve
from flowjax.models.unet import UNet

SMALL = {"channels": 8, "multipliers": (1, 2), "layers": 1, "attention_levels": (1,), "groups": 4}
LABEL = {"label": jnp.array([0, 3])}


def inputs(batch=2, height=8, width=4, channels=3, seed=0):
    random = np.random.RandomState(seed)
    x = jnp.asarray(random.standard_normal((batch, height, width, channels)), jnp.float32)
    return x, jnp.asarray(random.uniform(size=batch), jnp.float32)


@functools.cache
def small(**changes):
    """(net, random parameters, jitted function (params, x, t, cond) -> y)."""
    net = UNet(**{**SMALL, **changes})
    cond = LABEL if net.num_classes else {}
    params = randomise(shapes(net, *inputs(), cond))
    return net, params, jax.jit(lambda params, x, t, cond: net.apply({"params": params}, x, t, cond))


# --- sizes


@pytest.mark.parametrize(
    "name, side, number", [("ddpm_cifar10", 32, 35_746_307), ("ddpm_256", 256, 113_673_219), ("adm_64", 64, 295_904_454)]
)
def test_parameter_counts_of_the_papers(name, side, number):
    net = UNet(**UNet.presets[name])
    assert count(net, jnp.zeros((1, side, side, 3)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}) == number


def test_label_table_has_one_extra_row():
    table = shapes(UNet(**SMALL, num_classes=5), *inputs(), LABEL)["y_embed"]["embedding"]
    assert table.shape == (6, 4 * SMALL["channels"])


@pytest.mark.slow
def test_fresh_network_returns_zero_and_its_blocks_are_identities():
    net = UNet(**{**SMALL, "multipliers": (1,), "attention_levels": ()})
    x, t = inputs()
    y, params = jax.jit(net.init_with_output)(jax.random.key(0), x, t, {})
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(params)) > 0.1
    np.testing.assert_array_equal(y, 0.0)
    h = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    for block in (ResBlock(8, 4, 1e-6, out_init=zeros), AttentionBlock(4, 1e-6, out_init=zeros)):
        np.testing.assert_array_equal(jax.jit(block.init_with_output)(jax.random.key(0), h)[0], h)
    block = ResBlock(8, 4, 1e-6)
    assert float(jnp.abs(jax.jit(block.init_with_output)(jax.random.key(0), h)[0] - h).max()) > 0.1


@pytest.mark.parametrize("batch, height, width, channels", [(3, 4, 6, 1), (1, 2, 2, 5)])
def test_any_batch_and_any_even_sides(batch, height, width, channels):
    net = UNet(**SMALL, out_channels=4)
    x, t = inputs(batch, height, width, channels)
    y, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, {})
    assert y.shape == (batch, height, width, 4) and y.dtype == jnp.float32


def test_learned_sigma_doubles_the_head_and_is_returned_on_request():
    x, t = inputs()
    both, mean = (UNet(**SMALL, learn_sigma=True, return_sigma=both) for both in (True, False))
    params = randomise(shapes(both, x, t, {}))
    y, first = jax.jit(lambda params: [net.apply({"params": params}, x, t, {}) for net in (both, mean)])(params)
    assert y.shape == (2, 8, 4, 6)
    close(first, y[..., :3], 1e-6)


# --- parts, in closed form


@pytest.mark.parametrize("padding, offset", [("end", 0), ("symmetric", -1)])
def test_padding_decides_which_pixel_a_tap_reads(padding, offset):
    """With a kernel that copies its first tap, output i is input 2i, or 2i - 1 (zero outside)."""
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, 6, 4, 2)), jnp.float32)
    kernel = np.zeros((3, 3, 2, 2), np.float32)
    kernel[0, 0] = np.eye(2)
    y = Downsample(padding).apply({"params": {"conv": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}}, x)
    wanted = np.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, 1 + offset :: 2, 1 + offset :: 2][:, :3, :2]
    np.testing.assert_array_equal(y, wanted)


def test_resampling_is_nearest_and_mean():
    x = np.arange(8.0).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(double(jnp.asarray(x))[0, :, :, 0], np.kron(x[0, :, :, 0], np.ones((2, 2))))
    np.testing.assert_array_equal(halve(jnp.asarray(x))[0, :, :, 0], [[2.5, 4.5]])
    identity = np.zeros((3, 3, 1, 1), np.float32)
    identity[1, 1] = 1
    y = Upsample().apply({"params": {"conv": {"kernel": identity, "bias": np.zeros(1, np.float32)}}}, jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(y, double(jnp.asarray(x)))


@pytest.mark.parametrize("head_dim, heads", [(0, 1), (4, 2)])
def test_attention_block_with_equal_logits_adds_the_mean_value(head_dim, heads):
    """Zero queries make the softmax uniform: the block adds Linear(mean over positions of the values)."""
    h = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 2, 8)), jnp.float32)
    block = AttentionBlock(1, 0.0, head_dim)
    params = meta.unbox(block.init(jax.random.key(0), h)["params"])
    eye, nothing = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}, {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}
    params = {**params, "query": nothing, "value": eye, "out": eye}
    flat = np.asarray(h, np.float64).reshape(2, -1)
    normed = ((flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)).reshape(2, 6, 8)
    close(block.apply({"params": params}, h), h + normed.mean(1)[:, None, None, :], 1e-5)


@pytest.mark.slow
def test_every_up_unit_reads_its_skip_after_the_image():
    """The 1x1 shortcut of an up unit is linear in concat(h, skip): recompute it from the recorded outputs, by name."""
    net, params, _ = small(attention_levels=())
    apply = functools.partial(net.apply, capture_intermediates=True, mutable=["intermediates"])
    _, state = jax.jit(apply)({"params": params}, *inputs(), {})
    recorded = state["intermediates"]
    seen = {name: value["__call__"][0] for name, value in recorded.items() if name != "__call__"}
    for unit, image, skip in [
        ("up_1_res_0", "mid_res_1", "down_1_res_0"),
        ("up_1_res_1", "up_1_res_0", "down_0_sample"),
        ("up_0_res_0", "up_1_sample", "down_0_res_0"),
        ("up_0_res_1", "up_0_res_0", "conv_in"),
    ]:
        weights = params[unit]["shortcut"]
        both = np.concatenate([seen[image], seen[skip]], axis=-1)
        wanted = both @ weights["kernel"][0, 0] + weights["bias"]
        close(recorded[unit]["shortcut"]["__call__"][0], wanted, 1e-5)


def test_attention_is_at_the_named_levels_and_in_the_middle():
    names = set(shapes(UNet(**{**SMALL, "multipliers": (1, 2, 2), "attention_levels": (1,)}), *inputs(), {}))
    wanted = {"mid_attn_0", "down_1_attn_0", "up_1_attn_0", "up_1_attn_1"}
    assert {name for name in names if "attn" in name} == wanted


def test_time_is_scaled():
    net, params, apply = small()
    x, t = inputs()
    half = UNet(**SMALL, time_scale=500.0)
    close(half.apply({"params": params}, x, 2 * t, {}), apply(params, x, t, {}), 1e-4)
    assert float(jnp.abs(apply(params, x, 2 * t, {}) - apply(params, x, t, {})).max()) > 1e-2


# --- symmetries


def test_permuting_image_channels_permutes_the_output():
    net, params, apply = small()
    x, t = inputs()
    order = np.array([2, 0, 1])
    moved = jax.tree.map(lambda leaf: leaf, params)
    moved["conv_in"]["kernel"] = params["conv_in"]["kernel"][:, :, order]
    moved["conv_out"] = {k: leaf[..., order] for k, leaf in params["conv_out"].items()}
    close(apply(moved, x[..., order], t, {}), apply(params, x, t, {})[..., order], 1e-5)


def test_flip_is_a_symmetry_only_of_mirrored_kernels():
    """Holds for 2x2-mean resampling; a stride-2 convolution on an even side has no centre to mirror about."""
    _, params, apply = small(resample="resblock")
    x, t = inputs()
    mirrored = jax.tree.map(lambda leaf: (leaf + leaf[:, ::-1]) / 2 if leaf.ndim == 4 else leaf, params)
    y, flipped = (apply(mirrored, image, t, {}) for image in (x, x[:, :, ::-1]))
    close(flipped, y[:, :, ::-1], 1e-4)
    y, flipped = (apply(params, image, t, {}) for image in (x, x[:, :, ::-1]))
    assert float(jnp.abs(flipped - y[:, :, ::-1]).max()) > 0.1


def test_samples_do_not_see_each_other():
    _, params, apply = small(num_classes=5)
    x, t = inputs()
    alone = apply(params, x, t, LABEL)
    y = apply(params, x.at[0].set(0.0), t.at[0].set(0.5), {"label": jnp.array([4, 3])})
    close(y[1], alone[1], 1e-5)
    assert float(jnp.abs(y[0] - alone[0]).max()) > 1e-2


# --- conditions, dropout, precision, memory


def test_null_is_the_extra_row():
    net, params, apply = small(num_classes=5)
    cond = net.null({**LABEL, "other": 1})
    np.testing.assert_array_equal(cond["label"], [5, 5])
    assert cond["other"] == 1 and UNet(**SMALL).null({}) == {}
    x, t = inputs()
    y = apply(params, x, t, LABEL)
    assert float(jnp.abs(apply(params, x, t, net.null(LABEL)) - y).max()) > 1e-2
    moved = {**params, "y_embed": {"embedding": params["y_embed"]["embedding"].at[5].add(1.0)}}
    np.testing.assert_array_equal(apply(moved, x, t, LABEL), y)
    with pytest.raises(ConfigError, match="null_class"):
        UNet(**SMALL, num_classes=5, null_class=False).null(LABEL)


def test_dropout_acts_only_in_training():
    net = UNet(**SMALL, dropout=0.5)
    _, params, apply = small()
    x, t = inputs()
    close(net.apply({"params": params}, x, t, {}), apply(params, x, t, {}), 1e-6)
    train = jax.jit(lambda key: net.apply({"params": params}, x, t, {}, train=True, rngs={"dropout": key}))
    a, b, c = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 1e-2


@pytest.mark.slow
def test_bfloat16_runs_convolutions_in_bfloat16_and_returns_float32():
    net = UNet(**SMALL, dtype="bfloat16")
    _, params, apply = small()
    x, t = inputs()
    record = functools.partial(net.apply, capture_intermediates=True, mutable=["intermediates"])
    y, state = jax.jit(record)({"params": params}, x, t, {})
    kinds = {k: v["__call__"][0].dtype for k, v in state["intermediates"].items() if k != "__call__"}
    assert y.dtype == jnp.float32 and kinds.pop("t_embed") == kinds.pop("norm_out") == kinds.pop("conv_out") == jnp.float32
    assert set(kinds.values()) == {jnp.dtype("bfloat16")}
    close(y, apply(params, x, t, {}), 0.1)


def gradient(net, x, t, cond):
    return jax.grad(lambda params: jnp.sum(net.apply({"params": params}, x, t, cond) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["conv", "resblock"])
def test_gradients_reach_every_parameter(resample):
    net, params, _ = small(num_classes=5, scale_shift=resample == "resblock", resample=resample)
    for path, leaf in jax.tree.leaves_with_path(jax.jit(gradient(net, *inputs(), LABEL))(params)):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:  # adds the same to all logits of a query
            assert float(jnp.abs(leaf).max()) > 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "offload"])
def test_remat_recomputes_and_changes_no_gradient(remat):
    net = UNet(**{**SMALL, "multipliers": (1,), "attention_levels": ()})
    x, t = inputs()
    params = randomise(shapes(net, x, t, {}))
    plain, frugal = gradient(net, x, t, {}), gradient(net.clone(remat=remat), x, t, {})
    assert "remat" in str(jax.make_jaxpr(frugal)(params)) and "remat" not in str(jax.make_jaxpr(plain)(params))
    plain, frugal = jax.jit(plain)(params), jax.jit(frugal)(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), frugal, plain)


def test_remat_dots_repeats_no_convolution():
    net = UNet(**{**SMALL, "multipliers": (1,), "attention_levels": ()})
    x, t = inputs()
    params = shapes(net, x, t, {})
    work = {remat: flops.count(gradient(net.clone(remat=remat), x, t, {}), params) for remat in ("none", "dots", "full")}
    # What is left are the sums over groups of the norms, which are products as well.
    assert work["dots"] - work["none"] < 0.1 * (work["full"] - work["none"])


# --- bad settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"groups": 3}, "groups = 3 does not divide"),
        ({"channels": 6}, "does not divide channels x multiplier = 6 x 1"),
        ({"multipliers": (1, 2, 2, 2, 2)}, "divisible by 16"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (0, 1)}, "multipliers"),
        ({"attention_levels": (2,)}, "levels are 0, 1"),
        ({"attention_levels": (False, True)}, "levels are 0, 1"),
        ({"head_dim": 5}, "head_dim = 5"),
        ({"layers": 0}, "layers = 0"),
        ({"resample": "bilinear"}, "conv, resblock"),
        ({"down_padding": "same"}, "end, symmetric"),
        ({"remat": "some"}, "full"),
        ({"return_sigma": True}, "learn_sigma"),
        ({"num_classes": 5}, "label"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(UNet(**{**SMALL, **changes}).init, jax.random.key(0), *inputs(), {})


@pytest.mark.parametrize("shape", [(2, 7, 8, 3), (2, 8, 7, 3), (8, 8, 3)])
def test_odd_sides_are_refused(shape):
    with pytest.raises(ConfigError, match="divisible by 2"):
        jax.eval_shape(UNet(**SMALL).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2), {})


# --- sharding


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["conv", "resblock"])
def test_sharded_equals_unsharded(resample):
    net = UNet(**SMALL, num_classes=5, head_dim=4, scale_shift=resample == "resblock", resample=resample)
    check_sharded(net, *inputs(batch=4), {"label": jnp.array([0, 3, 5, 1])})


# --- diffusers

# The presets with fewer and narrower levels: head size, epsilons and time embedding stay the preset's own.
FEWER = {"channels": 64, "multipliers": (1, 2), "layers": 1, "attention_levels": (1,)}
CASES = {
    "unet_ddpm": ({**UNet.presets["ddpm_cifar10"], **FEWER}, {"downsample_padding": 0, "attention_head_dim": None}),
    "unet_adm": (
        {**UNet.presets["adm_64"], **FEWER, "num_classes": 5, "return_sigma": True},
        {
            "attention_head_dim": 64,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
            "num_class_embeds": 5,
            "out_channels": 6,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "norm_eps": 1e-5,
        },
    ),
    "unet_symmetric": (
        {**SMALL, "down_padding": "symmetric", "multipliers": (1, 2, 3), "attention_levels": (0, 2), "layers": 2, "head_dim": 4},
        {
            "block_out_channels": (8, 16, 24),
            "layers_per_block": 2,
            "downsample_padding": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        },
    ),
}
ORACLE = {
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def case(name):
    """(net, x, t, cond, state dict): all parameters random; conv_in small, so that the epsilon of the norms matters."""
    net = UNet(**CASES[name][0])
    x, t = inputs(height=8, width=12, seed=1)
    cond = LABEL if net.num_classes else {}
    like = shapes(net, x, t, cond)
    abstract = interop.to_torch(net, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like))
    state = random_arrays({key: value.shape for key, value in abstract.items()}, seed=2)
    for key in ("conv_in.weight", "conv_in.bias"):
        state[key] *= 1e-3
    return net, x, t, cond, state, interop.from_torch(net, state, like)


@pytest.mark.parametrize("name", CASES)
def test_output_equals_the_stored_output_of_diffusers(name):
    net, x, t, cond, _, params = case(name)
    y = jax.jit(net.apply)({"params": params}, x, t, cond)
    close(y, golden(name)["y"], 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_output_and_all_gradients_equal_diffusers(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    net, x, t, cond, state, params = case(name)
    oracle = diffusers.UNet2DModel(**{**ORACLE, **CASES[name][1]})
    oracle.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
    x_torch = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    labels = torch.tensor(np.asarray(cond["label"])) if cond else None
    y_torch = oracle(x_torch, 1000.0 * torch.tensor(np.asarray(t)), class_labels=labels).sample.permute(0, 2, 3, 1)
    projection = np.random.RandomState(3).standard_normal(y_torch.shape).astype(np.float32)
    (y_torch * torch.from_numpy(projection)).sum().backward()
    golden(name, y=y_torch.detach().numpy())

    def loss(params, x):
        y = net.apply({"params": params}, x, t, cond)
        return jnp.vdot(y, projection), y

    (_, y), (grads, grad_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    close(y, y_torch.detach(), 1e-4)
    close(grad_x, x_torch.grad.permute(0, 2, 3, 1), 1e-4)
    theirs = {key: value.grad.numpy() for key, value in oracle.named_parameters()}
    largest = max(np.abs(value).max() for value in theirs.values())
    for key, ours in interop.to_torch(net, grads).items():
        np.testing.assert_allclose(ours, theirs[key], rtol=1e-3, atol=1e-5 * largest, err_msg=key)
