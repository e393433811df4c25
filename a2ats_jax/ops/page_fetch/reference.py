"""The op in plain jnp."""

from a2ats_jax.typing import Array, Int, Shaped


def page_fetch(
  pages: Shaped[Array, "N 2 W"], ids: Int[Array, "n"]
) -> tuple[Shaped[Array, "n W"], Shaped[Array, "n W"]]:
  """Two gathers of rows, so that keys and values come out contiguous, each by itself."""
  halves = pages.reshape(-1, pages.shape[2])
  keys = halves.at[2 * ids].get(mode="promise_in_bounds")
  return keys, halves.at[2 * ids + 1].get(mode="promise_in_bounds")
