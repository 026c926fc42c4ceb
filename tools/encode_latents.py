"""Encode a data set once, for runs that train on latents: ArrayRecord shards with the latents of an exported autoencoder.

    python -m tools.encode_latents --vae=runs/emoji_vae/export --out=data/emoji_latents
    python -m tools.encode_latents --vae=... --out=... --data="{'name': 'tfds', 'dataset': 'photos', 'resize': 256, 'flip': True}"

--data is a data section; by default that of the run that trained the autoencoder. With flip = True the mirror images are encoded
too. Labels, captions and embeddings come along. Then train with

    --config.data="{'name': 'array_record', 'path': 'data/emoji_latents'}" --config.roles.vae.checkpoint=runs/emoji_vae/export

where roles.vae decodes the samples; it must be the very autoencoder that made the latents.
"""

import dataclasses
import shlex
import sys

from absl import flags

from experiments import shell
from flowjax.config import ConfigError
from flowjax.train import runtime

VAE = flags.DEFINE_string("vae", None, "The export of an autoencoder (experiments.export measures its latents).", required=True)
OUT = flags.DEFINE_string("out", None, "The directory to write.", required=True)
DATA = flags.DEFINE_string("data", "", "The data section; default: that of the autoencoder's run.")
SPLITS = flags.DEFINE_list("splits", ["train", "test"], "The splits to encode.")
DTYPE = flags.DEFINE_string("dtype", "float16", "Of the stored latents: float16 or float32.")
TILE = flags.DEFINE_integer("tile", 0, "Encode images larger than this in tiles of this many pixels; 0: whole.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 64, "Images encoded at a time.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another data set in --out.")


def main():
    runtime.setup()
    import jax

    from flowjax.data import latents
    from flowjax.train import export
    from flowjax.train.roles import Latents

    role, params, info = export.load(VAE.value, where="--vae")
    codec = role.net(params)
    if not isinstance(codec, Latents):
        raise ConfigError(f"--vae={VAE.value} is no autoencoder with measured latents: export it with experiments.export")
    codec = dataclasses.replace(codec, tile=TILE.value)
    section = shell.section(DATA.value, "data") if DATA.value else info["config"]["data"]
    manifest = latents.write(
        OUT.value, section, jax.jit(codec.encode), export.identity(params, info), splits=SPLITS.value, dtype=DTYPE.value,
        tile=TILE.value, batch=BATCH.value, overwrite=OVERWRITE.value, command=shlex.join(["python", "-m", "tools.encode_latents", *sys.argv[1:]]),
    )  # fmt: skip
    counts = ", ".join(f"{k} {v['count']}" for k, v in manifest["splits"].items())
    made = manifest["source"]["latents"]
    print(f"{OUT.value}: {manifest['name']}, {counts}, {manifest['image_shape']} {made['dtype']}, autoencoder {made['vae']}, key {made['key'][:12]}")
    return 0


if __name__ == "__main__":
    shell.run(main)
