"""The op in plain jnp."""

from a2ats_jax.typing import Array, Int


def slot_fetch(
  numbers: Int[Array, "*lead rows 128"], pages: Int[Array, "*some"], page: int
) -> Int[Array, "*some P"]:
  """A gather of rows of P."""
  return numbers.reshape(-1, page).at[pages].get(mode="promise_in_bounds")
