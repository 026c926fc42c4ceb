"""Textual inversion: one row of one table is trained, stored and loaded, and nothing else moves."""

import jax
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import records, text
from flowjax.interop import lora as interop
from flowjax.train import export, loop, lora, panel
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run
from train_runs import same, tiny, train

TABLE = "encoder/token_embed/embedding"
BYTES = {"name": "bytes", "length": 12}
FIRST = 257


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two data sets of grey pictures, and a network of the first one's captions."""
    place = tmp_path_factory.mktemp("inversion")
    for name, words in (("base", ("a c", "a d")), ("mine", ("a <x>", "<x> d"))):
        rows = (("train", "", {"image": np.full((4, 4, 1), 60 * i, np.uint8), "caption": words[i % 2]}) for i in range(4))
        records.write(place / name, rows, name=name)
    train(base(place), place / "run")
    return place


def base(place, vocab=FIRST, **changes):
    values = {
        "steps": 3, "batch_size": 8, "data": {"name": "array_record", "path": str(place / "base"), "text": BYTES},
        "model": {
            "name": "jit", "patch": 2, "width": 16, "depth": 2, "heads": 2, "bottleneck": 4, "context_from": 1,
            "text_encoder": {"vocab": vocab, "length": 12, "width": 16, "depth": 1, "heads": 2},
        },
        "optimizer": {"name": "adamw", "schedule": {"name": "constant", "rate": 1e-2}, "decay": 0.1},
        "ema": {"ema": {"name": "constant", "decay": 0.5}},
    }  # fmt: skip
    return tiny(**(values | changes))


def inversion(place, vectors=1, added=None, init="c", **changes):
    data = {"name": "array_record", "path": str(place / "mine"), "text": BYTES | {"added": {"<x>": vectors} if added is None else added}}
    net = {"checkpoint": str(place / "run"), "lora": {"token": "<x>", "init": init, "vectors": vectors}}
    return base(place, **({"steps": 2, "data": data, "roles": {"net": net}} | changes))


@pytest.fixture(scope="module")
def run(place):
    train(inversion(place), place / "word")
    return place / "word"


def output(role, params, ids):
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 4, 4, 1)
    return np.asarray(jax.jit(lambda ids: role.net(params).apply(x, np.full(1, 0.5, np.float32), {"tokens": ids}, None))(ids))


def tokens(prompt, **more):
    return text.build(BYTES | more)([prompt])


def test_at_first_the_word_is_the_one_it_begins_as_and_all_else_the_base(place):
    this = Run(inversion(place, mesh={"fsdp": 2}))
    state = this.fresh()
    role, params, _ = export.load(place / "run")
    whole = jax.device_get(this.whole("net", state.params["net"]))
    table, old = whole["encoder"]["token_embed"]["embedding"], params["encoder"]["token_embed"]["embedding"]
    assert table.shape == (FIRST + 1, 16) and this.roles["net"].module.text_encoder["vocab"] == FIRST + 1
    np.testing.assert_array_equal(table[:FIRST], old)
    np.testing.assert_array_equal(table[FIRST], old[ord("c") + 1])
    same({k: v for k, v in whole.items() if k != "encoder"}, {k: v for k, v in params.items() if k != "encoder"})
    new = tokens("a <x>", added={"<x>": 1})
    assert new[0].tolist() == [98, 33, FIRST] + [0] * 9
    for ids, as_base in ((new, tokens("a c")), (tokens("a d"), tokens("a d"))):
        # The tables are of different length, so these are two programs.
        np.testing.assert_allclose(output(this.roles["net"], whole, ids), output(role, params, as_base), rtol=1e-5, atol=1e-6)
    # A step moves the row alone; there is no state, gradient or average of anything else.
    before = jax.device_get(state.params["net"])
    assert jax.tree.map(np.shape, before) == {"encoder": {"token_embed": {"embedding": {"rows": (1, 16)}}}}
    state, _ = this.step()(state, this.frozen, mesh_lib.place(next(this.pipeline), this.mesh))
    same(this.frozen["net"], params)
    moved = this.whole("net", state.params["net"])["encoder"]["token_embed"]["embedding"]
    np.testing.assert_array_equal(moved[:FIRST], old)
    assert (np.asarray(moved[FIRST]) != np.asarray(old[ord("c") + 1])).all()


def test_a_row_that_no_token_has_is_taken_and_several_vectors(place, tmp_path):
    train(base(place, vocab=300, steps=1), tmp_path / "run")
    (tmp_path / "mine").symlink_to(place / "mine")
    (tmp_path / "base").symlink_to(place / "base")
    this = Run(inversion(tmp_path, vectors=2, model=base(place, vocab=300).model.to_dict()))
    table = this.whole("net", this.fresh().params["net"])["encoder"]["token_embed"]["embedding"]
    old = export.load(tmp_path / "run")[1]["encoder"]["token_embed"]["embedding"]
    changed = np.flatnonzero((np.asarray(table) != old).any(1))
    assert table.shape == old.shape and changed.tolist() == [FIRST, FIRST + 1]
    assert tokens("<x>b", added={"<x>": 2})[0].tolist() == [FIRST, FIRST + 1, 99] + [0] * 9


def test_stored_loaded_and_refused_on_another_base(place, run, tmp_path):
    role, params, info = export.load(run)
    its, tree, kept = export.stored(run)
    assert kept["lora"]["first"] == FIRST and kept["model"]["text_encoder"]["vocab"] == FIRST + 1
    export.export(run, tmp_path / "word", adapter=True)
    export.export(run, tmp_path / "whole")
    assert (tmp_path / "word/model.safetensors").stat().st_size < 300  # 16 numbers and their name
    same(export.load(tmp_path / "whole")[1], params)
    # On the base, as experiments.sample --lora has it.
    old, base_params, base_info = export.load(place / "run")
    word = lambda weight=1.0: ("w", tree, its.lora, export.info_of(tmp_path / "word"), weight)  # noqa: E731
    merged, told = export.adapted(old, base_params, base_info, [word()])
    same(merged, params)
    assert export.tokenizer_of(place / "run", told).vocab == FIRST + 1
    ids = tokens("<x> d", added={"<x>": 1})
    np.testing.assert_array_equal(output(export.role_of(told, "x"), merged, ids), output(role, params, ids))
    half, _ = export.adapted(old, base_params, base_info, [word(0.5)])
    table = lambda params: np.asarray(params["encoder"]["token_embed"]["embedding"])  # noqa: E731
    np.testing.assert_array_equal(table(half)[FIRST], 0.5 * table(params)[FIRST])
    with pytest.raises(ConfigError, match="--lora=w adapts another base than this"):
        export.adapted(old, jax.tree.map(lambda v: v + 1, base_params), base_info, [word()])
    with pytest.raises(ConfigError, match="one adapter at a time can bring a new word"):
        export.adapted(old, base_params, base_info, [word(), word()])
    with pytest.raises(ConfigError, match=f"--lora=w adds rows of 16 to {TABLE}, and the network has none"):
        export.adapted(old, {"x": base_params["x_embed"]}, base_info, [word()])
    with pytest.raises(ConfigError, match="has no place in layout 'kohya'"):
        interop.write(tmp_path / "x.safetensors", role.module, params, tree, its.lora, "kohya")


def test_the_panel_measures_from_the_word_as_it_began(place, tmp_path):
    """Though the base's table may have no row for it."""
    _, params, info = export.load(place / "run")
    random = np.random.default_rng(0)  # three steps teach no network to look at words
    export.write(tmp_path / "base", jax.tree.map(lambda p: 0.3 * random.standard_normal(p.shape, np.float32), params), info)
    section = {"every": 1, "count": 4, "steps": 2, "rewards": ["ink"], "metrics": [], "prompts": ["a <x>"]}
    roles = {"net": {"checkpoint": str(tmp_path / "base"), "lora": {"token": "<x>", "init": "c", "vectors": 1}}}
    this = Run(inversion(place, panel=section, roles=roles))
    state, measure = this.fresh(), panel.Panel(this)
    assert measure(state)["panel/kl"] < 1e-9
    moved = state.replace(ema=jax.tree.map(lambda p: p + random.standard_normal(p.shape, np.float32), state.ema))
    assert measure(moved)["panel/kl"] > 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"added": {"<a>": 1, "<x>": 1}}, "'<x>' would be token 258, and the base has no row for those before it: it knows 257 tokens"),
        ({"added": {}}, "'<x>' should be the last of data.text.added, which is missing"),
        ({"added": {"<x>": 2}}, "'<x>' should be the last of data.text.added"),
        ({"added": {"<x>": 0}}, "text.added = .* should say how many tokens each new word gets"),
        ({"init": "<x>"}, "lora.init = '<x>' should be words that the base knows"),
        ({"model": {"name": "jit", "patch": 2, "width": 32, "depth": 2, "heads": 2}, "objective": "flow_matching"}, "the network has no text encoder of"),
    ],
)  # fmt: skip
def test_words_that_cannot_be(place, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.run(inversion(place, **changes), tmp_path / "run")


def test_bad_sections():
    for section, message in (({"token": " ", "init": "c"}, "should be a word"), ({"token": "x", "init": "c", "rank": 2}, "rank is unknown")):
        with pytest.raises(ConfigError, match=message):
            lora.build(section, "roles.net.lora")


def test_new_words_of_a_learned_tokenizer(tmp_path):
    """Between the tokens of the words around them, which are those of the text without."""
    text.learn(["a red cat", "a dog with hat"] * 3, 300).save(str(tmp_path / "t.json"))
    plain = {"name": "file", "path": str(tmp_path / "t.json"), "length": 16}
    made = text.build(plain | {"added": {"<x>": 1, "<xy>": 2}})
    vocab = text.build(plain).vocab
    assert made.vocab == vocab + 3 and made.digest == text.build(plain).digest
    before, after = text.build(plain).encode(["a red", "with hat"])
    assert made.encode(["a red <xy> with hat", "<x>", "a red with hat"]) == [[*before, vocab + 1, vocab + 2, *after], [vocab], [*before, *after]]
