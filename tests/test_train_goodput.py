"""The clock of a run: phases that sum to the time alive, over restarts and kills; and that the device is kept busy."""

import json
import pathlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import objectives
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player
from flowjax.train import assembly, checkpoint, goodput, log, mesh
from flowjax.train.goodput import PHASES, Goodput
from train_runs import tiny, train


class Hand:
    """A clock that is set by hand."""

    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def spent(clock):
    """The phases that took any time."""
    return {k: v for k, v in clock.seconds().items() if v}


def test_every_moment_belongs_to_one_phase():
    hand = Hand()
    clock = Goodput(began=97.0, clock=hand)  # three seconds of imports
    hand.spend(2)
    with clock.during("compile"):
        hand.spend(10)
    hand.spend(1)
    clock.enter("step")
    hand.spend(5)
    clock.enter("data")
    hand.spend(0.5)
    clock.enter("step", was="step")  # the device was busy meanwhile
    clock.enter("data")
    hand.spend(0.25)
    clock.enter("step")
    with pytest.raises(KeyError), clock.during("save"):
        hand.spend(4)
        raise KeyError
    hand.spend(3)
    assert spent(clock) == {"start": 6.0, "compile": 10.0, "step": 8.5, "data": 0.25, "save": 4.0}
    assert tuple(clock.seconds()) == PHASES and sum(clock.seconds().values()) == hand.now - 97
    row = clock.row()
    assert row["goodput"] == pytest.approx(8.5 / 28.75) and row["seconds/compile"] == 10 and row["seconds/lost"] == 0
    assert clock.text() == "29 s: compile 35 %, step 30 %, start 21 %, save 14 %, data 1 %"
    assert Goodput(began=100, clock=Hand()).row()["goodput"] == 0


def test_what_a_killed_process_did_after_its_checkpoint_is_lost(tmp_path):
    file = tmp_path / "goodput.json"
    hand = Hand()
    first = Goodput(clock=hand)
    first.resume(file, 0)
    first.enter("step")
    hand.spend(10)
    with first.during("save"):
        hand.spend(1)
        first.keep(file, [], 100)
    hand.spend(20)
    first.keep(file, [100], 200)
    hand.spend(7)
    first.keep(file)
    assert spent(first) == {"step": 37, "save": 1}
    # Killed here: 7 s after checkpoint 200. The next process starts, and is killed before it has written a row.
    hand = Hand(3)
    second = Goodput(clock=hand)
    hand.spend(2)
    second.resume(file, 200)
    assert spent(second) == {"start": 2, "step": 30, "save": 1, "lost": 7}
    # The third finds checkpoint 200 damaged: all after 100 is lost, and the two seconds of the second with it.
    hand = Hand(50)
    third = Goodput(clock=hand)
    third.resume(file, 100)
    assert spent(third) == {"step": 10, "save": 1, "lost": 29}
    assert set(json.loads(file.read_text())["at"]) == {"100"}
    # Killed before any checkpoint: everything is lost, and nothing forgotten.
    fourth = Goodput(clock=Hand())
    fourth.resume(file, 0)
    assert spent(fourth) == {"lost": 40}


def test_the_record_forgets_deleted_checkpoints_and_is_not_written_at_every_row(tmp_path):
    file, hand = tmp_path / "goodput.json", Hand()
    clock = Goodput(clock=hand)
    clock.keep(file, [], 1)
    clock.keep(file, [1], 2)
    clock.keep(file, [2], 3)
    read = lambda: json.loads(file.read_text())  # noqa: E731
    assert set(read()["at"]) == {"2", "3"}
    hand.spend(goodput.KEEP_EVERY - 0.5)
    clock.keep(file)
    assert read()["seconds"]["start"] == 0
    hand.spend(0.5)
    clock.keep(file)
    assert read()["seconds"]["start"] == goodput.KEEP_EVERY


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": {}, "at": {}}', '{"seconds": 3}', '{"at": []}'])
def test_an_unreadable_record_counts_as_none(text, tmp_path):
    (tmp_path / "goodput.json").write_text(text)
    clock = Goodput(clock=Hand())
    clock.resume(tmp_path / "goodput.json", 3)
    assert spent(clock) == {}


def clocked(workdir):
    """The rows of training, with their clock."""
    return [row for row in log.read(workdir / "metrics.jsonl") if "goodput" in row]


def phases(row):
    return {k: row[f"seconds/{k}"] for k in PHASES}


def test_a_run_accounts_for_its_time_over_a_kill(tmp_path):
    """Rows carry the clock; the phases sum to the time in `train`, and what was done twice is lost."""
    config = tiny(steps=6, validation={"every": 2, "batches": 1}, sample={"steps": 2, "every": 3, "count": 8, "sampler": "euler"})
    run, began = tmp_path / "run", time.monotonic()
    real = checkpoint.Checkpoints.save
    with pytest.raises(ZeroDivisionError), mock.patch.object(
        checkpoint.Checkpoints, "save", lambda self, step, *a: 1 / 0 if step == 4 else real(self, step, *a)
    ), mock.patch.object(goodput, "KEEP_EVERY", 0):
        train(config, run)
    alive = time.monotonic() - began
    before = phases(clocked(run)[-1])
    at_two = json.loads((run / "goodput.json").read_text())["at"]["2"]
    assert before["lost"] == 0
    # The last row is that of step 4; validation followed it, closing the checkpoints followed that.
    assert 0.3 * alive < sum(before.values()) <= alive
    assert all(before[k] > 0 for k in ("start", "step", "save", "validation", "sample"))
    began = time.monotonic()
    _, said = train(config, run)
    alive_again = time.monotonic() - began
    after = json.loads((run / "goodput.json").read_text())["seconds"]
    total = sum(after.values())
    # What closes after the clock has stopped is missing, more of it on a busy machine.
    assert 0.9 < total / (sum(before.values()) + alive_again) < 1.01
    assert after["lost"] == pytest.approx(sum(before.values()) - sum(at_two.values()), abs=0.05) and after["lost"] > 0
    assert f"({total:.0f} s: " in said
    rows = clocked(run)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        # Rows hold milliseconds, and so few steps take few of them.
        assert row["goodput"] * sum(phases(row).values()) == pytest.approx(row["seconds/step"], abs=2e-3) and row["seconds/step"] > 0
    sums = [sum(phases(row).values()) for row in rows]
    assert sums == sorted(sums)


def slow_loss(nets, batch, key):
    """Flow matching on a device that takes its time: some 3 GFLOP besides. (A CPU runs callbacks and trifles while it is asked
    to, instead of in the background.)"""
    value, metrics = flow_matching.loss(nets, batch, key)
    wall = jax.lax.fori_loop(0, 60, lambda _, v: jnp.tanh(v @ v), jnp.full((300, 300), value))
    return value + 0 * jax.lax.stop_gradient(wall[0, 0]), metrics


@pytest.mark.parametrize("data, device", [(0.02, "slow"), (0.15, "fast")])
def test_data_is_fetched_while_the_device_works(data, device, tmp_path, monkeypatch):
    """A fetch that ends while the device still works on the step before costs nothing; one that the device waits for counts."""
    if device == "slow":
        objective = Objective({"net": "trained"}, (Player("net", slow_loss),), flow_matching.rollout)
        monkeypatch.setitem(objectives.OBJECTIVES, "slow", objective)

    class Slowly:
        """The pipeline of the run, slowed down."""

        def __init__(self, stream):
            self.stream = stream

        def __next__(self):
            time.sleep(data)
            return next(self.stream)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    made = assembly.pipeline
    monkeypatch.setattr(assembly, "pipeline", lambda *a, **k: Slowly(made(*a, **k)))
    steps, make = 15, mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda **settings: make(**settings | {"devices": jax.devices()[:1]}))
    name = "slow" if device == "slow" else "flow_matching"
    train(tiny(steps=steps, objective={"name": name}, checkpoint={"every": 0}), tmp_path / "run")
    rows = clocked(tmp_path / "run")
    waited = phases(rows[-1])["data"] - phases(rows[2])["data"]
    fetched = data * (rows[-1]["step"] - rows[2]["step"])
    if device == "slow":
        assert waited < 0.2 * fetched and np.median([row["data_wait"] for row in rows[2:]]) == 0
    else:
        assert waited > 0.7 * fetched and np.median([row["data_wait"] for row in rows[2:]]) > 0.5


def test_the_binaries_count_their_imports():
    import experiments

    assert 0 < time.monotonic() - experiments.BEGAN < 1e6
    assert "began=BEGAN" in (pathlib.Path(experiments.__file__).parent / "train.py").read_text()
