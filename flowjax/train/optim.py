"""Optimizers and learning-rate schedules by name, with per-parameter rules by regular expression.

Schedules count OPTIMIZER STEPS, whatever the batch, accumulation or number of processes. Parameter names are paths such as
"blocks/attn/q/kernel"; layers are stacked, so rules and masks look at names, never at ranks.
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowjax import config
from flowjax.config import ConfigError
from flowjax.models.stack import layer_numbers


def _warm(schedule: Callable, warmup: int) -> Callable:
    if warmup <= 0:
        return schedule
    # Step 0 already moves: (n + 1)/warmup, so that no optimizer step is a no-op.
    return lambda n: schedule(n) * jnp.minimum(1.0, (n + 1) / warmup)


def constant(steps: int, rate: float = 1e-3, warmup: int = 0) -> Callable:
    """Linear warm-up over `warmup` steps, then `rate`."""
    del steps
    return _warm(lambda n: jnp.full_like(jnp.asarray(n, jnp.float32), rate), warmup)


def cosine(steps: int, rate: float = 1e-3, warmup: int = 0, final: float = 0.0) -> Callable:
    """Warm-up, then half a cosine from `rate` at the end of the warm-up to rate * final at `steps`."""

    def decayed(n):
        progress = jnp.clip((n - warmup) / max(1, steps - warmup), 0.0, 1.0)
        return rate * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return _warm(decayed, warmup)


def linear(steps: int, rate: float = 1e-3, warmup: int = 0, final: float = 0.0) -> Callable:
    """Warm-up, then a straight line from `rate` to rate * final at `steps`."""

    def decayed(n):
        return rate * (1 - (1 - final) * jnp.clip((n - warmup) / max(1, steps - warmup), 0.0, 1.0))

    return _warm(decayed, warmup)


def inverse_sqrt(steps: int, rate: float = 1e-3, warmup: int = 0, reference: int = 10_000) -> Callable:
    """Warm-up, then rate / sqrt(max(1, n / reference)) (EDM2)."""
    del steps
    return _warm(lambda n: rate / jnp.sqrt(jnp.maximum(1.0, n / reference)), warmup)


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear, "inverse_sqrt": inverse_sqrt}


def _adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def _radam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    return optax.scale_by_radam(b1=b1, b2=b2, eps=eps)


def _lion(b1: float = 0.9, b2: float = 0.99):
    return optax.scale_by_lion(b1=b1, b2=b2)


def _sgd(momentum: float = 0.9, nesterov: bool = False):
    return optax.trace(decay=momentum, nesterov=nesterov)


def _adafactor(decay_rate: float = 0.8, clip_threshold: float = 1.0, min_dim: int = 128):
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim), optax.clip_by_block_rms(clip_threshold)
    )


def _muon(beta: float = 0.95, ns_steps: int = 5, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8):
    """Muon on the matrices of all layers, scanned or not, Adam on everything else (embeddings, biases, norms, first and last layers).

    Updates of a matrix (in, out) are times sqrt(max(1, out / in)), as the author's code and optax's `muon` have it. Scanned layers are
    batches of matrices: their leading axis is not a matrix axis, which optax has to be told.
    """

    def axes(params):
        """{name: (in, out) axes} of the matrices of layers."""
        ranks = {name_of(path): p.ndim for path, p in jax.tree.leaves_with_path(params)}
        layers = layer_numbers({name_of(path): p.shape for path, p in jax.tree.leaves_with_path(params)})
        leads = {n: int(isinstance(number, range)) for n, (number, _) in layers.items() if n.endswith("kernel")}
        return {n: (lead, lead + 1) for n, lead in leads.items() if ranks[n] == lead + 2}

    def matrices(params):
        found = axes(params)
        of = lambda name: optax.contrib.MuonDimensionNumbers(*found[name]) if name in found else None  # noqa: E731
        return jax.tree.map_with_path(lambda path, _: of(name_of(path)), params)

    def labels(params):
        names = [name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
        if any(n.endswith("kernel/down") for n in names):
            raise ConfigError("optimizer 'muon' is for whole matrices, and an adapter (roles.*.lora) is trained as their factors; use adamw")
        found = axes(params)
        return jax.tree.map_with_path(lambda path, _: "muon" if name_of(path) in found else "adam", params)

    muon = optax.contrib.scale_by_muon(beta=beta, ns_steps=ns_steps, weight_dimension_numbers=matrices)

    def scaled(updates, state, params=None):
        updates, state = muon.update(updates, state, params)
        return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates), state

    return optax.partition({"muon": optax.GradientTransformation(muon.init, scaled), "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}, labels)


OPTIMIZERS = {"adamw": _adam, "radam": _radam, "lion": _lion, "sgd": _sgd, "adafactor": _adafactor, "muon": _muon}


def name_of(path) -> str:
    """"blocks/attn/q/kernel" of a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rule(match: str, rate: float = None, decay: float = None, layer_decay: float = None, layers: tuple = ()):
    """The parameters whose names `match` finds: multiplier of their learning rate, their weight decay; None leaves it as it is.

    layer_decay: the rate holds for the last layer, and each layer before it has this much of the next one's (BEiT, MAE), whether
    layers are scanned or not. layers: only these of what is found, numbers from 0 at the input.
    """


def per_parameter(params, rules: Sequence, decay: float, where: str):
    """(learning-rate multiplier, weight decay) per leaf: kernels (of adapters their two factors) decay, the last matching rule overrides.

    rules: sequence of sections of `_rule`; a regular expression that matches nothing is an error. Scanned layers that differ have
    an array, which is broadcast over the parameter.
    """
    shapes = {name_of(path): tuple(p.shape) for path, p in jax.tree.leaves_with_path(params)}
    numbers = layer_numbers(shapes)
    values = {n: [1.0, decay if re.search(r"kernel(/down|/up)?$", n) else 0.0] for n in shapes}
    for i, rule in enumerate(rules):
        here = f"{where}.rules[{i}]"
        rule = {k: p.default for k, p in config.arguments(_rule).items()} | config.check(_rule, rule, here)
        try:
            hit = [n for n in shapes if re.search(rule["match"], n)]
        except re.error as error:
            raise ConfigError(f"{here}.match = {rule['match']!r} is not a regular expression: {error}") from None
        if not hit:
            raise ConfigError(f"{here}.match = {rule['match']!r} matches no parameter; parameters: {', '.join(shapes)}")
        _check_layers(rule, hit, numbers, here)
        for n in hit:
            values[n] = [_ruled(rule, key, old, numbers.get(n), len(shapes[n])) for key, old in zip(("rate", "decay"), values[n])]
    pick = lambda i: jax.tree.map_with_path(lambda path, _: values[name_of(path)][i], params)  # noqa: E731
    return pick(0), pick(1)


def _check_layers(rule, hit, numbers, where: str):
    """ConfigError where a rule speaks of layers and finds parameters that are in none, or no such layer."""
    if rule["layer_decay"] is not None and not 0 < rule["layer_decay"] <= 1:
        raise ConfigError(f"{where}.layer_decay = {rule['layer_decay']} should lie in (0, 1]")
    if rule["layer_decay"] is None and not rule["layers"]:
        return
    if outside := [n for n in hit if n not in numbers]:
        raise ConfigError(f"{where}.match = {rule['match']!r} finds {outside[0]}, which belongs to no layer, as layer_decay and layers need")
    depth = max(numbers[n][1] for n in hit)
    if wrong := [k for k in rule["layers"] if k not in range(depth)]:
        raise ConfigError(f"{where}.layers = {tuple(rule['layers'])}: {wrong[0]!r} is no layer; valid: 0 to {depth - 1}")


def _ruled(rule, key: str, old, number, rank: int):
    """What a rule makes of one parameter's rate or decay: a number, or an array with one for each scanned layer."""
    new = rule[key]
    if new is None and (key != "rate" or rule["layer_decay"] is None):
        return old
    if number is None or (rule["layer_decay"] is None and not rule["layers"]):
        return new
    at, depth = np.asarray(number[0]), number[1]
    if key == "rate" and rule["layer_decay"] is not None:
        new = (1.0 if new is None else new) * rule["layer_decay"] ** (depth - 1.0 - at)
    if rule["layers"]:
        new = np.where(np.isin(at, rule["layers"]), new, np.ravel(old) if np.ndim(old) else old)
    if np.ndim(new) == 0:
        return float(new)
    return float(new[0]) if (new == new[0]).all() else new.astype(np.float32).reshape(-1, *(1,) * (rank - 1))


def described(section, params, where: str = "optimizer") -> dict[str, str]:
    """What the rules of an optimizer's section do to parameters shaped like `params`, for the card: {} where they do nothing."""
    *_, common = _sections(section, where)
    rates, _ = per_parameter(params, common["rules"], common["decay"], where)
    groups: dict[str, list] = {}
    for (path, p), rate in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(rates), strict=True):
        each = ", ".join(f"{r:.4g}" for r in np.ravel(rate))
        groups.setdefault("frozen" if np.all(rate == 0) else f"rate x {each}", []).append((name_of(path), int(np.prod(p.shape))))
    if [*groups] == ["rate x 1"]:
        return {}
    some = lambda found: ", ".join(n for n, _ in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")  # noqa: E731
    return {k: f"{sum(n for _, n in found):,} parameters: {some(found)}" for k, found in groups.items()}


def _common(schedule, clip: float = 0.0, decay: float = 0.0, rules: Sequence = ()):
    """Settings of every optimizer: a section of SCHEDULES; global norm to clip at (0 = off); weight decay (decoupled, times the
    learning rate); per-parameter rules."""


def _sections(section, where: str):
    """(name, own settings, common settings) of an optimizer's section."""
    name, settings = config.split(section, where)
    common, own = config.arguments(_common), config.arguments(config.lookup(OPTIMIZERS, name, f"{where}.name"))
    for key in settings:
        if key not in common and key not in own:
            raise ConfigError(f"{where}.{key} is unknown for {name}; valid: {', '.join([*common, *own])}")
    shared = config.check(_common, {k: v for k, v in settings.items() if k in common}, where)
    for key in ("clip", "decay"):
        if shared.get(key, 0.0) < 0:
            raise ConfigError(f"{where}.{key} = {shared[key]} should not be negative")
    return name, {k: v for k, v in settings.items() if k in own}, {k: p.default for k, p in common.items()} | shared


def schedule_of(section, steps: int, where: str = "optimizer") -> Callable:
    """The learning rate as a function of the number of optimizer steps taken."""
    *_, common = _sections(section, where)
    return config.build(SCHEDULES, common["schedule"], f"{where}.schedule", steps=steps)


def build(section, params, steps: int, where: str = "optimizer", every: int = 1):
    """(optax transformation, schedule) for parameters shaped like `params` (arrays or ShapeDtypeStructs).

    Keys: name, the settings of the optimizer, and those of `_common`. A rule with rate 0 freezes a parameter and keeps no
    optimizer state for it (some of its scanned layers: it does, and they count for the clip). A role that moves on every `every`-th of the run's `steps` gets a schedule over its own steps.
    """
    schedule = schedule_of(section, -(-steps // every), where)
    name, settings, common = _sections(section, where)
    method = config.build(OPTIMIZERS, {"name": name, **settings}, where)
    clip = common["clip"]
    rates, decays = per_parameter(params, common["rules"], common["decay"], where)

    def decouple(updates, state, params=None):
        return jax.tree.map(lambda u, p, d: u + d * p if np.any(d) else u, updates, params, decays), state

    def scale(updates, state, params=None):
        return jax.tree.map(lambda u, r: r * u, updates, rates), state

    empty = lambda _: optax.EmptyState()  # noqa: E731
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    parts = [*clipping, method, optax.GradientTransformation(empty, decouple), optax.GradientTransformation(empty, scale)]
    chain = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if any(np.ndim(r) == 0 and r == 0 for r in jax.tree.leaves(rates)):
        labels = jax.tree.map(lambda r: "frozen" if np.ndim(r) == 0 and r == 0 else "trained", rates)
        # Inside the partition frozen leaves are masked out, so the per-leaf trees must be masked the same way.
        rates, decays = (jax.tree.map(lambda v, l: v if l == "trained" else optax.MaskedNode(), t, labels) for t in (rates, decays))
        chain = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
    return chain, schedule
