"""The KL autoencoder against published counts, symmetries, quadrature, and diffusers' implementation; latent statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_sharded, close, count, golden, random_arrays, randomise, shapes
from scipy import integrate, stats

from flowjax.config import ConfigError
from flowjax.interop import vae as interop
from flowjax.models.vae import AutoencoderKL, LatentStats, denormalise, kl, measure, normalise

SMALL = {"channels": 8, "multipliers": (1, 2), "layers": 1, "latent_channels": 3, "groups": 4}


def image(batch=2, height=8, width=12, channels=3, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal((batch, height, width, channels)), jnp.float32)


@functools.cache
def small(**changes):
    """(net, random parameters)."""
    net = AutoencoderKL(**{**SMALL, **changes})
    return net, randomise(shapes(net, image(), jax.random.key(0)))


def encode(net, params, x):
    return jax.jit(lambda params, x: net.apply({"params": params}, x, method="encode"))(params, x)


# --- the network


@pytest.mark.parametrize(
    "name, number",
    [("kl_f4_z3", 55_312_063), ("kl_f8_z4", 83_653_863), ("kl_f8_z16", 83_819_683), ("kl_f8_z16_quant", 83_821_011)],
)
def test_parameter_counts(name, number):
    net = AutoencoderKL(**AutoencoderKL.presets[name])
    assert count(net, jnp.zeros((1, 64, 64, 3)), jax.random.key(0)) == number and net.factor == int(name[4])
    assert net.latent_channels == int(name.split("_")[2][1:])


def test_default_is_the_quantless_f8_z4_layout():
    assert count(AutoencoderKL(), jnp.zeros((1, 64, 64, 3)), jax.random.key(0)) == 83_653_863 - 72 - 20


def test_shapes_of_a_small_autoencoder_for_grey_digits():
    net = AutoencoderKL(channels=32, multipliers=(1, 2, 2), layers=1, image_channels=1)
    x, key = jnp.zeros((2, 32, 32, 1)), jax.random.key(0)
    (y, mean, logvar), variables = jax.eval_shape(net.init_with_output, key, x, key)
    assert y.shape == (2, 32, 32, 1) and mean.shape == logvar.shape == (2, 8, 8, 4) and net.factor == 4
    assert 3e5 < sum(leaf.size for leaf in jax.tree.leaves(variables)) < 1e6


def test_call_is_encode_sample_decode():
    net, params = small()
    x, key = image(), jax.random.key(3)

    def parts(params):
        mean, logvar = net.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
        return net.apply({"params": params}, x, key), (net.apply({"params": params}, z, method="decode"), mean, logvar)

    whole, steps = jax.jit(parts)(params)
    for ours, wanted in zip(whole, steps, strict=True):
        close(ours, wanted, 1e-5)


def test_log_variance_is_clamped():
    net, params = small(mid_attention=False)
    bias = params["encoder"]["conv_out"]["bias"].at[3:].set(jnp.array([-1000.0, 0.0, 1000.0]))
    params = {**params, "encoder": {**params["encoder"], "conv_out": {**params["encoder"]["conv_out"], "bias": bias}}}
    mean, logvar = encode(net, params, image())
    assert float(logvar[..., 0].min()) == float(logvar[..., 0].max()) == -30.0
    assert float(logvar[..., 2].min()) == float(logvar[..., 2].max()) == 20.0
    assert float(jnp.std(logvar[..., 1])) > 0.01 and float(jnp.std(mean)) > 0.01


def test_latents_move_with_the_image():
    """Without attention, an object moved by f pixels before a plain background moves its latents by one position.

    Exact in the interior although norms see the whole image, because their statistics do not change.
    """
    net, params = small(mid_attention=False)
    # An output sees 18 pixels (9 latents) to each side in the encoder, 12 latents in the decoder; so far does the border reach.
    x = np.full((1, 88, 88, 3), 0.3, np.float32)
    moved = x.copy()
    x[0, 40:48, 40:48] = moved[0, 40:48, 42:50] = np.random.RandomState(1).standard_normal((8, 8, 3))
    (mean, _), (mean_moved, _) = encode(net, params, x), encode(net, params, moved)
    close(mean_moved[:, 9:-9, 10:-9], mean[:, 9:-9, 9:-10], 1e-5)
    assert float(jnp.abs(mean_moved - mean)[:, 9:-9, 9:-9].max()) > 0.1
    decode = jax.jit(lambda z: net.apply({"params": params}, z, method="decode"))
    z = np.full((1, 52, 52, 3), 0.3, np.float32)
    z_moved = z.copy()
    z[0, 25, 25] = z_moved[0, 25, 26] = 2.0
    y, y_moved = decode(z), decode(z_moved)
    close(y_moved[:, 24:-24, 26:-24], y[:, 24:-24, 24:-26], 1e-5)
    assert float(jnp.abs(y_moved - y)[:, 24:-24, 24:-24].max()) > 0.1


def test_attention_in_the_middle_is_optional():
    parts = [small(mid_attention=on)[1] for on in (True, False)]
    for half in ("encoder", "decoder"):
        assert ["attn_0" in params[half]["mid"] for params in parts] == [True, False]


@pytest.mark.slow
def test_bfloat16_returns_float32_moments_and_image():
    net, params = small(dtype="bfloat16")
    ours = jax.jit(net.apply)({"params": params}, image(), jax.random.key(0))
    wanted = jax.jit(small()[0].apply)({"params": params}, image(), jax.random.key(0))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == jnp.float32
        close(a, b, 0.1)
        assert float(jnp.abs(a - b).max()) > 1e-5


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    net, params = small(quant_conv=True)

    def loss(params):
        y, mean, logvar = net.apply({"params": params}, image(), jax.random.key(0))
        return jnp.sum((y - image()) ** 2) + jnp.sum(kl(mean, logvar))

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:  # adds the same to all logits of a query
            assert float(jnp.abs(leaf).max()) > 1e-4, name


@pytest.mark.slow
def test_sharded_equals_unsharded():
    check_sharded(AutoencoderKL(**SMALL, quant_conv=True), image(batch=4), jax.random.key(0))


@pytest.mark.parametrize(
    "changes, shape, message",
    [
        ({"groups": 3}, (1, 8, 8, 3), "groups = 3 does not divide"),
        ({"multipliers": (1, 2, 2)}, (1, 8, 6, 3), "divisible by 4"),
        ({}, (1, 7, 8, 3), "divisible by 2"),
        ({"multipliers": ()}, (1, 8, 8, 3), "multipliers"),
    ],
)
def test_bad_settings_are_named(changes, shape, message):
    net = AutoencoderKL(**{**SMALL, **changes})
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jax.random.key(0))


# --- the posterior


def test_kl_equals_quadrature_and_sums_over_a_sample():
    mean = np.array([[[0.0, 1.0]], [[-2.0, 0.3]]])
    logvar = np.array([[[0.0, 0.0]], [[1.0, -1.5]]])

    def one(m, v):
        q = stats.norm(m, np.exp(v / 2))
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), m - 20, m + 20, points=[m])[0]

    wanted = np.vectorize(one)(mean, logvar).sum(axis=(1, 2))
    with jax.enable_x64(True):
        ours = np.asarray(kl(jnp.asarray(mean), jnp.asarray(logvar)))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    np.testing.assert_allclose(ours[0], 0.5)  # mean 1, variance 1: half a nat


@pytest.mark.oracle
def test_kl_equals_torch():
    torch = pytest.importorskip("torch")
    mean, logvar = image(seed=1), image(seed=2)
    normal = torch.distributions.Normal
    q = normal(torch.tensor(np.asarray(mean)), torch.tensor(np.asarray(jnp.exp(logvar / 2))))
    close(kl(mean, logvar), torch.distributions.kl_divergence(q, normal(0.0, 1.0)).sum((1, 2, 3)), 1e-5)


def test_samples_have_the_moments_of_the_posterior():
    mean, logvar = jnp.full((200_000, 2), jnp.array([3.0, -1.0])), jnp.full((200_000, 2), jnp.log(jnp.array([4.0, 0.25])))
    z = np.asarray(AutoencoderKL.sample(mean, logvar, jax.random.key(0)))
    np.testing.assert_allclose(z.mean(0), [3.0, -1.0], atol=0.02)
    np.testing.assert_allclose(z.std(0), [2.0, 0.5], rtol=0.01)
    assert stats.kstest((z[:, 0] - 3) / 2, "norm").pvalue > 1e-3


# --- latent statistics


def test_streamed_statistics_equal_those_of_the_whole():
    random = np.random.RandomState(0)
    scale, offset = np.array([1e-2, 3.0, 50.0]), np.array([1e4, -2.0, 0.0])
    batches = [scale * random.standard_normal((n, 4, 5, 3)) + offset + n for n in (7, 1, 16, 3)]
    whole = np.concatenate([batch.reshape(-1, 3) for batch in batches])
    measured = measure(iter(batches))
    np.testing.assert_allclose(measured.mean, whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(measured.std, whole.std(0), rtol=1e-6)
    assert measured.mean.dtype == measured.std.dtype == np.float32


def test_statistics_do_not_cancel():
    batches = [np.full((500, 1), 1e6) + sign * 1e-3 for sign in (1, -1)]
    np.testing.assert_allclose(measure(batches).std, 1e-3, rtol=1e-4)


def test_normalised_latents_have_unit_scale_and_go_back():
    z = 5.0 + jnp.array([1.0, 0.1, 30.0]) * image(8)
    found = measure([np.asarray(z)])
    unit = normalise(z, found)
    np.testing.assert_allclose(unit.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(unit.std((0, 1, 2)), 1.0, rtol=1e-4)
    np.testing.assert_allclose(denormalise(unit, found), z, rtol=1e-5, atol=1e-4)
    by_hand = LatentStats(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    np.testing.assert_array_equal(normalise(jnp.array([5.0, 6.0]), by_hand), [2.0, 1.0])
    np.testing.assert_array_equal(denormalise(jnp.array([5.0, 6.0]), by_hand), [11.0, 26.0])


@pytest.mark.parametrize(
    "batches, message",
    [([], "no latents"), ([np.ones((4, 2))], "variance"), ([np.array([[1.0, 2.0], [np.nan, 3.0]])], "finite")],
)
def test_unusable_statistics_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        measure(batches)


# --- diffusers

# A preset with fewer and narrower levels, so that groups and the quant convolutions are the preset's own.
FEWER = {"channels": 32, "multipliers": (1, 2), "layers": 1}
CASES = {
    "vae_z4": ({**AutoencoderKL.presets["kl_f8_z4"], **FEWER}, {"latent_channels": 4}),
    "vae_z16_no_attention": (
        {**AutoencoderKL.presets["kl_f8_z16"], **FEWER, "multipliers": (1, 2, 3), "mid_attention": False},
        {
            "latent_channels": 16,
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
    ),
}
ORACLE = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def case(name):
    """(net, image, latent, state dict, parameters): all random; conv_in small, so that the epsilon of the norms matters."""
    net = AutoencoderKL(**CASES[name][0])
    x = image(seed=1)
    z = image(2, 4, 2, net.latent_channels, seed=2)
    like = shapes(net, x, jax.random.key(0))
    abstract = interop.to_torch(net, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like))
    state = random_arrays({key: value.shape for key, value in abstract.items()}, seed=3)
    for key in state:
        if ".conv_in." in key:
            state[key] *= 1e-3
    return net, x, z, state, interop.from_torch(net, state, like)


def moments_and_image(net, params, x, z):
    mean, logvar = net.apply({"params": params}, x, method="encode")
    return mean, logvar, net.apply({"params": params}, z, method="decode")


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_stored_outputs_of_diffusers(name):
    net, x, z, _, params = case(name)
    mean, logvar, y = jax.jit(functools.partial(moments_and_image, net))(params, x, z)
    stored = golden(name)
    close(mean, stored["mean"], 1e-4)
    close(logvar, stored["logvar"], 1e-4)
    close(y, stored["y"], 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_equal_diffusers(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    net, x, z, state, params = case(name)
    oracle = diffusers.AutoencoderKL(**{**ORACLE, **CASES[name][1]})
    oracle.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)

    def channels_first(array):
        return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2).requires_grad_()

    x_torch, z_torch = channels_first(x), channels_first(z)
    posterior = oracle.encode(x_torch).latent_dist
    theirs = [part.permute(0, 2, 3, 1) for part in (posterior.mean, posterior.logvar, oracle.decode(z_torch).sample)]
    projections = [np.random.RandomState(i).standard_normal(part.shape).astype(np.float32) for i, part in enumerate(theirs)]
    sum((part * torch.from_numpy(p)).sum() for part, p in zip(theirs, projections)).backward()
    golden(name, **{key: part.detach().numpy() for key, part in zip(("mean", "logvar", "y"), theirs)})

    def loss(params, x, z):
        outputs = moments_and_image(net, params, x, z)
        return sum(jnp.vdot(part, p) for part, p in zip(outputs, projections)), outputs

    (_, ours), (grads, grad_x, grad_z) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, z)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b.detach(), 1e-4)
    close(grad_x, x_torch.grad.permute(0, 2, 3, 1), 1e-4)
    close(grad_z, z_torch.grad.permute(0, 2, 3, 1), 1e-4)
    wanted = {key: value.grad.numpy() for key, value in oracle.named_parameters()}
    largest = max(np.abs(value).max() for value in wanted.values())
    for key, value in interop.to_torch(net, grads).items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-3, atol=1e-5 * largest, err_msg=key)
