"""Exact resume: uninterrupted == interrupted and resumed, bitwise, and != a restart from the weights alone."""

import shutil

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flowjax import models, objectives
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player
from flowjax.train import export, log
from train_runs import rows, stored, tiny, train


class Critic(nn.Module):
    """Scores points; small and without a time."""

    width: int = 4
    time: bool = False
    kind = "classifier"

    @nn.compact
    def __call__(self, x, t=None):
        return nn.Dense(1)(nn.silu(nn.Dense(self.width)(x)))


def against(nets, batch, key):
    value, metrics = flow_matching.loss(nets, batch, key)
    x_t = nets["net"].path.perturb(batch["x"], batch["z"], batch["t"])
    made = nets["net"].get("x", x_t, batch["t"], batch["cond"])
    return value - 0.1 * jnp.mean(nets["critic"](made)), metrics


def judge(nets, batch, key):
    x_t = nets["net"].path.perturb(batch["x"], batch["z"], batch["t"])
    made = nets["net"].get("x", x_t, batch["t"], batch["cond"])
    return jnp.mean(jnp.square(nets["critic"](batch["x"]) - 1)) + jnp.mean(jnp.square(nets["critic"](made))), {}


ADVERSARIAL = Objective({"net": "trained", "critic": "trained"}, (Player("net", against), Player("critic", judge, every=2)), flow_matching.rollout)


@pytest.fixture(autouse=True, scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "critic", Critic)
        patch.setitem(objectives.OBJECTIVES, "adversarial", ADVERSARIAL)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    train(tiny(steps=2), workdir)
    export.export(workdir, workdir / "export")
    return str(workdir / "export")


def one_role(teacher):
    return dict(ema={"ema": {"name": "warmup"}, "long": {"name": "power", "std": 0.1}}, validation={"every": 3, "batches": 1})


def consistency(teacher):
    return dict(
        objective={"name": "consistency_distillation", "steps": 4}, roles={"teacher": {"checkpoint": teacher}},
        ema={"target": {"name": "constant", "decay": 0.5}},
    )  # fmt: skip


def two_players(teacher):
    return dict(
        objective={"name": "adversarial"}, ema={"ema": {"name": "constant", "decay": 0.5}, "judge": {"name": "constant", "of": "critic"}},
        roles={"critic": {"model": {"name": "critic"}, "optimizer": {"name": "sgd", "schedule": {"name": "linear", "rate": 0.1}}}},
    )  # fmt: skip


def vae_gan(teacher):
    return dict(
        data={"name": "digits"}, objective={"name": "vae_gan", "start": 2},
        model={"name": "autoencoder_kl", "channels": 4, "multipliers": (1,), "layers": 1, "groups": 2, "image_channels": 1, "mid_attention": False},
        roles={"discriminator": {"model": {"name": "patch_gan", "channels": 4, "layers": 1, "groups": 2}}},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [one_role, consistency, two_players, vae_gan], ids=lambda f: f.__name__)
def test_interrupted_equals_uninterrupted_and_not_weights_only(case, teacher, tmp_path):
    changes = dict(steps=6, log={"every": 2, "tensorboard": False, "progress": False}, checkpoint={"every": 2, "keep": 4}) | case(teacher)
    config = tiny(**changes)
    assert train(config, tmp_path / "whole")[0] == 6
    # Stopped in the middle of a logging window (step 3), then once more, then finished.
    assert train(config, tmp_path / "parts", stop_at=3)[0] == 3
    assert train(config, tmp_path / "parts", stop_at=1)[0] == 4
    assert train(config, tmp_path / "parts")[0] == 6
    whole, parts = stored(tmp_path / "whole", 6), stored(tmp_path / "parts", 6)
    assert whole == parts and whole["data"] == {"next_index": 6}
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    # Everything that should be compared is there.
    kinds = {name.split("/")[0] for name in whole["fingerprints"]}
    assert kinds == {"step", "params", "opt", "ema"}
    # A restart with the weights, but without optimizer, averages and place, ends elsewhere.
    roles = config.to_dict()["roles"] | {"net": {"checkpoint": str(tmp_path / "half"), "weights": "params"}}
    shutil.copytree(tmp_path / "whole", tmp_path / "half", ignore=shutil.ignore_patterns("6", "4"))
    assert train(tiny(**(changes | {"roles": roles, "steps": 4})), tmp_path / "weights")[0] == 4
    restart = stored(tmp_path / "weights", 4)["fingerprints"]
    same = [k for k, v in whole["fingerprints"].items() if k.startswith("params/net") and v == restart[k]]
    assert not same


@pytest.mark.parametrize("moment", range(5))
def test_a_stop_at_any_moment_skips_no_data(moment, tmp_path):
    """Whenever the request arrives, the stored place in the data is the number of steps taken."""
    step, said = train(tiny(checkpoint={"every": 100}), tmp_path / "run", stop_at=moment)
    assert step == min(moment, 4) and ("stopped on request" in said) == (step < 4)
    assert stored(tmp_path / "run", step)["data"] == {"next_index": step}


def test_a_finished_run_says_so(tmp_path):
    train(tiny(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    step, said = train(tiny(), tmp_path / "run")
    assert step == 4 and "is already at step 4 of 4" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_continues_where_the_schedule_allows(tmp_path):
    flat = {"optimizer": {"name": "sgd", "schedule": {"name": "constant", "rate": 1e-2}}}
    train(tiny(steps=2, **flat), tmp_path / "run")
    step, _ = train(tiny(steps=4, **flat), tmp_path / "run")
    assert step == 4
    train(tiny(steps=4, **flat), tmp_path / "whole")
    ours, theirs = (stored(tmp_path / d, 4)["fingerprints"] for d in ("run", "whole"))
    assert ours == theirs


def test_rows_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    """A crash leaves rows of steps that will be taken again."""
    train(tiny(), tmp_path / "run")
    want = rows(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss"')  # the write that the crash cut off
    train(tiny(), tmp_path / "run")
    assert rows(tmp_path / "run") == want
    assert [r["step"] for r in log.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_frozen_networks_may_not_change(teacher, tmp_path):
    config = tiny(**consistency(teacher))
    train(config, tmp_path / "run", stop_at=2)
    source = tmp_path / "other"
    train(tiny(steps=1), source)
    shutil.copytree(teacher, tmp_path / "kept")
    shutil.rmtree(teacher)
    try:
        export.export(source, teacher)
        before = (tmp_path / "run/config.json").read_text()
        for _ in range(2):  # nothing says afterwards that it was trained with what stands there now
            with pytest.raises(ValueError, match="frozen networks changed"):
                train(config, tmp_path / "run")
        assert (tmp_path / "run/config.json").read_text() == before
    finally:
        shutil.rmtree(teacher)
        shutil.copytree(tmp_path / "kept", teacher)


def test_the_reported_rate_is_the_one_used(tmp_path):
    """SGD without momentum: the update's norm is rate x the gradient's, at every step, also for a player that moves every 2nd."""
    sgd = {"name": "sgd", "momentum": 0.0, "schedule": {"name": "cosine", "rate": 0.1, "warmup": 2}}
    config = tiny(**(two_players("") | {"optimizer": sgd, "roles": {"critic": {"model": {"name": "critic"}, "optimizer": sgd}}}), accumulate=2)
    train(config, tmp_path / "run", stop_at=None)
    for row in rows(tmp_path / "run"):
        assert row["net/update_norm"] == pytest.approx(row["rate/net"] * row["net/grad_norm"], rel=1e-4)
        if row["critic/loss"] != "nan":
            assert row["critic/update_norm"] == pytest.approx(row["rate/critic"] * row["critic/grad_norm"], rel=1e-4)
    assert [r["critic/loss"] == "nan" for r in rows(tmp_path / "run")] == [False, True, False, True]
    assert jax.device_count() == 8
