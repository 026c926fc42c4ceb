"""Preference pairs from a checkpoint: python -m tools.make_pairs --checkpoint=runs/digits --reward=ink --out=runs/pairs

For each prompt (class, or --prompt and --prompts of a network of captions) `--candidates` samples are drawn; the one of highest and
the one of lowest reward become a pair.
Prompts whose candidates all score the same are left out: there is nothing to prefer.
"""

import numpy as np
from absl import flags

from experiments import sampling, shell
from flowjax.train import runtime

OUT = flags.DEFINE_string("out", None, "Directory of the pairs to write.", required=True)
REWARD = flags.DEFINE_string("reward", "ink", "A name of flowjax.rewards.REWARDS that needs no network.")
PAIRS = flags.DEFINE_integer("pairs", 1000, "How many prompts.", lower_bound=1)
CANDIDATES = flags.DEFINE_integer("candidates", 4, "Samples per prompt.", lower_bound=2)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")


def main():
    runtime.setup()
    from flowjax.config import ConfigError
    from flowjax.data.sources import write_preferences
    from flowjax.evals import image, rewards
    from flowjax.train import generator

    if sampling.COUNT.value:
        raise ConfigError("--count means nothing here; use --pairs and --candidates")
    checkpoint, k = sampling.CHECKPOINT.value, CANDIDATES.value
    role, params, info = sampling.load()
    seed = max(0, sampling.SEED.value)
    _, cond, prompts = sampling.asked(checkpoint, info, PAIRS.value)
    cond = {name: np.repeat(v, k, axis=0) for name, v in cond.items()}
    chosen = sampling.options(info)
    x = image.quantise(generator.build(role, params, info, checkpoint, chosen)(cond, PAIRS.value * k, seed, sampling.BATCH.value))
    labels = cond.get("label")
    scores = rewards.reward(REWARD.value, x, labels)
    win, lose, kept = rewards.best_and_worst(x.reshape(PAIRS.value, k, *x.shape[1:]), scores.reshape(PAIRS.value, k))
    meta = {"reward": REWARD.value, "checkpoint": checkpoint, "step": info["step"], "seed": seed, "candidates": k, **sampling.told(chosen)}
    label = None if labels is None else labels[::k][kept]
    captions = [text for text, stays in zip(prompts, kept) if stays] if prompts else None
    write_preferences(OUT.value, win, lose, label, info["num_classes"] or 0, meta, overwrite=OVERWRITE.value, captions=captions)
    print(f"{len(win)} pairs in {OUT.value}; reward {REWARD.value}: {scores.mean():.4f} on average, {len(kept) - len(win)} prompts tied")
    return 0


if __name__ == "__main__":
    shell.run(main)
