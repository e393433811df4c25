"""The op in plain jnp."""

import jax
import jax.numpy as jnp

from a2ats_jax.typing import Array, Int, Shaped


def page_fetch(
  pages: Shaped[Array, "N rows W"], ids: Int[Array, "n"]
) -> tuple[Shaped[Array, "n *part"], ...]:
  """Gathers of rows: of floats two, so that keys and values come out contiguous, each by itself."""
  # A gather is refused where its numbers lie in another memory than the array.
  ids = jax.device_put(ids, jax.typeof(pages).memory_space)
  if pages.dtype == jnp.int8:
    rows = (pages.at[ids].get(mode="promise_in_bounds"),)
  else:
    halves = pages.reshape(-1, pages.shape[2])
    rows = tuple(halves.at[2 * ids + half].get(mode="promise_in_bounds") for half in range(2))
  rows = tuple(jax.device_put(x, jax.memory.Space.Device) for x in rows)
  # Else XLA's CPU backend copies by tokens, and finds out for each which page it is of.
  return jax.lax.optimization_barrier(rows)
