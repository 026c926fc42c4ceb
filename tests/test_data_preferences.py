"""Preferences as data: rankings, noise on the labels, what is held out, captions; and what people voted, on disk and as data."""

import json

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import records, sources, votes
from flowjax.data.pipeline import arrays, pipeline

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 3, 6, 4, 1), np.uint8)
LABELS = np.arange(40) % 5


def section(path, **settings):
    return {"name": "preferences", "path": str(path), **settings}


def test_rankings(tmp_path):
    made = sources.write_rankings(tmp_path / "r", IMAGES, LABELS, 5, {"rule": "brighter"})
    assert made["features"]["ranked"]["shape"] == [3, 6, 4, 1] and made["source"] == {"rule": "brighter"}
    pipe = pipeline(section(tmp_path / "r", pad=6, flip=True), 40, 0)
    assert pipe.shape == (6, 6, 1) and pipe.num_classes == 5 and pipe.manifest["ranks"] == 3
    batch = next(pipe)
    assert batch["ranked"].shape == (40, 3, 6, 6, 1) and set(batch) == {"ranked", "cond"}
    whole = arrays(section(tmp_path / "r"))["ranked"]
    np.testing.assert_allclose(whole, IMAGES / 127.5 - 1, atol=1e-6)
    # Shown once each, padded, turned left and right together.
    known = {w.tobytes(): False for w in whole} | {np.ascontiguousarray(w[:, :, ::-1]).tobytes(): True for w in whole}
    seen = [known[np.ascontiguousarray(w[:, :, 1:5]).tobytes()] for w in batch["ranked"]]
    assert 5 < sum(seen) < 35 and batch["ranked"][..., 0, 0].max() == -1
    resized = arrays(section(tmp_path / "r", resize=2))["ranked"]
    assert resized.shape == (40, 3, 2, 2, 1)


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_noise_turns_the_same_share_round_every_time(tmp_path, kind):
    many = RNG.integers(0, 256, (1000, 2, 2, 2, 1), np.uint8)
    if kind == "pairs":
        sources.write_preferences(tmp_path / "p", many[:, 0], many[:, 1], holdout=0.5)
    else:
        sources.write_rankings(tmp_path / "p", many, holdout=0.5)

    def read(split="train", **settings):
        found = arrays(section(tmp_path / "p", **settings), split)
        return np.stack([found["win"], found["lose"]], 1) if kind == "pairs" else found["ranked"]

    clean = read()
    turned = {share: (read(noise=share) != clean).any((1, 2, 3, 4)) for share in (0.1, 0.3, 1.0)}
    for share, rows in turned.items():
        np.testing.assert_array_equal(read(noise=share)[rows], clean[rows][:, ::-1])
        assert rows.mean() == pytest.approx(share, abs=0.045)
    assert (turned[0.1] <= turned[0.3]).all()  # more noise turns more, and none back
    np.testing.assert_array_equal(read(noise=0.1), read(noise=0.1))
    assert ((read(noise=0.3, noise_seed=1) != clean).any((1, 2, 3, 4)) != turned[0.3]).any()
    np.testing.assert_array_equal(read("test", noise=1.0), read("test"))  # the truth is what is held out
    with pytest.raises(ConfigError, match="data.noise = 1.5 should be a share"):
        read(noise=1.5)


def test_held_out_pairs_are_apart_in_either_order(tmp_path):
    first, second = IMAGES[:, 0], IMAGES[:, 1]
    both = np.concatenate([first, second]), np.concatenate([second, first])
    made = sources.write_preferences(tmp_path / "p", *both, holdout=0.4)
    counts = {k: v["count"] for k, v in made["splits"].items()}
    assert sum(counts.values()) == 80 and 10 < counts["test"] < 60
    parts = [arrays(section(tmp_path / "p"), k) for k in counts]
    sides = [{frozenset((w.tobytes(), v.tobytes())) for w, v in zip(p["win"], p["lose"])} for p in parts]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    for share, message in ((1.0, "should be a share"), (1e-9, "leaves one split empty")):
        with pytest.raises(ConfigError, match=message):
            sources.write_preferences(tmp_path / "q", *both, holdout=share)


def test_captions_come_along(tmp_path):
    sources.write_preferences(tmp_path / "p", IMAGES[:4, 0], IMAGES[:4, 1], captions=["a", "bb", "c", "d"])
    found = next(pipeline(section(tmp_path / "p", text={"name": "bytes", "length": 3}), 4, 0, shuffle=False))
    np.testing.assert_array_equal(found["cond"]["tokens"][1], [ord("b") + 1, ord("b") + 1, 0])
    with pytest.raises(ConfigError, match="captions must be 4 strings"):
        sources.write_preferences(tmp_path / "q", IMAGES[:4, 0], IMAGES[:4, 1], captions=["a"])


def test_bad_preferences(tmp_path):
    for bad in (IMAGES[:, :1], IMAGES[:, 0], IMAGES.astype(np.float32)):
        with pytest.raises(ConfigError, match="must be uint8 .* K at least 2"):
            sources.write_rankings(tmp_path / "r", bad)
    with pytest.raises(ConfigError, match="no examples"):
        sources.write_preferences(tmp_path / "r", IMAGES[:0, 0], IMAGES[:0, 1])
    records.write(tmp_path / "one", [("train", "", {"win": IMAGES[0, 0]})], name="one-sided")
    with pytest.raises(ConfigError, match="holds no lose: not a data set of preference pairs"):
        pipeline(section(tmp_path / "one"), 1, 0)


# --- votes ------------------------------------------------------------------------------------------------------------

ABOUT = {"checkpoint": "runs/x", "step": 7, "weights": "ema", "seed": 3, "num_classes": 5}


@pytest.fixture
def session(tmp_path):
    return votes.create(tmp_path / "s", lambda: IMAGES[:, :2], ABOUT, LABELS)


def test_a_decision_says_all_of_itself(session):
    session.vote(6, "right", "ann")
    (line,) = (session.folder / votes.VOTES).read_text().splitlines()
    told = json.loads(line)
    assert told.pop("when").endswith("+00:00")
    origin = {k: v for k, v in ABOUT.items() if k != "num_classes"}
    assert told == {"pair": 6, "choice": "right", "who": "ann", "label": 1, "samples": [12, 13], **origin}
    assert session.pending("ann") == [i for i in range(40) if i != 6] and len(session.pending("bob")) == 40


def test_what_was_being_written_when_the_process_died_does_not_count_and_is_written_over(session):
    session.vote(0, "left", "ann")
    file = session.folder / votes.VOTES
    whole = file.read_bytes()
    for cut in (whole + whole[: len(whole) // 2], whole + b"{", whole + b'{"pair": 1, "choice": "left", "who": "ann"}'):
        file.write_bytes(cut)
        again = votes.Session(session.folder)
        assert set(again.votes()) == {("ann", 0)}
        again.vote(1, "tie", "ann")
        assert [json.loads(line)["pair"] for line in file.read_text().splitlines()] == [0, 1]
    file.write_bytes(b"{}\n" + whole)
    with pytest.raises(records.DataError, match="votes.jsonl line 1 is no decision"):
        session.votes()
    file.write_bytes(whole.replace(b'"pair": 0', b'"pair": 40'))
    with pytest.raises(records.DataError, match="line 1: choice 'left' of pair 40; valid: left, right, tie, skip of 0..39"):
        session.votes()


def test_decisions_become_preferences(session, tmp_path):
    for pair, choice in [(0, "left"), (1, "right"), (2, "tie"), (3, "skip"), (1, "left")]:
        session.vote(pair, choice, "ann")
    session.vote(0, "right", "bob")
    made, counts = session.export(tmp_path / "p")
    assert counts == {"left": 2, "right": 1, "tie": 1, "skip": 1}  # ann's first decision on pair 1 was replaced
    found = arrays(section(tmp_path / "p"))
    win = np.stack([IMAGES[0, 0], IMAGES[0, 1], IMAGES[1, 0]])  # ann and bob disagree about pair 0
    lose = np.stack([IMAGES[0, 1], IMAGES[0, 0], IMAGES[1, 1]])
    np.testing.assert_allclose(found["win"], win / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(found["lose"], lose / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(found["cond"]["label"], [0, 0, 1])
    assert made["source"]["who"] == {"ann": 2, "bob": 1} and made["source"]["checkpoint"] == "runs/x" and len(made["source"]["when"]) == 2
    kept = [json.loads(line) for line in (tmp_path / "p" / votes.VOTES).read_text().splitlines()]
    assert [(v["pair"], v["who"]) for v in kept] == [(0, "ann"), (0, "bob"), (1, "ann")]


def test_nothing_and_one_side_are_refused(session, tmp_path):
    with pytest.raises(ConfigError, match=r"no image was preferred to another yet \(0 left, 0 right, 0 tie, 0 skip\)"):
        session.export(tmp_path / "p")
    for i in range(20):
        session.vote(i, "left", "ann")
    with pytest.raises(ConfigError, match=r"one side was preferred always \(20 left"):
        session.export(tmp_path / "p")
    session.vote(20, "right", "ann")
    assert session.export(tmp_path / "p")[0]["splits"]["train"]["count"] == 21
    for pair, choice, message in ((40, "left", "pair 40 is not in 0..39"), (True, "left", "pair True"), (1, "up", "choice 'up' is unknown")):
        with pytest.raises(ConfigError, match=message):
            session.vote(pair, choice, "ann")


def test_a_session_is_made_once(session, tmp_path):
    def never():
        raise AssertionError("drawn again")

    assert len(votes.create(session.folder, never, ABOUT, LABELS)) == 40
    with pytest.raises(ConfigError, match="holds other pairs .step: 7, not 8.; use another directory"):
        votes.create(session.folder, never, ABOUT | {"step": 8}, LABELS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="exists and holds no pairs"):
        votes.create(tmp_path / "other", never, ABOUT)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / votes.PAIRS).write_bytes(b"PK")  # killed before the session was there
    prompts = [f"a {i}" for i in range(40)]
    again = votes.create(tmp_path / "cut", lambda: IMAGES[:, :2], ABOUT, prompts=prompts)
    assert again.asked(3) == {"prompt": "a 3"} and votes.Session(tmp_path / "cut").prompts == prompts
    (session.folder / votes.PAIRS).write_bytes(b"PK")
    with pytest.raises(records.DataError, match="is damaged"):
        votes.Session(session.folder)
    with pytest.raises(records.DataError, match="holds no pairs to choose between"):
        votes.Session(tmp_path / "nowhere")
