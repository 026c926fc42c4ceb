"""Label rules, the stored record and what makes two of them comparable."""

import dataclasses
import json

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.evals import protocol
from flowjax.evals.protocol import Record, comparable, labels


def record(**changes):
    fields = dict(
        sampler={"name": "heun", "churn": 0.5},
        steps=50,
        guidance=None,
        ema="ema_0.999",
        label_rule="balanced",
        seed=0,
        samples=1000,
        features=["pixels-cb4344f0"],
        reference={"test": {"count": 360, "hash": "5c70c136"}},
        checkpoint_step=2000,
        results={"frechet": {"distance": 1.5, "ratio": None}},
    )
    return Record(**{**fields, **changes})


def test_balanced_labels():
    got = labels(23, 10, "balanced", 0)
    assert got.dtype == np.int32
    counts = np.bincount(got, minlength=10)
    assert sorted(counts) == [2] * 7 + [3] * 3
    assert (np.bincount(labels(40, 10), minlength=10) == 4).all()


def test_the_extra_classes_and_the_order_are_drawn():
    extra = {tuple(np.flatnonzero(np.bincount(labels(3, 10, "balanced", s), minlength=10))) for s in range(8)}
    assert len(extra) > 4
    assert np.any(np.diff(labels(40, 10)) < 0)


def test_random_labels_are_uniform_but_not_balanced():
    got = labels(10000, 10, "random", 3)
    counts = np.bincount(got, minlength=10)
    assert len(counts) == 10 and counts.std() > 5 and abs(counts - 1000).max() < 150


@pytest.mark.parametrize("rule", protocol.LABEL_RULES)
def test_labels_depend_on_the_seed_alone(rule):
    np.testing.assert_array_equal(labels(50, 7, rule, 1), labels(50, 7, rule, 1))
    assert (labels(50, 7, rule, 1) != labels(50, 7, rule, 2)).any()


def test_bad_label_requests():
    with pytest.raises(ConfigError, match="balanced, random"):
        labels(5, 2, "sorted")
    for n, classes in ((0, 3), (3, 0)):
        with pytest.raises(ConfigError, match="n >= 1"):
            labels(n, classes)


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "deep" / "record.json"
    record().write(path)
    assert Record.read(path) == record()
    assert json.loads(path.read_text())["code"] == protocol.code_version()
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.zeros(2), np.int64(3)])
def test_what_json_cannot_hold_is_named(bad, tmp_path):
    with pytest.raises(ConfigError, match=r"record\.results\.kid\[1\]"):
        record(results={"kid": [0.0, bad]}).write(tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_what_is_no_record_is_named(tmp_path):
    path = tmp_path / "r.json"
    for text in ("{", '{"steps": 3}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="r.json is not"):
            Record.read(path)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Record) if f.name != "results"])
def test_every_circumstance_counts(field):
    assert comparable(record(), dataclasses.replace(record(), **{field: "other"})) == [field]
    assert comparable(record(), dataclasses.replace(record(), **{field: "other"}), ignore=[field]) == []


def test_results_and_storage_do_not_count(tmp_path):
    record(results={}, sampler={"name": "heun", "grid": (1, 2)}).write(tmp_path / "r.json")
    assert comparable(record(sampler={"grid": [1, 2], "name": "heun"}), Record.read(tmp_path / "r.json")) == []
    with pytest.raises(ConfigError, match="sampelr"):
        comparable(record(), record(), ignore=["sampelr"])


def test_code_version_follows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(protocol.flowjax, "__file__", str(tmp_path / "__init__.py"))
    before = protocol.code_version()
    (tmp_path / "a.py").write_text("x = 1")
    assert protocol.code_version() != before
