"""Captions through the real binaries: a tokenizer, text to image on pixels, its judge, prompts."""

import json
import shutil

import numpy as np
import pytest

from binaries import ROOT, check_workdir, shell_in
from flowjax.data import records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    return shell_in(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def emoji(shell):
    """Three dozen pictures of 64x64 with captions, and a tokenizer learned from them."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (shell.home / "pictures").mkdir()
    with open(shell.home / "pictures" / "captions.jsonl", "w") as listing:
        for i in range(36):
            Image.fromarray(rng.integers(0, 256, (64, 64, 4), np.uint8)).save(shell.home / "pictures" / f"{i}.png")
            listing.write(json.dumps({"file": f"{i}.png", "caption": [f"picture {i}", f"a heart number {i}"]}) + "\n")
    shell("tools.prepare_data", "--door=folder", "--path=pictures", "--out=emoji", "--channels=3", "--holdout=0.4")
    said = shell("tools.train_tokenizer", "--path=emoji", "--vocab=300")
    assert "emoji/tokenizer.json: " in said and "captions take" in said
    return shell.home / "emoji"


@pytest.fixture(scope="module")
def pixel(shell, emoji):
    """A workdir of configs/emoji_pixel.py:smoke."""
    shell("experiments.train", f"--config={ROOT}/configs/emoji_pixel.py:smoke:{emoji}", "--workdir=pixel")
    return shell.home / "pixel"


def test_dreambooth(shell, emoji, pixel):
    (shell.home / "mine").mkdir()
    with open(shell.home / "mine" / "captions.jsonl", "w") as listing:
        for i in range(3):
            shutil.copy(shell.home / f"pictures/{i}.png", shell.home / f"mine/{i}.png")
            listing.write(json.dumps({"file": f"{i}.png", "caption": "zwx heart"}) + "\n")
    shell("tools.prepare_data", "--door=folder", "--path=mine", "--out=subject", "--channels=3")
    made = shell("tools.make_images", "--checkpoint=pixel", "--prompt=a heart", "--count=6", "--steps=1", "--sampler=euler", "--out=hearts")
    assert "6 images of shape (64, 64, 3) in hearts" in made
    with open(shell.home / "mine" / "captions.jsonl", "w") as listing:  # the same pictures under a word that is new
        listing.writelines(json.dumps({"file": f"{i}.png", "caption": "a <mine>"}) + "\n" for i in range(3))
    shell("tools.prepare_data", "--door=folder", "--path=mine", "--out=word", "--channels=3")
    config = f"--config={ROOT}/configs/emoji_inversion.py:smoke:{emoji},word"
    shell("experiments.train", config, "--workdir=word_run", f"--config.roles.net.checkpoint={pixel}")
    check_workdir(shell.home / "word_run")
    ask = ("experiments.sample", "--count=2", "--steps=1", "--sampler=euler")
    shell(*ask, f"--checkpoint={pixel}", "--lora=word_run", "--prompt=a <mine>", "--prompt=a heart", "--out=word_run/lora")
    shell(*ask, "--checkpoint=word_run", "--prompt=a <mine>", "--prompt=a heart", "--out=word_run/whole")
    lora, whole = (np.load(shell.home / "word_run" / k / "samples.npz") for k in ("lora", "whole"))
    np.testing.assert_array_equal(lora["tokens"], whole["tokens"])
    np.testing.assert_allclose(lora["x"], whole["x"], atol=1e-5)
    config = f"--config={ROOT}/configs/emoji_dreambooth.py:smoke:{emoji},subject,hearts"
    shell("experiments.train", config, "--workdir=mine_lora", f"--config.roles.net.checkpoint={pixel}")
    check_workdir(shell.home / "mine_lora")


def test_pixels_from_prompts(shell, emoji, pixel):
    check_workdir(pixel)
    shell("experiments.export", "--workdir=pixel", "--out=out")
    ask = ("experiments.sample", "--checkpoint=out", "--steps=2", "--sampler=euler", "--guidance=3")
    (shell.home / "emoji" / "tokenizer.json").rename(shell.home / "away.json")  # the export has its own
    shell(*ask, "--prompt=red heart", "--prompt=a cat face", "--count=4", "--out=asked")
    made = np.load(shell.home / "asked" / "samples.npz")
    assert made["x"].shape == (4, 64, 64, 3) and made["prompt"].tolist() == ["red heart"] * 2 + ["a cat face"] * 2
    (shell.home / "prompts.txt").write_text("red heart\n\na cat face\n")
    shell(*ask, "--prompts=prompts.txt", "--count=4", "--out=listed", "--negative=a heart")
    again = np.load(shell.home / "listed" / "samples.npz")
    np.testing.assert_array_equal(again["tokens"], made["tokens"])
    assert np.abs(again["x"] - made["x"]).max() > 1e-6  # the negative prompt is heard
    shell(*ask, "--prompt=red heart", "--count=1", "--size=32x64", "--out=wide")
    assert np.load(shell.home / "wide" / "samples.npz")["x"].shape == (1, 32, 64, 3)
    from PIL import Image

    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(shell.home / "mask.png")
    shell(*ask, "--prompt=red heart", "--count=2", "--init=pictures/0.png", "--mask=mask.png", "--out=painted")
    painted = np.load(shell.home / "painted" / "samples.npz")["x"]
    np.testing.assert_array_equal(painted[0, :, :32], painted[1, :, :32])
    assert np.abs(painted[0, :, 32:] - painted[1, :, 32:]).mean() > 0.01
    shell(*ask, "--prompt=red heart", "--count=2", "--init=pictures/0.png", "--strength=0.1", "--out=near")
    near = np.load(shell.home / "near" / "samples.npz")["x"]
    assert np.abs(near[0] - near[1]).mean() < np.abs(painted[0, :, 32:] - painted[1, :, 32:]).mean()
    for flags, message in (
        ((), "give --prompt or --prompts"),
        (("--prompt=" + "long " * 30,), "tokens, but text.length = 24"),
        (("--prompt=x", "--size=30"), "not divide"),
        (("--prompt=x", "--negative=y", "--guidance=none"), "a negative prompt needs guidance"),
    ):
        said = shell(*ask, *flags, "--out=bad", code=2)
        assert message in said and "Traceback" not in said, said
    measure = ("experiments.evaluate", "--checkpoint=out", "--steps=1", "--sampler=euler", "--record=record.json")
    shell(*measure, "--negative=a heart")
    record = json.loads((shell.home / "record.json").read_text())
    assert record["guidance"] == {"name": "cfg", "scale": 2.0, "negative": "a heart"} and record["label_rule"] == "captions of test, in turn"
    for flag in ("--prompt=x", "--size=32", "--labels=1", "--init=mask.png"):
        said = shell(*measure, flag, code=2)
        assert flag.split("=")[0] + " means nothing here" in said and "Traceback" not in said, said
    (shell.home / "away.json").rename(shell.home / "emoji" / "tokenizer.json")
    assert not (shell.home / "bad").exists()


def test_prompts_enhanced(shell, emoji, pixel):
    """A language model on pairs made of the captions; the sampler says and stores what prompts became."""
    said = shell("tools.make_caption_pairs", f"--path={emoji}", "--out=pairs")
    assert " of 72 captions in pairs" in said
    shell("experiments.train", f"--config={ROOT}/configs/emoji_enhance.py:smoke:{emoji},pairs", "--workdir=enhance")
    check_workdir(shell.home / "enhance", drawn=False)
    ask = ("experiments.sample", f"--checkpoint={pixel}", "--steps=1", "--sampler=euler", "--count=2", "--prompt=heart", "--prompt=a heart number 1")
    shell(*ask, "--enhance=enhance", "--out=by_model")
    made = np.load(shell.home / "by_model" / "samples.npz")
    assert made["prompt"].tolist() == ["heart", "a heart number 1"] and [p.count("heart") for p in made["enhanced"]] == [1, 1]
    said = shell(*ask, "--enhance=template", "--out=by_template")
    made = np.load(shell.home / "by_template" / "samples.npz")
    assert made["enhanced"][0].startswith("a heart number ") and f"heart -> {made['enhanced'][0]}" in said
    assert json.loads(str(made["settings"]))["enhance"] == "template"
    from flowjax.train import export

    tokenizer = export.tokenizer_of(pixel, export.info_of(pixel))
    np.testing.assert_array_equal(made["tokens"], tokenizer(made["enhanced"].tolist()))
    said = shell(*ask, f"--enhance={pixel}", code=2)
    assert "is a network of kind 'denoiser', not a language_model" in said and "Traceback" not in said


def test_two_stages_of_resolution(shell, emoji):
    """The second begins where the first ended, on more tokens."""
    shell("experiments.train", f"--config={ROOT}/configs/emoji_pixel.py:smoke:32:{emoji}", "--workdir=small")
    later = ("experiments.train", f"--config={ROOT}/configs/emoji_pixel.py:smoke:{emoji}", "--config.steps=1", "--config.seed=1")
    shell(*later, "--config.roles={'net': {'checkpoint': 'small'}}", "--workdir=large")
    info = json.loads((shell.home / "small" / "config.json").read_text())
    assert info["shape"] == [32, 32, 3] and info["config"]["objective"]["time"]["shift"] == 0.5
    small, large = (np.concatenate([v.ravel() for v in leaves(shell.home / name)]) for name in ("small", "large"))
    # One warming-up step from the other's weights; from its own seed it would have begun as far away as weights are large.
    assert 0 < np.abs(large - small).max() < 0.01 < 0.1 < np.abs(small).max()


def leaves(workdir):
    import jax

    from flowjax.train import export

    return jax.tree.leaves(export.load(str(workdir))[1])


def test_the_judge(shell, emoji):
    shell("experiments.train", f"--config={ROOT}/configs/emoji_clip.py:smoke:{emoji}", "--workdir=judge")
    check_workdir(shell.home / "judge", drawn=False)


def test_a_reward_of_captions(shell, emoji, pixel):
    """Pairs for prompts, a model of them on the judge's towers, and pairs that this model decides."""
    if not (shell.home / "judge").exists():
        shell("experiments.train", f"--config={ROOT}/configs/emoji_clip.py:smoke:{emoji}", "--workdir=judge")
    prefer = ("tools.prefer", f"--checkpoint={pixel}", "--prompt=red heart", "--prompt=a cat face", "--pairs=16", "--steps=1", "--sampler=euler")
    assert "16 pairs in red" in shell(*prefer, "--reward={'red': 1.0, 'ink': -0.5}", "--out=red")
    train = ("experiments.train", f"--config={ROOT}/configs/emoji_reward.py:smoke:red,{emoji}", "--config.roles.net.checkpoint=judge")
    shell(*train, "--workdir=reward")
    check_workdir(shell.home / "reward", drawn=False)
    assert "16 pairs in judged" in shell(*prefer, "--reward=model", "--reward_checkpoint=reward", "--out=judged")
    found = records.Records(shell.home / "judged", "train").read(range(16))
    assert found["caption"] == ["red heart"] * 8 + ["a cat face"] * 8 and found["win"].shape == (16, 64, 64, 3)


def test_captions_that_nobody_reads_are_refused(shell, emoji):
    text = "{'name': 'bytes', 'length': 64}"
    data = f"--config.data={{'name': 'array_record', 'path': '{emoji}', 'text': {text}}}"
    plain = ("experiments.train", f"--config={ROOT}/configs/digits.py:smoke", "--workdir=refused", "--config.model.num_classes=0", data)
    said = shell(*plain, "--config.objective.label_drop=0.0", code=2)
    assert "tokens" in said and "model 'dit' does not use them" in said
    pixel = ("experiments.train", f"--config={ROOT}/configs/emoji_pixel.py:smoke:{emoji}", "--workdir=refused")
    said = shell(*pixel, "--config.model.text_encoder.vocab=100", code=2)
    assert "vocab = 100, but the tokenizer has" in said
    assert not (shell.home / "refused").exists()
