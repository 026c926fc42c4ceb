"""What the sampling binaries make of their flags; what they refuse."""

import json

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import sampling
from flowjax.config import ConfigError


@pytest.fixture(autouse=True)
def given():
    """given(--flags): set them and no others; afterwards all are back at their defaults.

    Flag by flag: in one process with other tests the other binaries' required flags are there as well, and missing.
    """
    values = flags.FLAGS
    values.mark_as_parsed()
    names = [f.name for f in vars(sampling).values() if isinstance(f, flags.FlagHolder)]

    def parse(*arguments):
        for name in names:
            values[name].unparse()
        wanted = {}
        for argument in arguments:
            name, value = argument.removeprefix("--").split("=", 1)
            wanted.setdefault(name, []).append(value)
        for name, texts in wanted.items():
            values[name].parse(texts if name == sampling.PROMPT.name else texts[-1])

    yield parse
    parse()


CAPTIONED = {"text": {"name": "bytes", "length": 8}, "data": {}, "config": {"sample": {"count": 6, "prompts": ["a", "b"]}}}
EMBEDDED = {"conditions": {"text": [4, 8], "pooled": [8]}, "config": {"sample": {"count": 6}}}
CLASSES = {"num_classes": 3, "model": {"num_classes": 3}, "config": {"sample": {"count": 6}}}


def test_a_class_and_a_prompt(given):
    """Prompts one after the other, and the classes in turn through all of them."""
    both = CAPTIONED | {"model": {"num_classes": 5}}
    given("--prompt=one", "--prompt=two", "--labels=3,0")
    count, cond, rows = sampling.asked("nowhere", both, 6)
    assert rows == ["one"] * 3 + ["two"] * 3 and cond["label"].tolist() == [3, 0, 3, 0, 3, 0] and cond["tokens"].shape == (6, 8)
    given("--prompt=one", "--labels=5")
    with pytest.raises(ConfigError, match="classes are 0 to 4"):
        sampling.asked("nowhere", both, 1)
    given("--prompt=one")
    with pytest.raises(ConfigError, match="--labels is missing: this network is asked by a class and a prompt, both"):
        sampling.asked("nowhere", both, 1)


def test_sizes():
    assert sampling.size("64x96") == (64, 96) and sampling.size("32") == (32, 32)
    for wrong in ("wide", "64x", "0", "1x2x3", "-4"):
        with pytest.raises(ConfigError, match="should be HEIGHTxWIDTH"):
            sampling.size(wrong)


def test_prompts_come_together_and_in_order(given, tmp_path):
    (tmp_path / "p.txt").write_text("x\n\n y \n")
    given("--prompt=one", "--prompt=two", f"--prompts={tmp_path / 'p.txt'}")
    count, cond, rows = sampling.asked("nowhere", CAPTIONED, 6)
    assert rows == ["one", "one", "two", "x", "x", "y"] and count == 6 and cond["tokens"].shape == (6, 8)
    assert bytes(int(i) - 1 for i in cond["tokens"][3] if i) == b"x"
    assert sampling.asked("nowhere", CAPTIONED, 0)[0] == 4 * sampling.EACH
    assert sampling.asked("nowhere", CAPTIONED, 5)[2] == ["one", "one", "two", "x", "y"]  # none is left out
    with pytest.raises(ConfigError, match="--count=3 is less than the 4 prompts"):
        sampling.asked("nowhere", CAPTIONED, 3)
    given()
    assert sampling.asked("nowhere", CAPTIONED, 4)[2] == ["a", "a", "b", "b"]  # the run's own
    assert sampling.asked("nowhere", CAPTIONED, 1)[2] == ["a"]


def test_the_runs_own_negative_prompt_goes_with_guidance(given):
    own = {"steps": 3, "sampler": "euler", "grid": "uniform", "guidance": {"name": "cfg", "scale": 2.0}, "negative": "dull"}
    info = {"config": {"sample": own}}
    assert sampling.options(info) == own
    given("--guidance=none")
    assert sampling.options(info) == own | {"guidance": "none", "negative": ""}
    given("--guidance=none", "--negative=grey")  # which is refused where it is used
    assert sampling.options(info)["negative"] == "grey"


def test_a_scale_is_an_input_where_the_network_takes_one(given):
    sample = {"steps": 3, "sampler": "euler", "grid": "uniform", "guidance": "none"}
    plain, distilled = ({"config": {"sample": sample}, "conditions": c} for c in ({"label": []}, {"guidance": [], "label": []}))
    given("--guidance=3.5")
    assert sampling.options(plain)["guidance"] == {"name": "cfg", "scale": 3.5} == sampling.options({"config": {"sample": sample}})["guidance"]
    assert sampling.options(distilled)["guidance"] == {"name": "embedded", "scale": 3.5}
    given("--guidance={'name': 'cfg', 'scale': 2.0}")  # refused where it is used
    assert sampling.options(distilled)["guidance"] == {"name": "cfg", "scale": 2.0}


@pytest.mark.parametrize(
    ("flag", "info", "message"),
    [
        ("--labels=1", CAPTIONED, "asked by --prompt"),
        ("--prompts=nowhere.txt", CAPTIONED, "--prompts=nowhere.txt"),
        ("--prompt=123456789", CAPTIONED, "9 tokens, but text.length = 8"),
        ("--prompt=x", EMBEDDED, "nowhere takes embedded captions and has no text encoder for prompts: train with roles.text"),
        ("--count=2", EMBEDDED, "nowhere takes embedded captions and has no text encoder for prompts: train with roles.text"),
        ("--prompt=x", CLASSES, "--prompt: this network was not trained with captions"),
        ("--negative=x", CLASSES, "--negative: this network was not trained with captions"),
        ("--labels=3", CLASSES, "classes are 0 to 2"),
    ],
)
def test_refused(given, flag, info, message):
    given(flag)
    with pytest.raises(ConfigError, match=message):
        sampling.asked("nowhere", info, 0)


def test_images_to_edit(given, tmp_path):
    info = {"image_shape": [8, 8, 3]}
    Image.new("RGB", (16, 8), (255, 0, 0)).save(tmp_path / "red.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "half.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    given(f"--init={tmp_path / 'red.png'}")
    edit = sampling.edit(info)["edit"]
    np.testing.assert_allclose(edit.image, np.broadcast_to([1.0, -1, -1], (8, 8, 3)))
    assert edit.keep is None and edit.strength == 0.6
    given(f"--init={tmp_path / 'red.png'}", f"--mask={tmp_path / 'half.png'}")
    edit = sampling.edit(info)["edit"]
    assert edit.strength == 1.0 and edit.keep[:, :4].all() and not edit.keep[:, 4:].any()
    given(f"--init={tmp_path / 'red.png'}", f"--mask={tmp_path / 'white.png'}")
    with pytest.raises(ConfigError, match="white all over: nothing to keep"):
        sampling.edit(info)
    given(f"--init={tmp_path / 'red.png'}", "--strength=0")
    assert sampling.edit(info)["edit"].strength == 0  # and not the default
    with pytest.raises(ConfigError, match="makes no images"):
        sampling.edit({"image_shape": [2]})
    for strength in ("0.5", "0"):
        given(f"--strength={strength}")
        with pytest.raises(ConfigError, match="--init"):
            sampling.edit(info)
    given()
    assert sampling.edit(info) == {}


def test_what_is_recorded_of_an_edit_can_be_written(given, tmp_path):
    """An image goes by its name into the settings of samples, of preference pairs and of win rates."""
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    given(f"--init={tmp_path / 'black.png'}", "--strength=0.5")
    sample = {"steps": 3, "sampler": "euler", "grid": "uniform", "guidance": "none"}
    told = sampling.told(sampling.options({"image_shape": [8, 8, 3], "config": {"sample": sample}}))
    assert json.loads(json.dumps(told)) == sample | {"negative": "", "init": str(tmp_path / "black.png"), "strength": 0.5}


def test_the_seed_is_the_runs_own_where_none_is_given(given):
    given()
    assert sampling.seed({"config": {"sample": {"seed": 5}}}) == 5
    given("--seed=0")
    assert sampling.seed({"config": {"sample": {"seed": 5}}}) == 0


def test_two_networks_are_compared_on_the_same_classes(given):
    """One that was trained on half of the classes is asked for these, if nobody says otherwise."""
    from tools import win_rate

    half = CLASSES | {"config": {"data": {"name": "digits", "classes": (0, 1)}, "sample": {"count": 6}}}
    whole = CLASSES | {"config": {"data": "digits", "sample": {"count": 6}}}
    given()
    with pytest.raises(ConfigError, match="would be asked for different things.* give --labels or --prompt"):
        win_rate.asked({"against": ("a", half), "checkpoint": ("b", whole)}, 6)
    assert win_rate.asked({"against": ("a", half), "checkpoint": ("b", half)}, 6)["against"][0]["label"].tolist() == [0, 1] * 3
    given("--labels=1")
    assert win_rate.asked({"against": ("a", half), "checkpoint": ("b", whole)}, 2)["checkpoint"][0]["label"].tolist() == [1, 1]
