"""Captions embedded once: what is written, what a run on them computes, which encoder and tokenizer it accepts, and prompts."""

import json

import jax
import numpy as np
import pytest
from flax.core import meta
from test_data_latents import encode
from test_data_text import make_file
from train_runs import tiny, train

from flowjax import conditions
from flowjax.config import ConfigError
from flowjax.data import latents, records
from flowjax.data.pipeline import arrays, pipeline
from flowjax.models.text import TextTransformer
from flowjax.train import export, generator
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run

TEXT = {"name": "bytes", "length": 9}


def embed(tokens):
    """Of ids (n, L): (n, L, 2) and (n, 3), none like another."""
    assert tokens.shape == (4, 9) and tokens.dtype == np.int32
    sequence = np.stack([tokens / 3, np.arange(9) - tokens], axis=-1)
    return sequence, tokens[:, :3] / 7


def reader(identity="e", apply=embed, vocab=257):
    return latents.Encoder(apply, identity, vocab)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 8x6 with labels, one caption each."""
    out = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(0)
    rows = (
        (split, f"row {i}", {"image": rng.integers(0, 256, (8, 6, 3), np.uint8), "label": i % 3, "caption": f"{split} {i}"})
        for split, count in (("train", 11), ("test", 5)) for i in range(count)
    )  # fmt: skip
    records.write(out, rows, name="images", num_classes=3, class_names=("a", "b", "c"))
    return {"name": "array_record", "path": str(out), "text": TEXT}


def write(out, section, text=None, **options):
    return latents.write(out, section, text=text or reader(), **{"batch": 4, **options})


def read(out, split="train"):
    rows = records.Records(out, split)
    return rows.read(np.arange(len(rows)))


@pytest.mark.parametrize("dtype, error", [("float16", 2.0**-11), ("float32", 1e-7)])
def test_captions_are_embedded_and_the_rest_stays(data, tmp_path, dtype, error):
    manifest = write(tmp_path / "e", data | {"pad": 10}, dtype=dtype)
    assert manifest["image_shape"] == [10, 10, 3] and manifest["dtype"] == "uint8" and manifest["num_classes"] == 3
    assert {k: (v["dtype"], v.get("shape")) for k, v in manifest["features"].items() if k in ("text", "pooled")} == {
        "text": (dtype, [9, 2]), "pooled": (dtype, [3]),
    }  # fmt: skip
    for split, count in (("train", 11), ("test", 5)):
        rows, before = read(tmp_path / "e", split), read(data["path"], split)
        tokens = pipeline(data, count, 0, split=split, shuffle=False)
        want = [embed(np.resize(row, (4, 9))) for row in next(tokens)["cond"]["tokens"]]
        np.testing.assert_allclose(rows["text"], [w[0][0] for w in want], rtol=error, atol=1e-7)
        np.testing.assert_allclose(rows["pooled"], [w[1][0] for w in want], rtol=error, atol=1e-7)
        np.testing.assert_array_equal(rows["image"][:, 1:9, 2:8], before["image"])  # as in the data, with a border
        assert rows["caption"] == before["caption"] and list(rows["label"]) == list(before["label"])
    batch = next(pipeline({"name": "array_record", "path": str(tmp_path / "e")}, 4, 0))
    assert {k: (v.shape, v.dtype.name) for k, v in batch["cond"].items()} == {
        "label": ((4,), "int32"), "text": ((4, 9, 2), "float32"), "pooled": ((4, 3), "float32"),
    }  # fmt: skip


def test_latents_and_captions_in_one_go_or_one_after_the_other(data, tmp_path):
    """Whatever comes first, the second carries it along, with mirror images, tokenizer and who made it."""
    words = data | {"flip": True, "text": {"name": "file", "path": str(make_file(tmp_path / "t.json", WORDS)), "length": 9, "pad": 4}}
    vae, plain = latents.Encoder(encode, "abc"), {k: v for k, v in words.items() if k != "flip"}
    both = latents.write(tmp_path / "both", words, vae, reader(), batch=4)
    latents.write(tmp_path / "z", words, vae, batch=4)
    second = write(tmp_path / "second", plain | {"path": str(tmp_path / "z")})
    write(tmp_path / "e", plain)
    other = latents.write(tmp_path / "other", {"name": "array_record", "path": str(tmp_path / "e"), "flip": True}, vae, batch=4)
    assert both["splits"]["train"]["count"] == 22 and both["content_hash"] == second["content_hash"] == other["content_hash"]
    for manifest in (both, second, other):
        assert {k: v.get("vae", v.get("text")) for k, v in manifest["source"].items()} == {"latents": "abc", "embedded": "e"}
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    rows = read(tmp_path / "both")
    np.testing.assert_array_equal(rows["text"][0::2], rows["text"][1::2])  # an image and its mirror image
    assert np.abs(rows["x"][0::2] - rows["x"][1::2]).max() > 0.1


def test_nothing_is_embedded_twice(data, tmp_path):
    def never(tokens):
        raise AssertionError("embedded again")

    never = reader(apply=never)
    first = write(tmp_path / "e", data)
    assert write(tmp_path / "e", data | {"path": data["path"] + "/../images", "captions": "first"}, never) == first
    file = {"name": "file", "path": str(make_file(tmp_path / "t.json", WORDS)), "length": 9}
    for change in ({"text": never._replace(identity="other")}, {"dtype": "float32"}, {"splits": ("train",)}):
        with pytest.raises(AssertionError, match="embedded again"):
            write(tmp_path / "e", data, **{"text": never, **change})
    for change in ({"text": TEXT | {"length": 10}}, {"text": file}, {"pad": 10}):
        with pytest.raises(AssertionError, match="embedded again"):
            write(tmp_path / "e", data | change, never)
    # Of two files with the same ids for these captions, each is a tokenizer of its own.
    made = write(tmp_path / "f", data | {"text": file})
    make_file(tmp_path / "t.json", (*WORDS, "more"))
    assert write(tmp_path / "g", data | {"text": file})["content_hash"] != made["content_hash"]


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"text": ""}, {}, "data.text has to say by which tokenizer"),
        ({"text": TEXT | {"length": 6}}, {}, r"images \(train rows 0 to 3\): 'train 0' has 7 tokens, but text.length = 6"),
        ({"captions": "last"}, {}, "data.captions can be 'first'"),
        ({"curriculum": 9}, {}, "there is no data.curriculum"),
        ({"flip": True}, {}, "data.flip and --tile are for latents"),
        ({}, {"tile": 4}, "data.flip and --tile are for latents"),
        ({}, {"text": reader(vocab=256)}, "vocab = 256, but the tokenizer has 257 tokens"),
        ({}, {"text": reader(apply=lambda ids: (np.full((4, 9, 1), 1e6, np.float32), ids))}, r"\(train row 0\): its embedding is not finite in float16"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(data, tmp_path, change, options, message):
    with pytest.raises(ConfigError, match=message), np.errstate(over="ignore"):
        write(tmp_path / "e", data | change, **options)
    assert not (tmp_path / "e").exists()


def test_what_cannot_be_embedded(data, tmp_path):
    with pytest.raises(ConfigError, match="nothing to encode with"):
        latents.write(tmp_path / "e", data)
    rows = [("train", "", {"image": np.zeros((8, 6, 3), np.uint8), "caption": c}) for c in ("one", "two\n2")]
    records.write(tmp_path / "several", rows, name="several")
    several = data | {"path": str(tmp_path / "several")}
    with pytest.raises(ConfigError, match=r"several \(train rows 0 to 1\): 'two\\n2' are several captions"):
        write(tmp_path / "e", several, splits=("train",))
    write(tmp_path / "e", several | {"captions": "first"}, splits=("train",))
    tokens = np.zeros((4, 9), np.int32)
    tokens[0, :3] = [b + 1 for b in b"two"]
    np.testing.assert_array_equal(read(tmp_path / "e")["pooled"][1], embed(tokens)[1][0].astype(np.float16))
    assert read(tmp_path / "e")["caption"] == ["one", "two\n2"]
    with pytest.raises(ConfigError, match="several_embedded holds embeddings already"):
        write(tmp_path / "f", several | {"path": str(tmp_path / "e")}, splits=("train",))
    records.write(tmp_path / "mute", [("train", "", {"image": np.zeros((8, 6, 3), np.uint8)})], name="mute")
    with pytest.raises(ConfigError, match="mute has no captions to embed"):
        write(tmp_path / "f", data | {"path": str(tmp_path / "mute")}, splits=("train",))


# --- a run on embedded captions

WORDS = ("[PAD]", "[END]", "0", "1", "2")
ENCODER = {"vocab": 5, "length": 4, "width": 8, "depth": 1, "heads": 2}
MMDIT = {"name": "mmdit", "depth": 1, "width": 16, "heads": 2, "patch": 4, "table": 4, "base": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """d: 8x8 images whose captions are 0, 1, 2; t.json: a tokenizer; text: an encoder's export; e: the captions embedded by it."""
    home = tmp_path_factory.mktemp("home")
    rows = (
        (split, "", {"image": np.full((8, 8, 1), 40 * i % 256, np.uint8), "caption": str(i % 3)}) for split in ("train", "test") for i in range(16)
    )
    records.write(home / "d", rows, name="d")
    make_file(home / "t.json", WORDS)
    params = TextTransformer(**ENCODER).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    params = jax.tree.map(lambda v: v + 0.1, meta.unbox(params))
    info = {"model": {"name": "text", **ENCODER}, "path": "rectified", "prediction": "velocity", "shape": [8, 8, 1], "conditions": {"tokens": [4]}}
    export.write(home / "text", params, info)
    frozen(home, "e")
    return home


def read_by(home, at="text"):
    role, params, info = export.load(home / at)
    return latents.Encoder(jax.jit(lambda tokens: role.net(params)(tokens)), export.identity(params, info), role.module.vocab)


def tokens_of(home):
    return {"name": "array_record", "path": str(home / "d"), "text": {"name": "file", "path": str(home / "t.json"), "length": 4}}


def frozen(home, out, **options):
    return latents.write(home / out, tokens_of(home), text=read_by(home), **{"dtype": "float32", "batch": 16, **options})


def config(home, data=None, roles=("text",), **changes):
    data = data or {"name": "array_record", "path": str(home / "e")}
    return tiny(**({"data": data, "model": MMDIT, "roles": {k: {"checkpoint": str(home / k)} for k in roles}, "ema": {}} | changes))


def test_a_run_on_embedded_captions_is_the_run_that_embeds(home):
    """The same batches, conditions and loss, with parameters far from a start that does not listen; no text encoder on the devices."""
    online, cached = Run(config(home, tokens_of(home))), Run(config(home))
    assert [*online.frozen] == ["text"] and not cached.frozen
    a, b = next(online.pipeline), next(cached.pipeline)
    assert [*a["cond"]] == ["tokens"] and {*b["cond"]} == {"text", "pooled"}
    embedded = conditions.embed(online.roles["text"].net(online.loaded["text"][0]), a["cond"])
    np.testing.assert_array_equal(a["x"], b["x"])
    for k, v in embedded.items():
        np.testing.assert_allclose(b["cond"][k], v, rtol=1e-5, atol=1e-6)
    rng, state = np.random.default_rng(0), online.fresh()
    state = state.replace(params=jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(p.dtype), state.params))

    def loss(run, batch):
        return float(run.validate()(state, run.frozen, mesh_lib.place(batch, run.mesh), 0))

    want = loss(online, a)
    assert loss(cached, b) == pytest.approx(want, rel=1e-5)
    assert abs(loss(cached, b | {"cond": {k: v[::-1] for k, v in b["cond"].items()}}) - want) > 1e-3 * want  # captions are heard


def test_another_encoder_or_tokenizer_is_refused(home, tmp_path):
    role, params, info = export.load(home / "text")
    export.write(tmp_path / "text", jax.tree.map(lambda v: v * 1.001, params), info)
    with pytest.raises(ConfigError, match="captions embedded by another text encoder .* than roles.text .*tools.encode_latents --text"):
        Run(config(tmp_path, {"name": "array_record", "path": str(home / "e")}))
    # Embeddings of which nobody says whose they are.
    row = {"image": np.zeros((8, 8, 1), np.uint8), "text": np.zeros((4, 8), np.float32), "pooled": np.zeros(8, np.float32)}
    records.write(tmp_path / "foreign", [("train", "", row)] * 16, name="foreign")
    foreign = {"name": "array_record", "path": str(tmp_path / "foreign")}
    assert not Run(config(home, foreign, roles=())).frozen
    with pytest.raises(ConfigError, match=r"another text encoder \(unknown\) than roles.text"):
        Run(config(home, foreign))
    # A tokenizer besides the one that embedded them, another file in its place, and none.
    with pytest.raises(ConfigError, match="d_embedded holds its captions embedded, and their tokenizer"):
        Run(config(home, tokens_of(home) | {"path": str(home / "e")}))
    frozen(home, "changed")
    changed = {"name": "array_record", "path": str(home / "changed")}
    assert Run(config(home, changed)).tokenizer.vocab == 5
    make_file(home / "changed" / "tokenizer.json", ("[PAD]", "[END]", "1", "0", "2"))
    with pytest.raises(ConfigError, match="tokenizer.json is not the tokenizer that .*changed was made with"):
        Run(config(home, changed))
    (home / "changed" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        Run(config(home, changed))
    assert Run(config(home, changed, roles=())).tokenizer is None  # nor is it needed


def test_embedded_captions_are_mixed_with_their_like_only(home, tmp_path):
    def mixed(*paths):
        return {"name": "mixture", "parts": [{"name": "array_record", "path": str(p)} for p in paths], "weights": (1.0, 1.0)}

    run = Run(config(home, mixed(home / "e", home / "e")))
    assert run.embedded and run.tokens(["1"], "")["tokens"].tolist() == [[3, 1, 0, 0]]
    role, params, info = export.load(home / "text")
    export.write(tmp_path / "other", jax.tree.map(lambda v: v * 1.001, params), info)
    make_file(tmp_path / "u.json", ("[PAD]", "[END]", "1", "0", "2"))
    words = tokens_of(home)["text"] | {"path": str(tmp_path / "u.json")}
    others = {"encoder": (tokens_of(home), read_by(tmp_path, "other")), "tokenizer": (tokens_of(home) | {"text": words}, read_by(home))}
    for name, (section, text) in others.items():
        latents.write(tmp_path / name, section, text=text, dtype="float32", batch=16)
        with pytest.raises(ConfigError, match="data.parts must agree in .* and who encoded them"):
            pipeline(mixed(home / "e", tmp_path / name), 4, 0)


def test_prompts_of_a_run_on_embedded_captions(home, tmp_path):
    section = {"steps": 2, "sampler": "euler", "guidance": {"name": "cfg", "scale": 2.0}, "prompts": ("0", "2"), "negative": "1", "count": 4}
    run = Run(config(home, sample=section))
    section = run.config["sample"] | {"every": 1}
    cond = run.asked(section)
    assert cond["tokens"].tolist() == [[2, 1, 0, 0], [4, 1, 0, 0]] * 2 and [*cond] == ["tokens"]
    held_out = run.asked(section | {"prompts": []})
    assert {k: v.shape for k, v in held_out.items()} == {"text": (4, 4, 8), "pooled": (4, 8)}
    info = run.info(0, "run")
    assert info["text"]["length"] == 4 and info["data"]["tokenizer"]["vocab"] == 5 and info["conditions"] == {"text": [4, 8], "pooled": [8]}
    alone = Run(config(home, roles=()))
    with pytest.raises(ConfigError, match="sample.prompts needs roles.text, the text encoder that embedded the captions"):
        alone.asked(section)
    with pytest.raises(ConfigError, match="nowhere takes embedded captions and has no text encoder for prompts: train with roles.text"):
        export.tokenizer_of("nowhere", alone.info(0, "run"))


@pytest.mark.slow
def test_an_export_stands_alone(home, tmp_path):
    """Trained and exported; then neither data nor text encoder are where they were."""
    for name in ("text", "t.json", "d"):
        (tmp_path / name).symlink_to(home / name)
    frozen(tmp_path, "e")
    section = {"steps": 2, "sampler": "euler", "guidance": {"name": "cfg", "scale": 2.0}}
    fast = {"name": "adamw", "schedule": {"name": "constant", "rate": 0.1}}  # far from a start that does not listen
    train(config(tmp_path, steps=2, sample=section, optimizer=fast), tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out", weights="params")
    for name in ("e", "text", "run"):
        (tmp_path / name).rename(tmp_path / f"{name}.away")
    made = generator.load(tmp_path / "out", settings={"negative": "1"})
    ids = export.tokenizer_of(tmp_path / "out", made.info)(["0", "2"])
    x = made({"tokens": ids}, 2)
    # The same as with the embeddings that the data have of the same captions, prompt by prompt.
    held = arrays({"name": "array_record", "path": str(tmp_path / "e.away")}, "test")["cond"]
    np.testing.assert_allclose(made({k: v[[0, 2]] for k, v in held.items()}, 2), x, atol=1e-4)
    assert np.abs(made({"tokens": ids[::-1]}, 2) - x).max() > 1e-2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text"]["name"] == "file"
