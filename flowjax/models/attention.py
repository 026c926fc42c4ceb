"""Scaled dot-product attention: one entry, several implementations.

All take q (B, T, heads, head_dim), k and v (B, S, heads, head_dim) and an optional boolean mask, broadcastable to
(B, heads, T, S) and True where a query may look; all scale by head_dim^-1/2, take the softmax in float32 and return
(B, T, heads, head_dim) in q's dtype. A row with no True in it is undefined. "xla" holds the whole (T, S) matrix, runs
everywhere and has derivatives of every order in both modes; the fused kernels have reverse mode only, so objectives that
use `jax.jvp` through the network must name "xla".
"""

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, lookup

CUDNN_MAX_HEAD_DIM = 128  # of every generation; Hopper takes 256


def attention(q, k, v, mask=None, implementation: str = "auto"):
    """Attention of q over (k, v); see the module for shapes. "auto" is cuDNN where it applies, else XLA."""
    if implementation == "auto":
        implementation = "xla" if _cudnn_refusal(q, k, mask, jax.default_backend()) else "cudnn"
    return lookup(IMPLEMENTATIONS, implementation, "attention implementation")(q, k, v, mask)


def _xla(q, k, v, mask):
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(exact).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def _cudnn(q, k, v, mask):
    if refusal := _cudnn_refusal(q, k, mask, jax.default_backend()):
        raise ConfigError(f"attention implementation 'cudnn' {refusal}; use 'xla' or 'auto'")
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _cudnn_refusal(q, k, mask, backend: str) -> str | None:
    """Why cuDNN cannot take this case, or None."""
    if backend != "gpu":
        return f"needs a GPU, not {backend}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > CUDNN_MAX_HEAD_DIM:
        return f"needs a head size divisible by 8 and at most {CUDNN_MAX_HEAD_DIM}, not {q.shape[-1]}"
    if mask is not None and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"needs even lengths when there is a mask, not {q.shape[1]} and {k.shape[1]}"
    return None


IMPLEMENTATIONS = {"xla": _xla, "cudnn": _cudnn}
