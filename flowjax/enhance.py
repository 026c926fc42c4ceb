"""Prompt enhancement: a rewriter turns short prompts into captions such as a network was trained on.

    rewriter(list of prompts) -> list of prompts, in the same order

A section selects one: {"name": "template"}, {"name": "model", "checkpoint": ...}, {"name": "function", "path": "module:function"}. The
first two never drop or change a word of a prompt and leave alone what they hold for complete: a template does not rewrite twice, a
language model may. What they write is a function of prompt and seed. The empty and the negative prompt are not to be rewritten.
"""

import hashlib
import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from flowjax.config import ConfigError, arguments, check, lookup, split

LINKS = {"a", "an", "and", "at", "for", "from", "in", "of", "on", "or", "over", "the", "to", "under", "with", "without"}  # begin no prompt
CLAUSE = " with "  # what comes before it is the subject of a caption, what comes after it a detail


def parse(text: str) -> dict:
    """The section that a word on a command line stands for: a name, module:function, or the place of a text model."""
    if text in REWRITERS:
        return {"name": text}
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        return {"name": "function", "path": text}
    return {"name": "model", "checkpoint": text}


def build(section, captions: Callable[[str], list[str]], fits: Callable[[str], bool], where: str = "--enhance") -> Callable:
    """The rewriter of a section. captions(path): those of a data set, of the network's own for ""; fits: whether its text encoder
    takes a prompt of this length, which "template" and "model" heed."""
    name, settings = split(section, where)
    fn = lookup(REWRITERS, name, f"{where}.name")
    given = {"captions_of": captions, "fits": fits}
    given = {k: v for k, v in given.items() if k in arguments(fn)}
    rewrite = fn(**check(fn, settings, where, tuple(given)), **given)

    def rewriter(prompts: Sequence[str]) -> list[str]:
        made = rewrite(list(prompts))
        if not isinstance(made, list) or len(made) != len(prompts) or not all(isinstance(text, str) and text.strip() for text in made):
            raise ConfigError(f"{where}: {name} should give a list of {len(prompts)} prompts for as many, not {made!r}")
        return made

    return rewriter


def holds(words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether `others` are among `words`, in their order."""
    rest = iter(words)
    return all(word in rest for word in others)


def shortened(caption: str) -> list[str]:
    """Prompts that the caption completes, longest first, itself among them: without its detail, and without its first words."""
    subject = caption.partition(CLAUSE)[0].split()
    ends = [" ".join(subject[i:]) for i in range(len(subject)) if subject[i].lower() not in LINKS]
    return list(dict.fromkeys([caption, *ends]))


def chance(seed: int, prompt: str) -> float:
    """A number in [0, 1) that seed and prompt decide."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:6], "big") / 2**48


def template(captions_of, fits, captions: str = "", seed: int = 0) -> Callable:
    """Subject and detail as the captions of a data set combine them: [qualifier] subject with detail.

    A prompt whose words stand in captions becomes one of these, as often as it is there, of those that no other completes. One that
    stands in none gets a detail of the subjects that end in the same word. What has a detail already, or has none in the captions, stays.
    """
    counts = Counter(captions_of(captions))
    if not counts:
        raise ConfigError("template: there are no captions to learn from")
    words = {caption: caption.split() for caption in counts}
    where: dict[str, set[str]] = {}
    details: dict[str, Counter] = {}
    for caption, count in counts.items():
        for word in words[caption]:
            where.setdefault(word, set()).add(caption)
        subject, clause, detail = caption.partition(CLAUSE)
        if clause and subject.split():
            details.setdefault(subject.split()[-1], Counter())[detail] += count

    def choose(options: dict[str, int], prompt: str) -> str:
        options = {k: n for k, n in sorted(options.items()) if fits(k)} or {prompt: 1}
        edges = np.cumsum([*options.values()])
        return [*options][int(np.searchsorted(edges, chance(seed, prompt) * edges[-1], side="right"))]

    def one(prompt: str) -> str:
        asked = prompt.split()
        if not asked or CLAUSE.strip() in asked:
            return prompt
        found = set.intersection(*(where.get(word, set()) for word in asked))
        found = {c for c in found if holds(words[c], asked)}
        if found:
            complete = {c for c in found if not any(len(words[o]) > len(words[c]) and holds(words[o], words[c]) for o in found)}
            return choose({c: counts[c] for c in complete}, prompt)
        return choose({f"{prompt}{CLAUSE}{detail}": n for detail, n in details.get(asked[-1], {}).items()}, prompt)

    return lambda prompts: [one(prompt) for prompt in prompts]


def model(fits, checkpoint: str, weights: str = "ema", temperature: float = 0.7, seed: int = 0) -> Callable:
    """A language model trained on pairs (objective "language_model" with prefix = 1, data.text.pairs): it reads the prompt and writes
    what stands beside it. What it writes without the prompt's words, in their order, or too long, is not used."""
    import jax
    import jax.numpy as jnp

    from flowjax.decode import decode
    from flowjax.train import export

    if temperature < 0:
        raise ConfigError(f"model: temperature = {temperature} should not be negative")
    role, params, info = export.load(checkpoint, weights, where="--enhance")
    if role.module.kind != "language_model":
        raise ConfigError(f"--enhance: {checkpoint} is a network of kind {role.module.kind!r}, not a language_model (configs/emoji_enhance.py)")
    if split(info["config"]["objective"], "objective")[1].get("prefix", 0) != 1:
        raise ConfigError(f"--enhance: {checkpoint} was not trained on pairs (objective.prefix = 1)")
    tokenizer = export.tokenizer_of(checkpoint, info)
    write = jax.jit(lambda tokens, given, keys: decode(role.net(params), tokens, given, keys, temperature))

    def rewrite(prompts):
        starts = [tokenizer.encode([prompt])[0] for prompt in prompts]
        tokens = np.zeros((len(prompts), tokenizer.length), np.int32)
        room = [len(ids) + 1 < tokenizer.length for ids in starts]
        for row, ids, fit in zip(tokens, starts, room):
            row[: len(ids)] = ids if fit else 0
        given = jnp.asarray([len(ids) + 1 if fit else tokenizer.length for ids, fit in zip(starts, room)])
        keys = jnp.stack([jax.random.key(int(chance(seed, prompt) * 2**31)) for prompt in prompts])
        made = np.asarray(write(tokens, given, keys))
        texts = [tokenizer.decode(row[n:].tolist()) if fit else prompt for row, n, fit, prompt in zip(made, given.tolist(), room, prompts)]
        return [new if fits(new) and holds(new.split(), old.split()) and old.strip() else old for new, old in zip(texts, prompts)]

    return rewrite


def function(path: str) -> Callable:
    """module:function of the user's own, for example one that asks a large language model. Its prompts are taken as they come."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--enhance={path} should name a function as module:function: {error}") from None
    if not callable(found):
        raise ConfigError(f"--enhance={path} is not a function, but {found!r}")
    return found


REWRITERS = {"template": template, "model": model, "function": function}
