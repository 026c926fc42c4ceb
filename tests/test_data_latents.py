"""Latents made once: what is written, when it is written again, and which autoencoder a run accepts them from."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from train_runs import DIT, stored, tiny, train

from flowjax.config import ConfigError
from flowjax.data import latents, records
from flowjax.data.pipeline import arrays, ordered, pipeline
from flowjax.models import vae
from flowjax.train import export, generator
from flowjax.train.assembly import Run
from flowjax.train.roles import Latents

COUNTS = {"train": 11, "test": 5}


def encode(x):
    """Of (n, H, W, 3): (n, H / 2, W / 2, 4) such that left and right differ, and no pixel is like another."""
    assert x.shape[0] == 4 and x.dtype == np.float32 and np.abs(x).max() <= 1
    z = np.concatenate([x, x[..., :1] * np.linspace(0.5, 1, x.shape[2], dtype=np.float32)[:, None]], axis=-1)
    return z[:, ::2, ::2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with labels and captions."""
    out = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(0)
    rows = (
        (split, f"row {i}", {"image": rng.integers(0, 256, (8, 6, 3), np.uint8), "label": i % 3, "caption": f"{split} {i}\nagain {i}"})
        for split, count in COUNTS.items() for i in range(count)
    )  # fmt: skip
    records.write(out, rows, name="images", num_classes=3, class_names=("a", "b", "c"))
    return str(out)


def write(data, out, section=None, vae="abc", encode=encode, **options):
    return latents.write(out, {"name": "array_record", "path": data, **(section or {})}, latents.Encoder(encode, vae), **{"batch": 4, **options})


def read(out, split="train"):
    reader = records.Records(out, split)
    return reader.read(np.arange(len(reader)))


@pytest.mark.parametrize("dtype, error", [("float16", 2.0**-11), ("float32", 1e-7)])
def test_every_row_is_encoded_in_order_with_its_columns(data, tmp_path, dtype, error):
    manifest = write(data, tmp_path / "z", dtype=dtype)
    assert {k: v["count"] for k, v in manifest["splits"].items()} == COUNTS
    assert manifest["image_shape"] == [4, 3, 4] and manifest["dtype"] == dtype
    assert (manifest["num_classes"], manifest["class_names"]) == (3, ["a", "b", "c"])
    for split, count in COUNTS.items():
        rows, images = read(tmp_path / "z", split), arrays({"name": "array_record", "path": data}, split)["x"]
        want = np.concatenate([encode(images[[i] * 4])[:1] for i in range(count)])
        np.testing.assert_allclose(rows["x"], want, rtol=error, atol=1e-7)
        np.testing.assert_array_equal(rows["label"], np.arange(count) % 3)
        assert rows["caption"] == [f"{split} {i}\nagain {i}" for i in range(count)]


def test_a_flipped_section_has_both_images_of_the_training_split(data, tmp_path):
    manifest = write(data, tmp_path / "z", {"flip": True}, dtype="float32")
    assert {k: v["count"] for k, v in manifest["splits"].items()} == {"train": 22, "test": 5}
    rows, images = read(tmp_path / "z"), arrays({"name": "array_record", "path": data})["x"]
    np.testing.assert_array_equal(rows["x"][0::2], [encode(images[[i] * 4])[0] for i in range(11)])
    np.testing.assert_array_equal(rows["x"][1::2], [encode(images[[i] * 4, :, ::-1])[0] for i in range(11)])
    assert np.abs(rows["x"][1] - rows["x"][0][:, ::-1]).max() > 0.1  # which is not the mirrored latent
    np.testing.assert_array_equal(rows["label"], np.repeat(np.arange(11) % 3, 2))


def test_a_pipeline_reads_them_as_they_are(data, tmp_path):
    write(data, tmp_path / "z")
    section = {"name": "array_record", "path": str(tmp_path / "z")}
    batch = next(pipeline(section, 4, 0, shuffle=False))
    np.testing.assert_array_equal(batch["x"], read(tmp_path / "z")["x"][:4].astype(np.float32))
    assert batch["x"].dtype == np.float32 and list(batch["cond"]["label"]) == [0, 1, 2, 0]
    for change in ({"flip": True}, {"pad": 8}):
        with pytest.raises(ConfigError, match="pad, resize and flip are for images; images_latents holds latents"):
            pipeline(section | change, 4, 0)
    with pytest.raises(ConfigError, match="images_latents holds latents already"):
        write(str(tmp_path / "z"), tmp_path / "zz")


def test_nothing_is_encoded_twice(data, tmp_path):
    def never(x):
        raise AssertionError("encoded again")

    first = write(data, tmp_path / "z")
    assert write(data, tmp_path / "z", encode=never) == first
    # Neither where the data lie nor how their captions are read is part of what they are.
    assert write(data + "/../images", tmp_path / "z", {"captions": "first"}, encode=never) == first
    for change in ({"vae": "other"}, {"dtype": "float32"}, {"tile": 4}, {"section": {"flip": True}}, {"section": {"pad": 10}}, {"splits": ("train",)}):
        with pytest.raises(AssertionError, match="encoded again"):
            write(data, tmp_path / "z", **{"encode": never, **change})
    # What is there stays, unless it may be replaced.
    with pytest.raises(ConfigError, match="holds another data set .*--overwrite"):
        write(data, tmp_path / "z", dtype="float32")
    assert write(data, tmp_path / "z", dtype="float32", overwrite=True)["dtype"] == "float32"
    # A damaged shard is made again.
    shard = tmp_path / "z" / first["splits"]["train"]["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="encoded again"):
        write(data, tmp_path / "z", dtype="float32", encode=never)


def test_the_key_is_of_the_data(data, tmp_path):
    """Other pixels, other latents: the content hash of the data is in the key."""
    first = write(data, tmp_path / "z")["source"]["latents"]
    other = tmp_path / "other"
    rows = ((split, "", {"image": np.zeros((8, 6, 3), np.uint8), "label": 0, "caption": "x"}) for split in COUNTS)
    records.write(other, rows, name="images", num_classes=3, class_names=("a", "b", "c"))
    second = write(str(other), tmp_path / "zz")["source"]["latents"]
    assert first["key"] != second["key"] and first["vae"] == second["vae"] == "abc"
    assert first["data"]["train"]["content_hash"] == records.read_manifest(data)["content_hash"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "bfloat16"}, "--dtype = 'bfloat16' is unknown; valid: float16, float32"),
        ({"batch": 0}, "--batch = 0 should be at least 1"),
        ({"splits": ()}, "--splits names none"),
        ({"splits": ("train", "dev")}, "split 'dev' is not in"),
        ({"section": {"flipp": True}}, "data.flipp is unknown"),
        ({"encode": lambda x: np.full((len(x), 2, 2, 1), 1e6, np.float32)}, r"images \(train row 0\): its latent is not finite in float16"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(data, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message), np.errstate(over="ignore"):
        write(data, tmp_path / "z", **options)
    assert not (tmp_path / "z").exists()


def test_ordered_needs_one_finite_set_of_examples():
    for section in ("mix4", {"name": "mixture", "parts": ("mix4", "mix4"), "weights": (1, 1)}):
        with pytest.raises(ConfigError, match="one finite data set is needed"):
            ordered(section, "train", 4)


# --- an autoencoder as a codec


def test_a_codec_works_in_tiles_where_it_is_told_to():
    """A network of single positions does not notice; the seam of any other lies within the tiles (tests/test_models_tiling.py)."""
    seen = []

    class Halver:
        module = types.SimpleNamespace(factor=2)

        def encode(self, x):
            seen.append(x.shape)
            return x[:, ::2, ::2], None

        def decode(self, z):
            seen.append(z.shape)
            return z.repeat(2, axis=1).repeat(2, axis=2)

    x = np.random.default_rng(0).standard_normal((1, 32, 24, 2)).astype(np.float32)
    whole = Latents(Halver(), vae.LatentStats(np.array([1.0, 2.0], np.float32), np.array([2.0, 4.0], np.float32)))
    tiles = dataclasses.replace(whole, tile=16)
    z = whole.encode(x)
    np.testing.assert_allclose(tiles.encode(x), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tiles.decode(z), whole.decode(z), rtol=1e-5, atol=1e-6)
    assert seen[0] == (1, 32, 24, 2) and (1, 16, 16, 2) in seen and (1, 8, 8, 2) in seen
    seen.clear()
    dataclasses.replace(whole, tile=32).encode(x)  # small enough
    assert seen == [(1, 32, 24, 2)]


# --- a run on latents

VAE = {"name": "autoencoder_kl", "channels": 4, "multipliers": (1, 2), "layers": 1, "latent_channels": 2, "image_channels": 1, "groups": 2, "mid_attention": False}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(export of an autoencoder, latents of digits by it)."""
    home = tmp_path_factory.mktemp("vae")
    train(tiny(data={"name": "digits"}, model=VAE, objective={"name": "vae"}, steps=1, checkpoint={"every": 1}), home / "run")
    export.export(home / "run", home / "export", latents={"mean": [0.25, -0.5], "std": [0.5, 2.0]})
    role, params, info = export.load(home / "export")
    codec = role.net(params)
    encoder = latents.Encoder(jax.jit(codec.encode), export.identity(params, info))
    latents.write(home / "z", "digits", encoder, splits=("train", "test"), dtype="float32", batch=250)
    return home / "export", home / "z"


def latent_run(made, **changes):
    net = {**DIT, "patch": 2, "num_classes": 10}
    data = {"name": "array_record", "path": str(made[1])}
    return tiny(**({"data": data, "model": net, "roles": {"vae": {"checkpoint": str(made[0])}}, "ema": {}} | changes))


@pytest.mark.slow
def test_a_run_on_latents_is_the_run_that_encodes(made, tmp_path):
    """Bitwise but for the autoencoder's arithmetic in other batches; and it draws and exports pictures."""
    section = {"steps": 2, "sampler": "euler", "count": 4, "every": 2}
    online = latent_run(made, data={"name": "digits"}, steps=2)
    train(online, tmp_path / "online")
    train(latent_run(made, steps=2, sample=section), tmp_path / "cached")
    a, b = (export.load(tmp_path / k, weights="params")[1] for k in ("online", "cached"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    assert list((tmp_path / "cached" / "samples").glob("*.png"))
    assert stored(tmp_path / "cached", 2)["frozen"] == {} and [*stored(tmp_path / "online", 2)["frozen"]] == ["vae"]
    export.export(tmp_path / "cached", tmp_path / "alone", weights="params")
    role, params, _ = export.companion_of(tmp_path / "alone", export.info_of(tmp_path / "alone"), "vae", "vae")
    assert role.net(params).decode(np.zeros((1, 4, 4, 2))).shape == (1, 8, 8, 1)
    assert export.info_of(tmp_path / "alone")["data"]["latents"]["section"] == {"name": "digits"}


def test_latents_of_another_autoencoder_are_refused(made, tmp_path):
    """Other statistics are another autoencoder: the latents would be standardised by one and decoded by another."""
    run = Run(latent_run(made))
    assert run.example[0].shape == (1, 4, 4, 2) and not run.frozen
    info = run.info(0, "run")
    assert info["shape"] == [4, 4, 2] and info["image_shape"] == [8, 8, 1]  # what comes out, not what is read
    assert generator.resized(info, (16, 8)) == (8, 4, 2)
    space = info["latent_space"]
    role, params, info = export.load(made[0])
    # The same one whether the latents were made before or are made along.
    assert space == export.identity(params, info) == Run(latent_run(made, data={"name": "digits"})).latent_space
    others = {
        "weights": (jax.tree.map(lambda v: v * 1.001, params), info),
        "statistics": (params, {**info, "latents": {**info["latents"], "std": [0.5, 2.1]}}),
    }
    assert export.identity(params, info) == export.identity(params, json.loads(json.dumps(info)))
    for name, (params, info) in others.items():
        export.write(tmp_path / name, params, info)
        with pytest.raises(ConfigError, match="the data hold latents of another autoencoder .* than roles.vae .*tools.encode_latents"):
            Run(latent_run(made, roles={"vae": {"checkpoint": str(tmp_path / name)}}))


@pytest.mark.parametrize("source", [{"latents": {"vae": "other"}}, {}], ids=["another autoencoder", "no latents"])
def test_latents_are_mixed_with_their_like_only(made, tmp_path, source):
    """Shapes and types agree: only who made them differs, or that nobody did."""
    rows = (("train", "", {"x": np.ones((4, 4, 2), np.float32) * i, "label": i % 10}) for i in range(20))
    names = [str(c) for c in range(10)]
    records.write(tmp_path / "zz", rows, name="zz", num_classes=10, class_names=names, source=source)

    def mixed(*paths):
        return {"name": "mixture", "parts": [{"name": "array_record", "path": str(p)} for p in paths], "weights": (1.0,) * len(paths)}

    with pytest.raises(ConfigError, match="data.parts must agree in .* and who encoded them"):
        pipeline(mixed(made[1], tmp_path / "zz"), 4, 0)
    assert Run(latent_run(made, data=mixed(made[1], made[1]))).encoded
    if source:
        with pytest.raises(ConfigError, match="latents of another autoencoder"):
            Run(latent_run(made, data=mixed(tmp_path / "zz", tmp_path / "zz")))


def test_an_image_encoder_cannot_look_at_latents():
    kind = lambda kind: types.SimpleNamespace(module=types.SimpleNamespace(kind=kind))  # noqa: E731
    run = types.SimpleNamespace(
        pipeline=types.SimpleNamespace(manifest={"latents": {"vae": "a"}}), roles={"encoder": kind("image_encoder")}, loaded={"encoder": None},
        objective=types.SimpleNamespace(pixels=False),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="roles.encoder looks at images, and the data hold latents"):
        Run._encoded(run)
    run.roles["encoder"] = kind("classifier")
    assert Run._encoded(run)
    run.objective.pixels = True
    with pytest.raises(ConfigError, match="the objective looks at images, and the data hold latents"):
        Run._encoded(run)
    run.pipeline.manifest = {}
    assert not Run._encoded(run)
