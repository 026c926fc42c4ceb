"""Checkpoints: atomic, checked after loading, kept by policy, restorable onto another mesh; exports and roles that start from them."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.train import checkpoint, export, loop
from flowjax.train import mesh as mesh_lib
from flowjax.train import step as step_lib
from flowjax.train.assembly import Run
from train_runs import DIT, flip, same, stored, tiny, train

ROOT = pathlib.Path(__file__).resolve().parent.parent


def state(n, size=4096):
    """A State of random values that differ by n, and the target that asks for it."""
    values = jax.random.normal(jax.random.key(n), (size,))
    made = step_lib.State(jnp.int32(n), {"net": {"w": values}}, {"net": (jnp.int32(n),)}, {"ema": {"w": -values}})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return made, jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), made)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A directory with checkpoints of steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("originals") / "checkpoints"
    saver = checkpoint.Checkpoints(directory, keep=3)
    for n in (1, 2, 3):
        saver.save(n, state(n)[0], {"data": {"next_index": n}}, {"loss": n})
    saver.close()
    return directory


@pytest.fixture
def directory(originals, tmp_path):
    return pathlib.Path(shutil.copytree(originals, tmp_path / "checkpoints"))


def restore(directory, target=None, step=None):
    saver = checkpoint.Checkpoints(directory)
    try:
        return saver.restore(target or state(0)[1], step)
    finally:
        saver.close()


def largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_round_trip(directory):
    got, extra, step = restore(directory)
    same(got, state(3)[0])
    assert step == 3 and extra["data"] == {"next_index": 3} and isinstance(got, step_lib.State)
    got, extra, step = restore(directory, step=1)
    same(got, state(1)[0])
    assert step == 1 and extra["data"] == {"next_index": 1}
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7 .* \[1, 2, 3\]"):
        restore(directory, step=7)
    assert restore(directory.parent / "empty") is None


DAMAGE = {
    "flipped bit": lambda d: flip(d / "state"),
    "truncated": lambda d: os.truncate(largest(d / "state"), largest(d / "state").stat().st_size // 2),
    "emptied": lambda d: os.truncate(largest(d / "state"), 0),
    "missing data": lambda d: largest(d / "state").unlink(),
    "missing manifest": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
    "missing metadata": lambda d: (d / "state" / "_METADATA").unlink(),
    "missing state": lambda d: shutil.rmtree(d / "state"),
    "missing description": lambda d: shutil.rmtree(d / "extra"),
    "emptied metrics": lambda d: os.truncate(d / "metrics" / "metrics", 0),
    "emptied metadata": lambda d: os.truncate(d / "_CHECKPOINT_METADATA", 0),
    "everything emptied": lambda d: [os.truncate(f, 0) for f in d.rglob("*") if f.is_file()],
    "truncated description": lambda d: os.truncate(largest(d / "extra"), 20),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, directory, caplog):
    damage(directory / "3")
    with caplog.at_level(logging.ERROR, logger="flowjax"):
        got, extra, step = restore(directory)
    assert step == 2 and extra["data"] == {"next_index": 2}
    same(got, state(2)[0])
    assert f"{directory / '3'} is damaged" in caplog.text
    # It is out of the way, so that the run can reach its step again.
    assert not (directory / "3").exists() and (directory.parent / "checkpoints-damaged" / "3").exists()
    # The same for one part of it, as roles and exports read it; they change nothing. (The part itself may be unharmed.)
    (directory.parent / "checkpoints-damaged" / "3").rename(directory / "3")
    caplog.clear()
    with caplog.at_level(logging.ERROR, logger="flowjax"):
        part, step = checkpoint.load_part(directory, "ema/ema", state(0)[1].ema["ema"])
    same(part, state(step)[0].ema["ema"])


def test_a_changed_digit_of_the_description_is_noticed(directory):
    file = next(f for f in (directory / "3" / "extra").rglob("*") if f.is_file() and b'next_index\\": 3' in f.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'next_index\\": 3', b'next_index\\": 4'))
    assert restore(directory)[2] == 2


def test_all_damaged_is_a_plain_error(directory):
    for n in (1, 2, 3):
        flip(directory / str(n) / "state")
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged: \[3, 2, 1\]"):
        restore(directory)
    with pytest.raises(ConfigError, match="no readable checkpoint with params/net"):
        checkpoint.load_part(directory, "params/net", state(0)[1].params["net"])


def test_nothing_is_moved_when_all_are_unreadable(directory):
    for n in (1, 2, 3):
        os.truncate(directory / str(n) / "metrics" / "metrics", 0)
    for _ in range(2):  # the second attempt must not begin afresh
        with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged: \[1, 2, 3\]"):
            restore(directory)


def test_a_damaged_step_can_be_saved_again(directory):
    """The run that fell back to step 2 reaches step 3 once more."""
    flip(directory / "3" / "state")
    saver = checkpoint.Checkpoints(directory)
    assert saver.restore(state(0)[1])[2] == 2
    saver.save(3, state(3)[0], {"data": {"next_index": 3}})
    saver.close()
    got, _, step = restore(directory)
    assert step == 3
    same(got, state(3)[0])
    # A second accident at the same step.
    flip(directory / "3" / "state")
    assert restore(directory)[2] == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.replace(params={"net": {"w": t.params["net"]["w"], "b": t.step}}), "lacks params/net/b"),
        (lambda t: t.replace(ema={}), "has besides ema/ema/w"),
        (lambda t: t.replace(params={"net": {"w": jax.ShapeDtypeStruct((7,), jnp.float32)}}), "other shapes params/net/w"),
    ],
)
def test_another_configuration_is_a_plain_error(change, message, directory):
    with pytest.raises(ConfigError, match=f"written by another configuration: .*{message}"):
        restore(directory, change(state(0)[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_fingerprints_see_every_element(dtype):
    base = (np.arange(24).reshape(4, 6) % 2).astype(dtype)
    seen = {checkpoint.fingerprints({"a": jnp.asarray(base)})["a"]}
    for i in range(base.size):
        changed = base.copy()
        changed.flat[i] = 1 - changed.flat[i]
        seen.add(checkpoint.fingerprints({"a": jnp.asarray(changed)})["a"])
    assert len(seen) == base.size + 1
    # Exchanged values are noticed too, and so is the sign of a zero.
    assert checkpoint.fingerprints({"a": jnp.asarray(base.T)}) != checkpoint.fingerprints({"a": jnp.asarray(base)})
    assert checkpoint.fingerprints([jnp.float32(0.0)]) != checkpoint.fingerprints([jnp.float32(-0.0)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_fingerprints_do_not_depend_on_the_sharding(dtype):
    """Of an array that is whole on one CPU, NumPy computes them; of one in shards, the devices."""
    x = (100 * jax.random.uniform(jax.random.key(0), (8, 16))).astype(dtype)
    want = checkpoint.fingerprints({"a": x})
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        mesh = mesh_lib.make_mesh(*sizes)
        for spec in (jax.P("fsdp", "tensor"), jax.P(("data", "fsdp"), "tensor"), jax.P()):
            assert checkpoint.fingerprints({"a": jax.device_put(x, jax.NamedSharding(mesh, spec))}) == want


# --- what is kept


def kept(directory, metrics, **policy):
    saver = checkpoint.Checkpoints(directory, **policy)
    for n in sorted(metrics):
        saver.save(n, state(n, 4)[0], {}, metrics[n])
    saver.wait()
    steps = saver.steps()
    saver.close()
    return steps


def test_policies(tmp_path):
    losses = {n: {"loss": v} for n, v in zip(range(1, 8), (7, 6, 1, 5, 4, 3, 2))}
    assert kept(tmp_path / "latest", losses, keep=2) == [6, 7]
    assert kept(tmp_path / "every", losses, keep=1, keep_every=3) == [3, 6, 7]
    assert kept(tmp_path / "best", losses, keep=2, best="loss") == [3, 6, 7]
    some = {n: (v if n != 3 else {}) for n, v in losses.items()}  # not measured at step 3
    assert kept(tmp_path / "unmeasured", some, keep=2, best="loss") == [6, 7]


def test_best_of_a_run(tmp_path):
    """Smaller is better, and a name that is not measured is refused before anything is written."""
    config = tiny(steps=4, checkpoint={"every": 1, "keep": 1, "best": "validation_loss"}, validation={"every": 1, "batches": 1})
    train(config, tmp_path / "run")
    losses = {row["step"]: row["validation_loss"] for row in loop.log.read(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in row}
    best = min(losses, key=losses.get)
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == sorted({best, 4})
    for name in ("accuracy", "validation_loss"):
        with pytest.raises(ConfigError, match=f"checkpoint.best = '{name}' is not measured by this run; valid: .*loss, mse"):
            train(tiny(checkpoint={"best": name}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# --- kill -9 in the middle of a save

VICTIM = """
import sys, jax, jax.numpy as jnp
from flowjax.train import checkpoint, step
saver = checkpoint.Checkpoints(sys.argv[1], keep=3)
make = lambda n: step.State(jnp.int32(n), {"net": {f"w{i}": jax.random.normal(jax.random.key(n * 100 + i), (2**20,)) for i in range(16)}}, {}, {})
for n in (1, 2):
    saver.save(n, make(n), {"data": {"next_index": n}})
    saver.wait()
saver.save(3, make(3), {"data": {"next_index": 3}})
print("saving", flush=True)
saver.wait()
print("saved", flush=True)
saver.close()
"""


@pytest.mark.slow
def test_kill_in_the_middle_of_a_save(tmp_path):
    directory = tmp_path / "checkpoints"
    child = subprocess.Popen([sys.executable, "-c", VICTIM, str(directory)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "saving\n"
    # As soon as step 3 appears under its temporary name: in the middle.
    deadline = time.time() + 60
    while not [p for p in directory.iterdir() if p.name.startswith("3.")] and time.time() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == -signal.SIGKILL and "saved" not in said
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=place)
    target = step_lib.State(jax.ShapeDtypeStruct((), jnp.int32, sharding=place), {"net": {f"w{i}": leaf for i in range(16)}}, {}, {})
    saver = checkpoint.Checkpoints(directory)
    assert saver.steps() == [1, 2]
    got, extra, step = saver.restore(target)
    assert step == 2 and extra["data"] == {"next_index": 2}
    assert got.params["net"]["w5"][:8].tolist() == jax.random.normal(jax.random.key(205), (2**20,))[:8].tolist()
    # The remains are swept away and the same step can be saved.
    saver.save(3, got, {"data": {"next_index": 3}})
    saver.close()
    assert restore(directory, target)[2] == 3
    assert {p.name for p in directory.iterdir()} == {"1", "2", "3"}


# --- another mesh


@pytest.mark.slow
def test_restore_onto_another_mesh(tmp_path):
    """Saved on 2 x 2 x 2, bitwise the same on 8 x 1 x 1, 1 x 8 x 1 and in the shards that each asks for."""
    config = dict(model=DIT, data={"name": "digits"}, steps=2, sample={"steps": 1, "sampler": "euler", "count": 8})
    train(tiny(**config, mesh={"data": 2, "fsdp": 2, "tensor": 2}), tmp_path / "run")
    states = {}
    for sizes in ((2, 2, 2), (8, 1, 1), (1, 8, 1)):
        run = Run(tiny(**config, mesh=dict(zip(mesh_lib.AXES, sizes))))
        saver = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
        states[sizes], extra, step = saver.restore(run.target)
        saver.close()
        assert step == 2
        jax.tree.map(lambda v, t: v.sharding.is_equivalent_to(t.sharding, v.ndim) or pytest.fail(), states[sizes], run.target)
        same(states[sizes], states[2, 2, 2])
    kernels = [s.params["net"]["blocks"]["attn"]["q"]["kernel"] for s in states.values()]
    assert len({k.sharding.shard_shape(k.shape) for k in kernels}) == 3
    # On one device, as an export reads it.
    _, params, info = export.load(tmp_path / "run", "params")
    same(params, states[8, 1, 1].params["net"])
    # The run itself goes on there: mesh is a setting that may change.
    assert train(tiny(**(config | {"optimizer": tiny().optimizer.to_dict()}), mesh={"data": 8}), tmp_path / "run")[0] == 2


# --- exports, and roles that start from them


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "run"
    power = {f"p{i}": {"name": "power", "std": s, "snapshot_every": 2} for i, s in ((5, 0.05), (10, 0.1))}
    train(tiny(steps=6, ema={"ema": {"name": "constant", "decay": 0.5}, **power}), workdir)
    export.export(workdir, workdir / "export")
    return workdir


def test_export_round_trip(source):
    from safetensors.numpy import load_file

    _, ema, info = export.load(source, "ema")
    role, params, told = export.load(source / "export")
    same(params, ema)
    assert told["step"] == 6 and told["weights"] == "ema" and told["model"] == info["model"]
    flat = load_file(source / "export" / "model.safetensors")
    named = dict(zip(checkpoint.names_of(params), jax.tree.leaves(params)))
    assert {k.replace(".", "/") for k in flat} == set(named)
    for k, v in flat.items():
        assert v.dtype == np.float32 and v.tobytes() == np.asarray(named[k.replace(".", "/")]).tobytes(), k
    assert role.net(params)(jnp.zeros((1, 2)), 0.5, {"label": jnp.zeros((1,), jnp.int32)}).shape == (1, 2)
    _, raw, _ = export.load(source, "params")
    assert not np.array_equal(raw["out"]["kernel"], params["out"]["kernel"])
    _, early, info = export.load(source, "params", step=4)
    assert info["step"] == 4 and not np.array_equal(raw["out"]["kernel"], early["out"]["kernel"])


def test_posthoc_average_of_a_run(source, tmp_path):
    """A width that was tracked comes back; another differs from it; the result is exported like any average."""
    _, tracked, _ = export.load(source, "p10")
    _, got, info = export.load(source, posthoc_std=0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, tracked)
    assert info["weights"] == "posthoc-0.1" and info["step"] == 6
    told = export.export(source, tmp_path / "export", posthoc_std=0.08, step=4)
    _, params, info = export.load(tmp_path / "export")
    assert told["step"] == info["step"] == 4 and info["weights"] == "posthoc-0.08"
    assert not np.allclose(params["out"]["kernel"], tracked["out"]["kernel"])
    with pytest.raises(ConfigError, match="there are 2, 4, 6"):
        export.load(source, posthoc_std=0.1, step=5)


@pytest.mark.parametrize("victim", ["params", "params missing", "config missing", "config cut"])
def test_a_damaged_export_is_an_error(victim, source, tmp_path):
    folder = pathlib.Path(shutil.copytree(source / "export", tmp_path / "export"))
    if victim == "params":
        flip(folder / "params")
    elif victim == "params missing":
        largest(folder / "params").unlink()
    elif victim == "config missing":
        (folder / "config.json").unlink()
    else:
        os.truncate(folder / "config.json", 100)
    with pytest.raises(ConfigError, match=str(folder)):
        export.load(folder)


def test_a_role_starts_from_an_export_or_a_workdir(source):
    for section, weights in (({"checkpoint": str(source / "export")}, "ema"), ({"checkpoint": str(source), "weights": "params"}, "params")):
        state = Run(tiny(roles={"net": section})).fresh()
        _, want, _ = export.load(source, weights)
        same(state.params["net"], want)
        same(state.ema["ema"], want)
    # Averages and parameters are separate buffers: the step donates both.
    a, b = state.params["net"]["out"]["kernel"], state.ema["ema"]["out"]["kernel"]
    assert a.addressable_shards[0].data.unsafe_buffer_pointer() != b.addressable_shards[0].data.unsafe_buffer_pointer()
    assert not np.array_equal(want["out"]["kernel"], Run(tiny()).fresh().params["net"]["out"]["kernel"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"roles": {"net": {"checkpoint": "EXPORT"}}, "model": {"name": "mlp", "width": 16, "depth": 1, "num_classes": 4}}, "does not fit the model"),
        ({"roles": {"net": {"checkpoint": "WORKDIR", "weights": "emma"}}}, "weights = 'emma' is unknown .*; valid: params, ema, p10, p5"),
        ({"roles": {"net": {"checkpoint": "/nowhere"}}}, "/nowhere is neither an export nor a workdir"),
    ],
)
def test_a_role_that_does_not_fit_is_refused(changes, message, source):
    text = json.dumps(changes).replace("EXPORT", str(source / "export")).replace("WORKDIR", str(source))
    with pytest.raises(ConfigError, match=message):
        Run(tiny(**json.loads(text))).fresh()


def test_saving_the_same_step_twice_keeps_the_first(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path / "checkpoints")
    saver.save(1, state(1)[0], {})
    saver.save(1, state(2)[0], {})
    saver.close()
    same(restore(tmp_path / "checkpoints")[0], state(1)[0])
    assert stored(tmp_path, 1)["shapes"]["params/net/w"] == [4096]


def test_weights_do_not_go_on_under_another_meaning(tmp_path):
    """Same shapes, another path, prediction or scaling: refused, not trained."""
    base = tmp_path / "base"
    train(tiny(steps=1, checkpoint={"every": 0}), base)
    onwards = {"roles": {"net": {"checkpoint": str(base)}}, "steps": 1, "checkpoint": {"every": 0}}
    assert train(tiny(**onwards), tmp_path / "same")[0] == 1
    for change, what in (({"path": "trigonometric"}, "path"), ({"prediction": "eps"}, "prediction"), ({"input_scaling": "edm"}, "scaling")):
        with pytest.raises(ConfigError, match=f"another {what} than the config's"):
            train(tiny(**onwards, **change), tmp_path / "other")
    assert not (tmp_path / "other").exists()
