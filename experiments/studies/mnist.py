"""MNIST through the npz door: autoencoder, latent DiT, class agreement by an independent classifier.

    python -m experiments.study mnist --data=data/mnist      (made by tools.prepare_data)
"""

import functools
import pathlib

from experiments.studies import common
from flowjax.train import runtime

SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
COMPARED = 2.0  # guidance at which latents and pixels are compared
PATCHES = (8, 4)  # of pixels: as many tokens as the latents have, and four times as many


def data() -> str:
    """Where the prepared data set lies."""
    return common.DATA.value or "data/mnist"


@functools.cache
def autoencoder() -> pathlib.Path:
    """An export of the autoencoder, with the statistics of its latents."""
    from flowjax.data.pipeline import pipeline
    from flowjax.train import export

    workdir = common.train("mnist_vae", common.config("mnist_vae", data(), seed=0))
    out = workdir / "export"
    if not (out / "config.json").exists():
        role, params, info = export.load(workdir)
        stream = pipeline(info["config"]["data"], 250, 0)
        export.export(workdir, out, latents=export.measure_latents(role, params, (next(stream)["x"] for _ in range(80))))
    return out


def teacher(seed: int):
    """A finished run of configs/mnist_latent.py."""
    return common.train(f"mnist_latent/{seed}", common.config("mnist_latent", data(), seed=seed, roles={"vae": {"checkpoint": str(autoencoder())}}))


def of_pixels(patch: int, seed: int):
    """(run, its steps): configs/mnist_latent.py without an autoencoder, as many steps as cost what those of the largest patch do."""
    from flowjax.models import flops
    from flowjax.train.assembly import Run

    def changed(patch, **more):
        found = common.config("mnist_latent", data(), seed=seed, model={"patch": patch}, **more)
        found["roles"], found["sample"]["every"] = {}, 0
        return found

    def cost(patch):
        run = Run(changed(patch))
        return flops.count(run.step(), run.target, run.frozen, run.batch())

    whole = changed(patch)["steps"]
    steps = whole if patch == max(PATCHES) else round(whole * cost(max(PATCHES)) / cost(patch))
    return common.train(f"mnist_pixels/{patch}/{seed}", changed(patch, steps=steps)), steps


def latents_or_pixels(latent) -> str:
    """The table; latent: the runs on latents, by seed."""
    rows = []
    for name, runs in (
        ("8x8x4 latents, patches of 2, 16 tokens", [(run, common.config("mnist_latent", data())["steps"]) for run in latent]),
        *((f"pixels, patches of {p}, {(32 // p) ** 2} tokens", [of_pixels(p, seed) for seed in range(len(latent))]) for p in PATCHES),
    ):
        for scale in (None, COMPARED):
            options = {"features": ("pca",), "metrics": ("frechet", "agreement"), "guidance": scale}
            results = [common.measure(run, seed=i, **options) for i, (run, _) in enumerate(runs)]
            rows.append([
                f"{name}, guidance {scale or 1}", runs[0][1], common.spread([100 * r["agreement"]["agreement"] for r in results]),
                common.spread([common.frechet(r)["distance"] for r in results]),
            ])  # fmt: skip
    return common.table("mnist_pixels", ["network and sampling", "training steps", "class agreement %", "FD-pca"], rows)


def main():
    runtime.setup()
    from flowjax.data.pipeline import arrays
    from flowjax.evals import image
    from flowjax.train import export, generator

    out = autoencoder()
    role, params, info = export.load(out)
    held_out = arrays(info["config"]["data"], "test", limit=2000)["x"]
    quality = image.reconstruction(generator.reconstructions(role, params, held_out, 250), held_out)

    rows, runs = [], {}
    for name, guidance in (("no guidance", None), *((f"guidance {w}", w) for w in SCALES)):
        results = []
        for seed in range(common.SEEDS.value):
            latent = runs[seed] = teacher(seed)
            results.append(common.measure(latent, seed=seed, count=1000, features=("pca",), metrics=("frechet", "agreement"), guidance=guidance))
        rows.append([
            name, common.spread([100 * r["agreement"]["agreement"] for r in results]),
            common.spread([common.frechet(r)["distance"] for r in results]),
            common.spread([common.frechet(r)["train_to_test"] for r in results]),
        ])  # fmt: skip
    judge = results[0]["agreement"]["judge_accuracy"]
    text = [
        "# MNIST", "", f"{common.measured_by('mnist')}, 1,000 samples each.",
        "", f"Autoencoder (f = 4, 8x8x4 latents): PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f} on 2,000 held-out images.",
        f"The judge is a scikit-learn SVM on PCA features that scores {100 * judge:.2f} % on held-out MNIST.", "",
        common.table("mnist", ["sampling", "class agreement %", "FD-pca", "FD-pca of train to held-out"], rows),
    ]  # fmt: skip
    common.page("mnist", "\n".join(text))
    text += [
        "", "## Latents or pixels", "",
        "Latent diffusion (2112.10752): at equal compute better in a latent space than in pixels. The same network at the same cost of training,",
        "the autoencoder's own (once for all runs) left out.", "", latents_or_pixels([*runs.values()]),
    ]  # fmt: skip
    common.page("mnist", "\n".join(text))
