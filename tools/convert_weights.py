"""Weights of diffusers, transformers and the papers' own code, read and written: files <-> an export of flowjax.

    python -m tools.convert_weights --from=diffusers --model=sd3 sd3-medium/transformer exports/sd3
    python -m tools.convert_weights --from=diffusers --model=autoencoder_kl sd-vae-ft-ema exports/sd_vae
    python -m tools.convert_weights --from=diffusers --model=dit --vae=exports/sd_vae DiT-XL-2-256/transformer exports/dit
    python -m tools.convert_weights --from=original --model=sit --config_json='{}' --vae=exports/sd_vae SiT-XL-2.pt exports/sit
    python -m tools.convert_weights --from=transformers --model=clip_text --fields="{'penultimate': True}" sd3/text_encoder exports/clip
    python -m tools.convert_weights --from=diffusers --model=sd3_text sd3-medium exports/sd3_text
    python -m tools.convert_weights --from=diffusers --model=sd3 --vae=exports/sd3_vae --text=exports/sd3_text sd3-medium/transformer exports/sd3
    python -m tools.convert_weights --to=diffusers --model=dit runs/my_dit/export my_dit_for_diffusers --dtype=bfloat16
    python -m tools.parity                       (every kind against its library, in a table; needs torch)

Models: diffusers: dit (DiT), sd3 (SD3, SD3.5), flux (FLUX.1), unet (UNet2DModel), autoencoder_kl; transformers: clip, clip_text,
clip_vision, t5 (T5 v1.1 and UMT5 encoders), vit (ViT, MAE, DINOv2); original: dit, sit, in the names of the papers' code. sd3_text
and flux_text of diffusers are all text encoders and tokenizers of a pipeline's folder, read only and one export together, which
embeds captions as the pipeline does; SD3 without its T5 has zeros there. How many of its tokens: --fields="{'lengths': (77, 77, 77)}".

What is read is a folder with config.json and safetensors, whole or in shards, or one weight file, with config.json beside it or
--config_json. What is written by --from serves experiments.sample, roles.<name>.checkpoint and tools.encode_latents; with --vae,
samples are images, and with --text they can be asked for by --prompt. --to writes what the class's from_pretrained reads. Parameters
are float32 in between: half precision comes back bit for bit with its own --dtype. What no config of theirs says is given by
--fields: a UNet2DModel whose last class means "no class" has {'num_classes': 10, 'null_class': True}.
"""

import pathlib
import sys

import jax
from absl import app, flags

from experiments import shell
from flowjax.config import ConfigError

LIBRARIES = ("diffusers", "transformers", "original")
FROM = flags.DEFINE_enum("from", None, LIBRARIES, "Read weights of this library.")
TO = flags.DEFINE_enum("to", None, LIBRARIES, "Write weights for this library.")
MODEL = flags.DEFINE_string("model", None, "What the network is there.", required=True)
CONFIG_JSON = flags.DEFINE_string("config_json", "", "Their config, a file or JSON; default: config.json beside the weights.")
FIELDS = flags.DEFINE_string("fields", "", "Fields of our model section that no config of theirs says, as {'dtype': 'bfloat16'}.")
SIZE = flags.DEFINE_multi_integer("size", [], "Side of what a denoiser makes (or --size=H --size=W); default: as in their config.")
PATH = flags.DEFINE_string("path", "", "Path that a denoiser was trained on, where it is not that of its kind: name or section.")
PREDICTION = flags.DEFINE_string("prediction", "", "What a denoiser predicts, where it is not what its kind does.")
INPUT_SCALING = flags.DEFINE_string("input_scaling", "", "What is between x_t and a denoiser, where it is not that of its kind.")
VAE = flags.DEFINE_string("vae", "", "The export of the autoencoder whose latents a denoiser makes; it goes into the export.")
TEXT = flags.DEFINE_string("text", "", "The export of the text encoders that tell a denoiser what to draw; it goes into the export.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16", "float16"), "Of what --to writes.")
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Size of a shard of what --to writes.", lower_bound=1e-6)
READING, WRITING = (CONFIG_JSON, FIELDS, SIZE, PATH, PREDICTION, INPUT_SCALING, VAE, TEXT), (DTYPE, SHARD_GB)


def read(source, out):
    """--from: `source` becomes the export `out`. Returns the line to print."""
    from flowjax.data import text as text_lib
    from flowjax.interop import files, library, pipelines
    from flowjax.train import export

    config = CONFIG_JSON.value or None
    if config is not None:
        config = files.parse(config, "--config_json") if config.startswith("{") else files.read_json(config)
    meaning = {
        "path": shell.section(PATH.value, "path"),
        "prediction": PREDICTION.value,
        "input_scaling": shell.section(INPUT_SCALING.value, "input_scaling"),
    }
    fields = shell.section(FIELDS.value, "fields") or {}
    if not isinstance(fields, dict) or len(SIZE.value) > 2:
        raise ConfigError("--fields takes a section, {'name of the field': value}, and --size one number or two")
    if FROM.value == "diffusers" and MODEL.value in pipelines.TEXTS:
        if given := [f.name for f in (CONFIG_JSON, SIZE, PATH, PREDICTION, INPUT_SCALING, VAE, TEXT) if f.value]:
            raise ConfigError(f"--{given[0]} means nothing for --model={MODEL.value}")
        params, info, tokenizer = pipelines.load(source, MODEL.value, fields)
        with files.whole(out) as folder:
            export.write_tokenizer(folder, tokenizer)
            export.write(folder, params, info)
        return _told(out, params, info)
    options = {"fields": fields, "size": SIZE.value and (SIZE.value[0], SIZE.value[-1]), "meaning": meaning}
    params, info = library.load(source, FROM.value, MODEL.value, config, **options)
    vae, text, tokenizer = None, None, {}
    if VAE.value:
        _, *vae = export.load(VAE.value, where="--vae")
        try:
            info = library.decoded(info, vae[1]) | {"latent_space": export.identity(*vae)}
        except ConfigError as error:
            raise ConfigError(f"--vae={VAE.value}: {error}") from None
    if TEXT.value:
        _, *text = export.load(TEXT.value, where="--text")
        try:
            info = pipelines.captioned(info, *text)
        except ConfigError as error:
            raise ConfigError(f"--text={TEXT.value}: {error}") from None
        tokenizer = {k: v.read_bytes() for k, v in export.tokenizer_of(TEXT.value, text[1]).files.items()}
        info["text"] = text_lib.placeless(info["text"])
    with files.whole(out) as folder:
        for name, found in (("vae", vae), ("text", text)):
            if found:
                export.write(folder / name, *found)
        export.write_tokenizer(folder, tokenizer)
        export.write(folder, params, info)
    return _told(out, params, info)


def _told(out, params, info):
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"{out}: {info['model']['name']}, {count:,} parameters, {' and '.join(info['source']['dtypes'])} -> float32"


def write(source, out):
    """--to: the export or workdir `source` becomes a library's folder. Returns the line to print."""
    from flowjax.interop import library
    from flowjax.train import export

    role, params, info = export.load(source)
    config = library.save(out, TO.value, MODEL.value, role.module, params, info, DTYPE.value, int(SHARD_GB.value * 1e9))
    name = config.get("_class_name") or config.get("architectures", [MODEL.value])[0]
    return f"{out}: {name}, {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {DTYPE.value}"


def main(argv):
    if len(argv) != 3 or bool(FROM.value) == bool(TO.value):
        raise app.UsageError("give either --from or --to, and two places: what to read, and what to write")
    try:
        if given := [f.name for f in (WRITING if FROM.value else READING) if f.present]:
            raise ConfigError(f"--{given[0]} means nothing for --{'from' if FROM.value else 'to'}")
        if bucket := next((place for place in argv[1:] if "://" in place), None):
            raise ConfigError(f"{bucket} is in a bucket; convert on this machine and copy the result")
        print((read if FROM.value else write)(*map(pathlib.Path, argv[1:])))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
