"""The op in plain jnp."""

import jax
import jax.numpy as jnp

from a2ats_jax.typing import Array, Float, UInt16

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 512  # keys encoded at once: bounds the [keys, C] scores


def vq_encode(
  keys: Float[Array, "n K D"],
  whitener: Float[Array, "K D D"],
  whitened: Float[Array, "K C D"],
  offsets: Float[Array, "K C"],
) -> UInt16[Array, "n K"]:
  """``argmax_c (k L) . (c L) - ||c L||^2 / 2`` in float32, a block of keys at a time."""
  n, kv_heads, dim = keys.shape
  size = whitened.shape[1]

  def nearest(block: Array) -> Array:
    # KV heads first, as XLA's CPU backend takes a batched product: others are turned over first.
    z = jnp.einsum("nkd,kde->kne", block.astype(jnp.float32), whitener, precision=_HIGHEST)
    score = jnp.einsum("kne,kce->knc", z, whitened, precision=_HIGHEST) - offsets[:, None]
    # The first maximum, as two plain reductions: twice as fast on the CPU as argmax.
    best = score == jnp.max(score, axis=-1, keepdims=True)
    index = jnp.arange(size, dtype=jnp.int32)[None, None]
    return jnp.min(jnp.where(best, index, size - 1), axis=-1).T.astype(jnp.uint16)

  whole = n // _BLOCK * _BLOCK
  codes = jax.lax.map(nearest, keys[:whole].reshape(-1, _BLOCK, kv_heads, dim))
  codes = codes.reshape(whole, kv_heads)
  return jnp.concatenate([codes, nearest(keys[whole:])]) if whole < n else codes
