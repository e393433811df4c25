"""The op in plain jnp."""

import math

import jax.numpy as jnp

from a2ats_jax.typing import Array, Int


def lookup(tables: Int[Array, "*lead n"], places: Int[Array, "*lead m"]) -> Int[Array, "*lead m"]:
  """A gather from all tables as one: with an index of two numbers a CPU takes twice as long.

  All tables together have fewer than 2^31 numbers.
  """
  *lead, n = tables.shape
  row = jnp.arange(math.prod(lead), dtype=jnp.int32).reshape(*lead, 1)
  flat = tables.reshape(-1).at[(row * n + places).reshape(-1)]
  got = flat.get(mode="promise_in_bounds", wrap_negative_indices=False)
  return got.reshape(places.shape)
