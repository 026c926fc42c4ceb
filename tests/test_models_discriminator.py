"""The patch discriminator against published counts, its receptive field, torch, and what its norm promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, count, golden, random_arrays, randomise, shapes

from flowjax.config import ConfigError
from flowjax.interop import state_dict
from flowjax.models.discriminator import FeatureHead, PatchGAN

SMALL = PatchGAN(channels=8, layers=2, groups=4)


def image(batch=2, height=24, width=20, seed=0):
    return jnp.asarray(np.random.RandomState(seed).uniform(-1, 1, (batch, height, width, 3)), jnp.float32)


def names(path):
    """Numbers of the layers in torch.nn.Sequential: convolution, (norm), LeakyReLU."""
    if path[0] == "logits":
        return f"{2 + 3 * SMALL.layers}"
    kind, i = path[0].split("_")
    return f"{max(0, 3 * int(i) - 1) + (kind == 'norm')}"


def case():
    like = shapes(SMALL, image())
    abstract = state_dict.to_torch(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like), names)
    state = random_arrays({k: v.shape for k, v in abstract.items()}, seed=5)
    return state, state_dict.from_torch(state, like, names)


def logits(params, x, net=SMALL):
    return jax.jit(lambda p, x: net.apply({"params": p}, x))(params, x)


def test_parameter_count_and_logits_of_the_papers_discriminator():
    """2,765,633 with an affine norm on three layers, and 30 x 30 logits of 256 x 256 pixels."""
    x = jnp.zeros((1, 256, 256, 3))
    assert count(PatchGAN(), x) == 2_765_633
    assert jax.eval_shape(PatchGAN().init_with_output, jax.random.key(0), x)[0].shape == (1, 30, 30)
    assert count(PatchGAN(norm="none"), x) == 2_765_633 - (128 + 256 + 512)  # biases of convolutions instead of scale and bias


@pytest.mark.parametrize("layers, patch", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch_and_no_more(layers, patch):
    net = PatchGAN(channels=2, layers=layers, norm="none")
    x = image(1, 96, 96)
    params = randomise(shapes(net, x))
    y, back = jax.vjp(lambda x: net.apply({"params": params}, x), x)
    middle = y.shape[1] // 2
    (gradient,) = back(jnp.zeros_like(y).at[0, middle, middle].set(1.0))
    rows, columns = (np.flatnonzero(np.abs(gradient).max(axis)) for axis in ((0, 2, 3), (0, 1, 3)))
    assert len(rows) == len(columns) == patch == rows[-1] - rows[0] + 1
    (shifted,) = back(jnp.zeros_like(y).at[0, middle - 1, middle].set(1.0))
    assert rows[0] - np.flatnonzero(np.abs(shifted).max((0, 2, 3)))[0] == 2**layers


def test_an_examples_logits_do_not_depend_on_its_batch():
    _, params = case()
    x = image(4)
    close(logits(params, x)[1:2], logits(params, x[1:2]), 1e-5)
    assert float(jnp.abs(logits(params, x)[1] - logits(params, x)[2]).max()) > 1e-2


def test_initial_weights_are_those_of_dcgan():
    params = PatchGAN(channels=32).init(jax.random.key(0), image(1, 24, 24))["params"]
    for name, module in params.items():
        if "kernel" in module:
            kernel = np.asarray(module["kernel"].value)
            assert kernel.std() == pytest.approx(0.02, rel=0.1) and abs(kernel.mean()) < 2e-3, name


def test_logits_equal_the_stored_logits_of_torch():
    _, params = case()
    close(logits(params, image()), golden("patch_gan")["logits"], 1e-4)


@pytest.mark.oracle
def test_logits_and_gradient_equal_torch():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    leaky = lambda: nn.LeakyReLU(0.2)  # noqa: E731
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), leaky(),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.GroupNorm(4, 16), leaky(),
        nn.Conv2d(16, 32, 4, 1, 1, bias=False), nn.GroupNorm(4, 32), leaky(),
        nn.Conv2d(32, 1, 4, 1, 1),
    )  # fmt: skip
    state, params = case()
    net.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=True)
    x = torch.tensor(np.asarray(image())).permute(0, 3, 1, 2).requires_grad_()
    y = net(x)[:, 0]
    golden("patch_gan", logits=y.detach().numpy())
    close(logits(params, image()), y.detach(), 1e-5)
    y.square().sum().backward()
    close(jax.jit(jax.grad(lambda x: jnp.sum(logits(params, x) ** 2)))(image()), x.grad.permute(0, 2, 3, 1), 1e-4)


def test_bfloat16_returns_float32_logits():
    _, params = case()
    net = SMALL.clone(dtype="bfloat16")
    y = logits(params, image(), net)
    assert y.dtype == jnp.float32 and float(jnp.abs(y - logits(params, image())).max()) > 1e-5
    close(y, logits(params, image()), 0.1)


@pytest.mark.parametrize(
    "changes, size, message",
    [
        ({"norm": "batch"}, 64, "norm = 'batch' of a PatchGAN is unknown; valid: group, none"),
        ({"layers": 0}, 64, "layers = 0 of a PatchGAN should be at least 1"),
        ({"layers": 3}, 23, "23 x 23 are too small for 3 layers, which need 24"),
    ],
)
def test_bad_settings_are_named(changes, size, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(SMALL.clone(**changes).init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_the_smallest_image_has_one_logit():
    assert jax.eval_shape(SMALL.init_with_output, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))[0].shape == (1, 1, 1)


def test_head_on_features_judges_each_place_by_itself():
    """logits = w2 leaky(w1 f + b1) + b2, by hand."""
    net, features = FeatureHead(hidden=5), jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 4, 6)), jnp.float32)
    params = randomise(shapes(net, features))
    assert count(net, features) == 6 * 5 + 5 + 5 + 1
    h = features @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    wanted = (jnp.where(h > 0, h, 0.2 * h) @ params["fc2"]["kernel"] + params["fc2"]["bias"])[..., 0]
    close(logits(params, features, net), wanted, 1e-5)
