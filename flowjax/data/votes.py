"""Pairs of images that people choose between, and what they chose: a folder that any number of sittings add to.

    pairs.npz       images uint8 (n, 2, H, W, C), and the labels (n,) where there are classes
    session.json    how the pairs came about, and the prompts
    votes.jsonl     a line for each decision: pair, choice, who, when, label or prompt, and the session's checkpoint, step and seeds

A line is on the disk before the next pair is shown, so that a killed process loses nothing; what it was in the middle of writing is
not counted. Who decides a pair again replaces an own decision: the last line counts.
"""

import collections
import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowjax.config import ConfigError
from flowjax.data.records import DataError
from flowjax.data.sources import write_preferences

PAIRS, SESSION, VOTES = "pairs.npz", "session.json", "votes.jsonl"
CHOICES = ("left", "right", "tie", "skip")
ONE_SIDED = 20  # so many decisions for one side, and none for the other, are a key that was held down


class Session:
    """An open folder of pairs. Fields: folder, about, images, labels (or None), prompts (or [])."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder).expanduser()
        try:
            told = json.loads((self.folder / SESSION).read_text())
            with np.load(self.folder / PAIRS) as stored:
                self.images, self.labels = stored["images"], stored["label"] if "label" in stored else None
            self.about, self.prompts = told["about"], told["prompts"]
        except FileNotFoundError as error:
            raise DataError(f"{self.folder} holds no pairs to choose between: {error.filename} does not exist") from None
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.folder} is damaged: {error}") from None

    def __len__(self):
        return len(self.images)

    def asked(self, pair: int) -> dict[str, Any]:
        """{"prompt": ...}, {"label": ...} or {}: what both images of a pair were asked for."""
        if self.prompts:
            return {"prompt": self.prompts[pair]}
        return {} if self.labels is None else {"label": int(self.labels[pair])}

    def votes(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(who, pair) -> the last decision. DataError names a line that is none."""
        file = self.folder / VOTES
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # what follows the last newline was cut short
        found = {}
        for number, line in enumerate(lines, 1):
            try:
                vote = json.loads(line)
                key, choice = (vote["who"], vote["pair"]), vote["choice"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{file} line {number} is no decision: {line[:80]!r}") from None
            if choice not in CHOICES or not isinstance(key[1], int) or not 0 <= key[1] < len(self):
                raise DataError(f"{file} line {number}: choice {choice!r} of pair {key[1]!r}; valid: {', '.join(CHOICES)} of 0..{len(self) - 1}")
            found[key] = vote
        return found

    def pending(self, who: str) -> list[int]:
        """The pairs that `who` has not decided yet."""
        done = {pair for name, pair in self.votes() if name == who}
        return [i for i in range(len(self)) if i not in done]

    def vote(self, pair: int, choice: str, who: str) -> dict[str, Any]:
        """Keep a decision: returns when it is on the disk. ConfigError for one that is impossible."""
        if choice not in CHOICES:
            raise ConfigError(f"choice {choice!r} is unknown; valid: {', '.join(CHOICES)}")
        if not isinstance(pair, int) or isinstance(pair, bool) or not 0 <= pair < len(self):
            raise ConfigError(f"pair {pair!r} is not in 0..{len(self) - 1}")
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        origin = {k: self.about[k] for k in ("checkpoint", "step", "weights", "seed") if k in self.about}
        line = {"pair": pair, "choice": choice, "who": who, "when": when, **self.asked(pair), **origin, "samples": [2 * pair, 2 * pair + 1]}
        with open(self.folder / VOTES, "ab+") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # a line that a killed process left unfinished
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def export(self, out, holdout: float = 0.0, overwrite: bool = False) -> tuple[dict[str, Any], dict[str, int]]:
        """Write what was decided as preference pairs (flowjax.data.sources): (manifest, number of each choice).

        Ties and skipped pairs are left out. The decisions are kept beside the records. ConfigError where nothing was preferred, or
        one side always.
        """
        votes = self.votes()
        counts = collections.Counter(v["choice"] for v in votes.values())
        kept = sorted((v for v in votes.values() if v["choice"] in ("left", "right")), key=lambda v: (v["pair"], v["who"]))
        told = ", ".join(f"{counts[c]} {c}" for c in CHOICES)
        if not kept:
            raise ConfigError(f"{self.folder}: no image was preferred to another yet ({told})")
        if len(kept) >= ONE_SIDED and len({v["choice"] for v in kept}) == 1:
            raise ConfigError(f"{self.folder}: one side was preferred always ({told}), which says nothing of the images")
        pairs = np.array([v["pair"] for v in kept])
        best = np.array([v["choice"] == "right" for v in kept], int)
        who = dict(collections.Counter(v["who"] for v in kept))
        meta = {"by": "hand", **self.about, "who": who, "when": sorted(v["when"] for v in kept)[:: max(1, len(kept) - 1)], "choices": dict(counts)}
        label = None if self.labels is None else self.labels[pairs]
        caption = [self.prompts[i] for i in pairs] if self.prompts else None
        made = write_preferences(
            out, self.images[pairs, best], self.images[pairs, 1 - best], label, self.about.get("num_classes", 0), meta, overwrite, caption, holdout,
            {VOTES: b"".join(json.dumps(v, ensure_ascii=False).encode() + b"\n" for v in kept)},
        )  # fmt: skip
        return made, dict(counts)


def create(folder, images, about: Mapping, labels=None, prompts=()) -> Session:
    """Open the session in `folder`, which is made where there is none; ConfigError where there is another one.

    images: a callable that gives uint8 (n, 2, H, W, C), called only where they are not there yet; about: settings that tell it from others.
    """
    folder = pathlib.Path(folder).expanduser()
    told = json.loads(json.dumps({"about": dict(about), "prompts": list(prompts)}))
    if (folder / SESSION).exists():
        found = Session(folder)
        was, now = ({**s["about"], "prompts": s["prompts"]} for s in ({"about": found.about, "prompts": found.prompts}, told))
        if changed := [f"{k}: {was.get(k)!r}, not {now.get(k)!r}" for k in {**was, **now} if was.get(k) != now.get(k)]:
            raise ConfigError(f"{folder} holds other pairs ({'; '.join(changed)}); use another directory, or no --checkpoint to go on with these")
        return found
    if folder.exists() and {p.name for p in folder.iterdir()} - {PAIRS, f"{SESSION}.tmp"}:  # those of one that was cut short
        raise ConfigError(f"{folder} exists and holds no pairs to choose between; use another directory")
    made = images()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / PAIRS, images=made, **({} if labels is None else {"label": labels}))
    (folder / f"{SESSION}.tmp").write_text(json.dumps(told, indent=1, ensure_ascii=False))
    os.replace(folder / f"{SESSION}.tmp", folder / SESSION)  # last: before it there is no session
    return Session(folder)
