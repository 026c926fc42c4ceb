"""Scaled dot-product attention: one entry, several implementations.

All take q (B, T, heads, head_dim), k and v (B, S, heads, head_dim) and an optional boolean mask, broadcastable to
(B, heads, T, S) and True where a query may look; all scale by head_dim^-1/2, take the softmax in float32 and return
(B, T, heads, head_dim) in q's dtype. A row with no True in it is undefined.

  xla     holds the whole (T, S) matrix, runs everywhere.
  ring    tokens are split over the mesh axis "context"; keys and values travel round it while the softmax is accumulated
          (2310.01889). No device sees the whole matrix, nor all keys at once.
  cudnn   fused kernel of NVIDIA GPUs.
  splash  fused kernel of TPUs (Pallas); lengths are padded to whole blocks.

"xla" and "ring" have derivatives of every order in both modes; the fused kernels have reverse mode only. Who differentiates a network
forward does it with `jvp` of this module, in which "auto" passes them over and says so, and their names are refused.
"""

import contextvars
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.config import ConfigError, lookup
from flowjax.models import sharding

CUDNN_MAX_HEAD_DIM = 128  # of every generation; Hopper takes 256
SPLASH_BLOCKS = (512, 256, 128)
SPLASH_FROM = 1024  # tokens; below, XLA fuses the small matrix well enough and nothing is padded
BACKWARD_ONLY = "has no derivatives in forward mode, which are asked for here"
LAYOUT = ("batch", "seq", "act_heads", None)  # of q, k, v and the result

SEEN = "attention"  # collection of queries and keys, for who asks for it (mutable = [SEEN]); nobody else pays for it
_STACKS = ("dual_blocks", "blocks", "context_blocks")  # parameters of scanned layers, in the order of their layers

_log = logging.getLogger("flowjax.attention")
_forward = contextvars.ContextVar("forward", default=False)  # whether what is traced now is differentiated forward


def show(module, q, k):
    """Put the queries and keys of this attention layer into the collection SEEN."""
    if not module.is_initializing():
        module.sow(SEEN, "qk", (q, k), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def seen(layers) -> list[tuple[jax.Array, jax.Array]]:
    """(q, k), each (B, N, heads, head_dim), of the self-attention of every layer of a network, from its collection SEEN."""
    single = lambda tree: [name for name in tree if name.startswith("block_")]  # noqa: E731
    if not single(layers) and not layers.keys() & {*_STACKS}:
        layers = layers["encoder"]  # a masked autoencoder's
    found = []
    for name in _STACKS:
        if name in layers:
            q, k = layers[name]["attn"]["qk"]
            found += [(q[i], k[i]) for i in range(len(q))]
    return found + [layers[name]["attn"]["qk"] for name in sorted(single(layers), key=lambda name: int(name.removeprefix("block_")))]


def jvp(fn, primals, tangents):
    """jax.jvp of a function that asks a network."""
    before = _forward.set(True)
    try:
        return jax.jvp(fn, primals, tangents)
    finally:
        _forward.reset(before)


def attention(q, k, v, mask=None, implementation: str = "auto"):
    """Attention of q over (k, v); see the module for shapes. "auto" takes the first of ring, cudnn, splash that applies, else xla."""
    if implementation == "auto":
        refusals = {name: refuse(q, k, mask) for name, refuse in REFUSALS.items()}
        if q.shape[1] < SPLASH_FROM:
            refusals["splash"] = refusals["splash"] or f"is for {SPLASH_FROM} tokens or more, not {q.shape[1]}"
        implementation = next((name for name, refusal in refusals.items() if not refusal), "xla")
        reasons = "; ".join(f"{name} {refusal}" for name, refusal in refusals.items() if refusal)
        _say(f"attention of {q.shape[1]} over {k.shape[1]} tokens, {q.dtype}: {implementation} ({reasons})")
    compute = lookup(IMPLEMENTATIONS, implementation, "attention implementation")
    if implementation in REFUSALS and (refusal := REFUSALS[implementation](q, k, mask)):
        raise ConfigError(f"attention implementation {implementation!r} {refusal}; use 'xla' or 'auto'")
    return compute(q, k, v, mask)


@functools.cache  # once for each kind of call, not once for each layer and trace
def _say(text: str):
    _log.info(text)


def _xla(q, k, v, mask):
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(exact).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def _cudnn(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _cudnn_refusal(q, k, mask) -> str | None:
    """Why cuDNN cannot take this case, or None."""
    if (platform := sharding.platform()) not in ("gpu", "cuda"):
        return f"needs a GPU, not {platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > CUDNN_MAX_HEAD_DIM:
        return f"needs a head size divisible by 8 and at most {CUDNN_MAX_HEAD_DIM}, not {q.shape[-1]}"
    if mask is not None and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"needs even lengths when there is a mask, not {q.shape[1]} and {k.shape[1]}"
    return BACKWARD_ONLY if _forward.get() else None


def _ring(q, k, v, mask):
    mesh, (places, spans) = sharding.active_mesh(), _places(q, k)
    turns = mesh.shape["context"]
    exact = jnp.promote_types(q.dtype, jnp.float32)

    def block(q, k, v):
        """Of one block of keys: the largest logit, and relative to it the sum of exponentials and their sum of values."""
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
        # The result does not depend on the reference point, so neither does its derivative.
        top = jax.lax.stop_gradient(logits.max(-1))
        weights = jnp.exp(logits - top[..., None])
        values = jnp.einsum("bhts,bshd->bhtd", weights.astype(v.dtype), v, preferred_element_type=exact)
        return top, weights.sum(-1), values

    def merge(a, b):
        top = jnp.maximum(a[0], b[0])
        scale_a, scale_b = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
        values = scale_a[..., None] * a[2] + scale_b[..., None] * b[2]
        return top, scale_a * a[1] + scale_b * b[1], values

    def local(q, k, v):
        onward = [(i, (i + 1) % turns) for i in range(turns)]

        @jax.checkpoint  # else the backward pass would keep every block's logits, which together are the whole matrix
        def turn(carry, _):
            k, v, done = carry
            k, v = (jax.lax.ppermute(x, "context", onward) for x in (k, v))
            return (k, v, merge(done, block(q, k, v))), None

        first = jax.checkpoint(block)(q, k, v)
        (_, _, (_, total, values)), _ = jax.lax.scan(turn, (k, v, first), length=turns - 1)
        return jnp.einsum("bhtd->bthd", values / total[..., None]).astype(q.dtype)

    return jax.shard_map(local, mesh=mesh, in_specs=(places, spans, spans), out_specs=places)(q, k, v)


def _places(q, k):
    """PartitionSpecs of q and of k, v on the mesh in use."""
    return sharding.active_spec(LAYOUT, q.shape), sharding.active_spec(LAYOUT, k.shape)


def _ring_refusal(q, k, mask) -> str | None:
    mesh = sharding.active_mesh()
    if mesh is None or mesh.shape.get("context", 1) == 1:
        return "needs a mesh whose axis 'context' is larger than 1"
    if mask is not None:
        return "takes no mask"
    if any(place[1] != "context" for place in _places(q, k)):
        return f"needs lengths that mesh.context = {mesh.shape['context']} divides, not {q.shape[1]} and {k.shape[1]}"
    return None


def _splash(q, k, v, mask, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def local(q, k, v):
        (_, length, heads, _), span = q.shape, k.shape[1]
        q, k, v = (_pad(x, -x.shape[1] % SPLASH_BLOCKS[-1]).swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        rows, columns = (next(b for b in SPLASH_BLOCKS if x.shape[2] % b == 0) for x in (q, k))
        blocks = kernels.BlockSizes(
            block_q=rows, block_q_dkv=rows, block_q_dq=rows,
            block_kv=columns, block_kv_compute=columns, block_kv_dkv=columns, block_kv_dkv_compute=columns, block_kv_dq=columns,
        )  # fmt: skip
        everything = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads)
        kernel = kernels.make_splash_mha(everything, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        # Padded keys belong to another segment than every query, padded queries to that of the real ones: they are cut off.
        ids = kernels.SegmentIds(np.zeros(q.shape[2], np.int32), (np.arange(k.shape[2]) >= span).astype(np.int32))
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q, k, v).swapaxes(1, 2)[:, :length].astype(q.dtype)

    if (mesh := sharding.active_mesh()) is None:
        return local(q, k, v)
    # The partitioner cannot split the kernel: queries stay where they are, keys are gathered over the context axis.
    places = sharding.active_spec(LAYOUT, q.shape)
    spans = sharding.active_spec((LAYOUT[0], None, *LAYOUT[2:]), k.shape)
    return jax.shard_map(local, mesh=mesh, in_specs=(places, spans, spans), out_specs=places, check_vma=False)(q, k, v)


def _pad(x, count: int):
    """x (B, T, heads, head_dim) with `count` zero tokens more."""
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))


def _splash_refusal(q, k, mask) -> str | None:
    if (platform := sharding.platform()) != "tpu":
        return f"needs a TPU, not {platform}"
    if mask is not None:
        return "takes no mask"
    return BACKWARD_ONLY if _forward.get() else None


IMPLEMENTATIONS = {"xla": _xla, "ring": _ring, "cudnn": _cudnn, "splash": _splash}
REFUSALS = {"ring": _ring_refusal, "cudnn": _cudnn_refusal, "splash": _splash_refusal}  # "auto" tries them in this order
