"""Every config through the real binaries for a few steps: train, resume, sample, evaluate, export, sample from the export."""

import json
import socket

import numpy as np
import pytest

from binaries import ROOT, check_workdir, rows, shell_in
from flowjax.data import records, votes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """run(module, *flags) in a directory of its own, on one CPU device."""
    return shell_in(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="module")
def mnist_like(shell):
    """A data set of 28x28 images, through the npz door."""
    rng = np.random.default_rng(0)
    images = lambda n: rng.integers(0, 256, (n, 28, 28), np.uint8)  # noqa: E731
    labels = lambda n: np.arange(n) % 10  # noqa: E731
    np.savez(shell.home / "m.npz", x_train=images(60), y_train=labels(60), x_test=images(20), y_test=labels(20))
    shell("tools.prepare_data", "--door=npz", f"--path={shell.home / 'm.npz'}", f"--out={shell.home / 'mnist'}")
    return shell.home / "mnist"


@pytest.fixture(scope="module")
def digits(shell):
    """A workdir of configs/digits.py:smoke, on digits prepared as the quick start does."""
    assert "ready" in shell("tools.prepare_data", "--door=digits", f"--out={shell.home / 'data'}")
    command = ("experiments.train", f"--config={ROOT}/configs/digits.py:smoke", "--workdir=digits")
    assert "done at step 4" in shell(*command)
    assert "already at step 4 of 4" in shell(*command)
    return shell.home / "digits"


@pytest.fixture(scope="module")
def vae(shell, mnist_like):
    """An export of configs/mnist_vae.py:smoke."""
    shell("experiments.train", f"--config={ROOT}/configs/mnist_vae.py:smoke:{mnist_like}", "--workdir=vae")
    shell("experiments.export", "--workdir=vae")
    return shell.home / "vae" / "export"


def test_every_config_is_tested_here():
    mine = {"mix4", "digits", "digits_ddpm", "digits_edm", "digits_ct", "digits_classifier", "digits_cd", "digits_gd", "digits_dpo", "mnist_vae", "mnist_latent", "emoji_vae"}
    mine |= {"imagenet_dit_xl2", "imagenet_sit_xl2", "imagenet_dit_xl2_512", "imagenet_jit_b16", "mnist_jit", "digits_mae", "digits_repa"}
    mine |= {"digits_pd", "digits_reflow", "digits_dmd", "digits_meanflow", "digits_shortcut", "digits_grpo", "digits_refl", "digits_nft"}
    mine |= {"digits_scm", "digits_lcm", "digits_moment", "digits_imm", "digits_dmd2", "digits_add"}
    mine |= {"digits_lora", "digits_dreambooth", "digits_continue", "digits_sft", "digits_reward", "digits_online_dpo"}
    mine |= {"emoji_latent", *T2I, "emoji_pixel", "emoji_clip", "emoji_dreambooth", "emoji_reward", "emoji_enhance", "emoji_inversion"}  # the last six in test_smoke_text
    assert {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__"} == mine


def test_mix4(shell):
    shell("experiments.train", f"--config={ROOT}/configs/mix4.py:smoke", "--workdir=mix4")
    check_workdir(shell.home / "mix4")
    shell("experiments.sample", "--checkpoint=mix4", "--out=mix4/out", "--count=20", "--labels=1,3")
    x = np.load(shell.home / "mix4/out/samples.npz")
    assert x["x"].shape == (20, 2) and set(x["label"]) == {1, 3}


def test_digits(shell, digits):
    check_workdir(digits)
    common = ("--count=30", "--steps=3", "--guidance=1.5")
    shell("experiments.sample", "--checkpoint=digits", "--out=a", *common)
    shell("experiments.evaluate", "--checkpoint=digits", *common, "--record=record.json")
    record = json.loads((shell.home / "record.json").read_text())
    assert record["samples"] == 30 and record["guidance"] == {"name": "cfg", "scale": 1.5} and record["checkpoint_step"] == 4
    shell("experiments.export", "--workdir=digits", "--out=alone")
    # The export alone, in other batches, gives the same samples to rounding.
    digits.rename(shell.home / "away")
    try:
        shell("experiments.sample", "--checkpoint=alone", "--out=b", *common, "--batch=7")
    finally:
        (shell.home / "away").rename(digits)
    a, b = (np.load(shell.home / k / "samples.npz")["x"] for k in "ab")
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.fixture(scope="module")
def latents(shell):
    """Records such as the ImageNet configs ask for: normalised float16 latents and labels, here 8x8 and random."""
    rng = np.random.default_rng(0)
    rows = (("train", f"row {i}", {"x": rng.standard_normal((8, 8, 4)).astype(np.float16), "label": i}) for i in range(32))
    records.write(shell.home / "latents", rows, name="latents", num_classes=1000)
    return shell.home / "latents"


@pytest.mark.parametrize("name", ["imagenet_dit_xl2", "imagenet_sit_xl2", "imagenet_dit_xl2_512", "imagenet_jit_b16"])
def test_imagenet(shell, latents, name):
    shell("experiments.train", f"--config={ROOT}/configs/{name}.py:smoke:{latents}", f"--workdir={name}")
    check_workdir(shell.home / name, drawn=False)  # latents alone are no picture
    if name != "imagenet_dit_xl2":
        return
    said = shell("experiments.train", f"--config={ROOT}/configs/{name}.py:{latents}", "--config.mesh.fsdp=1", "--workdir=other", code=2)
    assert "shape of the examples: (8, 8, 4), but data.expect_shape = " in said and not (shell.home / "other").exists()


T2I = ("t2i_sd3_2b", "t2i_sd35_8b", "t2i_flux_12b")


@pytest.mark.parametrize("name", T2I)
def test_text_to_image_on_embeddings(shell, name):
    if not (path := shell.home / "t2i").exists():
        rng = np.random.default_rng(0)
        shapes = {"x": (8, 8, 4), "text": (6, 12), "pooled": (10,)}
        draw = lambda: {k: rng.standard_normal(v).astype(np.float16) for k, v in shapes.items()}  # noqa: E731
        rows = (("train" if i % 3 else "test", f"row {i}", draw()) for i in range(24))
        records.write(path, rows, name="embedded")
    shell("experiments.train", f"--config={ROOT}/configs/{name}.py:smoke:{path}", f"--workdir={name}")
    check_workdir(shell.home / name, drawn=False)


def test_plan(shell):
    """Compiles for four devices what is not here: the paper's data; prints and saves."""
    command = ("tools.plan", f"--config={ROOT}/configs/imagenet_sit_xl2.py:smoke:nowhere", "--topology=cpu:4", "--config.mesh.fsdp=2")
    said = shell(*command, "--out=plan.json")
    assert "train step: batch 8 on 4 devices, data 2 x fsdp 2" in said and "sampler: batch 8" in said
    found = json.loads((shell.home / "plan.json").read_text())
    assert found["step"]["flops"]["ratio"] > 0.99 and found["topology"] == "cpu:4"
    said = shell(*command, "--search", "--fsdp=1,4", "--remat=full", "--nosampler")
    assert "best first" in said and said.count("step: batch 8 on 4 devices") == 2
    assert "--topology=v5e-16" in shell("tools.plan", f"--config={ROOT}/configs/digits.py", "--topology=v5e-16", code=2)


@pytest.mark.parametrize("name", ["digits_ddpm", "digits_edm", "digits_ct", "digits_meanflow", "digits_shortcut", "digits_imm"])
def test_digits_by_other_roads(shell, name):
    shell("experiments.train", f"--config={ROOT}/configs/{name}.py:smoke", f"--workdir={name}")
    check_workdir(shell.home / name)


@pytest.fixture(scope="module")
def judge(shell):
    """A workdir of configs/digits_classifier.py:smoke."""
    shell("experiments.train", f"--config={ROOT}/configs/digits_classifier.py:smoke", "--workdir=judge")
    return shell.home / "judge"


def test_digits_classifier_guides(shell, digits, judge):
    assert [row for row in rows(shell.home / "judge") if "accuracy" in row]
    section = "{'name': 'classifier', 'scale': 2.0, 'checkpoint': 'judge'}"
    common = (f"--checkpoint={digits}", "--count=6", "--steps=2")
    shell("experiments.sample", *common, "--out=by_judge", f"--guidance={section}")
    shell("experiments.sample", *common, "--out=by_none", "--guidance=none")
    shell("experiments.sample", *common, "--out=by_bad", f"--guidance={section.replace('classifier', 'autoguidance').replace('judge', 'digits')}")
    judge, none, bad = (np.load(shell.home / f"by_{k}" / "samples.npz")["x"] for k in ("judge", "none", "bad"))
    assert np.abs(judge - none).max() > 1e-4
    np.testing.assert_allclose(bad, none, atol=1e-5)  # guided away from itself: nothing changes


def test_digits_consistency(shell, digits):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_cd.py:smoke", "--workdir=cd",
        f"--config.roles.teacher.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "cd")


def test_digits_continuous_consistency(shell, digits):
    train = ("experiments.train", f"--config={ROOT}/configs/digits_scm.py:smoke", "--workdir=scm")
    shell(*train, f"--config.roles.teacher.checkpoint={digits}")
    check_workdir(shell.home / "scm")


def test_digits_latent_consistency(shell, digits):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_lcm.py:smoke", "--workdir=lcm",
        f"--config.roles.teacher.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "lcm")
    assert "net, not in its checkpoint: g_embed" in (shell.home / "lcm/card.txt").read_text()


def test_digits_moment_matching(shell, digits):
    roles = [f"--config.roles.{name}.checkpoint={digits}" for name in ("net", "auxiliary", "teacher")]
    shell("experiments.train", f"--config={ROOT}/configs/digits_moment.py:smoke", "--workdir=moment", *roles)
    seen = [row for row in rows(shell.home / "moment") if "auxiliary/loss" in row]
    assert len(seen) == 4 and all(isinstance(row["net/loss"], float) for row in seen) and list((shell.home / "moment/samples").glob("*.png"))
    shell("experiments.train", f"--config={ROOT}/configs/digits_moment.py:smoke:parameters", "--workdir=parameters", roles[0], roles[2])
    check_workdir(shell.home / "parameters")


def test_digits_guidance_distillation(shell, digits):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_gd.py:smoke", "--workdir=gd",
        f"--config.roles.teacher.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "gd")
    assert "net, not in its checkpoint: g_embed" in (shell.home / "gd/card.txt").read_text()
    shell("experiments.export", "--workdir=gd", "--out=gd_alone")
    ask = ("experiments.sample", "--checkpoint=gd_alone", "--count=4", "--steps=2")
    shell(*ask, "--guidance=4", "--out=gd/four")
    made = np.load(shell.home / "gd/four/samples.npz")
    assert made["x"].shape == (4, 8, 8, 1) and json.loads(str(made["settings"]))["guidance"] == {"name": "embedded", "scale": 4.0}
    said = shell(*ask, "--guidance=none", "--out=gd/none", code=2)
    assert "needs cond['guidance']" in said and "'embedded'" in said and "Traceback" not in said
    # Its second stage: fewer steps, the scale still an input.
    halve = ("experiments.progressive", "--steps=2", "--teacher=gd", f"--config={ROOT}/configs/digits_pd.py:smoke:guided", "--workdir=gd_pd")
    assert "done at step 4" in shell(*halve) and '"name": "embedded"' in (shell.home / "gd_pd/2/config.json").read_text()
    assert "another set of conditions" in shell(*halve[:-2], f"--config={ROOT}/configs/digits_pd.py:smoke", "--workdir=gd_pd_0", code=2)


def test_digits_progressive(shell, digits):
    command = ("experiments.progressive", f"--config={ROOT}/configs/digits_pd.py:smoke", f"--teacher={digits}", "--workdir=pd")
    assert "done at step 4" in shell(*command, "--steps=2")
    said = shell(*command, "--steps=2,1")  # goes on in the middle
    assert said.count("done at step 4") == 1 and said.count("already at step 4") == 1
    info = json.loads((shell.home / "pd/1/config.json").read_text())["config"]
    assert info["objective"] == {"name": "progressive_distillation", "steps": 1} and info["roles"]["teacher"]["checkpoint"] == "pd/2"
    assert "1 is not half of 3" in shell(*command, "--steps=3,1", code=2)


def test_digits_reflow(shell, digits):
    couple = ("tools.make_couplings", f"--checkpoint={digits}", "--count=32", "--steps=2", "--guidance=1.5")
    assert "32 couplings of shape (8, 8, 1)" in shell(*couple, "--sampler=euler", "--out=couplings")
    assert "valid: euler" in shell(*couple, "--sampler=ancestral", "--out=bad", code=2) and not (shell.home / "bad").exists()
    # The same noise gives the same sample.
    shell("experiments.sample", f"--checkpoint={digits}", "--count=5", "--steps=2", "--guidance=1.5", "--sampler=euler", "--out=again", "--seed=0")
    pairs, again = records.Records(shell.home / "couplings", "train").read(range(32)), np.load(shell.home / "again/samples.npz")
    np.testing.assert_allclose(pairs["x"][:5], again["x"], atol=2e-5)
    np.testing.assert_array_equal(pairs["label"], np.arange(32) % 10)
    assert abs(pairs["z"].mean()) < 0.1 and abs(pairs["z"].std() - 1) < 0.1
    smaller = ("--config.model.width=16", "--config.roles.net.checkpoint=")  # begins as no other
    for way, how in (("", (f"--config.roles.net.checkpoint={digits}",)), ("one:", smaller)):
        shell("experiments.train", f"--config={ROOT}/configs/digits_reflow.py:smoke:{way}couplings", f"--workdir=reflow{way[:-1]}", *how)
    check_workdir(shell.home / "reflow")
    assert "share of t" in (shell.home / "reflowone/card.txt").read_text()
    said = shell("experiments.train", f"--config={ROOT}/configs/digits_ct.py:smoke", "--config.data={'name': 'array_record', 'path': 'couplings'}", "--workdir=bad", code=2)
    assert "the data are couplings" in said


def test_digits_distribution_matching(shell, digits):
    roles = [f"--config.roles.{name}.checkpoint={digits}" for name in ("net", "fake", "teacher")]
    shell("experiments.train", f"--config={ROOT}/configs/digits_dmd.py:smoke", "--workdir=dmd", "--config.objective.steps=2", *roles)
    seen = [row for row in rows(shell.home / "dmd") if "fake/loss" in row]
    assert len(seen) == 4 and list((shell.home / "dmd/samples").glob("*.png"))
    assert [isinstance(row["net/loss"], float) for row in seen] == [True, False, True, False]  # roles.net.every = 2


def test_digits_against_a_discriminator(shell, digits):
    roles = [f"--config.roles.{name}.checkpoint={digits}" for name in ("net", "fake", "teacher", "discriminator")]
    shell("experiments.train", f"--config={ROOT}/configs/digits_dmd2.py:smoke", "--workdir=dmd2", *roles)
    seen = [row for row in rows(shell.home / "dmd2") if "fake/loss" in row]
    assert len(seen) == 4 and all(isinstance(row["discriminator/loss"], float) for row in seen)
    assert "discriminator, not in its checkpoint: projector" in (shell.home / "dmd2/card.txt").read_text()


def test_digits_adversarial(shell, digits):
    """LADD; ADD is where there is an encoder, in test_digits_repa."""
    roles = [f"--config.roles.{name}.checkpoint={digits}" for name in ("net", "discriminator")]
    shell("experiments.train", f"--config={ROOT}/configs/digits_add.py:smoke:latent", "--workdir=ladd", *roles)
    assert len([row for row in rows(shell.home / "ladd") if "net/loss" in row]) == 4 and list((shell.home / "ladd/samples").glob("*.png"))


def test_digits_dpo(shell, digits):
    shell("tools.prefer", f"--checkpoint={digits}", "--out=pairs", "--pairs=20", "--candidates=2", "--steps=2")
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_dpo.py:smoke", "--workdir=dpo", "--config.data.path=pairs",
        f"--config.roles.reference.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "dpo")
    (loss, *_) = (row["loss"] for row in rows(shell.home / "dpo") if "loss" in row)
    assert loss == pytest.approx(np.log(2), abs=1e-6)
    seen = [row for row in rows(shell.home / "dpo") if "panel/kl" in row]
    assert [row["step"] for row in seen] == [0, 2, 4] and seen[0]["panel/kl"] < 1e-9 < seen[1]["panel/kl"] and "panel/frechet/pixels" in seen[0]
    measured = shell("experiments.evaluate", "--checkpoint=dpo", "--count=20", "--steps=2", "--metrics=agreement", "--record=dpo.json")
    assert '"agreement"' in measured  # against evaluate.data, as preferences are no images
    out = shell("tools.win_rate", "--checkpoint=dpo", f"--against={digits}", "--count=20", "--steps=2")
    assert 0 <= json.loads(out[out.index("{") : out.rindex("}") + 1])["win_rate"] <= 1
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_dpo.py:smoke:kto", "--workdir=kto", "--config.data.path=pairs",
        f"--config.roles.reference.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}", "--config.accumulate=2",
        "--config.panel.stop={'kl': {'above': 1e-9}}", "--stopped=7",
    )  # fmt: skip
    seen = [row for row in rows(shell.home / "kto") if "loss" in row]
    assert len(seen) == 2 and seen[0]["loss"] == pytest.approx(0.5, abs=1e-6) and seen[0]["reference_point"] == 0


def test_digits_reward(shell, digits, judge):
    """Preferences by a rule; a model of them, measured; what judges by it then, and what it refuses."""
    prefer = ("tools.prefer", f"--checkpoint={digits}", "--candidates=3", "--steps=2", "--sampler=euler")
    assert "rankings in ranked; reward ink" in shell(*prefer, "--rankings", "--pairs=60", "--holdout=0.4", "--out=ranked")
    train = ("experiments.train", f"--config={ROOT}/configs/digits_reward.py:smoke", "--config.data.path=ranked", "--config.data.noise=0.1")
    backbone = (f"--config.roles.net.checkpoint={judge}", "--config.model.backbone.time=True")
    shell(*train, *backbone, "--workdir=reward")
    check_workdir(shell.home / "reward", drawn=False)
    assert rows(shell.home / "reward")[0]["loss"] == pytest.approx(np.log(6), abs=1e-5)
    assert "net, not in its checkpoint: head, asked" in (shell.home / "reward/card.txt").read_text()
    shell("experiments.evaluate", "--checkpoint=reward", "--record=record.json")
    told = json.loads((shell.home / "record.json").read_text())["results"]["preferences"]
    assert 0 <= told["accuracy"] <= 1 and told["ece"] >= 0 and told["pairs"] % 3 == 0
    asked = ("--reward=model", "--reward_checkpoint=reward")
    out = shell("tools.win_rate", f"--checkpoint={digits}", f"--against={digits}", "--count=20", "--steps=2", *asked)
    told = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert told["win_rate"] == 0.5 and told["reward_checkpoint"] == "reward"
    metrics = "--config.evaluate.metrics=({'name': 'reward', 'of': 'model', 'checkpoint': 'reward'},)"
    roles = {"reference": {"checkpoint": str(digits)}, "net": {"checkpoint": str(digits)}, "reward": {"checkpoint": "reward"}}
    nft = ("experiments.train", f"--config={ROOT}/configs/digits_nft.py:smoke", metrics, "--config.objective.reward={'model': 1.0}")
    shell(*nft, "--workdir=by_model", f"--config.roles={roles}")
    shell("experiments.evaluate", "--checkpoint=by_model", "--count=20", "--steps=1", "--sampler=euler", "--record=record.json")
    assert {"mean", "sd", "mean_real"} <= json.loads((shell.home / "record.json").read_text())["results"]["reward"].keys()
    for command, message in (
        ((*train, *backbone[:1], "--workdir=bad"), "roles.net.checkpoint does not fit the model"),
        ((*prefer, "--reward=model", "--out=bad"), "'model' asks a reward: roles.reward.checkpoint, or --reward_checkpoint"),
        ((*prefer, "--reward=model", f"--reward_checkpoint={digits}", "--out=bad"), "is a denoiser, not a classifier or reward"),
        (("tools.prefer", "--out=bad"), "--checkpoint is missing"),
    ):
        said = shell(*command, code=2)
        assert message in said and "Traceback" not in said, said
    assert not (shell.home / "bad").exists()
    with socket.socket() as taken:  # the pairs are drawn, and the page cannot be shown
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        by_hand = ("tools.prefer", f"--checkpoint={digits}", "--by=hand", "--pairs=3", "--steps=2", "--out=by_hand")
        assert f"--port={taken.getsockname()[1]}: Address already in use" in shell(*by_hand, f"--port={taken.getsockname()[1]}", code=2)
    session = votes.Session(shell.home / "by_hand")
    assert session.images.shape == (3, 2, 8, 8, 1) and session.labels.tolist() == [0, 1, 2] and session.about["step"] == 4
    session.vote(0, "right", "ann")
    said = shell("tools.prefer", "--export=by_hand", "--out=by_ann")
    assert "pairs in by_ann: train 1; decided: 0 left, 1 right" in said
    assert "--reward means nothing for --export" in shell("tools.prefer", "--export=by_hand", "--out=bad", "--reward=ink", code=2)


def test_digits_grpo(shell, digits):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_grpo.py:smoke", "--workdir=grpo", "--config.objective.window=1",
        f"--config.roles.reference.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "grpo")
    seen = [row for row in rows(shell.home / "grpo") if "loss" in row]
    assert seen[0]["ratio"] == pytest.approx(1, abs=0.05)
    assert {"kl", "clipped", "reward", "reward/symmetry", "diversity"} <= seen[0].keys()


@pytest.mark.parametrize("name", ["smoke", "smoke:stepwise"])
def test_digits_online_preferences(shell, digits, name):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_online_dpo.py:{name}", f"--workdir={name}",
        f"--config.roles.reference.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / name)
    assert rows(shell.home / name)[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_digits_refl(shell, digits, judge):
    train = ("experiments.train", f"--config={ROOT}/configs/digits_refl.py:smoke", "--workdir=refl")
    section = {"net": {"checkpoint": str(digits)}, "reward": {"checkpoint": str(judge)}}
    anchored = section | {"reference": {"checkpoint": str(digits)}}
    asked = {"name": "reward_feedback", "reward": "agreement", "anchor": 0.1, "steps": 4, "late": 2, "through": 2}
    shell(*train, f"--config.roles={anchored}", f"--config.objective={asked}")
    check_workdir(shell.home / "refl")
    seen = [row for row in rows(shell.home / "refl") if "loss" in row]
    assert seen[0]["drift"] < 1e-9 and seen[0]["reward"] < 0
    said = shell(*train[:2], "--workdir=bad", f"--config.roles={section}", code=2)
    assert "roles.reward takes no part in objective.reward" in said and "Traceback" not in said


def test_digits_nft(shell, digits):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_nft.py:smoke", "--workdir=nft",
        f"--config.roles.reference.checkpoint={digits}", f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "nft")


def test_digits_lora(shell, digits):
    config = f"--config={ROOT}/configs/digits_lora.py:smoke"
    # All kernels, and a rate that shows: of a base that has seen four steps the blocks' gates are still shut.
    strong = ("--config.roles.net.lora.pattern=kernel$", "--config.optimizer.schedule.rate=0.05")
    shell("experiments.train", config, "--workdir=lora", f"--config.roles.net.checkpoint={digits}", *strong)
    check_workdir(shell.home / "lora")
    assert "net, adapted: " in (shell.home / "lora/card.txt").read_text()
    shell("experiments.export", "--workdir=lora", "--adapter=kohya", "--out=lora/kohya")
    adapters = {
        "none": [f"--checkpoint={digits}", "--lora=lora:0"], "whole": ["--checkpoint=lora"],
        "halves": [f"--checkpoint={digits}", "--lora=lora:0.5", "--lora=lora/kohya/pytorch_lora_weights.safetensors:0.5"],
    }  # fmt: skip
    for name, flags in adapters.items():
        shell("experiments.sample", *flags, "--count=4", "--steps=2", f"--out=lora/{name}")
    none, whole, halves = (np.load(shell.home / "lora" / k / "samples.npz") for k in adapters)
    np.testing.assert_allclose(halves["x"], whole["x"], atol=1e-4)
    assert np.abs(none["x"] - whole["x"]).max() > 1e-3
    assert json.loads(str(halves["settings"]))["lora"] == [flag.removeprefix("--lora=") for flag in adapters["halves"][1:]]
    said = shell("experiments.sample", "--checkpoint=lora", f"--lora={digits}", code=2)
    assert f"--lora={digits} holds a whole network, no adapter" in said and "Traceback" not in said


def test_digits_dreambooth(shell, digits):
    made = shell("tools.make_images", f"--checkpoint={digits}", "--labels=3", "--count=12", "--steps=2", "--out=prior")
    assert "12 images of shape (8, 8, 1) in prior" in made
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_dreambooth.py:smoke:prior", "--workdir=dreambooth",
        f"--config.roles.net.checkpoint={digits}",
    )  # fmt: skip
    check_workdir(shell.home / "dreambooth")


def test_digits_continued_and_fine_tuned(shell):
    """The second stage goes on with the average; the third takes a curated part of the data, and nothing of what is frozen moves."""
    two = "--config.model.depth=2"  # layers, whose rates differ
    shell("experiments.train", f"--config={ROOT}/configs/digits.py:smoke", "--workdir=two_layers", "--config.sample.every=0", two)
    kept = ("--config.roles.net.weights=params", "--config.roles.net.average=ema", "--config.roles.net.checkpoint=two_layers")
    shell("experiments.train", f"--config={ROOT}/configs/digits_continue.py:smoke", "--workdir=continued", *kept, two)
    check_workdir(shell.home / "continued")
    card = (shell.home / "continued/card.txt").read_text()
    assert "goes on with its ema of 4 updates" in card and "part 1: 30 %" in card and "rate x 0.8" in card
    said = shell("tools.curate", "--data=digits", "--reward=symmetry", "--best=0.02", "--each_class", "--out=curated")
    assert "of 1500 examples kept" in said and "test 297" in said
    sft = ("experiments.train", f"--config={ROOT}/configs/digits_sft.py:smoke:curated", "--workdir=sft", "--config.sample.every=0")
    shell(*sft, "--config.roles.net.checkpoint=continued", two)
    check_workdir(shell.home / "sft", drawn=False)
    card = json.loads((shell.home / "sft/card.json").read_text())
    assert card["shares of the data"]["part 1"] == "20 %: name digits" and "restarted" in card["start"]["ema.ema"]
    assert "t_embed" in card["rules of the optimizer"]["net"]["frozen"]


def test_mnist_latents(shell, mnist_like, vae):
    check_workdir(shell.home / "vae")
    info = json.loads((vae / "config.json").read_text())
    assert len(info["latents"]["mean"]) == 4 and min(info["latents"]["std"]) > 0
    out = shell("experiments.evaluate", f"--checkpoint={vae}")
    assert "psnr" in out
    shell(
        "experiments.train", f"--config={ROOT}/configs/mnist_latent.py:smoke:{mnist_like}", "--workdir=latent",
        f"--config.roles.vae.checkpoint={vae}",
    )  # fmt: skip
    check_workdir(shell.home / "latent")
    shell("experiments.export", "--workdir=latent", "--out=latent_alone")
    assert (shell.home / "latent_alone/vae/config.json").exists()
    shell("experiments.sample", "--checkpoint=latent_alone", "--out=latent_samples", "--count=4")
    assert np.load(shell.home / "latent_samples/samples.npz")["x"].shape == (4, 32, 32, 1)


def test_mnist_jit(shell, mnist_like):
    shell("experiments.train", f"--config={ROOT}/configs/mnist_jit.py:smoke:{mnist_like}", "--workdir=jit")
    check_workdir(shell.home / "jit")


def test_digits_repa(shell, digits):
    mae = ("experiments.train", f"--config={ROOT}/configs/digits_mae.py:smoke", "--workdir=mae")
    repa = ("experiments.train", f"--config={ROOT}/configs/digits_repa.py:smoke", "--workdir=repa", "--config.roles.encoder.checkpoint=mae")
    shell(*mae)
    check_workdir(shell.home / "mae", drawn=False)
    shell(*repa)
    check_workdir(shell.home / "repa")
    cosines = [row["alignment"] for row in rows(shell.home / "repa") if "alignment" in row]
    assert [c != 0 for c in cosines] == [True, True, False, False]  # objective.stop = 2
    add = ("experiments.train", f"--config={ROOT}/configs/digits_add.py:smoke:features", "--workdir=add_features", "--config.roles.encoder.checkpoint=mae")
    shell(*add, *[f"--config.roles.{name}.checkpoint={digits}" for name in ("net", "teacher")])
    assert all(isinstance(row["discriminator/loss"], float) for row in rows(shell.home / "add_features") if "net/loss" in row)
    shell("experiments.sample", "--checkpoint=repa", "--out=repa/out", "--count=4")
    plain = ("experiments.train", f"--config={ROOT}/configs/digits.py:smoke", "--workdir=bad", "--config.objective={'name': 'repa'}")
    said = shell(*plain, "--config.roles={'encoder': {'checkpoint': 'mae'}}", code=2)
    assert "needs model.projector" in said and "Traceback" not in said
    said = shell(*repa[:2], "--workdir=bad", "--config.roles.encoder.checkpoint=digits", code=2)
    assert "image_encoder" in said and "Traceback" not in said


def test_latents_align_with_the_pixels(shell, mnist_like, vae):
    shell(
        "experiments.train", f"--config={ROOT}/configs/digits_mae.py:smoke", "--workdir=eyes", "--config.model.encoder.patch=8",
        f"--config.data={{'name': 'array_record', 'path': '{mnist_like}', 'pad': 32}}", "--config.batch_size=8",
    )  # fmt: skip
    shell(
        "experiments.train", f"--config={ROOT}/configs/mnist_latent.py:smoke:{mnist_like}", "--workdir=aligned",
        f"--config.roles={{'vae': {{'checkpoint': '{vae}'}}, 'encoder': {{'checkpoint': 'eyes'}}}}", "--config.objective={'name': 'repa'}",
        "--config.model={'name': 'dit', 'depth': 2, 'width': 32, 'heads': 2, 'num_classes': 10, 'projector': {'layer': 1, 'features': 24}}",
    )  # fmt: skip
    check_workdir(shell.home / "aligned")


@pytest.fixture(scope="module")
def emoji(shell):
    """emoji_data: two dozen small pictures with captions and a tokenizer; emoji_vae/export: an autoencoder of them, trained against
    a discriminator."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (shell.home / "emoji").mkdir()
    with open(shell.home / "emoji/captions.jsonl", "w") as listing:
        for i in range(24):
            Image.fromarray(rng.integers(0, 256, (20, 16, 4), np.uint8)).save(shell.home / f"emoji/{i}.png")
            listing.write(json.dumps({"file": f"{i}.png", "caption": f"picture {i}"}) + "\n")
    shell("tools.prepare_data", "--door=folder", "--path=emoji", "--out=emoji_data", "--size=16", "--channels=3", "--holdout=0.3")
    shell("tools.train_tokenizer", "--path=emoji_data", "--vocab=300")
    shell("experiments.train", f"--config={ROOT}/configs/emoji_vae.py:smoke:gan:emoji_data", "--workdir=emoji_vae")
    shell("experiments.export", "--workdir=emoji_vae", "--latent_examples=16")
    return {"vae": {"checkpoint": "emoji_vae/export"}}


def test_emoji_latents(shell, emoji):
    """Latents of the autoencoder made once; text to image on those, its text encoder learned along."""
    seen = [row for row in rows(shell.home / "emoji_vae") if "net/loss" in row]
    assert [row["net/adversarial_weight"] > 0 for row in seen] == [False, False, True, True]
    assert list((shell.home / "emoji_vae/samples").glob("*.png"))
    encode = ("tools.encode_latents", "--vae=emoji_vae/export", "--out=emoji_data_latents")
    said = shell(*encode)
    assert "emoji_data_latents: emoji_latents, " in said and "[4, 4, 4] float16, autoencoder " in said
    assert said == shell(*encode)
    manifest = json.loads((shell.home / "emoji_data_latents/manifest.json").read_text())
    before = json.loads((shell.home / "emoji_data/manifest.json").read_text())
    assert manifest["captions"] and manifest["source"]["latents"]["flip"]
    counts = {k: v["count"] for k, v in before["splits"].items()}
    assert {k: v["count"] for k, v in manifest["splits"].items()} == {"train": 2 * counts["train"], "test": counts["test"]}
    assert "error: --vae=emoji_vae is no autoencoder with measured latents" in shell(
        "tools.encode_latents", "--vae=emoji_vae", "--out=other", code=2
    )
    config = f"--config={ROOT}/configs/emoji_latent.py:smoke:emoji_data"
    shell("experiments.train", config, "--workdir=emoji_latent", f"--config.roles={emoji}")
    check_workdir(shell.home / "emoji_latent")
    shell("experiments.sample", "--checkpoint=emoji_latent", "--out=emoji_samples", "--count=2", "--steps=2", "--prompt=picture 3")
    assert np.load(shell.home / "emoji_samples/samples.npz")["x"].shape == (2, 16, 16, 3)


def test_emoji_embedded(shell, emoji):
    """Latents and embedded captions made once; a run on both, asked by prompts, also where only its export is left."""
    import jax
    from flax.core import meta

    from flowjax.models.text import TextTransformer
    from flowjax.train import export

    encoder = {"vocab": 300, "length": 24, "width": 8, "depth": 1, "heads": 2}
    params = TextTransformer(**encoder).init(jax.random.key(0), np.zeros((1, 24), np.int32))["params"]
    info = {"model": {"name": "text", **encoder}, "path": "rectified", "prediction": "velocity", "shape": [], "conditions": {"tokens": [24]}}
    export.write(shell.home / "words", meta.unbox(params), info)
    text = {"name": "file", "path": "emoji_data/tokenizer.json", "length": 24}
    encode = ("tools.encode_latents", "--vae=emoji_vae/export", "--text=words", "--out=embedded")
    said = shell(*encode, f"--data={ {'name': 'array_record', 'path': 'emoji_data', 'text': text} }")
    assert "[4, 4, 4] float16, autoencoder " in said and "text [24, 8] and [8] float16, encoder " in said
    assert "is a network of kind 'autoencoder', not 'text_encoder'" in shell(*encode[:2], "--text=emoji_vae/export", "--out=other", code=2)
    shell(
        "experiments.train", f"--config={ROOT}/configs/emoji_latent.py:smoke:unused", "--workdir=both",
        "--config.data={'name': 'array_record', 'path': 'embedded'}", f"--config.roles={emoji | {'text': {'checkpoint': 'words'}}}",
        "--config.model={'name': 'mmdit', 'patch': 2, 'width': 32, 'depth': 2, 'heads': 4, 'table': 16, 'base': 16}",
        "--config.sample.prompts=('picture 3', 'picture 4')",
    )  # fmt: skip
    check_workdir(shell.home / "both")
    measure = ("experiments.evaluate", "--checkpoint=both", "--steps=1", "--sampler=euler", "--record=record.json")
    shell(*measure)
    assert json.loads((shell.home / "record.json").read_text())["label_rule"] == "captions of test, in turn"
    foreign = {"x": np.zeros((16, 16, 3), np.float32), "text": np.zeros((24, 8), np.float32), "pooled": np.zeros(8, np.float32)}
    records.write(shell.home / "foreign", [("test", "", foreign)] * 4, name="foreign")
    said = shell(*measure, "--data={'name': 'array_record', 'path': 'foreign'}", code=2)
    assert "foreign holds captions embedded by another text encoder (None) than the network's (" in said and "Traceback" not in said
    shell("experiments.export", "--workdir=both", "--out=both_alone")
    for name in ("embedded", "words", "emoji_vae"):
        (shell.home / name).rename(shell.home / f"{name}_away")
    ask = ("--prompt=picture 3", "--prompt=picture 4", "--negative=picture 5", "--count=2", "--steps=2")
    try:
        shell("experiments.sample", "--checkpoint=both_alone", "--out=both_samples", *ask)
    finally:
        for name in ("embedded", "words", "emoji_vae"):
            (shell.home / f"{name}_away").rename(shell.home / name)
    made = np.load(shell.home / "both_samples/samples.npz")
    assert made["x"].shape == (2, 16, 16, 3) and made["prompt"].tolist() == ["picture 3", "picture 4"]


def test_plain_errors(shell, digits):
    config = f"--config={ROOT}/configs/digits.py:smoke"
    out = shell("experiments.train", config, "--workdir=bad", "--config.objective={'name': 'flow_matching', 'tiem': 'uniform'}", code=2)
    assert "tiem" in out and "time" in out and "Traceback" not in out
    assert not (shell.home / "bad").exists()
    out = shell("experiments.train", config, "--workdir=digits", "--config.seed=5", code=2)
    assert "seed" in out and "Traceback" not in out
    out = shell("experiments.sample", "--checkpoint=nowhere", code=2)
    assert "nowhere" in out and "Traceback" not in out
    out = shell("experiments.sample", "--checkpoint=digits", "--labels=12", code=2)
    assert "0 to 9" in out
