"""Run a study by its name.

    python -m experiments.study ablations [--runs=runs/studies] [--seeds=3]
"""

import importlib
import sys

from experiments import shell

# What there is, and what each shows.
STUDIES = {
    "digits": "the figures of the README: teacher, few-step student, preference tuning",
    "ablations": "prediction, time law, guidance scale, average length, sampler order",
    "designs": "conditioning, patch size, image or velocity, time shift, representation alignment, dropped labels and captions",
    "distillation": "every road from many steps to one, at equal compute",
    "rewards": "reward against divergence: Flow-GRPO, ReFL, DRaFT, NFT, DPO, online DPO, and what they lose",
    "reward_model": "a reward model of the digits from labels of growing noise: accuracy, calibration",
    "mnist": "latent diffusion of MNIST; latents or pixels at equal compute",
    "autoencoders": "what the prior does to latents, and a discriminator to images",
    "emoji": "emoji from captions",
    "enhance": "short prompts for emoji, rewritten by template and by a language model",
    "lora": "quality over the rank of an adapter, and all weights",
    "personal": "DreamBooth on emoji: the subject, and what is left of its class",
    "lifecycle": "one network from pre-training to a two-step student, stage by stage",
    "plans": "what pods would do, compiled without one",
}


def main() -> int:
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if name not in STUDIES:
        told = "\n".join(f"  {key:14}{what}" for key, what in STUDIES.items())
        print(f"error: {name or 'no name'} is not a study; valid:\n{told}", file=sys.stderr)
        return 2
    sys.argv[0] = f"experiments.study {name}"
    shell.run(importlib.import_module(f"experiments.studies.{name}").main)
    return 0


if __name__ == "__main__":
    sys.exit(main())
