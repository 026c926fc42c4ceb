"""Turn your images into a data set that flowjax reads: ArrayRecord shards and a manifest.

    python -m tools.prepare_data --door=npz    --path=mnist.npz        --out=~/data/mnist
    python -m tools.prepare_data --door=idx    --path=folder_of_idx_gz --out=~/data/mnist
    python -m tools.prepare_data --door=folder --path=photos           --out=~/data/photos --size=64 --holdout=0.1
    python -m tools.prepare_data --door=folder --path=photos           --out=~/data/photos --area=65536 --step=32   (buckets of aspect ratios)
    python -m tools.prepare_data --door=tfds   --path=tfds/name/1.0.0  --out=~/data/name
    python -m tools.prepare_data --door=digits --out=~/data            (scikit-learn's digits, as a TFDS data set)
    python -m tools.prepare_data --verify=~/data/photos                (compare every shard with its recorded hash)

Train on it with --config.data.name=array_record --config.data.path=~/data/photos, or with name=buckets where --area made some.
"""

import pathlib
import shlex
import sys

from absl import app, flags

from flowjax.config import ConfigError
from flowjax.data import prepare, records

_DOOR = flags.DEFINE_enum("door", None, [*prepare.DOORS, "digits"], "What the data is.")
_PATH = flags.DEFINE_string("path", "", "The file or folder to read.")
_OUT = flags.DEFINE_string("out", "", "The directory to write.")
_NAME = flags.DEFINE_string("name", "", "Name of the data set; by default that of the path.")
_SIZE = flags.DEFINE_integer("size", 0, "Resize to size x size (shorter side, then centre crop); 0 keeps the size.")
_AREA = flags.DEFINE_integer("area", 0, "Make buckets of aspect ratios, of at most so many pixels each, instead of one size.")
_STEP = flags.DEFINE_integer("step", 64, "Sides of buckets are multiples of this.")
_SIDES = flags.DEFINE_list("sides", ["0", "0"], "Least and longest side of a bucket; 0: half and twice that of a square.")
_SMALLEST_SIDE = flags.DEFINE_integer("smallest_side", 0, "Leave out images with a shorter side.", lower_bound=0)
_CAPTION_WORDS = flags.DEFINE_list("caption_words", ["0", "0"], "Leave out images with a caption of fewer or more words; 0: any number.")
_DUPLICATES = flags.DEFINE_integer("duplicates", -1, "Leave out images whose 64-bit difference hash is within so many bits of an earlier one's.")
_CHANNELS = flags.DEFINE_integer("channels", 0, "1 (grey), 3 (RGB) or 4 (RGBA); 0 keeps the channels.")
_HOLDOUT = flags.DEFINE_float("holdout", 0.0, "Fraction of the images that becomes the test split.")
_CLASS_NAMES = flags.DEFINE_list("class_names", [], "Names of classes 0, 1, ... (npz and idx).")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another data set in --out.")
_VERIFY = flags.DEFINE_string("verify", "", "Check this prepared directory instead.")


def _pair(flag) -> tuple[int, int]:
    if len(flag.value) != 2 or not all(v.isdigit() for v in flag.value):
        raise ConfigError(f"--{flag.name}={','.join(flag.value)} should be two numbers: --{flag.name}=a,b")
    return int(flag.value[0]), int(flag.value[1])


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        if _VERIFY.value:
            if bad := records.damaged(_VERIFY.value, records.read_manifest(_VERIFY.value), thorough=True):
                sys.exit(f"error: damaged: {', '.join(bad)}")
            print(f"{_VERIFY.value}: every shard is as it was written")
            return
        if not _DOOR.value or not _OUT.value or bool(_PATH.value) == (_DOOR.value == "digits"):
            raise app.UsageError("give --door, --out and, except for digits, --path")
        if _DOOR.value == "digits":
            from flowjax.data import digits

            others = (_NAME, _SIZE, _AREA, _STEP, _SIDES, _SMALLEST_SIDE, _CAPTION_WORDS, _DUPLICATES, _CHANNELS, _HOLDOUT, _CLASS_NAMES, _OVERWRITE)
            if given := [f.name for f in others if f.present]:
                raise ConfigError(f"--{given[0]} means nothing for --door=digits")
            print(f"{digits.prepare(pathlib.Path(_OUT.value).expanduser())}: ready")
            return
        manifest = prepare.prepare(
            _DOOR.value,
            _PATH.value,
            _OUT.value,
            name=_NAME.value,
            size=_SIZE.value,
            channels=_CHANNELS.value,
            holdout=_HOLDOUT.value,
            class_names=tuple(_CLASS_NAMES.value),
            area=_AREA.value,
            step=_STEP.value,
            sides=_pair(_SIDES),
            smallest_side=_SMALLEST_SIDE.value,
            caption_words=_pair(_CAPTION_WORDS),
            duplicates=_DUPLICATES.value,
            overwrite=_OVERWRITE.value,
            command=shlex.join(["python", "-m", "tools.prepare_data", *sys.argv[1:]]),
        )
    except ConfigError as e:
        sys.exit(f"error: {e}")
    counts = ", ".join(f"{k} {v['count']}" for k, v in manifest["splits"].items())
    for reason, count in manifest["source"].get("dropped", {}).items():
        print(f"left out by --{reason}: {count}")
    for split in manifest["splits"]:
        if found := records.sizes(manifest, split):
            print(f"{split}: {', '.join(f'{h}x{w} {n}' for (h, w), n in found.items())}")
    print(
        f"{_OUT.value}: {manifest['name']}, {counts}, image {manifest['image_shape']} {manifest['dtype']}, "
        f"{manifest['num_classes']} classes, captions {manifest['captions']}, content {manifest['content_hash'][:12]}"
    )


if __name__ == "__main__":
    app.run(main)
