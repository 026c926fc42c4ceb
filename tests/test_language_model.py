"""The language model, its loss on pairs, decoding; rewriters of prompts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_sharded, count, randomise, shapes

from flowjax import enhance, objectives
from flowjax.config import ConfigError
from flowjax.data import records, text
from flowjax.data.pipeline import pipeline
from flowjax.data.records import DataError
from flowjax.decode import decode
from flowjax.models import build
from flowjax.models.language import LanguageModel
from flowjax.objectives import language_model
from flowjax.train import export, loop, step as step_lib
from train_runs import tiny, train

FIELDS = {"vocab": 12, "length": 8, "width": 16, "depth": 2, "heads": 2, "attention": "xla"}
TOKENS = jnp.asarray([[3, 9, 0, 4, 5, 6, 0, 0], [10, 0, 2, 3, 4, 5, 7, 8]])


# --- network and loss


def test_size_causality_and_shards():
    net = build({"name": "language_model", **FIELDS})
    d = 16
    assert count(net, TOKENS) == (12 + 8) * d + 2 * (12 * d * d + 13 * d) + 2 * d + 12 * d + 12
    params = randomise(shapes(net, TOKENS))
    logits = jax.jit(lambda t: net.apply({"params": params}, t))
    a, b = logits(TOKENS), logits(TOKENS.at[:, 4].set(1))
    assert a.shape == (2, 8, 12) and a.dtype == jnp.float32
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert (np.abs(a - b)[:, 4:].max((0, 2)) > 1e-4).all()
    with pytest.raises(ConfigError, match="length 8 was given 5"):
        jax.eval_shape(net.init, jax.random.key(0), TOKENS[:, :5])
    check_sharded(LanguageModel(**FIELDS), jnp.tile(TOKENS, (4, 1)))


def test_what_is_learned_is_one_text_with_its_end():
    rows = jnp.asarray([[7, 0, 5, 6, 0, 0, 0], [7, 8, 9, 0, 5, 0, 0], [7, 8, 0, 3, 4, 5, 6]])
    after = lambda prefix: [rows[i, 1:][m].tolist() for i, m in enumerate(np.asarray(language_model.learned(rows, prefix)))]  # noqa: E731
    assert after(0) == [[0], [8, 9, 0], [8, 0]] and after(1) == [[5, 6, 0], [5, 0], [3, 4, 5, 6]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_of_a_uniform_model_and_of_slices(accumulate):
    """log of the vocabulary, whatever is learned; rows of different length weigh by their tokens, in slices as well."""
    player = objectives.build({"name": "language_model", "prefix": 1}).players[0]
    rows = jnp.asarray([[1, 0, 2, 0, 0, 0], [1, 0, 2, 2, 2, 0]] * 2)
    # Token 2 has probability p after another 2 and after the prefix; an end always 1 - p.
    p = 0.7
    table = jnp.log(jnp.asarray([1 - p, 1e-9, p]))
    nets = {"net": lambda tokens: jnp.broadcast_to(table, (*tokens.shape, 3))}
    whole = step_lib.measured(player, nets, {"x": rows}, jax.random.key(0), accumulate)
    assert float(whole["measured"]) == 3.0
    parts = [rows] if accumulate == 1 else [rows[::2], rows[1::2]]
    found = np.mean([player.loss(nets, {"x": part, **whole}, None)[0] for part in parts])
    np.testing.assert_allclose(found, -(4 * np.log(p) + 2 * np.log(1 - p)) / 6, rtol=1e-5)
    uniform = {"net": lambda tokens: jnp.zeros((*tokens.shape, 5))}
    np.testing.assert_allclose(player.loss(uniform, {"x": rows, "measured": 3.0}, None)[0], np.log(5), rtol=1e-6)


# --- decoding


def test_decoding_goes_on_from_the_prefix_to_the_end():
    """A model that counts up from the last token and ends after 5."""
    net = lambda tokens: 50.0 * jax.nn.one_hot(jnp.where(tokens == 5, 0, tokens + 1), 8)  # noqa: E731
    start = jnp.asarray([[3, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [7, 2, 0, 3, 0, 0]])
    keys = jax.random.split(jax.random.key(0), 3)
    for temperature in (0.0, 1.0):
        made = jax.jit(lambda t, g, k, temperature=temperature: decode(net, t, g, k, temperature))(start, jnp.asarray([1, 2, 4]), keys)
        assert made.tolist() == [[3, 4, 5, 0, 0, 0], [1, 1, 2, 3, 4, 5], [7, 2, 0, 3, 4, 5]]


def test_tokens_are_drawn_with_their_probabilities_and_each_row_by_its_key():
    p = np.array([0.0, 0.1, 0.2, 0.7])
    net = lambda tokens: jnp.broadcast_to(jnp.log(jnp.asarray([1e-30, *p[1:]])), (*tokens.shape, 4))  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = jax.jit(lambda keys, t: decode(net, jnp.ones((len(keys), 3), jnp.int32), jnp.ones(len(keys), jnp.int32), keys, t), static_argnums=1)
    made = np.asarray(draw(keys, 1.0))
    for column in (1, 2):
        np.testing.assert_allclose(np.bincount(made[:, column], minlength=4) / 4000, p, atol=0.03)
    cold = np.asarray(draw(keys, 0.5))[:, 1]
    np.testing.assert_allclose(np.bincount(cold, minlength=4) / 4000, p**2 / np.sum(p**2), atol=0.03)
    np.testing.assert_array_equal(np.asarray(draw(keys[:7], 1.0)), made[:7])


# --- data of texts alone


PAIRS = {"name": "bytes", "length": 24, "pairs": True}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs"
    lines = ["cat\tred cat\nred cat\tred cat", "dog\tdog with hat", "red cat\tred cat"]
    records.write(path, (("train", "", {"caption": line}) for line in lines), name="pairs")
    return path


def test_batches_of_pairs(pairs):
    section = {"name": "array_record", "path": str(pairs), "text": PAIRS}
    stream = pipeline(section, 3, 0, shuffle=False)
    assert stream.shape == (24,) and stream.dtype == "int32" and stream.conditions == {} and stream.manifest["dtype"] == "int32"
    batch = next(stream)
    assert batch["x"].dtype == np.int32 and batch["cond"] == {}
    spell = lambda row: "".join(chr(i - 1) if i else "|" for i in row).rstrip("|")  # noqa: E731
    assert spell(batch["x"][1]) == "dog|dog with hat" and spell(batch["x"][0]) in ("cat|red cat", "red cat|red cat")
    with pytest.raises(ConfigError, match="pairs has only captions; data.text, a tokenizer, makes examples"):
        pipeline({"name": "array_record", "path": str(pairs)}, 3, 0)
    with pytest.raises(DataError, match="'cat' should be two texts with a tab between"):
        text.build(PAIRS)(["cat"])


def test_decoders_undo_encoders(tmp_path):
    learned = text.learn(["a red cat", "a dog with hat"], 300)
    learned.save(str(tmp_path / "t.json"))
    for section in ({"name": "bytes", "length": 30}, {"name": "file", "path": str(tmp_path / "t.json"), "length": 30}):
        made = text.build(section)
        assert [made.decode(row.tolist()) for row in made(["a red cat", "dog, äöü"])] == ["a red cat", "dog, äöü"]


def language(pairs, **changes):
    values = {
        "data": {"name": "array_record", "path": str(pairs), "text": PAIRS}, "model": FIELDS | {"name": "language_model", "vocab": 257, "length": 24},
        "objective": {"name": "language_model", "prefix": 1}, "sample": {"every": 0},
    }  # fmt: skip
    return tiny(**(values | changes))


def test_a_model_learns_to_complete(pairs, tmp_path):
    """Trained on three pairs it writes their captions, leaves what is complete, and what it drops words of."""
    schedule = {"name": "cosine", "rate": 2e-2, "warmup": 10}
    slow = {"log": {"every": 40, "tensorboard": False, "progress": False}, "checkpoint": {"every": 0}}
    train(language(pairs, steps=160, optimizer={"name": "adamw", "schedule": schedule, "clip": 1.0}, **slow), tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "export")
    section = {"name": "model", "checkpoint": str(tmp_path / "export"), "temperature": 0.0}
    rewrite = enhance.build(section, None, lambda prompt: len(prompt) <= 20)
    asked = ["cat", "dog", "red cat", "this is far too long a prompt"]
    assert rewrite(asked) == ["red cat", "dog with hat", "red cat", asked[3]]
    assert enhance.build(section, None, lambda prompt: len(prompt) <= 7)(["dog", "cat"]) == ["dog", "red cat"]  # the first would not fit
    assert rewrite(["zebra"]) == ["zebra"]
    for changes, message in (({"temperature": -1.0}, "temperature = -1.0"), ({"checkpoint": "nowhere"}, "nowhere is neither an export")):
        with pytest.raises(ConfigError, match=message):
            enhance.build(section | changes, None, None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "mix4"}, "a language model learns from texts, and the data are none"),
        ({"model": {"name": "mlp"}, "objective": "flow_matching"}, "the data are texts, for a language model"),
        ({"objective": {"name": "language_model", "prefix": -1}}, "objective.prefix = -1"),
        ({"sample": {"every": 1}}, "a network of kind 'language_model' draws nothing"),
        ({"model": FIELDS | {"name": "language_model", "vocab": 99, "length": 24}}, "vocab = 99, but the tokenizer has 257"),
    ],
)
def test_what_does_not_go_together_is_refused(pairs, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.run(language(pairs, **changes), tmp_path / "run")


# --- rewriters


CAPTIONS = [
    "officer", "woman officer", "woman officer with dark tone", "woman officer with light tone", "man officer", "cat", "black cat with hat",
    "slice of cake", "cat", "piece of cake with cream",
]  # fmt: skip
ASKED = ["officer", "woman officer", "man officer", "blue officer", "blue cat", "cat", "zebra", "woman with hat", "slice of cake", "cake", ""]


def template(seed=0, most=99):
    return enhance.build({"name": "template", "seed": seed}, lambda path: CAPTIONS, lambda prompt: len(prompt) <= most)


def test_the_template_completes_and_keeps_every_word():
    seen = [dict(zip(ASKED[:-1], template(seed)(ASKED[:-1]))) for seed in range(40)]
    options = {prompt: {made[prompt] for made in seen} for prompt in seen[0]}
    dark, light = "woman officer with dark tone", "woman officer with light tone"
    assert options["officer"] == {dark, light, "man officer"} and options["woman officer"] == {dark, light}
    assert options["blue officer"] == {"blue officer with dark tone", "blue officer with light tone"}
    assert options["blue cat"] == {"blue cat with hat"} and options["cat"] == {"black cat with hat"}
    assert options["cake"] == {"slice of cake", "piece of cake with cream"}
    for same in ("man officer", "zebra", "woman with hat", "slice of cake"):
        assert options[same] == {same}
    for made in seen:
        assert all(enhance.holds(new.split(), old.split()) for old, new in made.items())
        assert template()([*made.values()]) == [*made.values()]  # twice is once
    assert template(3)(ASKED[:3]) == [template(3)([prompt])[0] for prompt in ASKED[:3]]
    assert template(most=27)(["blue officer"])[0] in ("blue officer with dark tone")  # what does not fit is not chosen
    assert template(most=12)(["officer"]) == ["man officer"] and template(most=8)(["officer"]) == ["officer"]


def test_prompts_are_drawn_as_often_as_captions():
    captions = ["red cat"] * 3 + ["big cat"]
    made = [enhance.build({"name": "template", "seed": s}, lambda path: captions, lambda _: True)(["cat"])[0] for s in range(400)]
    assert 0.68 < made.count("red cat") / 400 < 0.82


def test_words_of_the_command_line():
    assert enhance.parse("template") == {"name": "template"}
    assert enhance.parse("my.module:fn") == {"name": "function", "path": "my.module:fn"}
    assert enhance.parse("runs/x") == {"name": "model", "checkpoint": "runs/x"}


def louder(prompts):
    return [prompt.upper() for prompt in prompts]


def broken(prompts):
    return prompts[1:]


def test_a_function_of_ones_own():
    own = lambda name: enhance.build({"name": "function", "path": f"{__name__}:{name}"}, None, None)  # noqa: E731
    assert own("louder")(["a", "b"]) == ["A", "B"]
    with pytest.raises(ConfigError, match=r"function should give a list of 2 prompts for as many, not \['b'\]"):
        own("broken")(["a", "b"])
    missing = (("nowhere:fn", "No module named 'nowhere'"), (f"{__name__}:nothing", "nothing"), (f"{__name__}:ASKED", "is not a function"))
    for path, message in missing:
        with pytest.raises(ConfigError, match=message):
            enhance.build({"name": "function", "path": path}, None, None)
    unknown = {"name": "tempalte"}, "'tempalte' is unknown; valid: function, model, template"
    for section, message in (unknown, ({"name": "template", "sed": 1}, "sed is unknown")):
        with pytest.raises(ConfigError, match=message):
            enhance.build(section, None, None)


def test_captions_shortened():
    whole = "woman police officer with dark tone"
    assert enhance.shortened(whole) == [whole, "woman police officer", "police officer", "officer"]
    assert enhance.shortened("slice of pizza") == ["slice of pizza", "pizza"]
    assert all(enhance.holds(long.split(), short.split()) for long, short in itertools.product(["a b with c"], enhance.shortened("a b with c")))
