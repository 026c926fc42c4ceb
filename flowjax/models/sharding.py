"""Logical axis names -> mesh axes: the one place that decides where an array lives.

Networks name the axes of parameters and activations ("batch", "embed", ...); a rule table maps each name to no mesh axis,
one, or several. The rules are not ambient state of a jitted function: enter `use(mesh, rules)` INSIDE the traced step, so
that the trace and its rules cannot part company.

XLA's partitioner can compute `h + gate * (act @ w)` wrongly on a mesh of several axes when it is left to choose the
layouts. Networks therefore constrain every output of a residual branch, every modulation or gate vector, and the sum.
"""

import contextlib
import contextvars
import math
from collections.abc import Mapping, Sequence

import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, None | str | tuple[str, ...]]

RULES: Rules = {
    # activations
    "batch": ("data", "fsdp"),
    "seq": "context",
    "act": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    # parameters
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": None,
    "layers": None,
    "conv_in": None,
    "conv_out": "fsdp",
    "norm": None,
    "small": None,
}

_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("flowjax_sharding", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES):
    """Make `constrain` place arrays on `mesh` by `rules` within the block; enter it inside the traced function."""
    _check_axes(mesh, rules)
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Fix the layout of x, one logical name (or None) per axis; a no-op outside `use`, except that names are checked."""
    if len(names) != x.ndim:
        raise ValueError(f"constrain got {len(names)} names {names} for an array of shape {x.shape}")
    if (active := _active.get()) is None:
        spec(names)
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit(names, x.shape, mesh, rules)))


def active_mesh() -> Mesh | None:
    """The mesh of the `use` that we are in, or None."""
    active = _active.get()
    return active and active[0]


def active_spec(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """`fit` on the mesh and rules of the `use` that we are in."""
    mesh, rules = _active.get()
    return fit(names, shape, mesh, rules)


def platform() -> str:
    """"cpu", "gpu" or "tpu": where the traced program will run, which is not this machine when it is compiled for another."""
    mesh = active_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def spec(names: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec that the rules give for these names, whatever the shape; KeyError on an unknown name."""
    return PartitionSpec(*(None if name is None else _rule(name, rules) for name in names))


def fit(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """`spec` for an array of this shape on this mesh.

    A mesh axis is dropped (the dimension is replicated over it) where its size does not divide what is left of the
    dimension, or where an earlier dimension already uses it.
    """
    used: set[str] = set()
    entries = []
    for name, size in zip(names, shape, strict=True):
        kept = []
        for axis in _axes(name, rules):
            if axis not in used and size % mesh.shape[axis] == 0:
                kept.append(axis)
                used.add(axis)
                size //= mesh.shape[axis]
        entries.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    return PartitionSpec(*entries)


def fit_param(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """`fit` for a parameter: a mesh axis that does not divide the dimension it is meant for splits another one that a rule splits too,
    the largest that it divides. A kernel (width, 4 width) is not kept whole because the axis divides 4 width only."""
    axes = [_axes(name, rules) for name in names]
    placed = [_tuple(entry) for entry in fit(names, shape, mesh, rules)]
    used = {axis for entry in placed for axis in entry}
    for axis in dict.fromkeys(axis for entry in axes for axis in entry):
        left = [size // math.prod(mesh.shape[a] for a in entry) for size, entry in zip(shape, placed, strict=True)]
        able = [i for i, size in enumerate(left) if axes[i] and size % mesh.shape[axis] == 0]
        if axis not in used and able:
            best = max(able, key=lambda i: left[i])
            placed[best] += (axis,)
    return PartitionSpec(*(None if not entry else entry[0] if len(entry) == 1 else entry for entry in placed))


def param_specs(boxed, mesh: Mesh, rules: Rules = RULES):
    """Tree of NamedSharding (`fit_param`) for abstract parameters whose leaves are boxed by nn.with_logical_partitioning.

    The tree has the structure of the unboxed parameters. A leaf without names is replicated.
    """
    _check_axes(mesh, rules)

    def one(leaf):
        if isinstance(leaf, meta.Partitioned):
            return NamedSharding(mesh, fit_param(leaf.names, leaf.value.shape, mesh, rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, meta.Partitioned))


def _rule(name: str, rules: Rules):
    if name not in rules:
        raise KeyError(f"unknown logical axis {name!r}; valid: {', '.join(rules)}")
    return rules[name]


def _axes(name: str | None, rules: Rules) -> tuple[str, ...]:
    return () if name is None else _tuple(_rule(name, rules))


def _tuple(axes: None | str | tuple[str, ...]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _check_axes(mesh: Mesh, rules: Rules):
    for name, axes in rules.items():
        for axis in _tuple(axes):
            if axis not in mesh.shape:
                raise ValueError(f"rule {name!r} names mesh axis {axis!r}; the mesh has {', '.join(mesh.axis_names)}")
