"""A curated part of a data set, as a data set of its own: the best by a reward, or the rows of a list."""

import pathlib
from collections.abc import Sequence

import numpy as np

from flowjax.config import ConfigError
from flowjax.data import records
from flowjax.data.pipeline import ordered
from flowjax.evals import rewards

BATCH = 1024
COLUMNS = ("image", "x", "label", "caption", "text", "pooled")


def listed(file: str, count: int) -> np.ndarray:
    """The row numbers, 0 to count - 1, that a file names one a line, sorted."""
    try:
        rows = [int(line) for line in pathlib.Path(file).expanduser().read_text().split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rows={file} should be a file of numbers, one a line: {error}") from None
    if not rows or min(rows) < 0 or max(rows) >= count or len({*rows}) < len(rows):
        raise ConfigError(f"--rows={file} should name different rows, of 0 to {count - 1}; it has {len(rows)}")
    return np.sort(rows)


def chosen(scores: np.ndarray, labels: np.ndarray | None, least: float | None, best: float | None) -> np.ndarray:
    """Rows, sorted, of at least this score, or of the best share of each label (of all, without labels); ties go to the first."""
    if least is not None:
        return np.flatnonzero(scores >= least)
    groups = np.zeros(len(scores), int) if labels is None else labels
    kept = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        kept.append(rows[np.argsort(-scores[rows], kind="stable")][: max(1, round(best * len(rows)))])
    return np.sort(np.concatenate(kept))


def scored(section, split: str, reward, each_class: bool):
    """(scores (N,), labels (N,) or None) of the images of a split."""
    manifest, batches = ordered(section, split, BATCH)
    scores, labels = [], []
    for _, _, columns in batches:
        image = np.asarray(columns.get("image", 0))
        if image.dtype != np.uint8 or image.ndim != 4:
            raise ConfigError(f"--reward looks at images, and {manifest['name']} holds {', '.join(manifest['columns'])} ({manifest['dtype']})")
        scores.append(rewards.reward(reward, image, columns.get("label")))
        labels.append(columns.get("label"))
    if each_class and labels[0] is None:
        raise ConfigError(f"--each_class: {manifest['name']} has no classes")
    return np.concatenate(scores), np.concatenate(labels) if each_class else None


def curate(
    section, out, *, split: str = "train", others: Sequence[str] = ("test",), reward="", least: float | None = None, best: float | None = None,
    each_class: bool = False, rows: str = "", overwrite: bool = False,
):  # fmt: skip
    """(manifest written, scores or None, rows kept): the part of `split` that is chosen, and the other splits whole, as a data set `out`.

    reward: a section of flowjax.rewards that needs no network, with `least` (a score) or `best` (a share in (0, 1]; of each class with
    each_class); or rows: a file of row numbers. ConfigError where these do not go together, or keep nothing.
    """
    how = {k: v for k, v in (("least", least), ("best", best), ("rows", rows or None)) if v is not None}
    if len(how) != 1 or bool(reward) != ("rows" not in how):
        raise ConfigError("--reward with --least or --best, or --rows: one of the three says what to keep")
    if best is not None and not 0 < best <= 1:
        raise ConfigError(f"--best={best} should be a share, in (0, 1]")
    if each_class and best is None:
        raise ConfigError("--each_class goes with --best")
    manifest, _ = ordered(section, split, BATCH)
    if "buckets" in manifest:
        raise ConfigError("--data: images of several sizes cannot be curated; take one bucket with data.size")
    told, scores = {"from": section, "split": split, "of": manifest["count"], **how}, None
    if reward:
        scores, labels = scored(section, split, reward, each_class)
        kept = chosen(scores, labels, least, best)
        if not len(kept):
            raise ConfigError(f"--least={least} keeps nothing: the rewards are {scores.min():.4g} to {scores.max():.4g}")
        mean = {"all": float(scores.mean()), "kept": float(scores[kept].mean())}
        told |= {"reward": reward, "each_class": each_class, "mean reward": mean, "least kept": float(scores[kept].min())}
    else:
        kept = listed(rows, manifest["count"])
    told |= {k: manifest[k] for k in ("content_hash",) if k in manifest}

    def examples(name, wanted):
        for numbers, _, columns in ordered(section, name, BATCH)[1]:
            for i, row in enumerate(numbers.tolist()):
                if wanted is None or row in wanted:
                    yield name, f"{manifest['name']} ({name} row {row})", {k: columns[k][i] for k in COLUMNS if k in columns}

    def there(name):
        try:
            return bool(ordered(section, name, 1))
        except ConfigError:
            return False

    def everything():
        yield from examples(split, {*kept.tolist()})
        for name in others:
            if name != split and there(name):
                yield from examples(name, None)

    about = {"num_classes": manifest["num_classes"], "class_names": manifest.get("class_names", ()), "source": {"curated": told}}
    return records.write(out, everything(), name="curated", overwrite=overwrite, **about), scores, kept
