"""Optimizers and learning-rate schedules by name, with per-parameter rules by regular expression.

Schedules count OPTIMIZER STEPS, whatever the batch, accumulation or number of processes. Parameter names are paths such as
"blocks/attn/q/kernel"; layers are stacked, so rules and masks look at names, never at ranks.
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from flowjax import config
from flowjax.config import ConfigError


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
    """Muon on matrices inside the network, Adam on everything else (embeddings, biases, norms, first and last layers).

    Stacked layers are batches of matrices: their leading axis is not a matrix axis, which optax has to be told.
    """

    def matrices(params):
        def one(path, p):
            name = name_of(path)
            hidden = name.endswith("kernel") and re.search(r"(^|/)blocks/", name) and p.ndim == 3
            return optax.contrib.MuonDimensionNumbers(1, 2) if hidden else None

        return jax.tree.map_with_path(one, params)

    def labels(params):
        names = [name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
        if any(n.endswith("kernel/down") for n in names):
            raise ConfigError("optimizer 'muon' is for whole matrices, and an adapter (roles.*.lora) is trained as their factors; use adamw")
        return jax.tree.map_with_path(
            lambda path, p: "muon" if name_of(path).endswith("kernel") and re.search(r"(^|/)blocks/", name_of(path)) and p.ndim == 3 else "adam",
            params,
        )

    muon = optax.contrib.scale_by_muon(beta=beta, ns_steps=ns_steps, weight_dimension_numbers=matrices)
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}, labels)


OPTIMIZERS = {"adamw": _adam, "radam": _radam, "lion": _lion, "sgd": _sgd, "adafactor": _adafactor, "muon": _muon}


def name_of(path) -> str:
    """"blocks/attn/q/kernel" of a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rule(match: str, rate: float = None, decay: float = None):
    """The parameters whose names `match` finds: multiplier of their learning rate, their weight decay; None leaves it as it is."""


def per_parameter(params, rules: Sequence, decay: float, where: str):
    """(learning-rate multiplier, weight decay) per leaf: kernels (of adapters their two factors) decay, the last matching rule overrides.

    rules: sequence of sections of `_rule`; a regular expression that matches nothing is an error.
    """
    names = [name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
    values = {n: [1.0, decay if re.search(r"kernel(/down|/up)?$", n) else 0.0] for n in names}
    for i, rule in enumerate(rules):
        rule = config.check(_rule, rule, f"{where}.rules[{i}]")
        try:
            hit = [n for n in names if re.search(rule["match"], n)]
        except re.error as error:
            raise ConfigError(f"{where}.rules[{i}].match = {rule['match']!r} is not a regular expression: {error}") from None
        if not hit:
            raise ConfigError(f"{where}.rules[{i}].match = {rule['match']!r} matches no parameter; parameters: {', '.join(names)}")
        for n in hit:
            values[n] = [old if rule.get(k) is None else rule[k] for k, old in zip(("rate", "decay"), values[n])]
    pick = lambda i: jax.tree.map_with_path(lambda path, _: values[name_of(path)][i], params)  # noqa: E731
    return pick(0), pick(1)


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
    optimizer state for it. A role that moves on every `every`-th of the run's `steps` gets a schedule over its own steps.
    """
    schedule = schedule_of(section, -(-steps // every), where)
    name, settings, common = _sections(section, where)
    method = config.build(OPTIMIZERS, {"name": name, **settings}, where)
    clip = common["clip"]
    rates, decays = per_parameter(params, common["rules"], common["decay"], where)

    def decouple(updates, state, params=None):
        return jax.tree.map(lambda u, p, d: u + d * p if d else u, updates, params, decays), state

    def scale(updates, state, params=None):
        return jax.tree.map(lambda u, r: r * u, updates, rates), state

    empty = lambda _: optax.EmptyState()  # noqa: E731
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    parts = [*clipping, method, optax.GradientTransformation(empty, decouple), optax.GradientTransformation(empty, scale)]
    chain = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if any(r == 0 for r in jax.tree.leaves(rates)):
        labels = jax.tree.map(lambda r: "frozen" if r == 0 else "trained", rates)
        # Inside the partition frozen leaves are masked out, so the per-leaf trees must be masked the same way.
        rates, decays = (jax.tree.map(lambda v, l: v if l == "trained" else optax.MaskedNode(), t, labels) for t in (rates, decays))
        chain = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
    return chain, schedule
