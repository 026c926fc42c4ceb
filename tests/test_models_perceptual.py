"""Perceptual distances: LPIPS against torch, layer by layer written from the paper; what holds of every such distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, count, golden, random_arrays, randomise, shapes
from train_runs import rows, tiny, train

from flowjax.config import ConfigError
from flowjax.data import records
from flowjax.interop import lpips as interop
from flowjax.models.classifier import Classifier
from flowjax.models.perceptual import LPIPS, distance, unit
from flowjax.train import export
from flowjax.train.assembly import Run
from flowjax.train.roles import Bound

SMALL = LPIPS(widths=((4, 6), (5,), (7, 3)))


def image(seed=0, batch=3, height=20, width=12):
    return jnp.asarray(np.random.RandomState(seed).uniform(-1, 1, (batch, height, width, 3)), jnp.float32)


def case():
    """(state dict, random parameters) of SMALL."""
    like = shapes(SMALL, image())
    abstract = interop.to_torch(SMALL, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like))
    state = {k: np.abs(v) if k.startswith("lin") else v for k, v in random_arrays({k: v.shape for k, v in abstract.items()}, 3).items()}
    vgg, weights = ({k: v for k, v in state.items() if k.startswith("lin") == lin} for lin in (False, True))
    return state, interop.from_torch(SMALL, {**vgg, "classifier.0.weight": np.zeros((2, 2))}, weights, like)


def ours(params, x, y):
    return jax.jit(lambda p, x, y: distance(Bound(SMALL, p), x, y))(params, x, y)


def test_parameter_count():
    """VGG16's convolutions (torchvision: 14,714,688) and 64 + 128 + 256 + 512 + 512 channel weights."""
    assert count(LPIPS(), jnp.zeros((1, 32, 32, 3))) == 14_714_688 + 1472


def test_names_are_those_of_the_published_files():
    names = set(interop.to_torch(LPIPS(), jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes(LPIPS(), jnp.zeros((1, 32, 32, 3))))))
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    wanted = {f"features.{i}.{leaf}" for i in convolutions for leaf in ("weight", "bias")} | {f"lin{i}.model.1.weight" for i in range(5)}
    assert names == wanted


def test_distance_equals_the_stored_distance_of_torch():
    _, params = case()
    stored = golden("lpips")
    close(ours(params, image(1), image(2)), stored["distance"], 1e-5)


@pytest.mark.oracle
def test_distance_and_gradient_equal_torch():
    """torch.nn's own convolutions, pooling and normalisation, put together as 1801.03924 (equation 1) says."""
    torch = pytest.importorskip("torch")
    state, params = case()
    state = {k: torch.tensor(v) for k, v in state.items()}
    blocks = [[0, 2], [5], [8, 10]]

    def maps(x):
        h = (x.permute(0, 3, 1, 2) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        for i, block in enumerate(blocks):
            if i:
                h = torch.nn.functional.max_pool2d(h, 2)
            for j in block:
                h = torch.relu(torch.nn.functional.conv2d(h, state[f"features.{j}.weight"], state[f"features.{j}.bias"], padding=1))
            yield torch.nn.functional.normalize(h, dim=1)

    def theirs(x, y):
        pairs = enumerate(zip(maps(x), maps(y)))
        return sum(torch.nn.functional.conv2d((a - b) ** 2, state[f"lin{i}.model.1.weight"]).mean((1, 2, 3)) for i, (a, b) in pairs)

    x, y = (torch.tensor(np.asarray(image(i)), requires_grad=True) for i in (1, 2))
    value = theirs(x, y)
    value.sum().backward()
    golden("lpips", distance=value.detach().numpy())
    close(ours(params, image(1), image(2)), value.detach(), 1e-5)
    close(jax.jit(jax.grad(lambda x: jnp.sum(ours(params, x, image(2)))))(image(1)), x.grad, 1e-4)


def classifier():
    net = Classifier(num_classes=3, width=8, stages=3, groups=4)
    return Bound(net, randomise(shapes(net, image())))


@pytest.mark.parametrize("net", [lambda: Bound(SMALL, case()[1]), classifier], ids=["lpips", "classifier"])
def test_a_distance_is_one(net):
    """Nought between equal images, symmetric, of each pair of images alone, and no larger than two unit vectors allow."""
    net = net()
    x, y = image(1), image(2)
    d = jax.jit(lambda x, y: distance(net, x, y))
    np.testing.assert_allclose(d(x, x), 0.0, atol=1e-12)
    close(d(x, y), d(y, x), 1e-6)
    close(d(x, y)[::-1], d(x[::-1], y[::-1]), 1e-5)
    assert d(x, y).shape == (3,) and float(d(x, y).min()) > 1e-3
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(d(x, y))))(x)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_classifier_gives_one_map_of_unit_vectors_per_stage():
    maps = classifier().feature_maps(image())
    assert [m.shape for m in maps] == [(3, 20, 12, 8), (3, 10, 6, 16), (3, 5, 3, 32)]
    for m in maps:
        np.testing.assert_allclose(jnp.sum(m**2, -1), 1.0, rtol=1e-4)


def test_a_classifier_of_noisy_images_has_no_feature_maps():
    net = Classifier(num_classes=3, width=8, groups=4, time=True)
    with pytest.raises(ConfigError, match="time = True was called without t"):
        jax.eval_shape(lambda k: net.init(k, image(), method="feature_maps"), jax.random.key(0))


def test_opposite_and_orthogonal_features():
    """|a - b|^2 of unit vectors: 4 and 2, at every position; the mean over positions and the sum over maps leave them."""

    class Fixed:
        def feature_maps(self, x):
            other = jnp.stack([jnp.zeros_like(x[..., 0]), jnp.ones_like(x[..., 0])], -1)
            return unit(5 * jnp.concatenate([x, jnp.zeros_like(x)], -1)), unit(jnp.where(x > 0, 3 * other, other[..., ::-1]))

    x = jnp.ones((1, 4, 6, 1))
    np.testing.assert_allclose(distance(Fixed(), x, -x), 4 + 2, rtol=1e-5)


def test_nothing_is_nought_with_a_finite_derivative():
    np.testing.assert_array_equal(unit(jnp.zeros((1, 1, 1, 4))), 0.0)
    assert np.isfinite(jax.grad(lambda h: jnp.sum(unit(h)[..., 0]))(jnp.zeros((1, 1, 1, 4)))).all()


def test_damaged_weights_are_refused():
    state, _ = case()
    vgg, weights = ({k: v for k, v in state.items() if k.startswith("lin") == lin} for lin in (False, True))
    like = shapes(SMALL, image())
    with pytest.raises(ValueError, match="lin1.model.1.weight"):
        interop.from_torch(SMALL, vgg, {**weights, "lin1.model.1.weight": -weights["lin1.model.1.weight"]}, like)
    with pytest.raises(ValueError, match="missing .*features.5.bias"):
        interop.from_torch(SMALL, {k: v for k, v in vgg.items() if k != "features.5.bias"}, weights, like)


@pytest.mark.parametrize("x", [jnp.zeros((1, 16, 16, 1)), jnp.zeros((1, 3, 16, 3))])
def test_images_that_do_not_fit_are_refused(x):
    with pytest.raises(ConfigError, match="RGB images of at least 4 x 4"):
        jax.eval_shape(lambda k: SMALL.init(k, x), jax.random.key(0))


@pytest.mark.slow
def test_a_classifier_that_was_trained_here_takes_part_in_an_autoencoders_run(tmp_path):
    """As a frozen role that only counts, and that the run's record names."""
    judge = {"name": "classifier", "width": 8, "stages": 2, "groups": 4, "num_classes": 10}
    train(tiny(data={"name": "digits"}, model=judge, objective="classification", steps=1), tmp_path / "judge")
    export.export(tmp_path / "judge", tmp_path / "judge" / "export")
    net = {"name": "autoencoder_kl", "channels": 4, "multipliers": (1,), "layers": 1, "groups": 2, "image_channels": 1, "mid_attention": False}
    objective = {"name": "vae", "perceptual_weight": 0.5}
    section = {"checkpoint": str(tmp_path / "judge" / "export")}
    train(tiny(data={"name": "digits"}, model=net, objective=objective, roles={"perceptual": section}, steps=2), tmp_path / "vae")
    last = [row for row in rows(tmp_path / "vae") if "perceptual" in row][-1]
    assert last["perceptual"] > 0 and last["loss"] > last["reconstruction"] + 0.4 * last["perceptual"]
    info = export.info_of(tmp_path / "vae")
    assert info["frozen_models"] == {"perceptual": judge} and [*info["frozen"]] == ["perceptual"]
    with pytest.raises(ConfigError, match="roles.discriminator.model: objective .* needs a network of kind 'discriminator'"):
        Run(tiny(data={"name": "digits"}, model=net, objective="vae_gan"))
    with pytest.raises(ConfigError, match="roles.perceptual.checkpoint is missing"):
        Run(tiny(data={"name": "digits"}, model=net, objective=objective, roles={"perceptual": {}}))


@pytest.mark.slow
def test_a_classifier_takes_part_in_a_run_on_couplings(tmp_path):
    """InstaFlow's second stage; one that looks at other channels is refused."""
    judge = {"name": "classifier", "width": 8, "stages": 2, "groups": 4, "num_classes": 10}
    train(tiny(data={"name": "digits"}, model=judge, objective="classification", steps=1), tmp_path / "judge")
    changes = dict(
        model={"name": "dit", "patch": 4, "width": 8, "depth": 1, "heads": 1, "num_classes": 0}, validation={"split": "train"}, steps=2,
        objective={"name": "flow_matching", "time": {"name": "steps", "count": 1}, "perceptual_weight": 0.5, "squares": 0.0},
        roles={"perceptual": {"checkpoint": str(tmp_path / "judge")}},
    )  # fmt: skip

    def couplings(channels):
        drawn = np.random.default_rng(0).standard_normal((2, 16, 8, 8, channels)).astype(np.float32)
        rows = [("train", f"row {i}", {"x": x, "z": z}) for i, (x, z) in enumerate(zip(*drawn))]
        records.write(tmp_path / f"pairs{channels}", rows, name="couplings")
        return {"name": "array_record", "path": str(tmp_path / f"pairs{channels}")}

    train(tiny(data=couplings(1), **changes), tmp_path / "run")
    last = [row for row in rows(tmp_path / "run") if "perceptual" in row][-1]
    assert last["perceptual"] > 0 and last["loss"] == pytest.approx(0.5 * last["perceptual"])
    with pytest.raises(ConfigError, match="roles.perceptual looks at 1 channels, and the examples of this run have 3"):
        Run(tiny(data=couplings(3), **changes))
    with pytest.raises(ConfigError, match="roles.perceptual compares .* the data should be couplings"):
        train(tiny(data={"name": "digits"}, **changes | {"model": changes["model"] | {"num_classes": 10}}), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
