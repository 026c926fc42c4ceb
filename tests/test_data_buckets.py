"""Buckets of aspect ratios: every image once an epoch, one size a batch, exact resumes; and filters, by brute force."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from flowjax.config import ConfigError
from flowjax.data import filters, images, latents, prepare, records
from flowjax.data.pipeline import arrays, pipeline
from flowjax.train.assembly import Run
from train_runs import DIT, rows, same, tiny, train

RNG = np.random.default_rng(0)
SIZES = [(16, 16)] * 11 + [(30, 15)] * 6 + [(15, 30)] * 3 + [(17, 16)] * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """24 plain images: the grey of number i is 10 i, whatever becomes of its size. Its caption is its number."""
    root = tmp_path_factory.mktemp("buckets")
    (root / "in").mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(np.full(size, 10 * i, np.uint8)).save(root / "in" / f"{i:02d}.png")
        (root / "in" / f"{i:02d}.txt").write_text(f"number {i}")
    prepare.prepare("folder", root / "in", root / "out", area=256, step=4)
    return str(root / "out")


@pytest.fixture
def section(path):
    return {"name": "buckets", "path": path, "text": {"name": "bytes", "length": 16}}


def numbers(batch):
    return np.rint((batch["x"][:, 0, 0, 0] + 1) * 12.75).astype(int)


@pytest.mark.parametrize("area, step, sides, count", [(512**2, 64, (256, 1024), 17), (1024**2, 64, (256, 2048), 41)])
def test_published_buckets(area, step, sides, count):
    found = images.bucket_sizes(area, step, *sides)
    assert len(found) == len(set(found)) == count and (math.isqrt(area),) * 2 in found
    for h, w in found:
        assert h * w <= area and h % step == w % step == 0 and min(h, w) >= sides[0] and max(h, w) <= sides[1]
        assert (w, h) in found
        short, long = sorted((h, w))
        assert (short + step) * long > area or (long + step) * short > area or long + step > sides[1]  # no room for one step more


def test_the_users_own_sides_are_kept_to():
    """Sides need not be multiples of the step; those of buckets are, and lie between them."""
    for area, step, sides in ((96**2, 32, (64, 100)), (80**2, 16, (50, 90)), (64**2, 24, (40, 110))):
        for h, w in images.bucket_sizes(area, step, *sides):
            assert h % step == w % step == 0 and sides[0] <= min(h, w) and max(h, w) <= sides[1], (h, w)
    with pytest.raises(ConfigError, match="--sides = 100,200"):  # the largest square in steps of 64 has sides of 64
        images.bucket_sizes(100**2, 64, 100, 200)


def test_the_nearest_ratio_is_taken():
    sizes = images.bucket_sizes(64 * 64, 8)
    for shape in [(100, 100), (100, 99), (300, 100), (100, 170), (64, 90), (1, 1000)]:
        chosen = images.nearest_bucket(shape, sizes)
        wrong = lambda s: abs(math.log(s[0] * shape[1] / (s[1] * shape[0])))  # noqa: E731
        assert wrong(chosen) <= min(map(wrong, sizes)) + 1e-9
        assert images.nearest_bucket(shape[::-1], sizes) == chosen[::-1]


def test_prepared(path):
    manifest = records.read_manifest(path)
    assert manifest["image_shape"] == [None, None, 1] and manifest["splits"]["train"]["count"] == 24
    sizes = records.sizes(manifest, "train")
    assert sum(sizes.values()) == 24 and sizes[16, 16] == 15 and len(sizes) == 3
    seen = set()
    for size, count in sizes.items():
        reader = records.Records(path, "train", size)
        got = reader.read(range(len(reader)))
        assert got["image"].shape == (count, *size, 1)
        for image, caption in zip(got["image"], got["caption"]):
            i = int(caption.split()[1])
            assert (image == 10 * i).all() and size == images.nearest_bucket(SIZES[i], images.bucket_sizes(256, 4))
            seen.add(i)
    assert seen == set(range(24))


def test_every_image_once_an_epoch(section):
    """With batches that divide no bucket: after E epochs' worth of examples each image was shown E times, give or take one."""
    pipe = pipeline(section, 4, 0)
    assert set(pipe.shapes) == {(16, 16, 1), (20, 12, 1), (12, 20, 1)} and pipe.shape == pipe.shapes[0] == (16, 16, 1)
    assert pipe.manifest["count"] == 24 and pipe.manifest["buckets"] == {"16x16": 15, "20x12": 6, "12x20": 3}
    batches = list(itertools.islice(pipe, 60))
    for batch in batches:
        for i, tokens in zip(numbers(batch), batch["cond"]["tokens"]):
            assert batch["x"].shape[1:3] == images.nearest_bucket(SIZES[i], images.bucket_sizes(256, 4))
            assert tokens.tolist() == pipe.tokenizer([f"number {i}"], "test")[0].tolist()
    for epochs in (2, 4, 6, 10):
        shown = np.bincount(np.concatenate([numbers(b) for b in batches[: 6 * epochs]]), minlength=24)
        assert abs(shown - epochs).max() <= 1, shown
    both = [b["x"].shape for b in batches[:30]]
    assert len(set(both[:8])) > 1  # not one bucket after the other


def test_any_bucket_covers_itself_before_it_repeats(section):
    by_size = {}
    for batch in itertools.islice(pipeline(section, 3, 1), 100):
        by_size.setdefault(batch["x"].shape[1:3], []).extend(numbers(batch))
    for shown in by_size.values():
        members = set(shown)
        for start in range(0, len(shown) - len(members) + 1, len(members)):
            assert set(shown[start : start + len(members)]) == members
        assert shown[: len(members)] != shown[len(members) : 2 * len(members)] or len(members) == 1


def test_resumes_and_processes(section):
    whole = list(itertools.islice(pipeline(section, 4, 0), 12))
    halves = [list(itertools.islice(pipeline(section, 4, 0, process_index=p, process_count=2), 12)) for p in range(2)]
    late = list(itertools.islice(pipeline(section, 4, 0, start=7), 5))
    for k, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([h[k]["x"] for h in halves]), batch["x"])
    for a, b in zip(late, whole[7:]):
        np.testing.assert_array_equal(a["x"], b["x"])


def test_latents_of_buckets(section, tmp_path):
    manifest = latents.write(tmp_path / "z", section, latents.Encoder(lambda x: x[:, ::4, ::4], "vae"), splits=("train",), dtype="float32", batch=4)
    assert manifest["splits"]["train"]["count"] == 24
    pipe = pipeline({"name": "buckets", "path": str(tmp_path / "z")}, 4, 0)
    assert set(pipe.shapes) == {(4, 4, 1), (5, 3, 1), (3, 5, 1)} and pipe.manifest["latents"]["vae"] == "vae"
    shown = np.concatenate([np.rint((next(pipe)["x"][:, 0, 0, 0] + 1) * 12.75) for _ in range(60)])
    assert set(shown.astype(int)) == set(range(24))


NET = {**DIT, "num_classes": 0, "depth": 1}


def test_training_on_buckets_resumes_exactly(path, tmp_path):
    config = lambda **more: tiny(data={"name": "buckets", "path": path}, model=NET, steps=8, objective={"name": "flow_matching"},  # noqa: E731
                                 batch_size=8, checkpoint={"every": 3}, validation={"every": 4, "batches": 3, "split": "train"}, **more)  # fmt: skip
    run = Run(config())
    shapes = {next(run.pipeline)["x"].shape[1:] for _ in range(8)}
    assert len(shapes) == 3  # or nothing is shown below
    train(config(), tmp_path / "whole")
    train(config(), tmp_path / "parts", stop_at=4)
    assert train(config(), tmp_path / "parts")[0] == 8
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert sum("validation_loss" in r for r in rows(tmp_path / "whole")) == 2
    from flowjax.train import export

    same(export.load(str(tmp_path / "whole"))[1], export.load(str(tmp_path / "parts"))[1])


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "buckets"}, "data.path"),
        ({"name": "buckets", "size": (16, 16)}, "data.path"),
        ({"name": "buckets", "pad": 32}, "no size, resize or pad"),
        ({"name": "buckets", "limit": 3}, "data.limit = 3 .* of each bucket"),
        ({"name": "array_record"}, "in buckets of 12 x 20, 16 x 16, 20 x 12"),
        ({"name": "array_record", "size": (4, 4)}, "in buckets of"),
        ({"name": "buckets", "split": "test"}, "no buckets in split 'test'"),
    ],
)
def test_bad_sections(path, section, message):
    section = dict(section)
    split = section.pop("split", "train")
    if section.keys() & {"pad", "limit"} or section["name"] == "array_record" or split == "test":
        section["path"] = path
    with pytest.raises(ConfigError, match=message):
        pipeline(section, 4, 0, split=split)


def test_classes_of_which_a_bucket_has_none(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (16, 4), (4, 16)]):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size, 10 * i, np.uint8)).save(tmp_path / "in" / "ab"[i % 2] / f"{i}.png")
    prepare.prepare("folder", tmp_path / "in", tmp_path / "out", area=64, step=4)
    section = {"name": "buckets", "path": str(tmp_path / "out")}
    pipe = pipeline(section | {"classes": (0,)}, 1, 0)
    assert pipe.manifest["buckets"] == {"8x8": 1, "16x4": 1} and {int(n) for _ in range(4) for n in numbers(next(pipe))} == {0, 2}
    with pytest.raises(ConfigError, match="2 is none of the 2 classes"):
        pipeline(section | {"classes": (2,)}, 1, 0)
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.zeros(2, int))
    prepare.prepare("npz", tmp_path / "c.npz", tmp_path / "c", area=64, step=4, class_names=("a", "b"))
    with pytest.raises(ConfigError, match=r"no example of data.classes = \(1,\)"):
        pipeline({"name": "buckets", "path": str(tmp_path / "c"), "classes": (1,)}, 1, 0)


def test_data_of_one_size_have_no_buckets(tmp_path):
    np.savez(tmp_path / "a.npz", images=RNG.integers(0, 256, (4, 8, 8, 1), np.uint8))
    prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "a")
    with pytest.raises(ConfigError, match="no buckets"):
        pipeline({"name": "buckets", "path": str(tmp_path / "a")}, 2, 0)
    with pytest.raises(ConfigError, match="of one size"):
        pipeline({"name": "array_record", "path": str(tmp_path / "a"), "size": (8, 8)}, 2, 0)


def test_no_single_batch_of_several_sizes(section):
    with pytest.raises(ConfigError, match="one bucket"):
        arrays(section)
    assert len(arrays({"name": "array_record", "path": section["path"], "size": (20, 12)})["x"]) == 6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"area": 64, "size": 8}, "give one of them"),
        ({"area": 63, "step": 8}, "--step"),
        ({"area": 64, "step": 8, "sides": (9, 16)}, "--sides"),
        ({"step": 8}, "--step = 8 .* without --area"),
        ({"size": 8, "sides": (4, 16)}, "--sides = 4,16 .* without --area"),
        ({"duplicates": 64}, "--duplicates"),
        ({"caption_words": (1, 0)}, "no captions"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    np.savez(tmp_path / "a.npz", images=RNG.integers(0, 256, (4, 8, 8, 1), np.uint8))
    with pytest.raises(ConfigError, match=message):
        prepare.prepare("npz", tmp_path / "a.npz", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# --- filters ------------------------------------------------------------------------------------------------------------


def textured(seed):
    """A smooth random picture, as different from the others as photographs are."""
    rough = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((96, 96), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_duplicates_by_brute_force(distance):
    """The index of pieces finds what comparing everything with everything finds."""
    rng = np.random.default_rng(1)
    flips = [[*rng.choice(64, rng.integers(0, 10), replace=False)] for _ in range(200)]
    hashes = [(0x0123456789ABCDEF * (1 + i % 3)) % 2**64 ^ sum(1 << int(b) for b in bits) for i, bits in enumerate(flips)]
    kept = []
    for h in hashes:
        if all((h ^ k).bit_count() > distance for k in kept):
            kept.append(h)
    keep = filters.duplicates(distance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "dhash", lambda image: image)
        assert [h for h in hashes if keep({"image": h})] == kept
    assert len(kept) < len(hashes)


def test_copies_are_found_and_others_are_kept(tmp_path):
    """Exact and JPEG copies (quality 70) and halves of the size are all dropped; of 300 different pictures none."""
    keep = filters.duplicates(4)
    originals = [textured(i) for i in range(300)]
    assert all(keep({"image": v}) for v in originals)
    for v in originals[:40]:
        Image.fromarray(v).save(tmp_path / "copy.jpg", quality=70)
        assert not keep({"image": v.copy()})
        assert not keep({"image": np.asarray(Image.open(tmp_path / "copy.jpg"))})
        assert not keep({"image": np.asarray(Image.fromarray(v).resize((48, 48), Image.Resampling.LANCZOS))})


def test_dhash_is_of_brightness_to_the_right():
    ramp = np.tile(np.arange(0, 252, 4, dtype=np.uint8), (63, 1))[..., None]
    assert filters.dhash(ramp) == 2**64 - 1 and filters.dhash(ramp[:, ::-1]) == 0
    assert filters.dhash(ramp.swapaxes(0, 1)) == 0  # flat from left to right
    lit = ramp.copy()
    lit[: len(lit) // 2] = lit[: len(lit) // 2, ::-1]
    assert filters.dhash(lit) == 2**32 - 1


def test_filters_of_a_data_set(tmp_path):
    (tmp_path / "in").mkdir()
    pictures = {"a": (textured(0), "one two"), "b": (textured(1)[:20], "three four"), "c": (textured(2), "five"),
                "d": (textured(0), "six seven"), "e": (textured(3), "eight nine ten\neleven twelve")}  # fmt: skip
    for name, (image, caption) in pictures.items():
        Image.fromarray(image).save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text(caption)
    made = prepare.prepare("folder", tmp_path / "in", tmp_path / "out", size=16, smallest_side=32, caption_words=(2, 3), duplicates=4)
    assert made["source"]["dropped"] == {"smallest_side": 1, "caption_words": 1, "duplicates": 1}
    assert records.Records(tmp_path / "out", "train").read(range(2))["caption"] == ["one two", "eight nine ten\neleven twelve"]
    import grain

    examples = [{"image": image, "caption": caption} for image, caption in pictures.values()]
    stream = grain.MapDataset.source(examples).filter(filters.smallest_side(32)).filter(filters.caption_words(0, 2))
    assert [e["caption"] for e in stream.to_iter_dataset()] == ["one two", "five", "six seven"]

