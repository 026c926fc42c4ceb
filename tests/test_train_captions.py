"""Captions in a run, assembled and not trained: what pictures are asked for, what the run says of itself, what it refuses."""

import jax
import numpy as np
import pytest
from flax.core import meta
from train_runs import DIT, tiny

from flowjax.config import ConfigError
from flowjax.data import records, sources
from flowjax.models.text import TextTransformer
from flowjax.train import export, loop
from flowjax.train.assembly import Run

TEXT = {"name": "bytes", "length": 6}
ENCODER = {"vocab": 257, "length": 6, "width": 8, "depth": 1, "heads": 2}
JIT = {"name": "jit", "depth": 2, "width": 16, "heads": 2, "patch": 4, "bottleneck": 4, "context_from": 1}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A section of 8x8 images of three classes, whose captions and labels say the same."""
    out = tmp_path_factory.mktemp("captioned") / "d"
    rows = (
        (split, f"{i}", {"image": np.full((8, 8, 1), i, np.uint8), "label": (i // 2) % 3, "caption": f"{(i // 2) % 3}"})
        for split in ("train", "test") for i in range(16)
    )  # fmt: skip
    records.write(out, rows, name="captioned", num_classes=3, class_names=("a", "b", "c"))
    return {"name": "array_record", "path": str(out), "text": TEXT}


def run(data, model=(), **changes):
    model = {**JIT, "text_encoder": ENCODER, **dict(model)}
    return Run(tiny(**({"data": data, "model": model, "prediction": "x"} | changes)))


def said(cond):
    return [bytes(int(i) - 1 for i in row if i).decode() for row in cond["tokens"]]


def test_pictures_are_asked_for_the_same_on_every_process_and_without_contradiction(captioned, monkeypatch):
    this = run(captioned, {"num_classes": 3})
    section = this.config["sample"] | {"every": 1, "count": 7}
    cond = this.asked(section)
    assert said(cond) == ["0", "0", "1", "1", "2", "2", "0"] == [str(label) for label in cond["label"]]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    np.testing.assert_array_equal(this.asked(section)["tokens"], cond["tokens"])
    assert this.first(3)["x"].shape == (3, 8, 8, 1) and this.first(3)["x"][2].max() == np.float32(2 / 127.5 - 1)
    # Prompts and classes are asked in turn; without pictures nothing is read.
    cond = this.asked(section | {"prompts": ["x", "y"]})
    assert said(cond) == ["x", "y"] * 3 + ["x"] and list(cond["label"]) == [0, 1, 2, 0, 1, 2, 0]
    this.config["validation"]["split"] = "nowhere"
    assert {k: v.shape for k, v in this.asked(section | {"every": 0}).items()} == {"label": (7,), "tokens": (7, 6)}
    assert said(this.asked(section | {"prompts": ["x"]})) == ["x"] * 7


def test_a_mixture_says_which_tokenizer_it_has(captioned):
    info = run({"name": "mixture", "parts": [captioned, captioned], "weights": [1, 2]}).info(0, "run")
    assert info["text"] == TEXT and info["data"]["tokenizer"]["vocab"] == 257
    assert export.tokenizer_of("nowhere", info)(["a"])[0, 0] == 98


def test_captions_that_are_embedded_and_not_looked_at_are_refused(captioned, tmp_path):
    """A frozen text encoder makes two conditions of the captions, of which at least one has to be used."""
    params = TextTransformer(**ENCODER).init(jax.random.key(0), np.zeros((1, 6), np.int32))["params"]
    info = {"model": {"name": "text", **ENCODER}, "path": "rectified", "prediction": "velocity", "shape": [8, 8, 1], "conditions": {"tokens": [6]}}
    export.write(tmp_path / "text", meta.unbox(params), info)
    roles = {"text": {"checkpoint": str(tmp_path / "text")}}
    with pytest.raises(ConfigError, match=r"the data has pooled, text \(data.text, roles.text, or embeddings\), but model 'dit' does not use them"):
        Run(tiny(data=captioned, model={**DIT, "num_classes": 3}, roles=roles))
    this = Run(tiny(data=captioned, model={"name": "mmdit", "depth": 1, "width": 16, "heads": 2, "table": 4, "base": 4}, roles=roles))
    assert {k: v.shape for k, v in this.example[1].items()} == {"label": (1,), "text": (1, 6, 8), "pooled": (1, 8)}


def test_pairs_of_captions_train(captioned, tmp_path):
    """From files of pairs and of marked examples with captions to a step of training; who looks at no mark is refused them."""
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 8, 8, 1), np.uint8)
    sources.write_preferences(tmp_path / "pairs", *images, captions=[f"{i}" for i in range(16)])
    sources.write_feedback(tmp_path / "marked", images[0], np.arange(16) % 3 == 0, captions=[f"{i}" for i in range(16)])
    start = Run(tiny(data={**captioned, "name": "array_record"}, model={**JIT, "text_encoder": ENCODER}, prediction="x"))
    export.write(tmp_path / "start", jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), start.target.params["net"]), start.info(0, "run"))
    roles = {k: {"checkpoint": str(tmp_path / "start")} for k in ("net", "reference")}
    changes = {"model": {**JIT, "text_encoder": ENCODER}, "prediction": "x", "roles": roles, "steps": 1}
    pairs = {"name": "preferences", "path": str(tmp_path / "pairs"), "text": TEXT}
    marked = {"name": "array_record", "path": str(tmp_path / "marked"), "text": TEXT}
    with pytest.raises(ConfigError, match=r"are marked as good and bad \(desirable\), which objective .* does not look at"):
        Run(tiny(**changes | {"roles": {}}, data=marked, objective={"name": "flow_matching"}))
    for data, objective, metric in ((pairs, "diffusion_dpo", "margin"), (marked, "diffusion_kto", "reference_point")):
        this = Run(tiny(**changes, data=data, objective={"name": objective}))
        batch = next(this.pipeline)
        shapes = lambda tree: jax.tree.map(lambda v: (v.shape, np.dtype(v.dtype)), tree)  # noqa: E731
        assert shapes(batch) == shapes(this.batch()) and len({*said(batch["cond"])}) > 8
        assert metric in this.step().lower(this.target, this.frozen, this.batch()).out_info[1]  # traced; compiling would take long


def test_a_run_goes_on_with_its_own_tokenizer(captioned, tmp_path):
    this = run(captioned)
    loop._claim(tmp_path, this)
    loop._claim(tmp_path, this)
    this.pipeline.manifest["tokenizer"] = {"vocab": 257, "sha256": "of another file"}
    with pytest.raises(ConfigError, match="the tokenizer changed since .* began: .* -> .*of another file"):
        loop._claim(tmp_path, this)


def test_a_run_goes_on_with_the_same_data_only(captioned, tmp_path):
    this = run(captioned)
    loop._claim(tmp_path, this)
    this.pipeline.manifest["content_hash"] = "of other images"
    with pytest.raises(ConfigError, match="the data changed since .*of other images"):
        loop._claim(tmp_path, this)


def test_another_padding_than_the_text_encoders_is_refused(captioned, tmp_path):
    from test_data_text import make_file

    words = {"name": "file", "path": str(make_file(tmp_path / "t.json", ("0", "[END]", "1", "2", "[PAD]"))), "length": 6}
    run(captioned | {"text": words})
    with pytest.raises(ConfigError, match="text.pad = 1, but what is trained here on text takes token 0"):
        run(captioned | {"text": words | {"pad": 1}})
