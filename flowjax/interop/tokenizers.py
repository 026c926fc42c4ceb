"""Tokenizers of transformers' folders -> files of the `tokenizers` library."""

import pathlib

from flowjax.config import ConfigError
from flowjax.interop import files

# How CLIP splits words (2103.00020's tokenizer).
_CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def read(folder) -> tuple[bytes, int]:
    """(content of a tokenizer.json, id of the padding) of a folder with tokenizer.json, or with CLIP's vocab.json and merges.txt."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("reading tokenizers needs the tokenizers library: pip install 'flowjax[text]'") from None
    folder = pathlib.Path(folder)
    special = _special(folder)
    if (folder / "tokenizer.json").exists():
        try:
            made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{folder / 'tokenizer.json'} is not a file of the tokenizers library ({error})") from None
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        made = _clip(tokenizers, folder, special)
    else:
        there = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt: {there}")
    if "pad_token" not in special:
        raise ConfigError(f"{folder} does not say its pad_token (tokenizer_config.json or special_tokens_map.json)")
    if (pad := made.token_to_id(special["pad_token"])) is None:
        raise ConfigError(f"{folder}: the pad_token {special['pad_token']!r} is not in the vocabulary")
    return made.to_str().encode(), pad


def _special(folder) -> dict[str, str]:
    """{"pad_token": ..., "bos_token": ..., "eos_token": ...}, as far as the folder says."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config = files.read_json(folder / name)
            told = {k: config.get(k) for k in ("pad_token", "bos_token", "eos_token", "unk_token")}
            found |= {k: v["content"] if isinstance(v, dict) else v for k, v in told.items() if v}
    return found


def _clip(tokenizers, folder, special):
    """CLIP's byte-level BPE: lower case, words that end in </w>, between a start and an end token."""
    start, end = special.get("bos_token", "<|startoftext|>"), special.get("eos_token", "<|endoftext|>")
    parts = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.Regex
    normalizers, pre_tokenizers, regex = parts
    try:
        model = tokenizers.models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=special.get("unk_token", end), continuing_subword_prefix="",
            end_of_word_suffix="</w>", fuse_unk=False,
        )  # fmt: skip
    except Exception as error:
        raise ConfigError(f"{folder}: vocab.json and merges.txt are not those of a CLIP ({error})") from None
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(regex(r"\s+"), " "), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(regex(_CLIP_WORDS), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    # A token that pads is special as well: "!" of SD3's second tokenizer is not a word's "!" any more.
    made.add_special_tokens([t for t in dict.fromkeys((start, end, special.get("pad_token", end))) if made.token_to_id(t) is not None])
    if None in (ids := [made.token_to_id(t) for t in (end, start)]):
        raise ConfigError(f"{folder}: the vocabulary lacks {start!r} or {end!r}")
    made.post_processor = tokenizers.processors.RobertaProcessing((end, ids[0]), (start, ids[1]), trim_offsets=False, add_prefix_space=False)
    return made
