"""Tails to hand to attention."""

import jax.numpy as jnp
import numpy as np

from a2ats_jax.attention import Tail


def draw(
  rng: np.random.Generator,
  *,
  batch: int,
  kv_heads: int,
  group: int,
  dim: int,
  codewords: int,
  level: float,
) -> Tail:
  """Random weights and sums; the first query head of each row has no tail if there are more.

  Args:
    level: about which the peaks lie.
  """
  heads = (batch, 1, kv_heads * group)
  peak = level + rng.normal(size=heads)
  weights = rng.random((*heads, codewords))
  total = (1 + rng.random(heads)) * codewords
  if heads[2] > 1:
    peak[:, :, 0], weights[:, :, 0], total[:, :, 0] = -np.inf, 0.0, 0.0
  sums = rng.normal(size=(batch, kv_heads, codewords, dim))
  return Tail(*(jnp.asarray(x, jnp.float32) for x in (weights, sums, peak, total)))
