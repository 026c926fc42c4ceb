"""Several text encoders side by side, as one: what SD3 (2403.03206, appendix B) and FLUX.1 read a prompt with.

Each encoder has a tokenizer of its own (flowjax.data.text, "joined"): a row of token ids holds those of the first, then those of the
second, and so on, `lengths` of them. `layout` says what becomes of their sequences (B, S_i, D_i) and pooled vectors (B, P_i):

    sd3     CLIP-L, CLIP-G (states before the last layer), T5: the CLIPs' states beside each other, widened by zeros to the width of
            T5's, then T5's, in one sequence; the CLIPs' pooled vectors beside each other
    flux    CLIP-L, T5: T5's sequence and CLIP's pooled vector

which is what the pipelines of diffusers hand to their transformers. No padding is masked.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, lookup
from flowjax.paths import expand


def _sd3(found, absent):
    clips, (t5, _) = (found, (jnp.zeros((len(found[0][0]), *absent)), None)) if absent else (found[:-1], found[-1])
    states = jnp.concatenate([sequence for sequence, _ in clips], axis=2)
    if (more := t5.shape[2] - states.shape[2]) < 0:
        raise ConfigError(f"model.layout 'sd3': the first encoders' states are {states.shape[2]} wide together, the last one's only {t5.shape[2]}")
    states = jnp.pad(states, ((0, 0), (0, 0), (0, more)))
    return jnp.concatenate([states, t5], axis=1), jnp.concatenate([pooled for _, pooled in clips], axis=1)


def _flux(found, absent):
    (_, pooled), (sequence, _) = found
    return sequence, pooled


LAYOUTS = {"sd3": (_sd3, 3), "flux": (_flux, 2)}  # and how many encoders each is of
_CLIP_L = {"name": "clip_text", "preset": "ViT-L/14"}
_T5 = {"name": "t5", "preset": "v1.1-xxl"}


def _built(encoders, lengths, layout: str, absent) -> list[nn.Module]:
    """The encoders, of a description that makes sense; outside of the class, whose methods linen would have claim them."""
    from flowjax import models

    _, count = lookup(LAYOUTS, layout, "model.layout")
    if absent and (layout != "sd3" or len(absent) != 2):
        raise ConfigError(f"model.absent = {tuple(absent)} is (length, width) of what replaces T5 in layout 'sd3', or ()")
    count -= bool(absent)
    if not len(encoders) == len(lengths) == count or min(lengths) < 1:
        found = f"{len(encoders)} and lengths = {tuple(lengths)}"
        raise ConfigError(f"model.layout {layout!r} takes {count} encoders and as many lengths of at least 1; there are {found}")
    if layout == "sd3" and lengths[0] != lengths[1]:
        raise ConfigError(f"model.lengths = {tuple(lengths)}: the states of the two CLIPs stand beside each other, and need the same length")
    built = [models.build(section, f"model.encoders[{i}]") for i, section in enumerate(encoders)]
    if wrong := [module for module in built if module.kind != "text_encoder" or isinstance(module, TextEncoders)]:
        raise ConfigError(f"model.encoders are single text encoders; a {type(wrong[0]).__name__} is not")
    return built


class TextEncoders(nn.Module):
    """See above.

    Fields:
      encoders: sections of text encoders (parameters "encoder_0", ...), with their own settings.
      lengths: how many of a row's tokens each of them gets.
      layout: a key of LAYOUTS.
      absent: for "sd3" without its T5, the (length, width) of the zeros in its place; () for none.
    """

    encoders: tuple
    lengths: tuple
    layout: str
    absent: tuple = ()

    kind = "text_encoder"
    presets = {
        "sd3": {
            "encoders": (
                {**_CLIP_L, "features": 768, "penultimate": True}, {"name": "clip_text", "preset": "bigG", "penultimate": True}, _T5,
            ),
            "lengths": (77, 77, 256), "layout": "sd3",
        },
        "flux1": {"encoders": (_CLIP_L, _T5), "lengths": (77, 512), "layout": "flux"},
    }  # fmt: skip

    @property
    def vocab(self) -> list[int]:
        """How many tokens each encoder knows."""
        return [module.vocab for module in _built(self.encoders, self.lengths, self.layout, self.absent)]

    def setup(self):
        for i, module in enumerate(_built(self.encoders, self.lengths, self.layout, self.absent)):
            setattr(self, f"encoder_{i}", module)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sequence (B, S, D), pooled (B, P)), float32, of token ids (B, sum of lengths)."""
        if tokens.shape[1] != sum(self.lengths):
            raise ConfigError(f"text encoders of lengths {tuple(self.lengths)} were given {tokens.shape[1]} tokens")
        return LAYOUTS[self.layout][0](self.parts(tokens), tuple(self.absent))

    def parts(self, tokens: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """[(sequence (B, S_i, D_i), pooled (B, P_i))] of the encoders, each on its own, before the layout."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [getattr(self, f"encoder_{i}")(tokens[:, end - n : end]) for i, (end, n) in enumerate(zip(ends, self.lengths))]


def left_out(module: nn.Module, params, drop, where: str) -> Callable | None:
    """leave(cond, key) -> cond, in whose "text" and "pooled" each encoder's part of a row is zero with probability `drop`, on its own.

    SD3 is trained with 0.464 (2403.03206, appendix B), which leaves one row in ten without any. drop: one probability, or one for each
    encoder. None where all are 0. **Errors:** ConfigError that names `where` for other values, and where the module is of one part.
    """
    if not isinstance(module, TextEncoders):
        raise ConfigError(f"{where} = {drop!r} is for several text encoders side by side (text_encoders); a {type(module).__name__} is one")
    count = len(module.encoders)
    rates = [*drop] if isinstance(drop, list | tuple) else [drop] * count
    if len(rates) != count or not all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates):
        raise ConfigError(f"{where} = {drop!r} should be a probability, or a list of {count}, one for each encoder")
    if not any(rates):
        return None
    tokens = jax.ShapeDtypeStruct((1, sum(module.lengths)), jnp.int32)
    shapes = jax.eval_shape(lambda params, tokens: module.apply({"params": params}, tokens, method="parts"), params, tokens)

    def leave(cond, key):
        rows = len(cond["text"])
        kept = ~jax.random.bernoulli(key, jnp.asarray(rates, jnp.float32), (rows, count))
        # What is kept goes through the layout as the encoders' outputs do, and comes out where they come out.
        of = lambda keep, part: tuple(jnp.broadcast_to(expand(keep, one), (rows, *one.shape[1:])) for one in part)  # noqa: E731
        masks = LAYOUTS[module.layout][0]([of(keep, part) for keep, part in zip(kept.T, shapes)], tuple(module.absent))
        return {**cond, **{name: jnp.where(mask != 0, cond[name], 0) for name, mask in zip(("text", "pooled"), masks)}}

    return leave
