"""Flags shared by the tools that judge images by a reward (flowjax.rewards), and what they select."""

from absl import flags

from experiments.shell import section

REWARD = flags.DEFINE_string("reward", "ink", "A name of flowjax.rewards.REWARDS, or a section {name: weight, ...}.")
CHECKPOINT = flags.DEFINE_string("reward_checkpoint", "", "The network that the reward asks: a reward model, or a classifier for 'agreement'.")


def scorer():
    """score(images uint8 (N, H, W, C), labels (N,) or None, prompts) -> float64 (N,), by the flags."""
    from flowjax.evals import rewards

    asked = section(REWARD.value, "reward")
    judge = rewards.judge(CHECKPOINT.value) if CHECKPOINT.value else None
    return lambda images, labels, prompts=(): rewards.reward(asked, images, labels, judge, prompts)


def told() -> dict:
    """The flags for a record."""
    return {"reward": section(REWARD.value, "reward")} | ({"reward_checkpoint": CHECKPOINT.value} if CHECKPOINT.value else {})
