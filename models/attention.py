"""Attention by several implementations, which differ in what can be differentiated and in speed."""

import jax
from jax import Array

REVERSE = ("xla", "cudnn", "splash")  # for values and gradients
FORWARD = ("xla", "fused")  # for values and derivatives in forward mode, jax.jvp


def attention(q: Array, k: Array, v: Array, implementation: str = "xla") -> Array:
    """softmax(q kᵀ / √d) v, over all heads.

    Args:
      q, k, v: (n, tokens, heads, d), float32 or bfloat16.
      implementation: of REVERSE or FORWARD. `xla` gives every derivative.
    Returns:
      (n, tokens, heads, d) of q's type.
    """
    if implementation != "xla":
        raise NotImplementedError(implementation)
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def reverse_attention(name: str, platform: str, dtype: str, tokens: int, d: int) -> str:
    """What `model.attention` stands for, "auto" resolved, of REVERSE."""
    return "xla" if name == "auto" else name


def forward_attention(name: str, platform: str, dtype: str, tokens: int, d: int) -> str:
    """What `model.attention_jvp` stands for, "auto" resolved, of FORWARD."""
    return "xla" if name == "auto" else name
