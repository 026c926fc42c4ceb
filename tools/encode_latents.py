"""Encode a data set once, for runs that train on latents, on embedded captions, or on both: ArrayRecord shards.

    python -m tools.encode_latents --vae=runs/emoji_vae/export --out=data/emoji_latents
    python -m tools.encode_latents --vae=... --out=... --data="{'name': 'tfds', 'dataset': 'photos', 'resize': 256, 'flip': True}"
    python -m tools.encode_latents --vae=... --text=exports/t5 --out=... --data="{'name': 'array_record', 'path': 'data/emoji',
        'text': {'name': 'file', 'path': 't5/tokenizer.json', 'length': 77}, 'captions': 'first'}"
    python -m tools.encode_latents --text=exports/t5 --out=... --data=...        (pixels stay pixels)

--data is a data section; by default that of the run that trained the autoencoder. With flip = True the mirror images are encoded
too. Labels, captions and what was encoded before come along, so the two can also be made one after the other. Captions are
embedded as tokens of data.text, which is that of the text encoder's export where it has one (sd3_text and flux_text of
tools.convert_weights do); with data.captions = 'first' the first one of several is taken, else several are refused. Then
train with

    --config.data="{'name': 'array_record', 'path': 'data/emoji_latents'}" --config.roles.vae.checkpoint=runs/emoji_vae/export
        --config.roles.text.checkpoint=exports/t5

where roles.vae decodes the samples and roles.text embeds prompts; they must be the very networks that encoded the data. Neither
is needed for the training alone.
"""

import dataclasses
import shlex
import sys

from absl import flags

from experiments import shell
from flowjax.config import ConfigError, keywords
from flowjax.train import runtime

VAE = flags.DEFINE_string("vae", "", "The export of an autoencoder (experiments.export measures its latents).")
TEXT = flags.DEFINE_string("text", "", "The export of a text encoder, such as tools.convert_weights writes.")
OUT = flags.DEFINE_string("out", None, "The directory to write.", required=True)
DATA = flags.DEFINE_string("data", "", "The data section; default: that of the autoencoder's run.")
SPLITS = flags.DEFINE_list("splits", ["train", "test"], "The splits to encode.")
DTYPE = flags.DEFINE_string("dtype", "float16", "Of the stored latents and embeddings: float16 or float32.")
TILE = flags.DEFINE_integer("tile", 0, "Encode images larger than this in tiles of this many pixels; 0: whole.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 64, "Images encoded at a time.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another data set in --out.")


def autoencoder(source):
    """(Encoder of images, the data section of its run)."""
    import jax

    from flowjax.data.latents import Encoder
    from flowjax.train import export
    from flowjax.train.roles import Latents

    role, params, info = export.load(source, where="--vae")
    codec = role.net(params)
    if not isinstance(codec, Latents):
        raise ConfigError(f"--vae={source} is no autoencoder with measured latents: export it with experiments.export")
    codec = dataclasses.replace(codec, tile=TILE.value)
    return Encoder(jax.jit(codec.encode), export.identity(params, info)), info["config"]["data"]


def text_encoder(source):
    """(Encoder of token ids, the section of its own tokenizer or None)."""
    import jax

    from flowjax.data.latents import Encoder
    from flowjax.train import export

    role, params, info = export.load(source, where="--text")
    if role.module.kind != "text_encoder":
        raise ConfigError(f"--text={source} is a network of kind {role.module.kind!r}, not 'text_encoder'")
    embed = jax.jit(lambda params, tokens: role.net(params)(tokens))  # large parameters are no constants of a program
    lengths = getattr(role.module, "lengths", None)
    made = Encoder(lambda tokens: embed(params, tokens), export.identity(params, info), role.module.vocab, lengths and [*lengths])
    return made, info.get("text") and {"name": "export", "path": source}


def main():
    runtime.setup()
    from flowjax.data import latents

    vae, section = autoencoder(VAE.value) if VAE.value else (None, None)
    section = shell.section(DATA.value, "data") if DATA.value else section
    if section is None:
        raise ConfigError("--data is missing: without --vae, or with one that was converted, no run says which data to encode")
    text, tokenizer = text_encoder(TEXT.value) if TEXT.value else (None, None)
    if tokenizer:
        section = {"text": tokenizer} | keywords(section)
    manifest = latents.write(
        OUT.value, section, vae, text, splits=SPLITS.value, dtype=DTYPE.value,
        tile=TILE.value, batch=BATCH.value, overwrite=OVERWRITE.value, command=shlex.join(["python", "-m", "tools.encode_latents", *sys.argv[1:]]),
    )  # fmt: skip
    counts = ", ".join(f"{k} {v['count']}" for k, v in manifest["splits"].items())
    made, shapes = manifest["source"], {k: v["shape"] for k, v in manifest["features"].items() if k in ("text", "pooled")}
    said = [f"{OUT.value}: {manifest['name']}, {counts}, {manifest['image_shape']} {manifest['dtype']}"]
    if "latents" in made:
        said.append(f"autoencoder {made['latents']['vae']}, key {made['latents']['key'][:12]}")
    if "embedded" in made:
        said.append(f"text {shapes['text']} and {shapes['pooled']} {made['embedded']['dtype']}, encoder {made['embedded']['text']}")
    print(", ".join(said))
    return 0


if __name__ == "__main__":
    shell.run(main)
