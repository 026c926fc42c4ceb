"""Captions to token ids: nothing cut or lost in silence; which of several captions is shown, and when."""

import json

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import pipeline as pipeline_lib, prepare, records, text
from flowjax.data.pipeline import arrays, declared, pipeline


def test_bytes_can_be_read_back():
    tokenizer = text.build({"name": "bytes", "length": 12})
    ids = tokenizer(["", "ab", "é红"])
    assert ids.dtype == np.int32 and ids.shape == (3, 12) and tokenizer.vocab == 257 and tokenizer.pad == 0
    assert [bytes(int(i) - 1 for i in row if i).decode() for row in ids] == ["", "ab", "é红"]
    assert ids.max() < tokenizer.vocab and text.build({"name": "bytes", "length": 1})(["\xff"[:0]]).tolist() == [[0]]


def test_a_long_caption_is_refused_or_cut_as_told():
    with pytest.raises(records.DataError, match="rows 3: 'abcd' has 4 tokens, but text.length = 3"):
        text.build({"name": "bytes", "length": 3})(["abc", "abcd"], "rows 3")
    cut = text.build({"name": "bytes", "length": 3, "truncate": True})(["abcd", "abc"])
    np.testing.assert_array_equal(cut[0], cut[1])


def make_file(path, words=("[PAD]", "[END]", "red", "heart")):
    """A tokenizer of words that ends every text with [END]."""
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[PAD]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 1)])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(path))
    return path


def test_files_of_the_tokenizers_library(tmp_path):
    file = make_file(tmp_path / "t.json")
    tokenizer = text.build({"name": "file", "path": str(file), "length": 5})
    assert tokenizer(["red heart", ""]).tolist() == [[2, 3, 1, 0, 0], [1, 0, 0, 0, 0]] and tokenizer.vocab == 4
    assert text.build({"name": "file", "path": str(file), "length": 4, "pad": 1})(["red"]).tolist() == [[2, 1, 1, 1]]
    with pytest.raises(records.DataError, match="has 4 tokens"):  # the file's own truncation would have hidden it
        text.build({"name": "file", "path": str(file), "length": 3})(["red red heart"])
    other = make_file(tmp_path / "u.json", ("[PAD]", "[END]", "heart", "red"))
    assert tokenizer.digest != text.build({"name": "file", "path": str(other), "length": 5}).digest


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "words", "length": 3}, "bytes, export, file, joined"),
        ({"name": "bytes"}, "lacks length"),
        ({"name": "bytes", "length": 0}, "text.length = 0"),
        ({"name": "file", "path": "nowhere.json", "length": 3}, "no such file"),
        ({"name": "file", "path": __file__, "length": 3}, "not a file of the tokenizers library"),
    ],
)
def test_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        text.build(section)


def test_what_fits_one_tokenizer_or_all_of_several():
    short, long = ({"name": "bytes", "length": n} for n in (3, 5))
    assert [text.build(short).fits(t) for t in ("", "abc", "abcd")] == [True, True, False]
    joined = text.build({"name": "joined", "parts": [long, short]})
    assert [joined.fits(t) for t in ("abc", "abcd")] == [True, False]


def test_tokenizers_of_exports_side_by_side_bring_their_files(tmp_path):
    """What is stored of them names files that lie beside it, not the exports that they came from."""
    for name, words in (("one", ("[PAD]", "[END]", "red")), ("two", ("[PAD]", "[END]", "heart"))):
        (tmp_path / name).mkdir()
        make_file(tmp_path / name / text.FILE, words)
        (tmp_path / name / "config.json").write_text(json.dumps({"text": {"name": "file", "length": 3}}))
    section = text.resolved({"name": "joined", "parts": [{"name": "export", "path": str(tmp_path / name)} for name in ("one", "two")]})
    built = text.build(section)
    (tmp_path / "out").mkdir()
    for name, file in built.files.items():
        (tmp_path / "out" / name).write_bytes(file.read_bytes())
    own = text.stored(section, tmp_path / "out")
    assert all(part["path"].startswith(str(tmp_path / "out")) for part in own["parts"])
    np.testing.assert_array_equal(text.build(own)(["red heart"]), built(["red heart"]))


def test_pad_outside_of_the_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match=r"text.pad = 4 is outside the vocabulary, 0..3"):
        text.build({"name": "file", "path": str(make_file(tmp_path / "t.json")), "length": 3, "pad": 4})


# --- in a pipeline --------------------------------------------------------------------------------------------------------

SEVERAL = "aaa\nb\ncc"


@pytest.fixture
def captioned(tmp_path):
    rows = (("train", f"row {i}", {"image": np.full((2, 2, 1), i, np.uint8), "caption": SEVERAL if i else "x"}) for i in range(8))
    records.write(tmp_path / "d", rows, name="captioned")
    return {"name": "array_record", "path": str(tmp_path / "d"), "text": {"name": "bytes", "length": 3}}


def said(batch):
    return [bytes(int(i) - 1 for i in row if i).decode() for row in batch["cond"]["tokens"]]


def test_each_showing_draws_one_of_the_captions(captioned):
    pipe = pipeline(captioned, 8, 0)
    assert pipe.conditions == {"tokens": (3,)} and pipe.tokenizer.length == 3 and pipe.manifest["tokenizer"]["vocab"] == 257
    batches = [next(pipe) for _ in range(100)]
    rows = [(int(round((x[0, 0, 0] + 1) * 127.5)), s) for b in batches for x, s in zip(b["x"], said(b))]
    assert {s for i, s in rows if i == 0} == {"x"}
    counts = [sum(s == c for i, s in rows if i) for c in SEVERAL.split("\n")]
    assert sum(counts) == 700 and max(abs(c - 700 / 3) for c in counts) < 4 * (700 * 2 / 9) ** 0.5
    again = pipeline(captioned, 8, 0, start=7)
    np.testing.assert_array_equal(next(again)["cond"]["tokens"], batches[7]["cond"]["tokens"])
    halves = [next(pipeline(captioned, 8, 0, process_index=i, process_count=2))["cond"]["tokens"] for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), batches[0]["cond"]["tokens"])


def test_the_first_caption_and_a_curriculum(captioned):
    first = pipeline(captioned | {"captions": "first"}, 8, 0)
    assert {*said(next(first))} == {"x", "aaa"}
    pipe = pipeline(captioned | {"curriculum": 80}, 8, 0)
    met = [{*said(next(pipe))} - {"x"} for _ in range(30)]
    assert met[:3] == [{"b"}] * 3  # the shortest, for the first third of 80 examples
    held_out = pipeline(captioned | {"curriculum": 80}, 8, 0, shuffle=False)
    assert set().union(*(said(next(held_out)) for _ in range(9))) == {"x", "b", "cc", "aaa"}
    assert set().union(*met[4:6]) == {"b", "cc"} and set().union(*met[10:]) == {"b", "cc", "aaa"}


def test_evaluators_get_the_captions(captioned):
    whole = arrays(captioned)
    assert whole["caption"] == ["x"] + [SEVERAL] * 7 and said(whole) == ["x"] + ["aaa"] * 7


def test_captions_that_do_not_fit_are_refused(captioned):
    with pytest.raises(records.DataError, match="captioned: 'aaa' has 3 tokens, but text.length = 2"):
        pipeline(captioned | {"text": {"name": "bytes", "length": 2}}, 8, 0)


def test_captions_that_are_never_shown_need_not_fit(tmp_path):
    records.write(tmp_path / "d", [("train", "row", {"image": np.zeros((2, 2, 1), np.uint8), "caption": "a\nbbbb"})], name="captioned")
    section = {"name": "array_record", "path": str(tmp_path / "d"), "text": {"name": "bytes", "length": 2}, "captions": "first"}
    assert said(next(pipeline(section, 1, 0))) == ["a"]


def test_settings_of_captions_are_checked(captioned, tmp_path):
    for wrong, message in (
        ({"captions": "last"}, "data.captions = 'last'"),
        ({"curriculum": -1}, "data.curriculum = -1"),
        ({"curriculum": 9, "captions": "first"}, "data.curriculum = 9"),
        ({"text": "", "curriculum": 9}, "data.captions and data.curriculum"),
        ({"expect_cond": {"tokens": (4,)}}, "data.expect_cond"),
        ({"expect_cond": {"token": (4,)}}, "data.expect_cond"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline(captioned | wrong, 2, 0)
    records.write(tmp_path / "bare", [("train", "row", {"image": np.zeros((2, 2, 1), np.uint8)})], name="bare")
    with pytest.raises(ConfigError, match="bare has no captions"):
        pipeline(captioned | {"path": str(tmp_path / "bare")}, 1, 0)
    with pytest.raises(ConfigError, match="data.parts must agree"):
        pipeline({"name": "mixture", "parts": (captioned, captioned | {"text": {"name": "bytes", "length": 4}}), "weights": (1, 1)}, 2, 0)


def test_embeddings_stored_with_the_examples(tmp_path, monkeypatch):
    row = {"x": np.ones((2, 2, 1), np.float16), "text": np.full((5, 3), 0.5, np.float16), "pooled": np.arange(4.0, dtype=np.float32)}
    records.write(tmp_path / "e", [("train", "row", row)] * 2, name="embedded")
    section = {"name": "array_record", "path": str(tmp_path / "e"), "expect_cond": {"text": [5, 3], "pooled": [4]}}
    pipe = pipeline(section, 2, 0)
    batch = next(pipe)
    assert pipe.conditions == {"text": (5, 3), "pooled": (4,)}
    assert batch["cond"]["text"].dtype == np.float32 and batch["cond"]["text"].shape == (2, 5, 3)
    np.testing.assert_array_equal(batch["cond"]["pooled"][0], np.arange(4.0))
    whole = arrays(section)
    assert [*whole["cond"]] == ["text", "pooled"] and arrays(section, embedded=False)["cond"] == {}
    monkeypatch.setattr(pipeline_lib, "CHUNK", 1)
    np.testing.assert_array_equal(arrays(section)["cond"]["text"], whole["cond"]["text"])
    for limit, held in ((2 * (4 * 2 + 19 * 4), True), (2 * (4 * 2 + 19 * 4) - 1, False)):  # they count, and may be most of it
        monkeypatch.setattr(pipeline_lib, "CACHE_BYTES", limit)
        assert (pipeline_lib._Part(section, "train")._cache is not None) == held
    promise = declared(section | {"path": "nowhere", "expect_shape": (2, 2, 1), "expect_classes": 0})
    assert promise.conditions == pipe.conditions


def test_several_captions_through_the_doors(tmp_path):
    from PIL import Image

    for n in range(2):
        for door in ("listed", "beside"):
            (tmp_path / door).mkdir(exist_ok=True)
            Image.new("L", (4, 4), n).save(tmp_path / door / f"{n}.png")
    (tmp_path / "beside" / "0.txt").write_text("a heart\n\n red  heart \n")
    (tmp_path / "beside" / "1.txt").write_text("one")
    lines = [{"file": "0.png", "caption": ["a heart", "red heart"]}, {"file": "1.png", "caption": "one"}]
    (tmp_path / "listed" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for door in ("listed", "beside"):
        prepare.prepare("folder", tmp_path / door, tmp_path / f"{door}.out")
        section = {"name": "array_record", "path": str(tmp_path / f"{door}.out"), "text": {"name": "bytes", "length": 9}}
        assert arrays(section)["caption"] == ["a heart\nred heart", "one"]


def test_a_tokenizer_learned_from_captions_encodes_anything(tmp_path, captioned):
    assert text.captions(captioned["path"], "train") == ["x"] + SEVERAL.split("\n") * 7
    model = text.learn(["red heart", "red cat"] * 9, 270)
    model.save(str(tmp_path / "t.json"))
    tokenizer = text.build({"name": "file", "path": str(tmp_path / "t.json"), "length": 12})
    ids = tokenizer(["red heart", "é红?"])
    assert model.decode([int(i) for i in ids[1] if i]).strip() == "é红?" and (ids[0] > 0).sum() < len("red heart")
    assert model.token_to_id(text.PADDING) == 0 == tokenizer.pad
