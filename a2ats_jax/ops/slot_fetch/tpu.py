"""The op for a TPU, in plain jnp too: a gather of whole rows, then a page's part of each."""

import jax
import jax.numpy as jnp

from a2ats_jax.ops.tiles import LANES
from a2ats_jax.typing import Array, Int


def hindrances(backend: str, numbers: Array, pages: Array, page: int) -> list[str]:
  """Why this form cannot serve, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    numbers, pages, page: as in :func:`slot_fetch`.
  """
  reasons = [] if backend == "tpu" else [f"it is for a TPU, and the backend is {backend}"]
  if page > LANES or LANES % page:
    reasons.append(f"tokens a page must divide {LANES}, got {page}")
  return reasons


def slot_fetch(
  numbers: Int[Array, "*lead rows 128"], pages: Int[Array, "*some"], page: int
) -> Int[Array, "*some P"]:
  """Rows are turned by halves, quarters and so on until a page's numbers come first.

  Args:
    numbers, pages: as in the op.
    page: a power of two up to 128.
  """
  each = LANES // page
  rows = numbers.reshape(-1, LANES).at[pages // each].get(mode="promise_in_bounds")
  # Held as they are: the gather and what follows would be one operation for each number.
  rows = jax.lax.optimization_barrier(rows)
  place = (pages % each)[..., None]
  half = each // 2
  while half:
    rows = jnp.where(place & half != 0, jnp.roll(rows, -half * page, axis=-1), rows)
    half //= 2
  return rows[..., :page]
