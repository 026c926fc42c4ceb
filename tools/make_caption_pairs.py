"""Pairs of a short prompt and a whole caption, for a language model that learns to write the second from the first.

    python -m tools.make_caption_pairs --path=data/emoji --out=data/emoji_pairs

From every caption of a data set: without its detail ("woman police officer with dark skin tone" -> "woman police officer"), without its
qualifiers ("police officer", "officer"), and as it is, so that what is complete is learned to stay. The splits are those of the data.
"""

from absl import flags

from experiments import shell

PATH = flags.DEFINE_string("path", None, "A data set made by tools.prepare_data, with captions.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory of the pairs to write.", required=True)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")


def main():
    from flowjax.data import records, text
    from flowjax.enhance import shortened

    manifest = records.read_manifest(PATH.value)
    count = 0

    def examples():
        nonlocal count
        for split in manifest["splits"]:
            for caption in dict.fromkeys(text.captions(PATH.value, split)):
                caption = " ".join(caption.split())
                pairs = [f"{prompt}\t{caption}" for prompt in shortened(caption)]
                count += len(pairs)
                yield split, f"{PATH.value} ({split}: {caption})", {"caption": "\n".join(pairs)}

    source = {"pairs": {"from": PATH.value, "content_hash": manifest["content_hash"]}}
    made = records.write(OUT.value, examples(), name="caption_pairs", source=source, overwrite=OVERWRITE.value)
    print(f"{count} pairs of {sum(v['count'] for v in made['splits'].values())} captions in {OUT.value}")
    return 0


if __name__ == "__main__":
    shell.run(main)
