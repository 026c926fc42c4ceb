"""Pipelines: batches are a function of (section, seed, number), whoever reads them and wherever the reading starts."""

import json

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import pipeline as module, prepare, records, sources
from flowjax.data.pipeline import arrays, interleave, pipeline
from flowjax.data.records import DataError

N = 50
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (N, 6, 4, 1), np.uint8)
X[:, 0, 0, 0] = np.arange(N)  # a mark that tells images apart
Y = np.arange(N) % 5


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    np.savez(root / "a.npz", x_train=X, y_train=Y, x_test=X[:7], y_test=Y[:7])
    prepare.prepare("npz", root / "a.npz", root / "a")
    return str(root / "a")


@pytest.fixture
def section(path):
    return {"name": "array_record", "path": path}


def take(pipe, n):
    return [next(pipe) for _ in range(n)]


def marks(batch):
    return np.rint((batch["x"][:, 0, 0, 0] + 1) * 127.5).astype(int)


def same(a, b):
    assert a.keys() == b.keys() and a["cond"].keys() == b["cond"].keys()
    for x, y in [(a[k], b[k]) for k in a if k != "cond"] + [(a["cond"][k], b["cond"][k]) for k in a["cond"]]:
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def order(section, n=N, seed=0, **kwargs):
    return np.concatenate([marks(b) for b in take(pipeline(section, 10, seed, **kwargs), n // 10)])


# --- what a batch is ----------------------------------------------------------------------------------------------------


def test_batches_hold_the_data(section):
    pipe = pipeline(section, 10, 0, shuffle=False)
    assert pipe.num_classes == 5 and pipe.shape == (6, 4, 1) and iter(pipe) is pipe
    assert pipe.manifest["name"] == "a" and pipe.manifest["count"] == N and len(pipe.manifest["content_hash"]) == 64
    json.dumps(pipe.manifest)
    batch = take(pipe, 3)[2]
    assert batch["x"].dtype == np.float32 and batch["cond"]["label"].dtype == np.int32
    np.testing.assert_allclose(batch["x"], X[20:30] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(batch["cond"]["label"], Y[20:30])
    whole = arrays(section)
    assert whole["x"].shape == (N, 6, 4, 1)
    np.testing.assert_array_equal(whole["x"][20:30], batch["x"])
    np.testing.assert_array_equal(whole["cond"]["label"], Y)
    assert len(arrays(section, "test")["x"]) == 7
    assert len(arrays(section, limit=9)["x"]) == 9 and len(arrays(section, limit=99)["x"]) == N


def test_pixel_range(tmp_path):
    np.savez(tmp_path / "b.npz", images=np.array([0, 255], np.uint8)[:, None, None])
    prepare.prepare("npz", tmp_path / "b.npz", tmp_path / "b")
    batch = arrays({"name": "array_record", "path": str(tmp_path / "b")})
    assert batch["x"].ravel().tolist() == [-1.0, 1.0] and batch["cond"] == {}


def test_reading_from_disk_equals_reading_from_memory(section, monkeypatch):
    cached = take(pipeline(section | {"pad": 8, "flip": True}, 10, 3), 7)
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    uncached = pipeline(section | {"pad": 8, "flip": True}, 10, 3)
    for a, b in zip(cached, take(uncached, 7), strict=True):
        same(a, b)


def test_small_data_is_read_once(section, monkeypatch):
    reads = []
    real = records.Records.read
    monkeypatch.setattr(records.Records, "read", lambda self, i: reads.append(len(i)) or real(self, i))
    take(pipeline(section, 10, 0), 20)
    assert reads == [N]
    monkeypatch.setattr(module, "CACHE_BYTES", N * 24 - 1)
    take(pipeline(section, 10, 0), 5)
    assert len(reads) > 5 and set(reads[1:]) == {10}


# --- order --------------------------------------------------------------------------------------------------------------


def test_each_epoch_has_an_order_of_its_own(section):
    seen = order(section, 3 * N).reshape(3, N)
    for epoch in seen:
        assert sorted(epoch) == list(range(N))
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])
    assert not np.array_equal(seen[0], np.arange(N))


def test_the_seed_decides_the_order(section):
    np.testing.assert_array_equal(order(section, seed=1), order(section, seed=1))
    assert not np.array_equal(order(section, seed=1), order(section, seed=2))
    np.testing.assert_array_equal(order(section, 2 * N, shuffle=False), [*range(N)] * 2)


def test_the_end_without_repeat(section):
    batches = list(pipeline(section, 8, 0, repeat=False))
    assert len(batches) == 6 and all(len(b["x"]) == 8 for b in batches)
    assert len(set(np.concatenate([marks(b) for b in batches]))) == 48
    for a, b in zip(batches, take(pipeline(section, 8, 0), 6), strict=True):
        same(a, b)
    assert len(list(pipeline(section, 8, 0, repeat=False, start=4))) == 2
    # An epoch may end within a batch when the stream repeats.
    assert len(take(pipeline(section, 64, 0), 1)[0]["x"]) == 64


@pytest.mark.parametrize("extra", [{}, {"flip": True}])
def test_resuming_continues_bitwise(section, extra):
    section = section | extra
    pipe = pipeline(section, 8, 5)
    take(pipe, 9)
    state = json.loads(json.dumps(pipe.get_state()))
    assert state == {"next_index": 9}
    expected = take(pipe, 12)
    fresh = pipeline(section, 8, 5)
    take(fresh, 2)
    fresh.set_state(state)
    for a, b, c in zip(expected, take(fresh, 12), take(pipeline(section, 8, 5, start=9), 12), strict=True):
        same(a, b)
        same(a, c)
    assert not np.array_equal(expected[0]["x"], take(pipeline(section, 8, 5), 1)[0]["x"])


MIXTURE = {"name": "mixture", "parts": ("mix4", {"name": "mix4", "seed": 9}), "weights": (0.7, 0.3)}


@pytest.mark.parametrize("kind", ["records", "toy", "mixture"])
def test_processes_make_up_the_batch_of_one(section, kind):
    section = {"records": section | {"flip": True}, "toy": "moons", "mixture": MIXTURE}[kind]
    whole = take(pipeline(section, 12, 4), 9)
    blocks = [take(pipeline(section, 12, 4, process_index=i, process_count=3), 9) for i in range(3)]
    for k in range(9):
        joined = {
            "x": np.concatenate([b[k]["x"] for b in blocks]),
            "cond": {"label": np.concatenate([b[k]["cond"]["label"] for b in blocks])},
        }
        assert len(blocks[0][k]["x"]) == 4
        same(whole[k], joined)


def test_threads_do_not_matter(section, monkeypatch):
    runs = []
    for threads in (0, 1, 7):
        monkeypatch.setattr(module, "THREADS", threads)
        runs.append(take(pipeline(section | {"flip": True}, 8, 5), 12))
    for a, b, c in zip(*runs, strict=True):
        same(a, b)
        same(a, c)


# --- transforms ---------------------------------------------------------------------------------------------------------


def test_flips(section):
    plain = take(pipeline(section, 10, 0), 40)
    flipped = take(pipeline(section | {"flip": True}, 10, 0), 40)
    bits = []
    for a, b in zip(plain, flipped, strict=True):
        np.testing.assert_array_equal(a["cond"]["label"], b["cond"]["label"])
        for x, y in zip(a["x"], b["x"], strict=True):
            bits.append(not np.array_equal(x, y))
            np.testing.assert_array_equal(y, x[:, ::-1] if bits[-1] else x)
    bits = np.array(bits).reshape(-1, N)
    assert 0.4 < bits.mean() < 0.6
    assert all(0.2 < (bits[i] != bits[i + 1]).mean() < 0.8 for i in range(len(bits) - 1))  # every epoch anew
    for a, b in zip(flipped, take(pipeline(section | {"flip": True}, 10, 0), 40), strict=True):
        same(a, b)
    np.testing.assert_array_equal(arrays(section | {"flip": True})["x"], arrays(section)["x"])


def test_pad_and_resize(section):
    padded = arrays(section | {"pad": 8})["x"]
    assert pipeline(section | {"pad": 8}, 10, 0).shape == padded.shape[1:] == (8, 8, 1)
    np.testing.assert_array_equal(padded[:, 1:7, 2:6], arrays(section)["x"])
    assert padded[:, 0].max() == padded[:, :, 0].max() == -1
    both = pipeline(section | {"resize": 4, "pad": 6}, 10, 0, shuffle=False)
    assert both.shape == (6, 6, 1) and both.manifest["transforms"] == {"resize": 4, "pad": 6}
    np.testing.assert_array_equal(next(both)["x"][:, 1:5, 1:5], (X[:10, 1:5] / np.float32(127.5) - 1).astype(np.float32))
    assert arrays(section | {"resize": 3})["x"].shape == (N, 3, 3, 1)


# --- mixtures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (5.0, 3.0, 2.0), (1.0, 8.0, 2.0, 1.0)])
def test_interleaving_keeps_the_weights_everywhere(weights):
    positions = np.arange(5000)
    part, local = interleave(positions, weights)
    share = np.array(weights) / sum(weights)
    for j in range(len(weights)):
        np.testing.assert_array_equal(local[part == j], np.arange((part == j).sum()))  # nothing skipped, nothing twice
        for stretch in (slice(0, 100), slice(1234, 2345), slice(0, 5000)):
            p = part[stretch]
            assert abs((p == j).sum() - share[j] * len(p)) <= len(weights)
    again = interleave(positions[3000:], weights)
    np.testing.assert_array_equal(again[0], part[3000:])
    np.testing.assert_array_equal(again[1], local[3000:])


def test_mixture_of_records(section, tmp_path):
    np.savez(tmp_path / "b.npz", images=255 - X[:20, :, :, 0], labels=Y[:20])
    prepare.prepare("npz", tmp_path / "b.npz", tmp_path / "b")
    parts = (section, {"name": "array_record", "path": str(tmp_path / "b")})
    pipe = pipeline({"name": "mixture", "parts": parts, "weights": (3, 1)}, 20, 0)
    assert pipe.num_classes == 5 and pipe.shape == (6, 4, 1) and [p["name"] for p in pipe.manifest["parts"]] == ["a", "b"]
    known = {x.tobytes(): (0, i) for i, x in enumerate(X)} | {(255 - x).tobytes(): (1, i) for i, x in enumerate(X[:20])}
    found = []
    for batch in take(pipe, 20):
        images = np.rint((batch["x"] + 1) * 127.5).astype(np.uint8)
        rows = [known[x.tobytes()] for x in images]
        np.testing.assert_array_equal(batch["cond"]["label"], [Y[i] for _, i in rows])
        assert sum(p for p, _ in rows) == 5
        found += rows
    first = [i for p, i in found if p == 0][:N]
    assert sorted(first) == list(range(N)) and sorted(i for p, i in found if p == 1)[::5] == list(range(20))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"weights": (1.0,)}, "weights"),
        ({"weights": (1.0, 0.0)}, "weights"),
        ({"weights": (1.0, float("nan"))}, "weights"),
        ({"parts": ("mix4", "moons")}, "agree"),
        ({"parts": (), "weights": ()}, "weights"),
        ({"flip": True}, "flip is unknown; valid: parts, weights"),
        ({"parts": ("mix4", {"name": "mixture", "parts": ("mix4",), "weights": (1.0,)})}, "mixture"),
    ],
)
def test_bad_mixtures(change, match):
    with pytest.raises(ConfigError, match=match):
        pipeline(MIXTURE | change, 10, 0)


# --- endless data -------------------------------------------------------------------------------------------------------


def test_toys(monkeypatch):
    pipe = pipeline("mix4", 64, 0)
    assert pipe.shape == (2,) and pipe.num_classes == 4 and pipe.manifest["count"] is None
    json.dumps(pipe.manifest)
    stream = np.concatenate([b["x"] for b in take(pipe, 20)])
    assert len(np.unique(stream, axis=0)) == len(stream) == 1280

    def first(**kwargs):
        section = {"name": "mix4", "seed": kwargs.pop("data_seed", 0)}
        return pipeline(section, 64, kwargs.pop("seed", 0), **kwargs).__next__()["x"].tobytes()

    assert first() == first() == stream[:64].tobytes()
    assert len({first(), first(seed=1), first(data_seed=1), first(split="test"), first(shuffle=False)}) == 5
    np.testing.assert_array_equal(arrays("mix4", limit=64)["x"], next(pipeline("mix4", 64, 7, shuffle=False))["x"])
    assert next(pipeline("checkerboard", 4, 0))["cond"] == {}
    with pytest.raises(TypeError, match="endless"):
        len(sources.SOURCES["mix4"]("train"))


# --- preference pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_preferences(tmp_path, dtype):
    win = X if dtype == np.uint8 else (X / 127.5 - 1).astype(np.float32)
    made = sources.write_preferences(tmp_path / "p", win, win[::-1], Y, num_classes=5, meta={"rule": "brighter"})
    assert made["source"] == {"rule": "brighter"} and made["image_shape"] == [6, 4, 1] and made["num_classes"] == 5
    section = {"name": "preferences", "path": str(tmp_path / "p"), "flip": True, "pad": 6}
    pipe = pipeline(section, 10, 0)
    assert pipe.shape == (6, 6, 1) and pipe.num_classes == 5
    batch = next(pipe)
    assert set(batch) == {"win", "lose", "cond"} and batch["win"].dtype == batch["lose"].dtype == np.float32
    whole = arrays(section | {"pad": 0})
    np.testing.assert_allclose(whole["win"], X / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(whole["lose"], whole["win"][::-1], atol=0)
    found = {w[:, 1:5].tobytes() + lose[:, 1:5].tobytes() for w, lose in zip(batch["win"], batch["lose"], strict=True)}
    pairs = zip(whole["win"], whole["lose"], strict=True)
    known = {a.tobytes() + b.tobytes() for w, lo in pairs for a, b in [(w, lo), (w[:, ::-1], lo[:, ::-1])]}
    assert found <= known and len(found) == 10  # a pair is flipped together
    assert batch["win"][:, :, 0].max() == -1 and batch["win"][:, :, 5].max() == -1


def test_preferences_of_points(tmp_path):
    win = RNG.normal(size=(8, 2)).astype(np.float32)
    assert sources.write_preferences(tmp_path / "p", win, -win)["num_classes"] == 0
    batch = next(pipeline({"name": "preferences", "path": str(tmp_path / "p")}, 8, 0, shuffle=False))
    np.testing.assert_array_equal(batch["win"], win)
    np.testing.assert_array_equal(batch["lose"], -win)
    assert batch["cond"] == {}


def test_pairs_and_marked_examples_with_captions(tmp_path):
    captions = [f"picture {i}" for i in range(len(X))]
    said = lambda tokens: [bytes(int(i) - 1 for i in row if i).decode() for row in tokens]  # noqa: E731
    text = {"name": "bytes", "length": 12}
    sources.write_preferences(tmp_path / "p", X, X[::-1], captions=captions)
    section = {"name": "preferences", "path": str(tmp_path / "p"), "text": text}
    batch = next(pipeline(section, 10, 0))
    found = [captions.index(c) for c in said(batch["cond"]["tokens"])]
    np.testing.assert_allclose(batch["win"], X[found] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(batch["lose"], X[::-1][found] / 127.5 - 1, atol=1e-6)
    good = np.arange(len(X)) % 3 == 0
    made = sources.write_feedback(tmp_path / "f", X, good, Y, 5, captions=captions)
    assert made["features"]["desirable"]["dtype"] == "int32" and made["name"] == "feedback"
    pipe = pipeline({"name": "array_record", "path": str(tmp_path / "f"), "text": text, "flip": True}, 10, 0)
    batch = next(pipe)
    found = [captions.index(c) for c in said(batch["cond"]["tokens"])]
    assert batch["desirable"].dtype == bool and batch["desirable"].tolist() == good[found].tolist()
    np.testing.assert_array_equal(batch["cond"]["label"], Y[found])
    mixed = pipeline({"name": "mixture", "parts": [{"name": "array_record", "path": str(tmp_path / "f")}] * 2, "weights": [1, 1]}, 6, 0)
    assert next(mixed)["desirable"].shape == (6,)


def test_feedback_that_teaches_nothing_is_refused(tmp_path):
    good = np.arange(len(X)) % 2 == 0
    for mark in (np.ones(len(X), bool), np.zeros(len(X), bool)):
        with pytest.raises(ConfigError, match="all .* examples are marked as .*: there is nothing to tell apart"):
            sources.write_feedback(tmp_path / "f", X, mark)
    with pytest.raises(ConfigError, match="desirable must hold .* bools"):
        sources.write_feedback(tmp_path / "f", X, good.astype(int))
    with pytest.raises(ConfigError, match=r"must be uint8 or float32 \(n, ...\)"):
        sources.write_feedback(tmp_path / "f", X.astype(int), good)
    for captions in (["x"], ["x"] * (len(X) - 1) + [" "]):
        with pytest.raises(ConfigError, match="captions must be .* strings, none of them empty"):
            sources.write_feedback(tmp_path / "f", X, good, captions=captions)
        with pytest.raises(ConfigError, match="captions must be"):
            sources.write_preferences(tmp_path / "f", X, X, captions=captions)
    with pytest.raises(ConfigError, match="preferences: no examples"):
        sources.write_preferences(tmp_path / "f", X[:0], X[:0])
    assert not (tmp_path / "f").exists()


def test_bad_preferences(tmp_path, path):
    x = np.zeros((4, 2), np.float32)
    for args in [(x, x[:3]), (x, x.astype(np.uint8)), (x.astype(float), x.astype(float)), (x[:, 0], x[:, 0])]:
        with pytest.raises(ConfigError, match="alike"):
            sources.write_preferences(tmp_path / "p", *args)
    for label in ([0, 1, 2, 3], [0, -1, 0, 0], [0, 1]):
        with pytest.raises(ConfigError, match="label"):
            sources.write_preferences(tmp_path / "p", x, x, label, num_classes=3)
    with pytest.raises(ConfigError, match="no lose and no win"):
        pipeline({"name": "preferences", "path": path}, 2, 0)
    assert not (tmp_path / "p").exists()


# --- TFDS ---------------------------------------------------------------------------------------------------------------


def test_tfds_source(tmp_path):
    from flowjax.data import digits

    directory = digits.prepare(tmp_path)
    by_name = {"name": "tfds", "dataset": "digits", "data_dir": str(tmp_path)}
    expected = arrays({"name": "digits", "data_dir": str(tmp_path)}, "test")
    same(arrays(by_name, "test"), expected)
    same(arrays(by_name | {"dataset": "digits/1.0.0"}, "test"), expected)
    same(arrays({"name": "tfds", "directory": str(directory)}, "test"), expected)
    assert arrays(by_name | {"label": ""}, "test")["cond"] == {}
    assert pipeline(by_name, 8, 0).num_classes == 10 and pipeline(by_name | {"label": ""}, 8, 0).num_classes == 0
    # The newest version, by number and not by letters.
    (tmp_path / "digits" / "0.10.0").symlink_to(directory)
    (tmp_path / "digits" / "0.9.0").mkdir()
    (tmp_path / "digits" / "0.9.0" / "dataset_info.json").write_text("")
    same(arrays(by_name, "test"), expected)
    for change, match in [
        ({"directory": "x"}, "either"),
        ({"dataset": ""}, "either"),
        ({"dataset": "mnist"}, "mnist: no prepared"),
        ({"image": "picture"}, "data.image = 'picture'"),
        ({"label": "row"}, "data.label = 'row'"),
    ]:
        with pytest.raises(ConfigError, match=match):
            pipeline(by_name | change, 8, 0)
    with pytest.raises(ConfigError, match="split 'valid' .* valid: test, train|split 'valid' .* valid: train, test"):
        pipeline(by_name, 8, 0, split="valid")
    (shard,) = directory.glob("*train.array_record*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=str(shard)):
        pipeline(by_name, 8, 0)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, match",
    [
        ({"batch_size": 9, "process_count": 2}, "batch_size = 9"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"process_index": 1}, "process_index = 1"),
        ({"process_index": -1}, "process_index = -1"),
        ({"start": -1}, "start = -1"),
        ({"batch_size": N + 1, "repeat": False}, "larger than the 50"),
        ({"split": "valid"}, "valid: test, train"),
    ],
)
def test_bad_calls(section, call, match):
    with pytest.raises(ConfigError, match=match):
        pipeline(section, **{"batch_size": 10, "seed": 0} | call)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"name": "folder"}, "data.name = 'folder' is unknown; valid: array_record, checkerboard, digits"),
        ({"flop": True}, "data.flop is unknown for array_record; valid: path, size, pad, resize, flip"),
        ({"flip": 1}, "flip = 1 should be bool"),
        ({"pad": 5}, "pad = 5 is smaller"),
        ({"pad": -1}, "pad = -1"),
        ({"resize": -1}, "resize = -1"),
        ({"path": "nowhere"}, "nowhere/manifest.json"),
    ],
)
def test_bad_sections(section, change, match):
    with pytest.raises(ConfigError, match=match):
        pipeline(section | change, 10, 0)
    with pytest.raises(ConfigError, match="lacks path"):
        pipeline({"name": "array_record"}, 10, 0)


def test_more_refusals(section, tmp_path, monkeypatch):
    assert len(list(pipeline(section, N, 0, repeat=False))) == 1
    with pytest.raises(ConfigError, match="pad, resize and flip are for images"):
        pipeline({"name": "mix4", "flip": True}, 10, 0)
    for bad in ("mix4", MIXTURE):
        with pytest.raises(ConfigError, match="repeat"):
            pipeline(bad, 10, 0, repeat=False)
    with pytest.raises(ConfigError, match="limit"):
        arrays("mix4")
    with pytest.raises(ConfigError, match="mixture"):
        arrays(MIXTURE, limit=3)
    with pytest.raises(ConfigError, match="valid: train, test"):
        pipeline("mix4", 10, 0, split="valid")
    sources.write_preferences(tmp_path / "p", np.zeros((4, 3, 3, 1), np.float32), np.zeros((4, 3, 3, 1), np.float32))
    with pytest.raises(ConfigError, match="resize is for uint8"):
        pipeline({"name": "preferences", "path": str(tmp_path / "p"), "resize": 2}, 2, 0)
    records.write(tmp_path / "c", [("train", "", {"caption": "words"})], name="words")
    with pytest.raises(ConfigError, match="words has only caption"):
        pipeline({"name": "array_record", "path": str(tmp_path / "c")}, 1, 0)
    monkeypatch.setattr(module, "ARRAY_BYTES", 4 * N * 24 - 1)
    with pytest.raises(ConfigError, match="GiB"):
        arrays(section)
    assert len(arrays(section, limit=N - 1)["x"]) == N - 1


@pytest.mark.parametrize("cache", [2**29, 0])
@pytest.mark.parametrize("label", [-1, 2])
def test_labels_outside_the_classes_are_refused(tmp_path, monkeypatch, cache, label):
    monkeypatch.setattr(module, "CACHE_BYTES", cache)
    rows = [("train", "", {"image": X[i], "label": label if i == 3 else i % 2}) for i in range(6)]
    records.write(tmp_path / "bad", rows, name="bad", num_classes=2)
    with pytest.raises(DataError, match=rf"bad \(train row 3\): label {label} is outside 0..1"):
        next(pipeline({"name": "array_record", "path": str(tmp_path / "bad")}, 6, 0))


def test_sizes_that_differ_need_resize(tmp_path):
    import tensorflow_datasets as tfds

    from flowjax.data import images

    class Mixed(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"image": images.encode_png(np.full((5 + i, 7, 1 if i == 2 else 3), 10 * i, np.uint8))}

    Mixed(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    section = {"name": "tfds", "dataset": "mixed", "data_dir": str(tmp_path)}
    for extra in ({}, {"flip": True}, {"pad": 16}):
        with pytest.raises(ConfigError, match="data.resize is missing"):
            pipeline(section | extra, 2, 0)
    pipe = pipeline(section | {"resize": 4}, 4, 0)
    assert pipe.shape == (4, 4, 3)
    assert sorted(np.rint((next(pipe)["x"] + 1) * 127.5)[:, 0, 0, 0]) == [0, 10, 20, 30]


def test_expectations_of_the_data(tmp_path):
    """expect_shape and expect_classes are promises: checked where the data are, believed where they are not."""
    rows = (("train", f"row {i}", {"x": np.full((4, 4, 2), i, np.float16), "label": i % 3}) for i in range(8))
    records.write(tmp_path / "d", rows, name="latents", num_classes=3)
    section = {"name": "array_record", "path": str(tmp_path / "d"), "expect_shape": (4, 4, 2), "expect_classes": 3}
    batch = next(pipeline(section, 8, 0, shuffle=False))
    assert batch["x"].dtype == np.float32 and batch["x"].shape == (8, 4, 4, 2)
    np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], np.arange(8))
    with pytest.raises(records.DataError, match=r"shape of the examples: \(4, 4, 2\), but data.expect_shape = \(4, 4, 4\)"):
        pipeline({**section, "expect_shape": (4, 4, 4)}, 8, 0)
    with pytest.raises(records.DataError, match="classes of the examples: 3, but data.expect_classes = 4"):
        pipeline({**section, "expect_classes": 4}, 8, 0)
    promise = module.declared({**section, "path": "nowhere"})
    assert promise.shape == (4, 4, 2) and promise.num_classes == 3 and promise.manifest["declared"]


def test_no_data_at_all():
    for read in (lambda: pipeline(None, 2, 0), lambda: arrays(None)):
        with pytest.raises(ConfigError, match="no data: this network was converted"):
            read()
