"""The ops in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Int8

from a2ats_jax.ops.tiles import LANES
from a2ats_jax.typing import Array, Int


def page_zeros(count: int, rows: int, host: bool) -> Int8[Array, "N R 128"]:
  """Made on the device, and moved."""
  space = jax.memory.Space.Host if host else jax.memory.Space.Device
  return jax.device_put(jnp.zeros((count, rows, LANES), jnp.int8), space)


def page_write(
  pages: Int8[Array, "N R 128"], ids: Int[Array, "n"], new: Int8[Array, "n R 128"]
) -> Int8[Array, "N R 128"]:
  """A page after the other, each a block: a scatter to host memory would not compile."""
  space = jax.typeof(pages).memory_space

  def write(i: Array, pages: Array) -> Array:
    at = (jnp.maximum(ids[i], 0), 0, 0)
    old = jax.lax.dynamic_slice(pages, at, (1, *pages.shape[1:]))
    block = jnp.where(ids[i] < 0, jax.device_put(old, jax.memory.Space.Device), new[i][None])
    return jax.lax.dynamic_update_slice(pages, jax.device_put(block, space), at)

  return jax.lax.fori_loop(0, ids.shape[0], write, pages)
