"""Export: python -m experiments.export --workdir=runs/digits [--out=runs/digits/export --weights=ema --step=2000]

Writes the averaged weights as an orbax checkpoint and as safetensors, with the config that rebuilds the network. For an
autoencoder the per-channel statistics of its latents over the training data are measured and stored with it. Of a run that
trained an adapter (roles.net.lora) it writes the merged network, or with --adapter the adapter alone: "flowjax" in a form that
experiments.sample --lora reads, "diffusers" or "kohya" in the safetensors layouts of those.
"""

from absl import flags

from experiments import shell
from flowjax.config import ConfigError
from flowjax.train import runtime

WORKDIR = flags.DEFINE_string("workdir", None, "The run to export.", required=True)
OUT = flags.DEFINE_string("out", "", "Where to; default: <workdir>/export.")
WEIGHTS = flags.DEFINE_string("weights", "ema", 'The name of an average, or "params".')
STEP = flags.DEFINE_integer("step", 0, "Which checkpoint (or snapshot); 0: the newest intact one.", lower_bound=0)
POSTHOC_STD = flags.DEFINE_float("posthoc_std", 0.0, "Width of a power average to reconstruct from the run's snapshots.", lower_bound=0.0)
ADAPTER = flags.DEFINE_enum("adapter", None, ["flowjax", "diffusers", "kohya"], "Write the adapter of the network, in this layout.")
LATENT_EXAMPLES = flags.DEFINE_integer("latent_examples", 50_000, "Examples for an autoencoder's latent statistics.", lower_bound=1)


def main():
    runtime.setup()
    from flowjax import storage
    from flowjax.data.pipeline import pipeline
    from flowjax.interop import lora
    from flowjax.train import export

    step = STEP.value or None
    out = storage.path(OUT.value) if OUT.value else storage.path(WORKDIR.value) / "export"
    latents = None
    if POSTHOC_STD.value and WEIGHTS.present:
        raise ConfigError("--weights and --posthoc_std exclude each other")
    if ADAPTER.value in ("diffusers", "kohya"):
        role, tree, info = export.stored(WORKDIR.value, WEIGHTS.value, step, posthoc_std=POSTHOC_STD.value)
        if role.lora is None:
            raise ConfigError(f"{WORKDIR.value} holds a whole network, no adapter (roles.net.lora)")
        base = export.base_of(WORKDIR.value, info)
        out.mkdir(parents=True, exist_ok=True)
        lora.write(out / lora.FILE, role.module, base, tree, role.lora, ADAPTER.value)
        print(f"step {info['step']} ({info['weights']}): {out / lora.FILE}")
        return 0
    role, params, info = export.load(WORKDIR.value, WEIGHTS.value, step, posthoc_std=POSTHOC_STD.value)
    if role.module.kind == "autoencoder":
        count = min(info["data"].get("count") or LATENT_EXAMPLES.value, LATENT_EXAMPLES.value)
        batch = min(250, count)
        stream = pipeline(info["config"]["data"], batch, 0, shuffle=True)
        latents = export.measure_latents(role, params, (next(stream)["x"] for _ in range(count // batch)))
    info = export.export(WORKDIR.value, out, WEIGHTS.value, step, latents, POSTHOC_STD.value, ADAPTER.value is not None)
    print(f"step {info['step']} ({info['weights']}): {out}")
    return 0


if __name__ == "__main__":
    shell.run(main)
