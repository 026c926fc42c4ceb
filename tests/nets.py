"""Tools for tests of networks: random parameters, golden files, sharded against unsharded."""

import contextlib
import os
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flowjax.models import sharding
from flowjax.train.mesh import AXES

GOLDEN = pathlib.Path(__file__).parent / "golden"


@contextlib.contextmanager
def optimised():
    """What is jitted inside is compiled to run fast, which conftest.py otherwise leaves out: for loops of convolutions."""
    plain, options = jax.jit, {"xla_backend_optimization_level": 2}
    with mock.patch.object(jax, "jit", lambda fn, **rest: plain(fn, compiler_options=options, **rest)):
        yield


def count(net, *inputs) -> int:
    """Number of parameters, without allocating any."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), *inputs)))


def shapes(net, *inputs):
    """The unboxed parameter tree as shapes."""
    return meta.unbox(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])


def random_arrays(shapes: dict[str, tuple], seed: int) -> dict[str, np.ndarray]:
    """Values for torch-named parameters, nothing left at a default; the same on every machine and NumPy version."""
    random = np.random.RandomState(seed)  # the legacy generator: its stream is frozen
    values = {}
    for key in sorted(shapes):
        value = random.standard_normal(shapes[key])
        if value.ndim > 1:
            value /= np.sqrt(np.prod(shapes[key][1:]))
        else:
            value = 0.3 * value + key.endswith("weight")
        values[key] = value.astype(np.float32)
    return values


def randomise(params, seed: int = 0):
    """A parameter tree of the same structure with random kernels, biases, scales and tables."""
    random = np.random.RandomState(seed)
    flat = {}
    for path, leaf in sorted(traverse_util.flatten_dict(params).items()):
        value = random.standard_normal(leaf.shape)
        if path[-1] == "kernel":
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif path[-1] != "embedding":
            value = 0.3 * value + (path[-1] == "scale")
        flat[path] = jnp.asarray(value, jnp.float32)
    return traverse_util.unflatten_dict(flat)


def close(ours, theirs, tolerance):
    """Largest difference relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / (np.abs(theirs).max() + 1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


def golden(name: str, **arrays) -> dict[str, np.ndarray]:
    """The stored arrays of golden file `name`; given arrays must agree with it (FLOWJAX_WRITE_GOLDEN=1 stores them)."""
    path = GOLDEN / f"{name}.npz"
    if arrays and os.environ.get("FLOWJAX_WRITE_GOLDEN"):
        np.savez_compressed(path, **arrays)
    with np.load(path) as stored:
        stored = dict(stored)
    for key, value in arrays.items():
        close(value, stored[key], 1e-5)
    return stored


def check_sharded(net, *inputs, sizes=(2, 2, 2, 1)):
    """Outputs and every gradient agree on one device and on `sizes` (data, fsdp, tensor, context), with random parameters."""
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)
    boxed = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    params = randomise(meta.unbox(boxed))
    placed = jax.device_put(params, sharding.param_specs(boxed, mesh))
    for axis in ("fsdp", "tensor"):
        assert any(axis in leaf.sharding.spec for leaf in jax.tree.leaves(placed)), f"nothing is split over {axis}"

    def loss(params, *inputs):
        y = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(net.apply({"params": params}, *inputs))])
        return jnp.vdot(y, jnp.cos(jnp.arange(y.size))), y

    def loss_on_mesh(*arguments):
        with sharding.use(mesh):
            return loss(*arguments)

    def place(leaf):
        batched = not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(("data", "fsdp")) if batched else PartitionSpec()))

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *inputs)
    (_, y_mesh), grads_mesh = jax.jit(jax.value_and_grad(loss_on_mesh, has_aux=True))(placed, *jax.tree.map(place, inputs))
    close(y_mesh, y, 1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    for ours, theirs in zip(jax.tree.leaves(grads_mesh), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * largest)


def check_round_trip(interop, net, inputs, state, params):
    """A state dict comes back bit for bit, from scanned parameters and unrolled ones, which are the same network."""
    unrolled = net.clone(scan=False)
    flat = interop.from_torch(unrolled, state, shapes(unrolled, *inputs))
    for own, tree in ((net, params), (unrolled, flat)):
        back = interop.to_torch(own, tree)
        assert back.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(back[key], value, err_msg=key)
            assert back[key].flags.c_contiguous
    close(unrolled.apply({"params": flat}, *inputs), net.apply({"params": params}, *inputs), 1e-5)


def check_every_input_matters(apply, params, x, t, cond):
    """Of three samples the second changes with each of its inputs, and the others do not notice."""
    y = apply(params, x, t, cond)
    changes = [(x.at[1].add(1.0), t, cond), (x, t.at[1].add(0.2), cond)]
    changes += [(x, t, {**cond, k: v.at[1].set(v[0])}) for k, v in cond.items()]
    for changed in changes:
        other = apply(params, *changed)
        np.testing.assert_array_equal(other[jnp.array([0, 2])], y[jnp.array([0, 2])])
        assert jnp.abs(other[1] - y[1]).max() > 1e-3
