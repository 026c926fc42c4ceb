"""Sharding changes nothing but speed: the whole train step on one device and on eight, split in every way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import generate
from flowjax.config import ConfigError
from flowjax.train import card, export, generator
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run
from nets import randomise
from train_runs import DIT, same, tiny, train

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2), "context": (1, 2, 1, 4)}
ONE = (1, 1, 1)


def config(sizes, **changes):
    # SGD with rate 1 and no clipping: the change of the parameters is the gradient.
    sgd = {"name": "sgd", "momentum": 0.0, "schedule": {"name": "constant", "rate": 1.0}}
    model = {**DIT, "width": 32, "heads": 8, "patch": 4, "dropout": 0.1}
    base = dict(data={"name": "digits"}, model=model, optimizer=sgd, ema={"ema": {"name": "constant", "decay": 0.5}})
    return tiny(**(base | changes), mesh=dict(zip(mesh_lib.AXES, sizes)))


def one_step(sizes, **changes):
    """(state, gradients, metrics) after a step from random parameters (adaLN-zero's zeros would hide every mistake)."""
    run = Run(config(sizes, **changes), devices=jax.devices()[: np.prod(sizes)])
    start = run.fresh()
    values = jax.tree.map(lambda v: 0.3 * np.asarray(v), {k: randomise(jax.device_get(v), i) for i, (k, v) in enumerate(start.params.items())})
    # Copies: the step donates its state, and may not find one buffer in two places.
    put = lambda values, like: jax.tree.map(lambda v, l: jnp.copy(jax.device_put(v, l.sharding)), values, like)  # noqa: E731
    start = start.replace(params=put(values, start.params), ema={"ema": put(values["net"], start.ema["ema"])})
    split = any(v.sharding.shard_shape(v.shape) != v.shape for v in jax.tree.leaves(start.params))
    state, metrics = run.step()(start, run.frozen, mesh_lib.place(next(run.pipeline), run.mesh))
    gradients = jax.tree.map(lambda a, b: a - np.asarray(b), values, jax.device_get(state.params))
    return jax.device_get(state), gradients, jax.device_get(metrics), split


def check(sizes, reference, **changes):
    state, gradients, metrics, split = one_step(sizes, **changes)
    want_state, want, want_metrics, _ = reference
    assert split == (sizes[1] * sizes[2] > 1), "parameters are split exactly when the mesh says so"
    assert metrics.keys() == want_metrics.keys() and {"loss", "net/loss"} & metrics.keys()
    for k in metrics.keys() - {"finite"}:
        np.testing.assert_allclose(metrics[k], want_metrics[k], rtol=2e-5, err_msg=k)
    for role in want:
        largest = max(np.abs(g).max() for g in jax.tree.leaves(want[role]))
        assert largest > 1e-3
        for (path, a), b in zip(jax.tree.leaves_with_path(gradients[role]), jax.tree.leaves(want[role]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * largest, err_msg=role + jax.tree_util.keystr(path))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(want["net"]))
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(want_state.ema), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * largest)


@pytest.fixture(scope="module")
def reference():
    return one_step(ONE)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_dit_with_dropout(sizes, reference):
    check(sizes, reference)


@pytest.mark.slow
def test_accumulation_on_a_mesh(reference):
    """Slices on the mesh == slices on one device (dropout differs from that of the whole batch)."""
    one = one_step(ONE, accumulate=2)
    assert one[2]["loss"] != pytest.approx(reference[2]["loss"], rel=1e-6)
    check((2, 2, 2), one, accumulate=2)


VAE = {"name": "autoencoder_kl", "channels": 8, "multipliers": (1, 2), "layers": 1, "latent_channels": 2, "image_channels": 1, "groups": 4, "mid_attention": False}  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An exported VAE with measured latents, trained for two steps on the default mesh."""
    workdir = tmp_path_factory.mktemp("vae") / "run"
    changes = dict(data={"name": "digits"}, model=VAE, objective={"name": "vae"}, steps=2, sample={"every": 2, "count": 4})
    train(tiny(**changes), workdir)
    assert list((workdir / "samples").glob("*.png"))
    role, params, _ = export.load(workdir)
    digits = [np.random.default_rng(0).uniform(-1, 1, (32, 8, 8, 1)).astype(np.float32)]
    export.export(workdir, workdir / "export", latents=export.measure_latents(role, params, digits))
    return str(workdir / "export")


@pytest.mark.slow
def test_vae():
    changes = dict(model=VAE, objective={"name": "vae"})
    check((2, 2, 2), one_step(ONE, **changes), **changes)


@pytest.mark.slow
def test_vae_against_a_discriminator():
    """Two players, and a weight between them that is made of norms over the whole batch."""
    judge = {"discriminator": {"model": {"name": "patch_gan", "channels": 8, "layers": 1, "groups": 4}}}
    changes = dict(model=VAE, objective={"name": "vae_gan", "start": 0, "adversarial_weight": 5.0}, roles=judge)
    one = one_step(ONE, **changes)
    assert 1e-2 < one[2]["net/adversarial_weight"] < 5e4  # neither nothing nor the bound
    check((2, 2, 2), one, **changes)


def frozen_by_the_same_rules(run, autoencoder):
    """What is frozen is split where the same network's parameters would be if they were trained, and whole when put together."""
    (_, params, _), held = export.load(autoencoder), run.frozen["vae"]
    same(jax.device_get(held), jax.device_get(params))
    trained = Run(config((1, 4, 2), model=VAE, objective={"name": "vae"}))
    places = lambda tree: [v.sharding.spec for v in jax.tree.leaves(tree)]  # noqa: E731
    assert places(held) == places(trained.target.params["net"]) and card.bytes_per_device(held) < 0.5 * sum(v.nbytes for v in jax.tree.leaves(params))
    assert run.loaded["vae"][0] is held and run.codecs["vae"] is held  # and nowhere else


@pytest.mark.slow
def test_latents(autoencoder, tmp_path):
    """A DiT on the latents of a frozen VAE: the same on a mesh, and through the whole loop, export and pictures."""
    changes = dict(model={**DIT, "patch": 2}, roles={"vae": {"checkpoint": autoencoder}})
    check((2, 2, 1), one_step(ONE, **changes), **changes)
    frozen_by_the_same_rules(Run(config((1, 4, 2), **changes)), autoencoder)
    run = config((2, 2, 2), **changes, steps=2, sample={"steps": 2, "sampler": "euler", "count": 4, "every": 2})
    train(run, tmp_path / "run")
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    export.export(tmp_path / "run", tmp_path / "run" / "export")
    out = tmp_path / "run" / "export"
    role, params, _ = export.companion_of(out, export.info_of(out), "vae", "vae")
    assert role.net(params).encode(np.zeros((1, 8, 8, 1))).shape == (1, 4, 4, 2)
    # The autoencoder that it was trained with, and no other: neither beside the run nor left over from another export.
    role, params, info = export.load(autoencoder)
    export.write(tmp_path / "other", jax.tree.map(lambda p: p * 1.01, params), info)
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    told["config"]["roles"]["vae"]["checkpoint"] = str(tmp_path / "other")
    (tmp_path / "run" / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="other has changed since .*run was trained with it"):
        export.export(tmp_path / "run", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    export.export(autoencoder, out)
    assert export.companion_of(out, export.info_of(out), "vae", "vae") is None


# --- the mesh itself


@pytest.mark.parametrize("sizes, want", [(dict(), (8, 1, 1)), (dict(data=2, fsdp=-1), (2, 4, 1)), (dict(data=1, fsdp=2, tensor=-1), (1, 2, 4))])
def test_minus_one_is_what_is_left(sizes, want):
    mesh = mesh_lib.make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == (*want, 1) and tuple(mesh.shape) == mesh_lib.AXES


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=4), dict(data=-1, fsdp=-1), dict(data=0), dict(data=-1, fsdp=3), dict(data=-2), dict(data=16)])
def test_meshes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        mesh_lib.make_mesh(**sizes)


def test_batches_that_do_not_divide_are_refused():
    mesh = mesh_lib.make_mesh(2, 2, 2)
    mesh_lib.check_batch(8, 2, mesh)
    for batch, accumulate in ((8, 3), (6, 1), (12, 2), (0, 1)):
        with pytest.raises(ConfigError, match="must be a multiple of accumulate x data x fsdp"):
            mesh_lib.check_batch(batch, accumulate, mesh)


def test_optimizer_state_lives_with_its_parameters():
    """Moments are split like the parameter; factored rows and counters are on every device."""
    for name in ("adamw", "adafactor", "muon"):
        settings = {"min_dim": 8} if name == "adafactor" else {}
        run = Run(config((2, 2, 2), optimizer={"name": name, "schedule": "constant", **settings}))
        places = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(run.shardings.opt)}
        shapes = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(run.target.opt)}
        params = {jax.tree_util.keystr(k): (v.shape, v.sharding) for k, v in jax.tree.leaves_with_path(run.target.params["net"])}
        split = 0
        for k, place in places.items():
            owner = next((p for p in params if k.endswith(p)), None)
            if owner and shapes[k] == params[owner][0]:
                assert place == params[owner][1], k
                split += not place.is_fully_replicated
            else:
                assert place.is_fully_replicated, k
        assert split > 0, name


@pytest.mark.slow
def test_a_generator_uses_every_device(tmp_path):
    """Rows of a batch on each of the eight, with the samples of one device."""
    train(tiny(), tmp_path / "run")
    make, cond = generator.load(tmp_path / "run"), {"label": np.arange(13) % 4}
    rows = make.sample(make.params, 0, np.arange(16), {"label": np.zeros(16, np.int32)}).sharding
    assert len(rows.device_set) == 8 and rows.shard_shape((16, 2)) == (2, 2)
    role, params, info = export.load(tmp_path / "run")
    alone = jax.jit(generate.make(role, (2,), **generator.chosen(info, {}) | {"negative": None}))
    want = generate.run(alone, params, cond, 13, seed=1)
    for batch in (3, 13):
        np.testing.assert_allclose(make(cond, 13, 1, batch), want, rtol=1e-5, atol=1e-6)
