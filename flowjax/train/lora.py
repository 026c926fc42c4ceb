"""Low-rank adapters of any network's kernels: LoRA (2106.09685) and DoRA (2402.09353), as functions of parameter trees.

    D = (alpha / r) A B,    W = W0 + D                                        LoRA
                            W = m (W0 + D) / ||W0 + D||, m per output         DoRA; no gradient through the norm

Kernels are (in, out) here, so A is (in, r) and B is (r, out): the transposes of the papers'. The kernel of a convolution is
(height, width, in, out) and its adapter two convolutions, A (height, width, in, r) and B (r, out). Layers that are scanned have
one more axis in front, and each its own A and B. What is stored beside "down" (A) and "up" (B) is "magnitude", m - ||W0||. It
begins at zero like B, so that the change of a kernel is exactly zero at first, whatever a compiler does with norms.

An adapter is a tree like the network's own, with {"down", "up"[, "magnitude"]} in the place of each adapted kernel. `merge`
adds it to the frozen base within the train step. So no network has to know of adapters, what is sampled is what was trained,
and a kernel's gradient exists for a moment before it becomes those of A and B; what is spared is the optimizer's state, the
averages and most of a checkpoint.

Where the network takes an input that its base does not know, such as LCM's scale of guidance, the parameters of that input
(layers.ADDED) are trained whole and stored in the adapter, as they are and where they are.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from flowjax.config import ConfigError, check
from flowjax.train.inversion import Inversion

LEAVES = ("down", "up", "magnitude", "rows")  # of an adapter's part; what else it has it holds whole
LEAST = 1e-30  # of a squared norm: an output whose kernel is zero has no direction, and begins with that of D


@dataclasses.dataclass(frozen=True)
class Lora:
    """pattern: regular expression that finds the paths of the adapted kernels; rank r; alpha: 0 stands for r; dora: with
    magnitudes; added: what the base may lack and does, which the adapter holds whole where the network has it."""

    pattern: str
    rank: int
    alpha: float = 0.0
    dora: bool = False
    added: tuple[str, ...] = ()

    def fresh(self, key, boxed, where: str = "lora"):
        """`init`, by the name that it has for every kind of adapter."""
        return self.init(key, boxed, where)

    def begun(self, base, tokenizer):
        """None: an adapter begins as it is drawn, whatever the base."""

    def of_base(self, whole):
        """Shapes of the base's parameters: those of the network."""
        return whole

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return (self.alpha or self.rank) / self.rank

    def init(self, key, boxed, where: str = "lora"):
        """The boxed adapter (with logical axis names) of a network with these boxed parameters, arrays or shapes.

        A is uniform with the variance 1 / (3 in) of the reference implementation (its "kaiming_uniform"), B and m - ||W0|| are
        zero. ConfigError unless the pattern finds kernels, and only these.
        """
        made = {}
        for i, (path, leaf) in enumerate(self._kernels(boxed, where).items()):
            value, names = (leaf.value, leaf.names) if isinstance(leaf, meta.Partitioned) else (leaf, (None,) * leaf.ndim)
            shape, lead = value.shape, int(names[0] == "layers")
            bound = float(np.prod(shape[lead:-1])) ** -0.5
            down = jax.random.uniform(jax.random.fold_in(key, i), (*shape[:-1], self.rank), jnp.float32, -bound, bound)
            found = {
                "down": (down, (*names[:-1], None)),
                "up": (jnp.zeros((*shape[:lead], self.rank, shape[-1])), (*names[:lead], None, names[-1])),
            }
            if self.dora:
                found["magnitude"] = jnp.zeros((*shape[:lead], shape[-1])), (*names[:lead], names[-1])
            for name, (value, axes) in found.items():
                made[f"{path}/{name}"] = leaf.replace(value=value, names=axes) if isinstance(leaf, meta.Partitioned) else value
        return traverse_util.unflatten_dict(made, sep="/") | {k: boxed[k] for k in self.added if k in boxed}

    def held(self, tree):
        """What of a network's parameters its base has."""
        return {k: v for k, v in tree.items() if k not in self.added}

    def _kernels(self, boxed, where):
        flat = traverse_util.flatten_dict(self.held(boxed), sep="/")
        kernels = sorted(k for k in flat if k.rpartition("/")[2] == "kernel")
        found = sorted(k for k in flat if re.search(self.pattern, k))
        some = ", ".join(kernels[:12]) + (f" ... and {len(kernels) - 12} more" if len(kernels) > 12 else "")
        if not found:
            raise ConfigError(f"{where}.pattern = {self.pattern!r} finds no parameter; what can be adapted: {some}")
        if wrong := [k for k in found if k not in kernels]:
            none = ", ".join(wrong[:4])
            raise ConfigError(f"{where}.pattern = {self.pattern!r} finds {none}, no matrix; what can be adapted: {some}")
        return {k: flat[k] for k in found}


def build(section, where: str, added: Iterable[str] = ()) -> Lora | Inversion:
    """The Lora that a section {"pattern", "rank"[, "alpha", "dora"]} describes, or the Inversion of {"token", "init"[, "vectors"]}."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} = {section!r} should be a section: {{'pattern': ..., 'rank': ...}}, or {{'token': ..., 'init': ...}}")
    if "token" in section:
        word = Inversion(**check(Inversion, section, where))
        if not word.token.strip() or word.vectors < 1:
            raise ConfigError(f"{where}: token = {word.token!r} should be a word and vectors = {word.vectors} at least 1")
        return word
    made = Lora(**check(Lora, section, where, ("added",)), added=tuple(added))
    if made.rank < 1 or made.alpha < 0:
        raise ConfigError(f"{where}: rank = {made.rank} should be at least 1 and alpha = {made.alpha} not negative")
    try:
        re.compile(made.pattern)
    except re.error as error:
        raise ConfigError(f"{where}.pattern = {made.pattern!r} is not a regular expression: {error}") from None
    return made


def scale_of(made: Lora | Inversion):
    """What `merge` takes beside the tree of an adapter."""
    return made.scale if isinstance(made, Lora) else made


def parts(adapter) -> dict[str, dict]:
    """{path of the kernel: {"down", "up"[, "magnitude"]}}, or {path of the table: {"rows"}}."""
    found: dict[str, dict] = {}
    for path, leaf in traverse_util.flatten_dict(adapter, sep="/").items():
        kernel, _, name = path.rpartition("/")
        if name in LEAVES:
            found.setdefault(kernel, {})[name] = leaf
    return found


def added(adapter) -> dict:
    """{path: leaf} of the parameters that it holds whole."""
    return {k: v for k, v in traverse_util.flatten_dict(adapter, sep="/").items() if k.rpartition("/")[2] not in LEAVES}


def change(kernel, part, scale: float):
    """W - W0 of one kernel W0, or of the kernels of scanned layers; exactly zero where `up` and `magnitude` are."""
    down, up = part["down"], part["up"]
    lead = up.ndim - 2  # axes of layers; those between them and the last two belong to the space of a convolution
    up = up.reshape(*up.shape[:lead], *(1,) * (down.ndim - up.ndim), *up.shape[lead:])
    product = scale * jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    if "magnitude" not in part:
        return product
    over = lambda v: jnp.sum(v, axis=tuple(range(lead, kernel.ndim - 1)), keepdims=True)  # noqa: E731
    square = jnp.maximum(over(jnp.square(kernel)), LEAST)
    grown = 1 + over(2 * kernel * product + jnp.square(product)) / square  # ||W0 + D||^2 / ||W0||^2
    more = part["magnitude"].reshape(square.shape) / jnp.sqrt(square)
    gain = (1 + more) / jnp.sqrt(jax.lax.stop_gradient(jnp.maximum(grown, LEAST)))
    return (gain - 1) * kernel + gain * product


def merge(params, adapters: Iterable[tuple]):
    """The parameters with adapters (tree, scale, weight) added to them: W0 + sum of weight (W_i - W0), each W_i as if it were
    alone. Of the embedding of a new word it is (tree, its Inversion, weight).

    Kernels that no adapter names are passed on untouched, and with up = 0 and magnitude = 0 all are bitwise what they were. What an
    adapter holds whole is put beside them.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    merged = dict(flat)
    for adapter, scale, weight in adapters:
        for path, part in parts(adapter).items():
            if "rows" in part:
                merged[path] = scale.merged(merged[path], part, weight)
            else:
                merged[path] = merged[path] + weight * change(flat[path], part, scale)
        merged |= added(adapter)
    return traverse_util.unflatten_dict(merged, sep="/")


def check_fit(params, adapter, where: str):
    """ConfigError unless every part of the adapter has a kernel of its shape among the parameters, and it brings no others along."""
    if whole := sorted({k.partition("/")[0] for k in added(adapter)}):
        raise ConfigError(f"{where} brings {', '.join(whole)} along, inputs of a network that its base is not: sample the adapter's own checkpoint")
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, part in parts(adapter).items():
        found = flat[path].shape if path in flat else None
        if "rows" in part:
            if found is None or found[1:] != part["rows"].shape[1:]:
                raise ConfigError(f"{where} adds rows of {part['rows'].shape[1]} to {path}, and the network has {found or 'none'}")
            continue
        down, up = part["down"].shape, part["up"].shape
        if found != (*down[:-1], up[-1]):
            has = "none" if found is None else f"{found} there"
            raise ConfigError(f"{where} adapts {path} of shape {(*down[:-1], up[-1])}, and the network has {has}")
