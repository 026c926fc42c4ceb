"""How often one network's sample beats another's: python -m tools.win_rate --checkpoint=A --against=B --reward=ink

Both draw from the same noise for the same classes or prompts, prints A's win rate on the reward (ties count half), and the share of
each one's samples that an independent judge assigns to the asked class. A reward that asks a network: --reward_checkpoint.
"""

import json

import numpy as np
from absl import flags

from experiments import judging, sampling, shell
from flowjax.config import ConfigError
from flowjax.train import runtime

AGAINST = flags.DEFINE_string("against", None, "The other export or workdir.", required=True)
DATA = flags.DEFINE_string("judge_data", "", "Workdir or export whose training data the judge learns; default: --against.")


def asked(loaded: dict, count: int) -> dict:
    """{name: (cond, prompts)} of what each network, {name: (checkpoint, info)}, is asked for; ConfigError where these are not the same."""
    found = {name: sampling.asked(checkpoint, info, count)[1:] for name, (checkpoint, info) in loaded.items()}
    (a, own), (b, other) = found.values()
    if own != other or ("label" in a) != ("label" in b) or ("label" in a and not np.array_equal(a["label"], b["label"])):
        raise ConfigError("--checkpoint and --against would be asked for different things, each for its own; give --labels or --prompt")
    return found


def main():
    runtime.setup()
    from flowjax.data.pipeline import arrays
    from flowjax.evals import agreement, image, rewards
    from flowjax.train import export, generator

    out, scores = {}, {}
    judge, score, mine = None, judging.scorer(), sampling.load()
    seed, count = sampling.seed(mine[2]), sampling.COUNT.value or 1000
    loaded = {"against": export.load(AGAINST.value, sampling.WEIGHTS.value), "checkpoint": mine}
    places = {"against": AGAINST.value, "checkpoint": sampling.CHECKPOINT.value}
    wanted = asked({name: (places[name], info) for name, (*_, info) in loaded.items()}, count)
    for name, (role, params, info) in loaded.items():
        checkpoint, chosen, (cond, prompts) = places[name], sampling.options(info), wanted[name]
        x = image.quantise(generator.build(role, params, info, checkpoint, chosen)(cond, count, seed, sampling.BATCH.value), sampled=True)
        scores[name] = score(x, cond.get("label"), prompts)
        out[name] = {"checkpoint": checkpoint, "step": info["step"], "reward": float(scores[name].mean()), "sampling": sampling.told(chosen)}
        if name == "against":
            out[name]["sampling"].pop("lora", None)  # adapters are of --checkpoint
        if "label" in cond:
            if judge is None:
                source = export.info_of(DATA.value) if DATA.value else info
                real = arrays(source["config"]["data"], "train")
                judge = agreement.judge("svm", image.quantise(real["x"]), real["cond"]["label"])
            out[name]["agreement"] = agreement.agreement(x, cond["label"], judge)["agreement"]
    out["win_rate"] = rewards.win_rate(scores["checkpoint"], scores["against"])
    out |= {**judging.told(), "samples": count, "seed": seed}
    print(json.dumps(out, indent=1))
    return 0


if __name__ == "__main__":
    shell.run(main)
