"""How often one network's sample beats another's: python -m tools.win_rate --checkpoint=A --against=B --reward=ink

Both draw from the same noise for the same classes or prompts; prints A's win rate on the reward (ties count half), and the share of
each one's samples that an independent judge assigns to the asked class. A reward that asks a network: --reward_checkpoint.
"""

import json

from absl import flags

from experiments import judging, sampling, shell
from flowjax.train import runtime

AGAINST = flags.DEFINE_string("against", None, "The other export or workdir.", required=True)
DATA = flags.DEFINE_string("judge_data", "", "Workdir or export whose training data the judge learns; default: --against.")


def main():
    runtime.setup()
    from flowjax.data.pipeline import arrays
    from flowjax.evals import agreement, image, rewards
    from flowjax.train import export, generator

    seed, count = max(0, sampling.SEED.value), sampling.COUNT.value or 1000
    out, scores = {}, {}
    judge, score, mine = None, judging.scorer(), sampling.load()
    for name, checkpoint in (("against", AGAINST.value), ("checkpoint", sampling.CHECKPOINT.value)):
        role, params, info = mine if name == "checkpoint" else export.load(checkpoint, sampling.WEIGHTS.value)
        chosen, (_, cond, prompts) = sampling.options(info), sampling.asked(checkpoint, info, count)
        x = image.quantise(generator.build(role, params, info, checkpoint, chosen)(cond, count, seed, sampling.BATCH.value))
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
