"""What a decode step does on the device beside encoding, fetching and attending.

XLA's own programs, each by itself, so that their figures say whether a kernel would pay: the score
of every cell; from scores to page numbers, and its two largest pieces, the cut and the pages that
hold a token; and the estimate of what was not chosen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from a2ats_jax import index
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.base import Geometry
from a2ats_jax.rope import RopeConfig, make_rope


def parts(kept: Geometry, codewords: int) -> dict[str, tuple[Callable[..., Any], Any]]:
  """Functions and the shapes of their arguments.

  Args:
    kept: of one layer.
  """
  heads, dim = (1, kept.kv_heads), kept.head_dim
  words = jax.ShapeDtypeStruct((*heads, codewords, dim), jnp.float32)
  book = jax.eval_shape(make_codebook, words, jnp.broadcast_to(jnp.eye(dim), (*heads, dim, dim)))
  method = A2ATS(
    codebook=book,
    budget=Budget(tokens=2048, per="kv_head"),
    far=FarPosition.segments(8),
    tail="centroid",
  )
  rope = make_rope(RopeConfig(head_dim=dim, theta=500000.0))
  state = jax.eval_shape(lambda: method.init(kept))
  leaves, tree = jax.tree.flatten(state)
  place = next(i for i, x in enumerate(leaves) if x is state.store.pages)

  def state_of(rest):
    pages = jnp.zeros(leaves[place].shape, leaves[place].dtype)  # which no part reads
    return jax.tree.unflatten(tree, [*rest[:place], pages, *rest[place:]])

  def score(rest, book, q, positions):
    here = dataclasses.replace(method, codebook=book)
    return here.score(state_of(rest), q, positions, rope, 0)

  def choose(rest, table, positions):
    here = state_of(rest)
    return method.choose(here, here.index.counts[0], table, positions[:, 0], 0)

  def pages(rest, taken):
    found = index.page_cells(state_of(rest).index, layer=0)
    return index.page_numbers(found, taken, most=2048)

  def tail(rest, table, left):
    found = method._tail(state_of(rest), table, left, 0)
    return found.weights, found.peak, found.total  # the sums join in the kernel

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((kept.batch, *shape), dtype)

  rest, count = [*leaves[:place], *leaves[place + 1 :]], state.index.counts.shape[3]
  q, positions = array(kept.dtype, 1, kept.heads, dim), array(jnp.int32, 1)
  table, of_cells = (
    array(jnp.float32, kept.heads, count),
    array(jnp.int32, kept.kv_heads, count),
  )
  one = (array(jnp.float32, kept.kv_heads, count), array(jnp.int32))
  return {
    "score": (score, (rest, book, q, positions)),
    "choose": (choose, (rest, table, positions)),
    "choose, the cut": (index.select, (of_cells, *one)),
    "choose, the pages": (pages, (rest, of_cells)),
    "tail": (tail, (rest, table, of_cells)),
  }
