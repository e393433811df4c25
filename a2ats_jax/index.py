"""Which tokens lie in which cell, and the cut that turns cell scores into selected tokens.

A far token's score depends on its cell alone, its (segment, codeword) pair. So what a query head is
granted are all tokens of the better cells and the first tokens, by position, of the boundary one;
and for a KV head the union over its group is, per cell, the longest of these prefixes: one number a
cell. No token has a score of its own and nothing is sorted when a query comes.

This chooses exactly the tokens that ``choose`` and ``union`` of
:mod:`a2ats_jax.methods.selection` choose, ties included: the order (score, cell, index) makes every
selected set a prefix of each cell.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from a2ats_jax.typing import Array, Bool, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["counts", "cells", "ranks"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CodeIndex:
  """The far tokens of one layer, or (leading axis L) of all, by cell.

  Invariants: ``counts[c]`` is the number of slots with cell c, and their ranks are 0, 1, ... in the
  order of the tokens' positions. An empty slot has the cell after the last.

  Attributes:
    counts: tokens of every cell.
    cells: the cell of the token in every slot.
    ranks: its place among the tokens of its cell.
  """

  counts: Int[Array, "*L B K cells"]
  cells: Int[Array, "*L B K slots"]
  ranks: Int[Array, "*L B K slots"]


def build(
  cells: Int[Array, "B K T"],
  eligible: Bool[Array, "B T"],
  *,
  count: int,
  slots: int,
  order: Literal["cell", "arrival"] = "cell",
) -> tuple[CodeIndex, Int[Array, "B K T"]]:
  """Index a prompt.

  Args:
    cells: of every token, 0 .. ``count`` - 1.
    eligible: tokens to index; the others get no slot.
    count: number of cells.
    slots: room for the prompt and for tokens appended later, at least T.
    order: ``cell`` puts a cell's tokens side by side, ``arrival`` keeps tokens by position.

  Returns:
    The index, and for every slot up to T the token that belongs there; slots after a row's
    eligible tokens are empty, whatever token they name.
  """
  b, kv_heads, t = cells.shape
  there = jnp.broadcast_to(eligible[:, None], cells.shape)
  marked = jnp.where(there, cells, count)
  by_cell = jnp.argsort(marked, axis=-1, stable=True)
  sorted_cells = jnp.take_along_axis(marked, by_cell, axis=-1)
  rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
  counts = jnp.zeros((b, kv_heads, count), jnp.int32).at[rows, heads, marked].add(1, mode="drop")
  starts = jnp.cumsum(counts, axis=-1) - counts
  place = jnp.arange(t, dtype=jnp.int32)[None, None]
  first = jnp.take_along_axis(starts, jnp.minimum(sorted_cells, count - 1), axis=-1)
  sorted_ranks = jnp.where(sorted_cells < count, place - first, 0)
  if order == "cell":
    token, in_slot, ranks = by_cell, sorted_cells, sorted_ranks
  else:
    token = jnp.argsort(~there, axis=-1, stable=True)
    back = jnp.argsort(by_cell, axis=-1)  # where each token stands in the order by cell
    in_slot = jnp.take_along_axis(marked, token, axis=-1)
    ranks = jnp.take_along_axis(jnp.take_along_axis(sorted_ranks, back, axis=-1), token, axis=-1)
  more = ((0, 0), (0, 0), (0, slots - t))
  index = CodeIndex(counts, jnp.pad(in_slot, more, constant_values=count), jnp.pad(ranks, more))
  return index, token


def append(index: CodeIndex, cells: Int[Array, "B K"], slot: Int[Array, "B"]) -> CodeIndex:
  """Put one token of every row, later than all before it, into an empty slot; -1 for none."""
  b, kv_heads, slots = index.cells.shape
  rows = jnp.arange(b, dtype=jnp.int32)[:, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None]
  there = (slot >= 0)[:, None]
  where = jnp.where(there, slot[:, None], slots)
  rank = jnp.take_along_axis(index.counts, cells[..., None], axis=-1)[..., 0]
  return CodeIndex(
    index.counts.at[rows, heads, cells].add(there.astype(jnp.int32)),
    index.cells.at[rows, heads, where].set(cells, mode="drop"),
    index.ranks.at[rows, heads, where].set(rank, mode="drop"),
  )


def _ordered(scores: Float[Array, "*batch cells"]) -> Int[Array, "*batch cells"]:
  """Integers in the order of float32 scores; both zeros are one number."""
  bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
  return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def cut(
  scores: Float[Array, "B H cells"], counts: Int[Array, "B H cells"], granted: Int[Array, "B"]
) -> Int[Array, "B H cells"]:
  """How many tokens of every cell are among the first ``granted``, by (score, cell, index).

  Finds the boundary cell's score by halving the range of its 32 bits and counting tokens, so no
  cell is sorted. All tokens where there are fewer than granted.

  Args:
    scores: float32, no NaN. Cells of the same score are taken in their order.
    counts: tokens of every cell.
  """
  keys = _ordered(scores)
  wanted = jnp.minimum(granted[:, None], jnp.sum(counts, axis=-1))

  def at_least(key: Array) -> Array:
    return jnp.sum(jnp.where(keys >= key[..., None], counts, 0), axis=-1)

  def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds  # the largest key that still has enough tokens lies between, both included
    span = (high - low).astype(jnp.uint32)  # wraps to the true distance
    middle = low + ((span >> 1) + (span & 1)).astype(jnp.int32)
    enough = at_least(middle) >= wanted
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

  bounds = jnp.min(keys, axis=-1), jnp.max(keys, axis=-1)
  boundary = jax.lax.fori_loop(0, 32, halve, bounds)[0][..., None]
  better = jnp.where(keys > boundary, counts, 0)
  tied = jnp.where(keys == boundary, counts, 0)
  room = wanted[..., None] - jnp.sum(better, axis=-1, keepdims=True)
  earlier = jnp.cumsum(tied, axis=-1) - tied
  return better + jnp.clip(room - earlier, 0, tied)


def select(
  index: CodeIndex, scores: Float[Array, "B H cells"], granted: Int[Array, "B"]
) -> Int[Array, "B K cells"]:
  """Tokens to read of every cell: for each KV head the longest prefix over its group.

  Args:
    scores: of one decode step's cells, :func:`a2ats_jax.codebook.score_table`.
    granted: tokens each query head may read.
  """
  b, heads, cells = scores.shape
  kv_heads = index.counts.shape[1]
  counts = jnp.repeat(index.counts, heads // kv_heads, axis=1)
  taken = cut(scores, counts, granted)
  return jnp.max(taken.reshape(b, kv_heads, heads // kv_heads, cells), axis=2)


def selected(index: CodeIndex, taken: Int[Array, "B K cells"]) -> Bool[Array, "B K slots"]:
  """The slots whose tokens are read: rank below what is taken of the slot's cell."""
  cells = taken.shape[-1]
  limit = jnp.take_along_axis(taken, jnp.minimum(index.cells, cells - 1), axis=-1)
  return (index.ranks < limit) & (index.cells < cells)


def pages_of(chosen: Bool[Array, "B K slots"], page: int) -> Bool[Array, "B K N"]:
  """The pages of ``page`` slots that hold a selected token; slots a multiple of the page."""
  b, kv_heads, slots = chosen.shape
  return jnp.any(chosen.reshape(b, kv_heads, slots // page, page), axis=-1)
