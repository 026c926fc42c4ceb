"""A curated part of a data set, as a data set of its own: the best by a reward, or the rows of a list.

    python -m tools.curate --data="{'name': 'digits'}" --reward=symmetry --best=0.2 --each_class --out=data/digits_curated
    python -m tools.curate --data="{'name': 'array_record', 'path': 'data/emoji'}" --reward="{'red': 1.0}" --least=0.05 --out=data/reds
    python -m tools.curate --data="{'name': 'array_record', 'path': 'data/emoji'}" --rows=chosen.txt --out=data/chosen

--least keeps what scores at least as much; --best the best share (of each class, with --each_class), ties in the order of the data;
--rows the rows that a file names, one number a line, counted from 0 in the order of the data: what a person has chosen. All other
splits of the data are kept whole, so that what the subset does to the rest of the data can be measured. The manifest says how the
subset came about. Train on it with data = {"name": "array_record", "path": ...} (configs/digits_sft.py).
"""

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


def main():
    from flowjax.evals import curate

    given = {f.name: f.value for f in (SPLIT, OTHERS, LEAST, BEST, EACH_CLASS, ROWS, OVERWRITE)}
    section, reward = shell.section(DATA.value, "data"), shell.section(REWARD.value, "reward")
    made, scores, kept = curate.curate(section, OUT.value, reward=reward, **given)
    counts = ", ".join(f"{k} {v['count']}" for k, v in made["splits"].items())
    print(f"{len(kept)} of {made['source']['curated']['of']} examples kept; {OUT.value}: {counts}")
    if scores is not None:
        print(f"reward {REWARD.value}: {scores.mean():.4f} on average, {scores[kept].mean():.4f} of those kept")
    return 0


if __name__ == "__main__":
    shell.run(main)
