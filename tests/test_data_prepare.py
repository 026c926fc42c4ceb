"""Every door brings data through unchanged, and refuses bad data by the name of its file, leaving nothing behind."""

import gzip
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flowjax.config import ConfigError
from flowjax.data import images, prepare, records, sources
from flowjax.data.records import DataError

ROOT = pathlib.Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def read(path, split="train"):
    reader = records.Records(path, split)
    return reader.read(range(len(reader)))


def refused(tmp_path, file, *args, match="", **kwargs):
    """Preparing fails with the file's name in the message and leaves neither a data set nor a scratch directory."""
    with pytest.raises(DataError) as caught:
        prepare.prepare(*args, tmp_path / "made" / "out", **kwargs)
    assert str(file) in str(caught.value) and match in str(caught.value), caught.value
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path)
    return path


def truncate(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


# --- round trips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 4])
def test_npz(tmp_path, rank):
    x, y = pixels(*(10, 6, 5, 3)[:rank]), np.arange(10) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4, None])
    made = prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "out", class_names=("a", "b", "c"), command="typed")
    assert made == records.read_manifest(tmp_path / "out")
    assert made["name"] == "a" and made["num_classes"] == 3 and made["class_names"] == ["a", "b", "c"]
    assert made["image_shape"] == list(x.shape[1:]) + [1] * (rank == 3) and made["dtype"] == "uint8" and not made["captions"]
    assert {k: v["count"] for k, v in made["splits"].items()} == {"train": 10, "test": 4}
    assert made["command"] == "typed" and made["source"]["door"] == "npz" and made["code_version"]
    out = read(tmp_path / "out")
    np.testing.assert_array_equal(out["image"], x if rank == 4 else x[..., None])
    np.testing.assert_array_equal(out["label"], y)
    assert out["label"].dtype == np.int32
    np.testing.assert_array_equal(read(tmp_path / "out", "test")["label"], y[:4])


def test_npz_without_labels_or_test_split(tmp_path):
    x = pixels(5, 4, 4)
    np.savez(tmp_path / "a.npz", images=x)
    made = prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "out", name="other")
    assert made["num_classes"] == 0 and list(made["features"]) == ["image"] and made["name"] == "other"
    np.savez(tmp_path / "b.npz", images=x, labels=np.array([0, 1, 0, 1, 2]))
    assert prepare.prepare("npz", tmp_path / "b.npz", tmp_path / "b")["num_classes"] == 3


def write_idx(path, array):
    data = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(tmp_path, end):
    folder = tmp_path / "idx"
    folder.mkdir()
    x, y = pixels(300, 5, 4), (np.arange(300) % 10).astype(np.uint8)  # 300 needs two bytes of the big-endian size
    for split, n in (("train", 300), ("t10k", 40)):
        write_idx(folder / f"{split}-images-idx3-ubyte{end}", x[:n])
        write_idx(folder / f"{split}-labels-idx1-ubyte{end}", y[:n])
    made = prepare.prepare("idx", folder, tmp_path / "out")
    assert {k: v["count"] for k, v in made["splits"].items()} == {"train": 300, "test": 40} and made["num_classes"] == 10
    out = read(tmp_path / "out")
    np.testing.assert_array_equal(out["image"][..., 0], x)
    np.testing.assert_array_equal(out["label"], y)
    prepare.prepare("idx", folder / f"t10k-images-idx3-ubyte{end}", tmp_path / "pair", class_names=tuple("0123456789"))
    np.testing.assert_array_equal(read(tmp_path / "pair")["image"][..., 0], x[:40])


def test_folder_of_classes_with_captions_beside(tmp_path):
    source = {f"{c}/{i}.png": pixels(6, 6, 3) for c in ("zebra", "ant") for i in range(3)}
    for name, image in source.items():
        save(tmp_path / "in" / name, image)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"picture {name} é\n", encoding="utf-8")
    made = prepare.prepare("folder", tmp_path / "in", tmp_path / "out")
    assert made["class_names"] == ["ant", "zebra"] and made["num_classes"] == 2 and made["captions"]
    out = read(tmp_path / "out")
    order = sorted(source)
    np.testing.assert_array_equal(out["image"], [source[n] for n in order])
    np.testing.assert_array_equal(out["label"], [0, 0, 0, 1, 1, 1])
    assert out["caption"] == [f"picture {n} é" for n in order]


def test_folder_with_listed_captions(tmp_path):
    source = {f"{i}.png": pixels(6, 5, 3) for i in range(4)}
    for name, image in source.items():
        save(tmp_path / "in" / name, image)
    lines = [json.dumps({"file": n, "caption": f"a {n}"}) for n in reversed(source)]
    (tmp_path / "in" / "captions.jsonl").write_text("\n".join(lines))
    made = prepare.prepare("folder", tmp_path / "in", tmp_path / "out")
    assert made["captions"] and made["num_classes"] == 0 and made["image_shape"] == [6, 5, 3]
    out = read(tmp_path / "out")
    assert out["caption"] == [f"a {n}" for n in source]
    np.testing.assert_array_equal(out["image"], list(source.values()))


def test_folder_with_splits(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for c in "ab":
            for i in range(count):
                save(tmp_path / "in" / split / c / f"{i}.png", pixels(4, 4, 1))
    made = prepare.prepare("folder", tmp_path / "in", tmp_path / "out")
    assert {k: v["count"] for k, v in made["splits"].items()} == {"train": 6, "test": 4}
    assert made["class_names"] == ["a", "b"] and made["image_shape"] == [4, 4, 1]
    np.testing.assert_array_equal(read(tmp_path / "out", "test")["label"], [0, 0, 1, 1])
    (tmp_path / "in" / "test" / "b").rename(tmp_path / "in" / "test" / "c")
    refused(tmp_path, tmp_path / "in" / "test", "folder", tmp_path / "in", match="differ")


def test_tfds(tmp_path):
    from flowjax.data import digits

    path = digits.prepare(tmp_path)
    made = prepare.prepare("tfds", path, tmp_path / "out")
    assert {k: v["count"] for k, v in made["splits"].items()} == {"train": 1500, "test": 297}
    assert made["class_names"] == list("0123456789") and made["image_shape"] == [8, 8, 1]
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(path).as_data_source("test")
    out = read(tmp_path / "out", "test")
    np.testing.assert_array_equal(out["image"], [row["image"] for row in source])
    np.testing.assert_array_equal(out["label"], [row["label"] for row in source])


def test_tfds_captions(tmp_path):
    import tensorflow_datasets as tfds

    class Captioned(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")
        code_path = None

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = tfds.features.FeaturesDict({"image": image, "caption": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"image": images.encode_png(np.full((5 + i, 7, 3), i, np.uint8)), "caption": f"grey\n {i} é\n"}

    builder = Captioned(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    made = prepare.prepare("tfds", builder.data_path, tmp_path / "out", size=4)
    out = read(tmp_path / "out")
    assert made["captions"] and made["num_classes"] == 0 and made["image_shape"] == [4, 4, 3]
    assert sorted(out["caption"]) == [f"grey {i} é" for i in range(4)]
    assert [f"grey {image[0, 0, 0]} é" for image in out["image"]] == out["caption"]
    refused(tmp_path, builder.data_path, "tfds", builder.data_path, match="--size")
    source = sources.tfds("train", directory=str(builder.data_path), label="", caption="caption")  # a caption's own lines are no captions
    assert sorted(source.read(np.arange(4))["caption"]) == sorted(out["caption"])


# --- images -------------------------------------------------------------------------------------------------------------


def test_resize_is_antialiased_and_central():
    x = np.zeros((32, 64, 3), np.uint8)
    x[:, 16:48] = np.indices((32, 32)).sum(0)[..., None] % 2 * 255  # finest checks in the central square
    x[:, :16], x[:, 48:] = 10, 20
    out = images.resize(x, 8)
    assert out.shape == (8, 8, 3)
    assert np.all(np.abs(out[:, 1:-1].astype(int) - 127) <= 2)  # without antialiasing the checks would come out 0 or 255
    tall = images.resize(np.swapaxes(x, 0, 1), 8)
    np.testing.assert_allclose(tall, np.swapaxes(out, 0, 1), atol=1)  # rounded after the first axis in either order
    np.testing.assert_array_equal(images.resize(x[:, 16:48], 32), x[:, 16:48])
    assert images.resize(pixels(3, 3, 1), 6).shape == (6, 6, 1)
    ramp = np.tile(np.arange(30, dtype=np.uint8)[None, :, None] * 8, (10, 1, 1))
    np.testing.assert_array_equal(images.resize(ramp, 10), ramp[:, 10:20])  # only a crop: the middle third


def test_pad_centres_on_black():
    x = pixels(2, 3, 4, 1)
    out = images.pad(x, 6)
    assert out.shape == (2, 6, 6, 1)
    np.testing.assert_array_equal(out[:, 1:4, 1:5], x)
    out[:, 1:4, 1:5] = 0
    assert not out.any()
    floats = images.pad(np.zeros((3, 4, 1), np.float32), 4)
    assert floats[3].min() == floats[3].max() == -1 and not floats[:3].any()


def test_decode_modes(tmp_path):
    colour = pixels(4, 5, 3)
    for mode, channels in (("1", 1), ("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("LA", 4), ("CMYK", 3)):
        file = tmp_path / (mode + (".tif" if mode == "CMYK" else ".png"))
        Image.fromarray(colour).convert(mode).save(file)
        out = images.decode(file, str(file))
        assert out.shape == (4, 5, channels) and out.dtype == np.uint8, mode
    np.testing.assert_array_equal(images.decode(tmp_path / "RGB.png", ""), colour)
    assert images.decode(tmp_path / "RGB.png", "", 1).shape == (4, 5, 1)
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0] = (10, 20, 30, 255)
    np.testing.assert_array_equal(images.convert(clear, 3), [[[10, 20, 30]] * 2, [[255] * 3] * 2])
    np.testing.assert_array_equal(images.convert(clear, 1)[1], [[255]] * 2)
    assert images.convert(colour, 4)[..., 3].min() == 255
    Image.fromarray(np.array([[7, 99]], np.uint8)).save(tmp_path / "key.png", transparency=7)  # one grey that is seen through
    np.testing.assert_array_equal(images.decode(tmp_path / "key.png", "", 1)[..., 0], [[255, 99]])
    Image.fromarray(np.zeros((3, 3), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="deep.png.*8-bit"):
        images.decode(tmp_path / "deep.png", "deep.png")


# --- refusals -----------------------------------------------------------------------------------------------------------


def npz_with(tmp_path, **arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    return tmp_path / "bad.npz"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_npz_is_refused(tmp_path, keep):
    file = truncate(npz_with(tmp_path, images=pixels(50, 8, 8), labels=np.zeros(50, int)), keep)
    refused(tmp_path, file, "npz", file, match="not a readable npz")


def test_damaged_npz_member_is_refused(tmp_path):
    file = npz_with(tmp_path, images=pixels(50, 8, 8))
    data = bytearray(file.read_bytes())
    data[1000] ^= 255
    file.write_bytes(data)
    refused(tmp_path, file, "npz", file, match="not a readable npz")


@pytest.mark.parametrize(
    "arrays, match",
    [
        ({"x_train": np.zeros((4, 8), np.uint8)}, "shape (4, 8)"),
        ({"x_train": np.zeros((4, 8, 8, 2), np.uint8)}, "shape (4, 8, 8, 2)"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8)}, "no images"),
        ({"x_train": np.zeros((4, 8, 8), np.float32)}, "float32"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.arange(3)}, "3 labels for 4 images"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.zeros(4)}, "labels are float64"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.zeros((4, 2), int)}, "shape (4, 2)"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.array([0, 1, -1, 2])}, "label -1 of train row 2"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "y_train": np.array([0, 1, 255, 2])}, "only 4 values occur"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8)}, "x_train"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "images": np.zeros((4, 8, 8), np.uint8)}, "give x_train"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8), "xtest": np.zeros((4, 8, 8), np.uint8)}, "xtest are unknown"),
        (
            {"x_train": np.zeros((2, 8, 8), np.uint8), "y_train": np.arange(2), "x_test": np.zeros((2, 8, 8), np.uint8)},
            "split 'test' has no labels",
        ),
        ({"x_train": np.zeros((2, 8, 8), np.uint8), "x_test": np.zeros((2, 9, 9), np.uint8)}, "--size"),
    ],
)
def test_bad_npz_is_refused(tmp_path, arrays, match):
    file = npz_with(tmp_path, **arrays)
    refused(tmp_path, file, "npz", file, match=match)


def test_labels_beyond_the_class_names_are_refused(tmp_path):
    file = npz_with(tmp_path, images=pixels(4, 8, 8), labels=np.array([0, 1, 2, 1]))
    refused(tmp_path, file, "npz", file, match="label 2 of train row 2 is outside 0..1", class_names=("a", "b"))
    refused(tmp_path, tmp_path / "none.npz", "npz", tmp_path / "none.npz")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_bad_idx_is_refused(tmp_path, end):
    x = write_idx(tmp_path / f"train-images-idx3-ubyte{end}", pixels(50, 8, 8))
    y = tmp_path / f"train-labels-idx1-ubyte{end}"
    refused(tmp_path, y, "idx", x, match="does not exist")
    write_idx(y, np.zeros(49, np.uint8))
    refused(tmp_path, y, "idx", x, match="49 labels for 50 images")
    write_idx(y, np.zeros(50, np.uint8))
    refused(tmp_path, truncate(x), "idx", x, match="truncated")
    refused(tmp_path, truncate(x, 0), "idx", x)
    x.write_bytes(gzip.compress(b"text, not an idx") if end else b"text, not an idx")
    refused(tmp_path, x, "idx", x, match="not an idx file")
    write_idx(tmp_path / "pictures", pixels(2, 8, 8))
    refused(tmp_path, tmp_path / "pictures", "idx", tmp_path / "pictures", match="'labels'")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", "idx", tmp_path / "empty", match="train-images")


def test_bad_folders_are_refused(tmp_path):
    folder = tmp_path / "in"
    refused(tmp_path, folder, "folder", folder, match="not a folder")
    folder.mkdir()
    refused(tmp_path, folder, "folder", folder, match="no images")
    good = save(folder / "a" / "1.png", pixels(20, 20, 3))
    (folder / "b").mkdir()
    refused(tmp_path, folder / "b", "folder", folder, match="no images in this class")
    file = save(folder / "b" / "2.png", pixels(20, 20, 3))
    refused(tmp_path, truncate(file), "folder", folder, match="unreadable image")
    file.write_text("this is text")
    refused(tmp_path, file, "folder", folder, match="unreadable image")
    save(file, pixels(20, 21, 3))
    refused(tmp_path, file, "folder", folder, match="--size")
    save(file, pixels(20, 20, 1))
    refused(tmp_path, file, "folder", folder, match="--channels")
    save(file, pixels(20, 20, 3))
    stray = save(folder / "0.png", pixels(20, 20, 3))
    refused(tmp_path, stray, "folder", folder, match="label is missing")
    stray.unlink()
    (folder / "b" / "3.txt").write_text("lonely")
    refused(tmp_path, folder / "b" / "3.txt", "folder", folder, match="caption without image")
    (folder / "b" / "3.txt").rename(folder / "b" / "2.txt")
    refused(tmp_path, good, "folder", folder, match="image without caption")
    good.with_suffix(".txt").write_text("  ")
    refused(tmp_path, good.with_suffix(".txt"), "folder", folder, match="empty caption")
    good.with_suffix(".txt").write_text("fine")
    twin = save(folder / "a" / "1.jpg", pixels(20, 20, 3))
    refused(tmp_path, folder / "a" / "1", "folder", folder, match="share the caption")
    twin.unlink()
    assert prepare.prepare("folder", folder, tmp_path / "out")["splits"]["train"]["count"] == 2


def test_bad_caption_listings_are_refused(tmp_path):
    folder = tmp_path / "in"
    for i in range(2):
        save(folder / f"{i}.png", pixels(4, 4, 3))
    listing = folder / "captions.jsonl"
    for text, match in [
        ('{"file": "0.png", "caption": "a"}\n{"file": "9.png", "caption": "b"}', "9.png: caption without image"),
        ('{"file": "0.png", "caption": "a"}', "1.png: image without caption"),
        ('{"file": "0.png", "caption": "a"}\n{"file": "1.png"}', "captions.jsonl line 2"),
        ('{"file": "0.png", "caption": "a"}\nnonsense', "captions.jsonl line 2"),
        ('{"file": "0.png", "caption": "a"}\n{"file": "0.png", "caption": "b"}', "captions.jsonl line 2"),
        ('{"file": "0.png", "caption": " "}', "captions.jsonl line 1"),
        ('{"file": "0.png", "caption": 3}', "captions.jsonl line 1"),
    ]:
        listing.write_text(text)
        refused(tmp_path, folder, "folder", folder, match=match)


def test_truncated_tfds_shard_is_refused(tmp_path):
    from flowjax.data import digits

    path = digits.prepare(tmp_path)
    (shard,) = path.glob("*test.array_record*")
    for keep in (0.9, 0.3, 0.0):
        truncate(shard, keep)
        refused(tmp_path, shard, "tfds", path)
    refused(tmp_path, tmp_path, "tfds", tmp_path, match="dataset_info.json")


# --- options ------------------------------------------------------------------------------------------------------------


def test_size_and_channels(tmp_path):
    for i, shape in enumerate([(8, 12, 3), (16, 9, 4), (7, 7, 1)]):
        save(tmp_path / "in" / f"{i}.png", pixels(*shape))
    assert prepare.prepare("folder", tmp_path / "in", tmp_path / "out", size=6, channels=3)["image_shape"] == [6, 6, 3]
    np.savez(tmp_path / "a.npz", images=pixels(3, 10, 10))
    made = prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "npz", size=5, channels=3)
    assert made["image_shape"] == [5, 5, 3] and made["source"]["size"] == 5


def test_holdout_is_by_content(tmp_path):
    x = pixels(400, 4, 4)
    x[200:] = x[:200]  # every image twice
    np.savez(tmp_path / "a.npz", images=x, labels=np.arange(400) % 2)
    made = prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "out", holdout=0.25)
    train, test = (read(tmp_path / "out", s)["image"] for s in ("train", "test"))
    assert len(train) + len(test) == 400 and 60 < len(test) < 140
    assert not {i.tobytes() for i in train} & {i.tobytes() for i in test}
    assert made["source"]["holdout"] == 0.25
    for image in test:
        assert hashlib.sha256(image.tobytes()).digest()[0] < 64  # a quarter of the values of the first byte
    np.savez(tmp_path / "b.npz", x_train=x, x_test=x)
    with pytest.raises(ConfigError, match="split 'test' already"):
        prepare.prepare("npz", tmp_path / "b.npz", tmp_path / "b", holdout=0.25)
    with pytest.raises(ConfigError, match="empty"):
        prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "b", holdout=1e-9)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"channels": 2}, "--channels"),
        ({"size": -1}, "--size"),
        ({"holdout": 1.0}, "--holdout"),
        ({"holdout": -0.1}, "--holdout"),
    ],
)
def test_bad_options_are_refused(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        prepare.prepare("npz", "a.npz", tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match="valid: folder, idx, npz, tfds"):
        prepare.prepare("zip", "a.npz", tmp_path / "out")
    with pytest.raises(ConfigError, match="class_names"):
        prepare.prepare("folder", tmp_path, tmp_path / "out", class_names=("a",))


# --- the command --------------------------------------------------------------------------------------------------------


def tool(*args):
    return subprocess.run([sys.executable, "-m", "tools.prepare_data", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_command(tmp_path):
    file = npz_with(tmp_path, images=pixels(6, 8, 8), labels=np.arange(6) % 2)
    run = ["--door=npz", f"--path={file}", f"--out={tmp_path / 'out'}"]
    done = tool(*run, "--class_names=a,b")
    assert done.returncode == 0 and "train 6, image [8, 8, 1] uint8, 2 classes" in done.stdout, done.stderr
    manifest = records.read_manifest(tmp_path / "out")
    assert manifest["command"].startswith("python -m tools.prepare_data --door=npz") and manifest["class_names"] == ["a", "b"]
    refusal = tool(*run, "--class_names=c,d")
    assert refusal.returncode == 1 and "--overwrite" in refusal.stderr and "Traceback" not in refusal.stderr
    assert tool(*run, "--class_names=c,d", "--overwrite").returncode == 0
    unread = tool("--door=digits", f"--out={tmp_path / 'digits'}", "--size=16")
    assert unread.returncode == 1 and "--size means nothing for --door=digits" in unread.stderr and not (tmp_path / "digits").exists()
    shard = tmp_path / "out" / "train-00000.array_record"
    assert tool(f"--verify={tmp_path / 'out'}").returncode == 0
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    verify = tool(f"--verify={tmp_path / 'out'}")
    assert verify.returncode == 1 and str(shard) in verify.stderr
