"""Textual inversion (2208.01618): of a network that learned its text encoder along, the embedding of a new word, and nothing else.

    table' = table, with `rows` in the places first .. first + vectors - 1

An adapter like that of `flowjax.train.lora`: a tree with {"rows"} in the place of the table, merged with the frozen base within the step,
averaged, stored and loaded like one. The places are those after the tokenizer's own (data.text.added): rows of the table that no token
has, or new ones behind its last. The rows begin as the mean embedding of the tokens of `init`, so that the word says at first what that
says; every other parameter, and what is made of prompts without the word, stays what it was, bit for bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from flowjax.config import ConfigError

TABLE = "token_embed/embedding"


@dataclasses.dataclass(frozen=True)
class Inversion:
    """token: the new word, one of data.text.added; init: words that it begins as; vectors: how many embeddings it has.

    first, rows: place of the first of them and rows of the base's table, which the run finds out (`placed`).
    """

    token: str
    init: str
    vectors: int = 1
    first: int = 0
    rows: int = 0

    def placed(self, module, tokenizer, where: str):
        """(this adapter with its places, the module with a table that has them)."""
        fields = getattr(module, "text_encoder", None)
        if not fields:
            raise ConfigError(f"{where}.token: the network has no text encoder of its own (model.text_encoder) whose table could have a new word")
        added = dict(tokenizer.added) if tokenizer else {}
        if not added or [*added.items()][-1] != (self.token, self.vectors):
            wanted = f"{{..., {self.token!r}: {self.vectors}}}"
            raise ConfigError(f"{where}.token = {self.token!r} should be the last of data.text.added, which is {added or 'missing'}: {wanted}")
        if self.first or self.rows:
            raise ConfigError(f"{where}: first and rows are what the run finds out; leave them out")
        first, rows = tokenizer.vocab - self.vectors, fields["vocab"]
        if first > rows:
            lacking = f"would be token {first}, and the base has no row for those before it: it knows {rows} tokens"
            raise ConfigError(f"{where}.token = {self.token!r} {lacking}")
        if not (ids := tokenizer.encode([self.init])[0]) or max(ids) >= first:
            raise ConfigError(f"{where}.init = {self.init!r} should be words that the base knows")
        grown = {**fields, "vocab": max(rows, tokenizer.vocab)}
        return dataclasses.replace(self, first=first, rows=rows), module.clone(text_encoder=grown)

    def begun(self, base, tokenizer):
        """{path of the table: {"rows": mean embedding of the tokens of `init`}} from the parameters of the base."""
        path = _table(base, "lora")
        table = jnp.asarray(traverse_util.flatten_dict(base, sep="/")[path])
        mean = jnp.mean(table[jnp.asarray(tokenizer.encode([self.init])[0])], axis=0, keepdims=True)
        return traverse_util.unflatten_dict({f"{path}/rows": jnp.tile(mean, (self.vectors, 1))}, sep="/")

    def fresh(self, key, boxed, where: str = "lora"):
        """The boxed adapter, of zeros; a run begins with `begun` in their place."""
        del key
        path = _table(boxed, where)
        leaf = traverse_util.flatten_dict(boxed, sep="/")[path]
        width = (leaf.value if isinstance(leaf, meta.Partitioned) else leaf).shape[1]
        zeros = jnp.zeros((self.vectors, width))
        made = leaf.replace(value=zeros, names=(None, leaf.names[1])) if isinstance(leaf, meta.Partitioned) else zeros
        return traverse_util.unflatten_dict({f"{path}/rows": made}, sep="/")

    def of_base(self, whole):
        """Shapes of the base's parameters, from those of the network with the new rows."""
        flat = traverse_util.flatten_dict(whole, sep="/")
        path = _table(whole, "lora")
        table = flat[path]
        return traverse_util.unflatten_dict(flat | {path: jax.ShapeDtypeStruct((self.rows, *table.shape[1:]), table.dtype)}, sep="/")

    def held(self, whole):
        """What of the network's parameters the base has: all, by name."""
        return whole

    def merged(self, table, part, weight: float = 1.0):
        """The table with weight times the rows in their places."""
        rows = weight * part["rows"] if weight != 1 else part["rows"]
        return jnp.concatenate([table[: self.first], rows.astype(table.dtype), table[self.first + self.vectors :]])


def _table(params, where: str) -> str:
    found = [k for k in traverse_util.flatten_dict(params, sep="/") if k.endswith(TABLE)]
    if len(found) != 1:
        raise ConfigError(f"{where}.token: the network has {len(found)} tables of tokens ({', '.join(found)}), and a new word goes into one")
    return found[0]
