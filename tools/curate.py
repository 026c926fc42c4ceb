"""A curated part of a data set, as a data set of its own: the best by a reward, or the rows of a list.

    python -m tools.curate --data="{'name': 'digits'}" --reward=symmetry --best=0.2 --each_class --out=data/digits_curated
    python -m tools.curate --data="{'name': 'array_record', 'path': 'data/emoji'}" --reward="{'red': 1.0}" --least=0.05 --out=data/reds
    python -m tools.curate --data="{'name': 'array_record', 'path': 'data/emoji'}" --rows=chosen.txt --out=data/chosen

--least keeps what scores at least as much; --best the best share (of each class, with --each_class), ties in the order of the data;
--rows the rows that a file names, one number a line, counted from 0 in the order of the data: what a person has chosen. All other
splits of the data are kept whole, so that what the subset does to the rest of the data can be measured. The manifest says how the
subset came about. Train on it with data = {"name": "array_record", "path": ...} (configs/digits_sft.py).
"""

import pathlib

import numpy as np
from absl import flags

from experiments import shell

DATA = flags.DEFINE_string("data", None, "Data section (or name) to choose from.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory of the data set to write.", required=True)
SPLIT = flags.DEFINE_string("split", "train", "The split to choose from.")
OTHERS = flags.DEFINE_list("others", ["test"], "Splits to keep whole, where the data have them.")
REWARD = flags.DEFINE_string("reward", "", "A name of flowjax.rewards.REWARDS that needs no network, or {name: weight} of several.")
LEAST = flags.DEFINE_float("least", None, "Keep examples of at least this reward.")
BEST = flags.DEFINE_float("best", None, "Keep this share of best reward, in (0, 1].")
EACH_CLASS = flags.DEFINE_bool("each_class", False, "--best of each class, not of all.")
ROWS = flags.DEFINE_string("rows", "", "A file of row numbers, one a line.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")
BATCH = 1024


def listed(count: int) -> np.ndarray:
    """The rows that --rows names, sorted."""
    from flowjax.config import ConfigError

    try:
        rows = [int(line) for line in pathlib.Path(ROWS.value).expanduser().read_text().split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rows={ROWS.value} should be a file of numbers, one a line: {error}") from None
    if not rows or min(rows) < 0 or max(rows) >= count or len({*rows}) < len(rows):
        raise ConfigError(f"--rows={ROWS.value} should name different rows, of 0 to {count - 1}; it has {len(rows)}")
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


def main():
    from flowjax.config import ConfigError
    from flowjax.data import records
    from flowjax.data.pipeline import ordered
    from flowjax.evals import rewards

    section = shell.section(DATA.value, "data")
    how = [k for k, given in (("least", LEAST.value is not None), ("best", BEST.value is not None), ("rows", bool(ROWS.value))) if given]
    if len(how) != 1 or bool(REWARD.value) != (how[0] != "rows"):
        raise ConfigError("--reward with --least or --best, or --rows: one of the three says what to keep")
    if BEST.value is not None and not 0 < BEST.value <= 1:
        raise ConfigError(f"--best={BEST.value} should be a share, in (0, 1]")
    if EACH_CLASS.value and BEST.value is None:
        raise ConfigError("--each_class goes with --best")
    manifest, batches = ordered(section, SPLIT.value, BATCH)
    if "buckets" in manifest:
        raise ConfigError("--data: images of several sizes cannot be curated; take one bucket with data.size")
    reward = shell.section(REWARD.value, "reward")
    scores, labels = [], []
    if REWARD.value:
        for _, _, columns in batches:
            if np.asarray(columns.get("image", 0)).dtype != np.uint8 or np.ndim(columns.get("image")) != 4:
                raise ConfigError(f"--reward looks at images, and {manifest['name']} holds {', '.join(manifest['columns'])} ({manifest['dtype']})")
            scores.append(rewards.reward(reward, columns["image"], columns.get("label")))
            labels.append(columns.get("label"))
        scores = np.concatenate(scores)
        if EACH_CLASS.value and labels[0] is None:
            raise ConfigError(f"--each_class: {manifest['name']} has no classes")
        kept = chosen(scores, np.concatenate(labels) if EACH_CLASS.value else None, LEAST.value, BEST.value)
        if not len(kept):
            raise ConfigError(f"--least={LEAST.value} keeps nothing: the rewards are {scores.min():.4g} to {scores.max():.4g}")
    else:
        kept = listed(manifest["count"])
    wanted = {*kept.tolist()}
    features = [k for k in (*manifest["columns"], *manifest.get("embeddings", ())) if k in ("image", "x", "label", "caption", "text", "pooled")]

    def examples():
        yield from split(SPLIT.value, wanted)
        for name in OTHERS.value:
            if name != SPLIT.value and exists(name):
                yield from split(name, None)

    def exists(name):
        try:
            ordered(section, name, 1)
        except ConfigError:
            return False
        return True

    def split(name, wanted):
        for rows, _, columns in ordered(section, name, BATCH)[1]:
            for i, row in enumerate(rows.tolist()):
                if wanted is None or row in wanted:
                    yield name, f"{manifest['name']} ({name} row {row})", {k: columns[k][i] for k in features}

    told = {"from": section, "split": SPLIT.value, how[0]: getattr(flags.FLAGS, how[0]), "of": manifest["count"]}
    told |= {"content_hash": manifest["content_hash"]} if "content_hash" in manifest else {}
    if REWARD.value:
        mean = {"all": float(scores.mean()), "kept": float(scores[kept].mean())}
        told |= {"reward": reward, "each_class": EACH_CLASS.value, "mean reward": mean, "least kept": float(scores[kept].min())}
    made = records.write(
        OUT.value, examples(), name="curated", num_classes=manifest["num_classes"], class_names=manifest.get("class_names", ()),
        source={"curated": told}, overwrite=OVERWRITE.value,
    )  # fmt: skip
    counts = ", ".join(f"{k} {v['count']}" for k, v in made["splits"].items())
    print(f"{len(kept)} of {manifest['count']} examples kept; {OUT.value}: {counts}")
    if REWARD.value:
        print(f"reward {REWARD.value}: {scores.mean():.4f} on average, {scores[kept].mean():.4f} of those kept")
    return 0


if __name__ == "__main__":
    shell.run(main)
