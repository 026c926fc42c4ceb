"""Exact operation counts from the jaxpr, without compiling.

The compiler's own cost analysis counts the body of a scan once, and 6 * parameters * tokens over-counts a DiT by half, because
a third of its parameters act once per image and not once per token.
"""

import math
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from flowjax.models import half


def count(fn: Callable, *args, branch: Callable = max) -> int:
    """Floating-point operations of the matrix products and convolutions of fn(*args); one multiply-add is TWO.

    Arguments may be jax.ShapeDtypeStruct. Papers of the DiT family print multiply-adds, half of this number, as "Gflops".
    Scan bodies count once per iteration, of the branches of a cond the dearest counts (or min, the cheapest: `branch`), and what remat recomputes counts
    again: for utilisation take three times the forward pass rather than the count of a rematerialised gradient. Fused
    attention kernels are opaque; count the network with attention = "xla".

    Raises ValueError for a matrix product inside a `while` loop, whose number of turns is not known.
    """
    return 2 * _macs(jax.make_jaxpr(fn)(*args).jaxpr, branch)


def _macs(jaxpr: Jaxpr, branch: Callable) -> int:
    return sum(_macs_of(eqn, branch) for eqn in jaxpr.eqns)


def _macs_of(eqn, branch: Callable) -> int:
    name = eqn.primitive.name
    if name in ("dot_general", half.NAME):
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        # Every output element meets the whole kernel of its feature, less the zeros that a transposed convolution inserts.
        kernel, features = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
        per_output = math.prod(kernel) // kernel[features]
        return math.prod(eqn.outvars[0].aval.shape) * per_output // math.prod(eqn.params["lhs_dilation"])

    inner = [_macs(sub, branch) for sub in _subjaxprs(eqn.params)]
    if name == "cond":
        return branch(inner)
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    if name == "shard_map":  # the body is one device's share
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]) * sum(inner)
    if name == "while" and any(inner):
        raise ValueError("cannot count a matrix product inside a while loop; write it as lax.scan")
    return sum(inner)


def _subjaxprs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
