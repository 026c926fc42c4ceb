"""The driver of progressive distillation: which stages it runs, from whom, and where it goes on."""

import pytest

from flowjax.config import ConfigError
from flowjax.train import loop, progressive
from train_runs import tiny


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """run(steps, stop_in=stage) -> the stages it trained, [(steps, teacher, guided)]; one that is stopped ends before its last step."""
    base = tiny(steps=9, objective={"name": "progressive_distillation", "steps": 1, "guidance": {"name": "cfg", "scale": 2.0}})
    done = {}

    def run(steps, stop_in=None):
        asked = []

        def train(config, workdir, stop):
            n = config["objective"]["steps"]
            assert workdir == tmp_path / str(n) and config["sample"]["steps"] == n
            assert {config["roles"][k]["checkpoint"] for k in ("teacher", "net")} == {config["roles"]["teacher"]["checkpoint"]}
            if done.get(n) != 9:
                asked.append((n, config["roles"]["teacher"]["checkpoint"], "guidance" in config["objective"]))
            done[n] = 4 if n == stop_in else 9
            if n == stop_in:
                stop.set()
            return done[n]

        monkeypatch.setattr(loop, "run", train)
        progressive.run(base, "T", steps.split(","), tmp_path)
        return asked

    return run


def test_each_stage_learns_of_the_one_before_and_the_first_is_guided(driver, tmp_path):
    assert driver("4,2,1") == [(4, "T", True), (2, str(tmp_path / "4"), False), (1, str(tmp_path / "2"), False)]
    assert driver("4,2,1") == []


def test_a_stage_that_is_stopped_ends_the_command_and_the_next_one_goes_on_there(driver, tmp_path):
    assert [n for n, *_ in driver("4,2,1", stop_in=2)] == [4, 2]
    assert driver("4,2,1") == [(2, str(tmp_path / "4"), False), (1, str(tmp_path / "2"), False)]


@pytest.mark.parametrize("steps", ["8,4,3", "4,4", "0", "4,x", "3,2"])
def test_counts_that_are_not_halves_are_refused(driver, steps):
    with pytest.raises(ConfigError, match="is not half of|should be numbers of steps"):
        driver(steps)
