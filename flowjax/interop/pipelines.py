"""The text encoders of a pipeline of diffusers, with their tokenizers: its folder -> one export (flowjax.models.text_encoders).

    sd3_text     text_encoder, text_encoder_2 (CLIP with projection), text_encoder_3 (T5; where there is none, zeros), tokenizer, ...
    flux_text    text_encoder (CLIP), text_encoder_2 (T5), tokenizer, tokenizer_2
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from flowjax import conditions
from flowjax.config import ConfigError, lookup
from flowjax.interop import files, library, tokenizers
from flowjax.train import export


class Texts(NamedTuple):
    """layout: of models.text_encoders.   kinds: (model of transformers, fields of ours), in order.   longest: tokens of T5."""

    layout: str
    kinds: tuple
    longest: int


_PENULTIMATE = ("clip_text", {"penultimate": True})
TEXTS = {
    "sd3_text": Texts("sd3", (_PENULTIMATE, _PENULTIMATE, ("t5", {})), 256),
    "flux_text": Texts("flux", (("clip_text", {}), ("t5", {})), 512),
}


def load(folder, model: str, fields: Mapping[str, Any] | None = None) -> tuple[dict, dict, dict[str, bytes]]:
    """(params, info, {name: content} of the tokenizers' files) of a pipeline's text encoders.

    fields: of our model section, `lengths` above all (SD3 was trained with 77 tokens of T5, FLUX.1 schnell with 256), and
    "encoder_i": fields of the i-th. **Errors:** ConfigError, as flowjax.interop.library.load.
    """
    told, folder = lookup(TEXTS, model, "model"), pathlib.Path(folder)
    fields, kinds, absent = dict(fields or {}), list(told.kinds), ()
    if model == "sd3_text" and not (folder / "text_encoder_3").exists():
        kinds.pop()
        config = folder / "transformer" / "config.json"
        absent = (told.longest, files.read_json(config).get("joint_attention_dim", 4096) if config.exists() else 4096)
    params, sections, lengths, parts, contents, dtypes = {}, [], [], [], {}, set()
    for i, (kind, own) in enumerate(kinds):
        suffix = f"_{i + 1}" if i else ""
        found, info = library.load(folder / f"text_encoder{suffix}", "transformers", kind, fields=own | fields.pop(f"encoder_{i}", {}))
        params[f"encoder_{i}"] = found
        sections.append(info["model"])
        lengths.append(info["model"].get("length", told.longest))
        contents[f"tokenizer_{i}.json"], pad = tokenizers.read(folder / f"tokenizer{suffix}")
        parts.append({"name": "file", "length": lengths[i], "pad": pad})
        dtypes |= {*info["source"]["dtypes"]}
    section = {"name": "text_encoders", "encoders": sections, "lengths": lengths, "layout": told.layout, "absent": absent, **fields}
    if not len(section["lengths"]) == len(parts):
        raise ConfigError(f"--fields: lengths = {section['lengths']} should be {len(parts)} numbers, one for each encoder that is there")
    parts = [part | {"length": int(length)} for part, length in zip(parts, section["lengths"])]
    found = {"model": section, "shape": [], "conditions": {"tokens": [sum(section["lengths"])]}}
    info = library.info_of(found, {"library": "diffusers", "model": model, "dtypes": sorted(dtypes)})
    _ = export.role_of(info, "--fields").module.vocab  # which takes all encoders, and says what does not fit
    return params, info | {"text": {"name": "joined", "parts": parts}}, contents


def captioned(info: dict, params, text: dict) -> dict:
    """The info of a denoiser that a text encoder of these params and this info tells what to draw; ConfigError where they do not fit."""
    role = export.role_of(text, "text")
    if role.module.kind != "text_encoder" or not text.get("text"):
        raise ConfigError("not a text encoder with a tokenizer (--model=sd3_text or flux_text makes one)")
    cond = conditions.zeros(text["conditions"], 1)
    found = conditions.shapes_of(jax.eval_shape(lambda p, c: conditions.embed(role.net(p), c), params, cond))
    wanted = {k: v[-1] for k, v in info["conditions"].items() if k in ("text", "pooled")}
    if wrong := [k for k, v in wanted.items() if found[k][-1] != v]:
        raise ConfigError(f"its {wrong[0]!r} is {found[wrong[0]][-1]} wide, the network takes {wanted[wrong[0]]}")
    if not wanted:
        raise ConfigError("the network takes no embedded text")
    return info | {"conditions": info["conditions"] | {k: list(found[k]) for k in wanted}, "text": text["text"]}
