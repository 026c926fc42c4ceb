"""A matrix product of half precision whose derivatives are products of half precision too, summed and returned in each input's own type.

The derivative of kernel.astype(bfloat16) would round each device's gradient to bfloat16 BEFORE it is summed over the batch's devices.
Here the product that makes it reads bfloat16 and writes float32, which is what the sum then adds. jax's own product cannot say that: its
transposes inherit the type of its result, so that bfloat16 would have to be kept as, and on GPUs copied to, float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

NAME = "half_dot"  # in jaxprs, with the dimension_numbers of dot_general


def half_dot(a: jax.Array, b: jax.Array, dimension_numbers, half: str, out: str) -> jax.Array:
    """jax.lax.dot_general of a and b, rounded to `half` ("bfloat16" or "float16") where they are not, as an array of type `out`.

    Linear in both; derivatives of every order, in both modes, are such products, that of an input in that input's type. vmap works.
    """
    pairs = tuple(tuple(tuple(int(i) for i in side) for side in kind) for kind in dimension_numbers)
    return _primitive.bind(a, b, dimension_numbers=pairs, half=jnp.dtype(half).name, out=jnp.dtype(out).name)


def _compute(a, b, *, dimension_numbers, half, out):
    return jax.lax.dot_general(a.astype(half), b.astype(half), dimension_numbers, preferred_element_type=jnp.dtype(out))


def _typed(a, b, **settings):
    made = jax.eval_shape(functools.partial(_compute, **settings), *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (a, b)))
    return jax.core.ShapedArray(made.shape, made.dtype)


def _rest(ndim: int, *taken) -> list[int]:
    return [i for i in range(ndim) if i not in sum(taken, ())]


def _transposed(of_a, cotangent, a, b, *, dimension_numbers, half, out):
    """Of the result's cotangent: that of a, or of b. The result's axes are the batch, then the rest of a, then that of b."""
    want, other = (a.aval, b) if of_a else (b.aval, a)
    (mine, theirs), (batch, their_batch) = (pair if of_a else pair[::-1] for pair in dimension_numbers)
    rest, their_rest = _rest(want.ndim, mine, batch), _rest(other.ndim, theirs, their_batch)
    count = len(batch)
    first = count + (len(rest) if of_a else 0)  # where the other's axes are in the result
    dims = ((range(first, first + len(their_rest)), their_rest), (range(count), their_batch))
    made = half_dot(cotangent, other, dims, half, want.dtype.name)
    # Axes of `made`: the batch, the rest of this input, and what was summed over, in the order in which the other has it.
    order = [*batch, *rest, *(mine[theirs.index(i)] for i in sorted(theirs))]
    return jax.lax.transpose(made, [order.index(i) for i in range(want.ndim)])


def _mapped(args, axes, *, dimension_numbers, half, out):
    (ca, cb), (ba, bb) = dimension_numbers
    a, b = (v if axis is None else jnp.moveaxis(v, axis, 0) for v, axis in zip(args, axes, strict=True))
    if axes[0] is not None:
        ca, ba = ([i + 1 for i in dims] for dims in (ca, ba))
    if axes[1] is not None:
        cb, bb = ([i + 1 for i in dims] for dims in (cb, bb))
    if None not in axes:
        return half_dot(a, b, ((ca, cb), ([0, *ba], [0, *bb])), half, out), 0
    made = half_dot(a, b, ((ca, cb), (ba, bb)), half, out)
    return made, len(ba) if axes[1] is None else a.ndim - len(ca)


_primitive = Primitive(NAME)
_primitive.def_impl(jax.jit(_compute, static_argnames=("dimension_numbers", "half", "out")))
_primitive.def_abstract_eval(_typed)
ad.defbilinear(_primitive, functools.partial(_transposed, True), functools.partial(_transposed, False))
batching.primitive_batchers[_primitive] = _mapped
mlir.register_lowering(_primitive, mlir.lower_fun(_compute, multiple_results=False))
