"""Scoring and choosing far tokens: the published order, and the union over a group.

Shared by the reference, the oracle and the ablations; the fast path has to choose the same set.
"""

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, item_scores, score_table
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.index import kv_head_scores
from a2ats_jax.methods.base import Stats
from a2ats_jax.methods.dense import attend_masked, token_bytes
from a2ats_jax.rope import Rope, far_query
from a2ats_jax.typing import Array, Bool, Float, Int


def check_near(*, sinks: int, window: int) -> None:
  """Refuse what cannot be read in any case: the window holds at least the token itself."""
  if window < 1 or sinks < 0:
    raise UserError(
      f"window must be at least 1 token and sinks 0 or more, got {window} and {sinks}"
    )


def near_and_far(
  positions: Int[Array, "B S"], slots: int, *, sinks: int, window: int
) -> tuple[Bool[Array, "B S T"], Bool[Array, "B S T"]]:
  """Which slots each query reads in any case (sinks and window), and which are eligible.

  By the query's position alone, never by when a token was written: a token leaves the window when
  the decode position moves on. Slots after the query are in neither.
  """
  slot = jnp.arange(slots, dtype=positions.dtype)[None, None, :]
  distance = positions[:, :, None] - slot
  keep = (slot < sinks) | (distance < window)
  return keep & (distance >= 0), ~keep


def far_scores(
  q: Float[Array, "B S H D"],
  item_codes: Int[Array, "B K M"],
  *,
  positions: Int[Array, "B S"],
  starts: Int[Array, "B cuts"],
  far: FarPosition,
  segments: int,
  book: Codebook,
  rope: Rope,
) -> Float[Array, "B S H cells"]:
  """The far score of every cell, for the reference and the fast path alike.

  Args:
    q: before rotary embedding.
    item_codes: codewords of the tokens that are cells of their own, anything for those to come.
    positions: of the queries.
    starts: of the segments.
    segments: Z.
    book: of one layer.
  """
  distance = far.distances(positions, starts, segments)
  b, s, h, d = q.shape
  moved = far_query(jnp.broadcast_to(q[:, :, None], (b, s, segments, h, d)), distance, rope)
  old = far.prompt_segments
  table = score_table(moved[:, :, :old], book.codewords)
  if segments == old:
    return table
  heads = jnp.arange(book.codewords.shape[0], dtype=jnp.int32)[None, :, None]
  words = book.codewords[heads, item_codes]
  return jnp.concatenate([table, item_scores(moved[:, :, old:], words)], axis=-1)


def of_budget(
  budget: Budget, logits: Float[Array, "B S H T"], eligible: Bool[Array, "B S T"], kv_heads: int
) -> Float[Array, "B S heads T"]:
  """Scores of the heads that a budget grants tokens to, where every token is a cell of its own.

  Args:
    logits: far scores of query heads, divided by ``sqrt(D)``.
  """
  if budget.per == "query_head":
    return logits
  b, s, t = eligible.shape
  seen = jnp.broadcast_to(eligible[:, :, None], (b, s, kv_heads, t))
  return kv_head_scores(logits, seen.astype(jnp.int32))


def choose(
  scores: Float[Array, "B S heads T"],
  cells: Int[Array, "B K T"],
  eligible: Bool[Array, "B S T"],
  lengths: Int[Array, "B S"],
  budget: Budget,
) -> Bool[Array, "B S heads T"]:
  """Per head, the eligible tokens the budget grants, by (score down, cell up, index up).

  All of them when fewer are eligible. Tokens of one cell must carry the same score.

  Args:
    scores: far score of every token, of query heads or, for a budget per KV head, of KV heads.
    cells: the cell of every token; all zero where ties go by index alone.
    lengths: tokens cached up to each query, with its own.
  """
  b, s, h, t = scores.shape
  granted = budget.resolve(t)
  limit = int(granted.max())
  if limit == 0:
    return jnp.zeros(scores.shape, bool)
  count = jnp.asarray(granted)[lengths]
  kv_heads = cells.shape[1]
  scores = jnp.where(eligible[:, :, None], scores, -jnp.inf)
  # Tokens in (cell, index) order: from here on ties go to the lower place.
  order = jnp.argsort(cells, axis=-1, stable=True)
  place = jnp.argsort(order, axis=-1)
  ranked = jnp.take_along_axis(
    scores.reshape(b, s, kv_heads, h // kv_heads, t), order[:, None, :, None], axis=-1
  )
  best = jax.lax.top_k(ranked, limit)[0]
  last = jnp.take_along_axis(
    best, jnp.maximum(count - 1, 0)[:, :, None, None, None], axis=-1
  )  # the score of the last token granted
  better = ranked > last
  tied = ranked == last
  room = count[:, :, None, None, None] - jnp.sum(better, axis=-1, keepdims=True)
  chosen = better | (tied & (jnp.cumsum(tied, axis=-1) <= room))
  chosen &= (ranked > -jnp.inf) & (count > 0)[:, :, None, None, None]
  chosen = jnp.take_along_axis(chosen, place[:, None, :, None], axis=-1)
  return chosen.reshape(b, s, h, t)


def union(chosen: Bool[Array, "B S heads T"], kv_heads: int) -> Bool[Array, "B S K T"]:
  """Tokens that any query head of a KV head's group chose."""
  b, s, h, t = chosen.shape
  return jnp.any(chosen.reshape(b, s, kv_heads, h // kv_heads, t), axis=3)


def read_exactly(
  q: Float[Array, "B S H D"],
  keys: Float[Array, "B K T D"],
  values: Float[Array, "B K T D"],
  chosen: Bool[Array, "B S heads T"],
  near: Bool[Array, "B S T"],
  lengths: Int[Array, "B S"],
) -> tuple[attention.Part, Bool[Array, "B S K T"], Stats]:
  """Exact attention over the union of a group's choices and what is read in any case.

  Args:
    q, keys: rotated.

  Returns:
    The part, the far tokens chosen per KV head, and the statistics with no tail.
  """
  selected = union(chosen, keys.shape[1])
  read = selected | near[:, :, None]
  many = jnp.sum(read, axis=-1, dtype=jnp.int32)
  stats = Stats(
    length=lengths,
    selected=jnp.sum(selected, axis=-1, dtype=jnp.int32),
    read=many,
    tail=jnp.zeros(q.shape[:3]),
    read_bytes=token_bytes(many, keys),
    moved=jnp.zeros(many.shape),
  )
  return attend_masked(q, keys, values, read), selected, stats
