"""Device mesh, and where every leaf of the train state lives on it."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flowjax.config import ConfigError

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices=None) -> Mesh:
    """A (data, fsdp, tensor, context) mesh over all devices; one size may be -1, "what is left".

    Devices are laid out so that an axis follows the machine's links where it can; of several TPU slices, which only the data
    centre's network joins, each holds whole copies of the model: they split the data axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    free = [k for k, v in sizes.items() if v == -1]
    fixed = math.prod(v for v in sizes.values() if v != -1)
    count = len(devices)
    if len(free) > 1 or any(v < 1 and v != -1 for v in sizes.values()) or fixed < 1 or count % fixed or (not free and fixed != count):
        raise ConfigError(
            f"mesh = {sizes} does not fit {count} devices: the product must be {count}, or one axis -1 and the others divide it"
        )
    if free:
        sizes[free[0]] = count // fixed
    # Auto axes: the partitioner follows our constraints (Explicit axes break flax's Dropout).
    return Mesh(_lay_out(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _lay_out(shape, devices):
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ConfigError(f"mesh.data = {shape[0]} must be a multiple of the number of TPU slices, {slices}")
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the global batch over data x fsdp; every device along tensor and context holds the same rows."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, updates: int = 1):
    """ConfigError unless every slice of the global batch divides over the devices that hold rows."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or accumulate < 1 or batch_size % (updates * accumulate * rows):
        name, count = ("updates x ", f"{updates} x ") if updates > 1 else ("", "")
        raise ConfigError(
            f"batch_size = {batch_size} (global) must be a multiple of {name}accumulate x data x fsdp = {count}{accumulate} x {rows}"
        )


def like(tree, params, shardings):
    """Shardings for `tree` (abstract): a leaf whose path ends in a parameter's path, with its shape, lives where it lives.

    This covers every optax state without knowing it: factored or counting leaves do not match and are replicated.
    """
    known = {
        tuple(map(str, path)): (leaf.shape, place)
        for (path, leaf), place in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    }
    mesh = jax.tree.leaves(shardings)[0].mesh

    def one(path, leaf):
        path = tuple(map(str, path))
        for i in range(len(path)):
            shape, place = known.get(path[i:], (None, None))
            if shape == leaf.shape:
                return place
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(one, tree)


def place(batch: Mapping, mesh: Mesh):
    """This process's rows -> global arrays; no copy is waited for."""
    put = lambda rows: jax.make_array_from_process_local_data(batch_sharding(mesh), np.asarray(rows))  # noqa: E731
    return jax.tree.map(put, batch)
