"""Learn a byte-level BPE tokenizer from a data set's captions: any text can be encoded, and common words become one token.

    python -m tools.train_tokenizer --path=data/emoji --vocab=2000

Use it with data.text = {"name": "file", "path": "data/emoji/tokenizer.json", "length": ...}. Token 0 is padding. The command
prints how many tokens the captions take, so that a length can be chosen.
"""

import pathlib

from absl import flags

from experiments import shell
from flowjax.data import text

_PATH = flags.DEFINE_string("path", None, "A data set made by tools.prepare_data, with captions.", required=True)
_OUT = flags.DEFINE_string("out", "", "The file to write; by default tokenizer.json beside the data.")
_VOCAB = flags.DEFINE_integer("vocab", 2000, "Tokens in all; at least 257: padding and every byte.", lower_bound=257)
_SPLIT = flags.DEFINE_string("split", "train", "The split to learn from.")


def main():
    texts = text.captions(_PATH.value, _SPLIT.value)
    model = text.learn(texts, _VOCAB.value)
    out = pathlib.Path(_OUT.value or f"{_PATH.value}/tokenizer.json").expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save(str(out))
    lengths = sorted(len(e.ids) for e in model.encode_batch(texts))
    print(
        f"{out}: {model.get_vocab_size()} tokens; {len(texts)} captions take {lengths[len(lengths) // 2]} of them (median), "
        f"{lengths[int(0.99 * (len(lengths) - 1))]} (99 %), {lengths[-1]} (longest)"
    )


if __name__ == "__main__":
    shell.run(main)
