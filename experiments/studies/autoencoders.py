"""Autoencoders of MNIST: what the prior does to the latent space, and what a discriminator does to the images.

    python -m experiments.study autoencoders --data=data/mnist      (made by tools.prepare_data)
"""

import functools

import jax
import numpy as np

from experiments.studies import common
from flowjax.config import ConfigError
from flowjax.train import runtime

STEPS, MORE, BATCH, HELD_OUT = 600, 600, 32, 2000
LATENTS = 4000  # of which the moments are taken
# title -> changes of the objective of configs/mnist_vae.py
PRIORS = {
    "plain autoencoder": {"kl_weight": 0.0, "sample": False},
    "KL weight 0.01": {},
    "KL weight 0.1": {"kl_weight": 0.1},
    "KL weight 1": {"kl_weight": 1.0},
}
ADVERSARIAL = (0.1, 0.5)  # weights of the discriminator's term, before the adaptive one
PATCH_GAN = {"name": "patch_gan", "channels": 16, "layers": 2, "groups": 4}
ADAM = {"name": "adamw", "b1": 0.5, "b2": 0.9, "decay": 0.0, "schedule": {"name": "constant", "rate": 2e-4}}
RATE = {"name": "adamw", "schedule": {"name": "constant", "rate": 5e-4}, "clip": 1.0}


def settings(seed, **changes):
    found = common.config("mnist_vae", common.DATA.value or "data/mnist", seed=seed, batch_size=BATCH, **changes)
    found["sample"]["every"] = 0
    return found


def prior(name, seed):
    """The run of one of PRIORS."""
    slug = name.replace(" ", "_")
    return common.train(f"autoencoders/{slug}/{seed}", settings(seed, steps=STEPS, objective=PRIORS[name]))


def continued(weight, seed):
    """MORE steps from the second of PRIORS, against a discriminator with this weight or, 0, alone, all at one constant rate."""
    roles, objective = {"net": {"checkpoint": str(prior("KL weight 0.01", seed))}}, {"name": "vae", "reconstruction": "l1", "kl_weight": 1e-2}
    if weight:
        objective |= {"name": "vae_gan", "start": 0, "adversarial_weight": weight}
        roles["discriminator"] = {"model": PATCH_GAN, "optimizer": ADAM}
    where = f"autoencoders/continued_{f'gan_{weight:g}' if weight else 'alone'}/{seed}"
    return common.train(where, settings(seed, steps=MORE, objective=objective, roles=roles, optimizer=RATE))


@functools.cache
def _data():
    """(held-out images (HELD_OUT, 32, 32, 1), training images to take moments of, Features of a classifier trained on all of them)."""
    from flowjax.data.pipeline import arrays
    from flowjax.evals import features, image

    section = settings(0)["data"]
    train, held_out = arrays(section, "train"), arrays(section, "test", limit=HELD_OUT)["x"]
    if len(train["x"]) < LATENTS or len(held_out) < HELD_OUT:
        found = f"{len(train['x']):,} training and {len(held_out):,} held-out images"
        raise ConfigError(f"--data: the study looks at {LATENTS:,} training and {HELD_OUT:,} held-out images, and there are {found}")
    judge = features.extractor("classifier", image.quantise(train["x"]), train["cond"]["label"], cache=f"{common.RUNS.value}/features")
    return held_out, train["x"][:LATENTS], judge


@functools.cache
def loaded(workdir):
    """(encode(x) -> (mean, logvar), decode(z)) of a run, in batches."""
    from flowjax.train import export

    role, params, _ = export.load(workdir)
    encode, decode = (jax.jit(lambda params, v, name=name: getattr(role.net(params), name)(v)) for name in ("encode", "decode"))

    def batched(fn, v, size=250):
        parts = [jax.device_get(fn(params, v[i : i + size])) for i in range(0, len(v), size)]
        return jax.tree.map(lambda *p: np.concatenate(p), *parts)

    return functools.partial(batched, encode), functools.partial(batched, decode)


def images(workdir) -> dict[str, float]:
    """How reconstructions of held-out images compare with them: pixels, spectrum, features of a classifier."""
    from flowjax.evals import frechet, image

    x, _, judge = _data()
    encode, decode = loaded(workdir)
    y = decode(encode(x)[0])
    seen, made = judge(image.quantise(x)), judge(image.quantise(y))
    apart = np.square(seen - np.roll(seen, 1, axis=0)).sum(1).mean()  # of two different images
    return {
        "psnr": image.psnr(y, x, 2.0).mean(),
        "sharpness": image.fine_share(y) / image.fine_share(x),
        "perceptual": np.square(seen - made).sum(1).mean() / apart,
        "rfd": frechet.distance(frechet.statistics(seen), frechet.statistics(made)),
    }


def latents(workdir, seed) -> dict[str, float]:
    """What a diffusion model would find: posterior means of training images, each channel standardised."""
    from flowjax.evals import frechet, image

    held_out, x, judge = _data()
    encode, decode = loaded(workdir)
    rng, mean = np.random.default_rng(seed), encode(x)[0]
    z = (mean - mean.mean((0, 1, 2))) / mean.std((0, 1, 2))
    flat, channels = z.reshape(len(z), -1).astype(np.float64), z.reshape(-1, z.shape[-1]).astype(np.float64)
    dimensions = flat.shape[1]
    normal = frechet.Statistics(len(flat), np.zeros(dimensions), np.eye(dimensions) * (len(flat) - 1))
    between = 0.5 * (mean + np.roll(mean, 1, axis=0))[: len(held_out)]  # on the way from one image to another
    again = encode(decode(between))[0]
    back = lambda z: z * mean.std((0, 1, 2)) + mean.mean((0, 1, 2))  # noqa: E731
    shaken, drawn = (rng.standard_normal(z[: len(held_out)].shape, np.float32) for _ in range(2))
    own = encode(held_out)[0]
    prior_images = np.clip(decode(back(drawn)), -1, 1)
    return {
        "std": mean.std((0, 1, 2)).mean(),
        "kurtosis": (channels**4).mean(0).mean() - 3.0,
        "frechet": frechet.distance(frechet.statistics(flat), normal) / dimensions,
        "cycle": np.square(again - between).mean() / mean.var((0, 1, 2)).mean(),
        "shaken": image.psnr(decode(own + 0.2 * mean.std((0, 1, 2)) * shaken), held_out, 2.0).mean(),
        "prior": frechet.distance(frechet.statistics(judge(image.quantise(held_out))), frechet.statistics(judge(image.quantise(prior_images)))),
    }


def main():
    runtime.setup()
    _data()  # said before anything is trained, where it is too little
    seeds = range(common.SEEDS.value)
    spread = lambda found, key, factor=1.0: common.spread([factor * float(f[key]) for f in found])  # noqa: E731
    text = [
        "# Autoencoders", "",
        f"{common.measured_by('autoencoders')}; MNIST at 32 x 32, f = 4, 8x8x4 latents,",
        f"{STEPS} steps of batch {BATCH}; {HELD_OUT} held-out images; features of a classifier trained on the training images.",
        "", "## What the prior does to the latent space", "",
        "Standardised latents of training images, as a diffusion model sees them. FD to N(0, I) is per dimension; the cycle error is that of the",
        "mean of two latents, decoded and encoded again, in units of the latents' variance; noise is 0.2 of their standard deviation; the last",
        "column is the Frechet distance (classifier) of decoded Gaussian noise to held-out images.", "",
    ]  # fmt: skip
    rows = []
    for name in PRIORS:
        runs = [prior(name, seed) for seed in seeds]
        inside, outside = [latents(run, seed) for seed, run in zip(seeds, runs)], [images(run) for run in runs]
        told = (spread(inside, k) for k in ("shaken", "std", "kurtosis", "frechet", "cycle", "prior"))
        rows.append([name, spread(outside, "psnr"), *told])
    head = ["", "PSNR", "PSNR with noise on the latents", "std of the latents", "excess kurtosis", "FD to N(0, I)", "cycle error"]
    head.append("FD of decoded noise")
    text += [common.table("autoencoders_prior", head, rows), "", "## With and without a discriminator", ""]
    text += [
        f"From the same {STEPS} steps with KL weight 0.01, {MORE} more at a constant rate. Sharpness: share of the variance above half of the",
        "highest frequency, over that of the images themselves (1: as sharp). Perceptual: squared distance of classifier features to those",
        "of the image, over that of two different images. rFD: Frechet distance of these features. Latent diffusion (2112.10752) and VQGAN (2012.09841): sharper",
        "at comparable PSNR, nearer in features.", "",
    ]  # fmt: skip
    rows = []
    ways = {"all begin here": functools.partial(prior, "KL weight 0.01"), "without": functools.partial(continued, 0.0)}
    for name, run in (ways | {f"with, weight {w:g}": functools.partial(continued, w) for w in ADVERSARIAL}).items():
        found = [images(run(seed)) for seed in seeds]
        rows.append([name, *(spread(found, k) for k in ("psnr", "sharpness")), spread(found, "perceptual", 100), spread(found, "rfd")])
    text.append(common.table("autoencoders_gan", ["", "PSNR", "sharpness", "perceptual, %", "rFD"], rows))
    common.page("autoencoders", "\n".join(text))
    return 0
