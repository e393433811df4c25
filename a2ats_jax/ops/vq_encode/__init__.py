"""The nearest codeword of every key."""

from types import MappingProxyType

import jax
import jax.numpy as jnp

from a2ats_jax.ops import dispatch, stored_tiles
from a2ats_jax.ops.tiles import EncodeTiles
from a2ats_jax.ops.vq_encode import gpu, reference, tpu
from a2ats_jax.typing import Array, Float, UInt16

MANY = 4096
"""Keys from which on more of them only repeat the same blocks."""


def shape_of(keys: Array, whitener: Array, whitened: Array, offsets: Array) -> stored_tiles.Shape:
  """What stored tiles are looked up by; :data:`MANY` keys stand for any larger number."""
  n, kv_heads, dim = keys.shape
  return {
    "keys": min(n, MANY),
    "kv_heads": kv_heads,
    "dim": dim,
    "codewords": whitened.shape[1],
    "dtype": str(keys.dtype),
  }


@jax.jit  # one pass, without an array of squares
def offsets_of(whitened: Float[Array, "*L K C D"]) -> Float[Array, "*L K C"]:
  """Half the squared norm of every whitened codeword."""
  return 0.5 * jnp.sum(jnp.square(whitened), axis=-1)


def _on_tpu(*args: Array) -> Array:
  # Not the offsets: the kernel has whole codewords in VMEM, whose norms come out as the column it
  # subtracts. Given, they would come as rows of lanes, to be turned over.
  tiles = stored_tiles.find("vq_encode", EncodeTiles, shape_of(*args))
  return tpu.vq_encode(*args[:3], tiles=tiles)


def _on_gpu(*args: Array) -> Array:
  return gpu.vq_encode(*args, tiles=stored_tiles.find("vq_encode", gpu.Tiles, shape_of(*args)))


IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=_on_tpu, hindrances=tpu.hindrances),
    "gpu": dispatch.Implementation(run=_on_gpu, hindrances=gpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.vq_encode),
  }
)


def vq_encode(
  keys: Float[Array, "n K D"],
  whitener: Float[Array, "K D D"],
  whitened: Float[Array, "K C D"],
  offsets: Float[Array, "K C"],
  *,
  implementation: str = dispatch.AUTO,
) -> UInt16[Array, "n K"]:
  """``argmin_c ||k L - c L||^2`` for every KV head, ties to the lowest; no n x C array exists.

  Args:
    keys: n of them, before rotary embedding.
    whitener: L.
    whitened: codewords times L.
    offsets: half of their squared norms, :func:`offsets_of`.
    implementation: by name, or ``auto``.
  """
  args = (keys, whitener, whitened, offsets)
  return dispatch.call("vq_encode", IMPLEMENTATIONS, implementation, *args)
