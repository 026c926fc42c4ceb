"""tools.bench: its numbers fit together, its refusals are plain, and the PyTorch side computes what ours does."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import close, randomise, shapes
from train_runs import DIT, tiny

from flowjax import models, samplers, times
from flowjax.config import ConfigError
from flowjax.models import flops
from flowjax.predictions import Model
from flowjax.train import card, settings
from flowjax.train import step as step_lib
from flowjax.train.assembly import Run
from tools import bench

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = {"data": {"name": "digits"}, "model": DIT}
VAE = {
    "name": "autoencoder_kl", "channels": 4, "multipliers": (1, 2), "layers": 1, "latent_channels": 2, "groups": 2, "image_channels": 1,
    "quant_conv": True,
}  # fmt: skip


def test_training_numbers_fit_together(monkeypatch):
    monkeypatch.setattr(card, "peak_flops", lambda: 1e12)
    config = tiny(**DIGITS)
    out = bench.train(config, warmup=1, repeats=5)
    seconds = out["step_seconds"]
    assert len(seconds["all"]) == 5 and seconds["min"] == min(seconds["all"]) > 0
    assert seconds["median"] == np.median(seconds["all"]) and out["steps_per_second"] == 1 / seconds["median"]
    assert out["images_per_second"] == pytest.approx(16 * out["steps_per_second"])
    assert out["tokens"] == 4  # 8 x 8 pixels in patches of 4
    assert out["tokens_per_second_per_chip"] == pytest.approx(4 * out["images_per_second"] / jax.device_count())
    assert out["model_tflops"] == pytest.approx(out["flops"] * out["steps_per_second"] / 1e12)
    assert out["mfu"] == pytest.approx(out["model_tflops"] / jax.device_count())
    assert 0 < out["data_wait"] < 1
    assert out["memory"]["planned"] >= out["memory"]["temporaries"] > 0 and out["memory"]["most_in_use"] is None
    assert out["parameters"] == card.size(Run(config).target.params["net"])
    lines = dict(bench.table_of_training(out))
    assert lines["step"].endswith("of 5 after 1") and lines["data"] == "the pipeline" and lines["MFU"].endswith(" %")
    json.dumps(out)


def test_a_network_without_tokens_on_one_batch_without_a_known_peak():
    out = bench.train(tiny(), warmup=1, repeats=2, synthetic=True)
    assert out["tokens"] is None and out["tokens_per_second_per_chip"] is None and out["mfu"] is None
    lines = dict(bench.table_of_training(out))
    assert lines["tokens/s/chip"] == "no tokens" and "unknown" in lines["MFU"] and lines["data"] == "one fixed batch"


def test_the_pipeline_alone():
    out = bench.feed(tiny(**DIGITS), warmup=1, repeats=3)
    assert out["images_per_second"] == pytest.approx(out["batch"] * 3 / out["seconds"])
    # 8x8 float32 images and int32 labels.
    assert out["bytes_per_second"] == pytest.approx(out["images_per_second"] * (64 + 1) * 4)
    assert out["images_per_second_per_core"] == pytest.approx(out["images_per_second"] / bench.threads())


def test_operations_do_not_count_what_remat_repeats():
    once = Run(tiny(**DIGITS))
    again = Run(tiny(data=DIGITS["data"], model={**DIT, "remat": "full"}))
    batch = next(once.pipeline)
    count = lambda this: flops.count(this.step(), this.target, this.frozen, batch)  # noqa: E731
    assert count(again) > count(once)
    assert count(again.plain()) == count(once)
    assert again.roles["net"].module.remat == "full"  # the run itself is left alone


def test_steps_train_on_and_synthetic_batches_are_one():
    this = Run(tiny())
    steps = bench.Steps(this, synthetic=True)
    assert next(steps.batches) is next(steps.batches) is steps.first
    seconds, waits = steps(3)
    assert seconds.shape == waits.shape == (3,) and int(steps.state.step) == 3
    streamed = bench.Steps(Run(tiny()), synthetic=False)
    assert not np.array_equal(next(streamed.batches)["x"], streamed.first["x"])


def test_data_that_a_config_promises_need_not_be_there():
    config = tiny(data={"name": "array_record", "path": "nowhere", "expect_shape": (8, 8, 4), "expect_classes": 10}, model=DIT, batch_size=64)
    batch = bench.invented(bench.assembled(config))
    assert batch["x"].shape == (64, 8, 8, 4) and abs(float(batch["x"].std()) - 1) < 0.1
    assert {*batch["cond"]["label"].tolist()} == {*range(10)}
    assert bench.train(config, warmup=1, repeats=2, synthetic=True)["data_wait"] < 0.5
    assert len(bench.sample(config, ["euler"], [1], batch=4, repeats=1)) == 1
    with pytest.raises(ConfigError, match="nowhere"):
        bench.train(config, warmup=1, repeats=2)
    # Data that are here are taken, whatever is promised.
    assert not bench.assembled(tiny(data={**DIGITS["data"], "expect_shape": (8, 8, 1), "expect_classes": 10}, model=DIT)).pipeline.manifest.get("declared")


def test_sampling_rows():
    rows = bench.sample(tiny(**DIGITS), ["euler", "heun"], [1, 3], batch=8, repeats=3)
    assert [(r["sampler"], r["steps"]) for r in rows] == [("euler", 1), ("euler", 3), ("heun", 1), ("heun", 3)]
    for row in rows:
        assert len(row["call_seconds"]["all"]) == 3
        assert row["images_per_second"] == pytest.approx(8 / row["call_seconds"]["median"])
        assert row["model_tflops"] == pytest.approx(row["flops"] * row["images_per_second"] / 8 / 1e12)
    work = [r["flops"] for r in rows]
    assert work[1] == 3 * work[0] and work[2] == 2 * work[0] and work[3] == 6 * work[0]
    table = bench.table_of_sampling(rows)
    assert len({len(line) for line in table[:5]}) == 1 and "heun" in table[3]
    (row,) = bench.sample(tiny(), batch=8, repeats=1)  # the config's own: Euler, 2 steps
    assert (row["sampler"], row["steps"]) == ("euler", 2)
    (row,) = bench.sample(tiny(), [{"name": "adaptive"}], [2], batch=8, repeats=1)
    assert row["flops"] is None and row["model_tflops"] is None and "unknown" in bench.table_of_sampling([row])[1]


def test_an_autoencoder_is_not_sampled():
    with pytest.raises(ConfigError, match="only denoisers"):
        bench.sample(vae_config(), batch=4)


def test_turns(monkeypatch):
    """Two sides with a clock of our own: the first step after a change of sides takes a hundred times as long."""
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    ours, theirs = iter([2.0, 4.0, 3.0]), iter([6.0, 4.0, 9.0])

    def side(name, speeds):
        def run(count):
            calls.append((name, count))
            now[0] += 100.0 if count == 1 else next(speeds) * count

        return run

    out = bench.in_turn(side("a", ours), side("b", theirs), rounds=3, repeats=5)
    assert calls == [("a", 1), ("a", 5), ("b", 1), ("b", 5)] * 3
    assert out["all"] == {"ours": [2.0, 4.0, 3.0], "torch": [6.0, 4.0, 9.0]} and out["seconds"] == {"ours": 3.0, "torch": 6.0}
    assert (out["ratio"], out["ratio_min"], out["ratio_max"]) == (2.0, 1.0, 3.0)
    table = bench.table_vs_torch([{"batch": 12, **out}])
    assert "1.00 to 3.00" in table[1] and " 4,000 " not in table[1] and "3,000" in table[1]


def test_the_compile_cache_is_noticed(tmp_path):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        fn = lambda: jax.jit(lambda x: jnp.tanh(x @ x + 0.12345))  # noqa: E731
        bench.compiled(fn(), jnp.ones((7, 7)))
        run, spent = bench.compiled(fn(), jnp.ones((7, 7)))
        # A program that no earlier run of this test can have stored.
        _, fresh = bench.compiled(jax.jit(lambda x, c=time.time_ns() % 2**31: x @ x + c), jnp.ones((7, 7)))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert spent["cached"] and not fresh["cached"] and spent["trace"] > 0 and spent["compile"] > 0
    assert run(jnp.ones((7, 7))).shape == (7, 7)


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs PyTorch"):
        bench.train_vs_torch(tiny(**DIGITS))


# --- the binary


def binary(*given, code=0, module="tools.bench"):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", module, *given]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


CONFIG = "--config=configs/digits.py:smoke"


@pytest.mark.slow
def test_binary_trains_samples_and_saves(tmp_path):
    out = binary(CONFIG, "--config.batch_size=24", "--repeats=4", f"--json={tmp_path / 'a.json'}")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["training"]["batch"] == 24 and "images/s" in out
    assert saved["training"]["repeats"] == 4 and saved["config"]["batch_size"] == 24
    assert saved["device"]["count"] == 1 and saved["versions"]["jax"] == jax.__version__
    assert saved["command"][0] == CONFIG
    out = binary(CONFIG, "--sampling", "--samplers=euler", "--steps=1,2", "--batch=4", "--repeats=2", f"--json={tmp_path / 'b.json'}")
    assert [row["steps"] for row in json.loads((tmp_path / "b.json").read_text())["sampling"]] == [1, 2] and "euler" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "given, message",
    [
        (["--steps=3"], "--steps is for --sampling"),
        (["--rounds=3"], "--rounds is for --vs"),
        (["--synthetic", "--sampling"], "--synthetic is for training alone"),
        (["--sampling", "--steps=ten"], "should be whole numbers"),
        (["--sampling", "--steps=0"], "steps = 0 should be at least 1"),
        (["--sampling", "--samplers=hoin"], "'hoin' is unknown; valid: "),
        (["--json=/nowhere/at/all.json"], "no directory /nowhere/at"),
        (["--config.modle={'name': 'dit'}"], "config.modle is unknown"),
    ],
)
def test_binary_refuses(given, message):
    assert message in binary(CONFIG, *given, code=2)


@pytest.mark.slow
def test_binary_refuses_an_unknown_flag():
    assert "repeat" in binary(CONFIG, "--repeat=3", code=2)


# --- the PyTorch side


@pytest.fixture
def reference():
    pytest.importorskip("torch")
    from tools import torch_reference

    return torch_reference


def tensor(x):
    import torch

    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def channel_last(y):
    return np.moveaxis(y.detach().cpu().numpy(), 1, -1)


@pytest.mark.oracle
@pytest.mark.parametrize("changes", [{}, {"scan": False, "num_classes": 0, "sincos": False}, {"learn_sigma": True, "time_scale": 1.0, "frequency_shift": 1.0}])
def test_dit_is_the_same_network(reference, changes):
    import torch

    net = models.build({**DIT, "depth": 3, "patch": 2, "num_classes": 5, **changes})
    random = np.random.RandomState(0)
    x, t = jnp.asarray(random.standard_normal((3, 6, 4, 2)), jnp.float32), jnp.array([0.007, 0.5, 0.999])
    cond = {"label": jnp.array([4, 0, 5])} if net.num_classes else {}
    params = randomise(shapes(net, x, t, cond))
    label = torch.tensor(np.array(cond["label"])) if cond else None
    theirs = reference.build(net, x.shape[1:], params)(tensor(x), torch.tensor(np.array(t)), label)
    close(net.apply({"params": params}, x, t, cond), channel_last(theirs), 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("changes", [{}, {"quant_conv": False, "mid_attention": False, "multipliers": (1, 2, 3), "layers": 2}])
def test_autoencoder_is_the_same_network(reference, changes):
    net = models.build({**VAE, **changes})
    x, z = jnp.asarray(np.random.RandomState(0).standard_normal((2, 8, 8, 1)), jnp.float32), None
    params = randomise(shapes(net, x, jax.random.key(0)))
    mean, logvar = net.apply({"params": params}, x, method="encode")
    z = np.random.RandomState(1).standard_normal(mean.shape).astype(np.float32)
    ours = net.apply({"params": params}, mean + jnp.exp(0.5 * logvar) * z, method="decode"), mean, logvar
    theirs = reference.build(net, x.shape[1:], params)(tensor(x), tensor(z))
    for a, b in zip(ours, theirs, strict=True):
        close(a, channel_last(b), 1e-4)


def vae_config(**changes):
    values = {"data": {"name": "digits"}, "model": VAE, "objective": {"name": "vae", "reconstruction": "l2", "kl_weight": 0.05}}
    return tiny(**(values | changes))


ADAM = {"name": "adamw", "schedule": {"name": "cosine", "rate": 1e-2, "warmup": 2}, "clip": 0.1, "decay": 0.3, "b1": 0.8, "b2": 0.95, "eps": 1e-2}
FLOW = {"name": "flow_matching", "label_drop": 0.5}


@pytest.mark.oracle
@pytest.mark.parametrize("config", [tiny(**DIGITS, objective=FLOW, optimizer=ADAM), vae_config(optimizer=ADAM)], ids=["dit", "vae"])
def test_three_train_steps_are_the_same(reference, config):
    """Same weights, same draws: parameters and averages after three steps. A large eps keeps Adam from blowing up gradients
    that are zero but for rounding."""
    import torch

    this = Run(config)
    module, state, step = this.roles["net"].module, this.fresh(), this.step()
    params = jax.device_get(randomise(state.params["net"]))
    places = this.shardings.params["net"]
    state = state.replace(params={"net": jax.device_put(params, places)}, ema={"ema": jax.device_put(params, places)})
    net = reference.build(module, this.example[0].shape[1:], params)
    rates = [float(this.schedules["net"](n)) for n in range(3)]
    decays = [[float(decay(n + 1.0)) for n in range(3)] for decay, _ in this.averages.values()]
    trainer = reference.Trainer(net, this.config, module, rates, decays)
    for n in range(3):
        batch = next(this.pipeline)
        nets = step_lib.nets_of(this.objective, this.roles, state.params, state.ema, {})
        drawn = this.objective.rollout(nets, {**batch, "step": n}, step_lib.rollout_key(this.config["seed"], n))
        given = [tensor(drawn["x"])]
        if "t" in drawn:
            assert (drawn["cond"]["label"] == 10).any()
            given += [torch.tensor(np.array(drawn["cond"]["label"])), torch.tensor(np.array(drawn["t"]))]
        state, metrics = step(state, {}, batch)
        loss = trainer.update(*given, tensor(drawn["z"]))
        assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-4)
    like = reference.build(module, this.example[0].shape[1:], state.params["net"])
    average = reference.build(module, this.example[0].shape[1:], state.ema["ema"])
    start = reference.build(module, this.example[0].shape[1:], params)
    far = lambda a, b: float((a - b).detach().abs().max())  # noqa: E731
    moved = [far(a, b) for a, b in zip(like.parameters(), start.parameters(), strict=True)]
    assert np.median(moved) > 1e-4
    for ours, theirs in ((like.parameters(), trainer.params), (average.parameters(), trainer.averages[0])):
        for a, b, size in zip(ours, theirs, moved, strict=True):
            assert far(a, b) < 1e-3 * max(size, 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("law", [{"name": "uniform"}, {"name": "uniform", "stratified": True}, {"name": "logit_normal", "mean": 0.5, "std": 0.7}])
def test_draws_follow_the_law(reference, law):
    import torch

    torch.manual_seed(0)
    x, label = torch.zeros(4000, 1, 2, 2), torch.zeros(4000, dtype=torch.int64)
    _, dropped, t, z = reference.draw_flow_matching((x, label), 7, law, 0.25)
    path = Run(tiny()).roles["net"].path
    options = {k: v for k, v in law.items() if k != "stratified"}
    quantiles = np.sort(times.cdf(t.numpy(), path, **options))
    assert np.abs(quantiles - (np.arange(4000) + 0.5) / 4000).max() < (3e-4 if law.get("stratified") else 0.03)
    assert set(dropped.tolist()) == {0, 7} and abs((dropped == 7).float().mean() - 0.25) < 0.03
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03 and z.shape == x.shape


@pytest.mark.oracle
@pytest.mark.parametrize("method, scale", [("euler", None), ("heun", 1.5), ("heun", 0), ("euler", 1)])
def test_samplers_land_in_the_same_place(reference, method, scale):
    import torch

    from flowjax import guidance

    net = models.build({**DIT, "num_classes": 5})
    x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 8, 8, 1)), jnp.float32)
    cond = {"label": jnp.array([4, 0, 2])}
    params = randomise(shapes(net, x, jnp.zeros(3), cond))
    path = Run(tiny()).roles["net"].path
    model = models.denoiser(net, params, path, "velocity")
    model = model if scale is None else guidance.cfg(model, scale)
    assert isinstance(model, Model)
    grid = times.grid(4, path, shift=2.0)
    ours = samplers.sample(model, x, jax.random.key(0), grid, method, cond=cond)
    loop = reference.Sampler(reference.build(net, x.shape[1:], params), net, method, grid.tolist(), scale)
    close(ours, channel_last(loop(tensor(x), torch.tensor(np.array(cond["label"])))), 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model={**DIT, "mlp": "swiglu"}), "model.mlp = 'swiglu'; it has 'gelu'"),
        (dict(model={**DIT, "dropout": 0.1}), "model.dropout = 0.1"),
        (dict(model=tiny()["model"], data={"name": "mix4"}), "has no MLP; it has DiT, AutoencoderKL"),
        (dict(path={"name": "cosine"}), "path = {'name': 'cosine'}"),
        (dict(prediction="eps"), "prediction = 'eps'; it has 'velocity'"),
        (dict(objective={"name": "flow_matching", "weight": "min_snr"}), "objective.weight = 'min_snr'"),
        (dict(objective={"name": "flow_matching", "time": {"name": "mode"}}), "objective.time.name = 'mode'"),
        (dict(objective={"name": "flow_matching", "time": {"name": "uniform", "shift": 3.0}}), "objective.time.shift"),
        (dict(optimizer={"name": "lion", "schedule": "constant"}), "optimizer.name = 'lion'; it has 'adamw'"),
        (dict(accumulate=2), "accumulate = 2"),
    ],
)
def test_what_torch_does_not_have_is_refused_by_name(reference, changes, message):
    config = settings.resolve(tiny(**(DIGITS | changes)))
    with pytest.raises(ConfigError) as caught:
        reference.check_train(config, models.build(config["model"]))
    assert message in str(caught.value)


@pytest.mark.oracle
def test_samplers_that_torch_does_not_have(reference):
    config = settings.resolve(tiny(**DIGITS, sample={"guidance": {"name": "apg", "scale": 2.0}}))
    net = models.build(config["model"])
    with pytest.raises(ConfigError, match="the sampler = 'rk4'; it has 'euler', 'heun'"):
        reference.check_sample(config, net, "rk4")
    with pytest.raises(ConfigError, match="sample.guidance = 'apg'"):
        reference.check_sample(config, net, "euler")


@pytest.mark.oracle
def test_several_devices_are_refused(reference):
    with pytest.raises(ConfigError, match="one device, and there are 8"):
        bench.train_vs_torch(tiny(**DIGITS))


@pytest.mark.oracle
@pytest.mark.slow
def test_binary_against_torch(reference, tmp_path):
    file = tmp_path / "vs.json"
    out = binary(CONFIG, "--vs=torch", "--rounds=2", "--repeats=2", f"--json={file}")
    (row,) = json.loads(file.read_text())["training"]
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["rounds"] == 2 and "above 1 we are faster" in out
    out = binary(CONFIG, "--vs=torch", "--sampling", "--samplers=euler,heun", "--steps=2", "--batch=4", "--rounds=1", f"--json={file}")
    assert [row["sampler"] for row in json.loads(file.read_text())["sampling"]] == ["euler", "heun"]
    assert "model.rope" in binary(CONFIG, "--config.model.rope=true", "--vs=torch", code=2)


@pytest.mark.oracle
def test_operations_one_by_one_are_the_same_on_both_sides(reference):
    from tools import operations

    normal = lambda *shape: np.random.default_rng(0).standard_normal(shape, np.float32)  # noqa: E731
    product = normal(16, 8), normal(8, 32), normal(16, 32)
    image = normal(2, 6, 6, 4), normal(3, 3, 4, 4), normal(2, 6, 6, 4)
    layouts = {"forward": (0, 2, 3, 1), "by the input": (0, 2, 3, 1), "by the kernel": (2, 3, 1, 0)}  # of a convolution's results in torch
    for operation, theirs, arrays in ((jnp.matmul, operations.their_product, product), (operations.convolve, operations.their_convolution, image)):
        mine, other = operations.ours(operation, *arrays), theirs(reference.torch, *arrays)
        assert [*mine] == [*other] == [*operations.PARTS]
        for part in mine:
            found = other[part]()
            (want,) = [v for v in found if v is not None] if isinstance(found, tuple) else [found]
            want = want.numpy().transpose(layouts[part]) if want.ndim == 4 else want.numpy()
            np.testing.assert_allclose(mine[part](), want, rtol=2e-4, atol=2e-4, err_msg=part)


@pytest.mark.slow
def test_operations_have_to_be_named():
    assert "name what to measure: --widths=96,384" in binary(module="tools.operations", code=2)
