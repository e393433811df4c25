"""One layer of any model over a whole prompt: exact attention, then a KV method takes it in.

This is where a model and a method meet. A model's attention layer calls :func:`prefill_layer` for
a prompt and :meth:`Method.attend` for every token after it; docs/embedding.md shows both in modules
of Flax NNX and Linen.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.methods.base import Method, PromptLayer, State, needs_of
from a2ats_jax.methods.sliding import Sliding
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int

CHUNK = 512  # prompt tokens attended at once

Projected = tuple[Array, Array, Array]  # queries, keys, values before rotary embedding


def chunk_of(length: int, most: int = CHUNK) -> int:
  """``most``, or for a short prompt the next power of two: few shapes, little padding."""
  return min(most, 1 << max(length - 1, 0).bit_length())


def prefill_layer(
  method: Method,
  state: State,
  q: Float[Array, "B T H D"],
  k: Float[Array, "B T K D"],
  v: Float[Array, "B T K D"],
  *,
  lengths: Int[Array, "B"],
  rope: Rope,
  layer: int | Array,
) -> tuple[Float[Array, "B T H D"], State]:
  """Exact causal attention of one layer over a prompt, and the state that has taken it in.

  Under :class:`a2ats_jax.methods.sliding.Sliding` attention is over its window, at ``T window``
  cost; under any other method over all tokens before.

  Works under ``jax.jit`` and inside a ``jax.lax.scan`` over layers. Position t lies in slot t.

  Args:
    state: of a geometry whose ``prompt`` is T.
    q, k, v: before rotary embedding; slots from a row's length on hold anything finite.
    lengths: tokens of each row, at least 1.
    layer: index of the layer, may be traced.

  Returns:
    The attention output in q's dtype, not yet projected and meaningless in padding; and the state.

  Raises:
    UserError: shapes that are no queries, keys and values of one prompt.
  """
  _check(q, k, v)
  (out, _, _), state = prefill_by_chunks(
    method,
    state,
    (q, k, v),
    project=lambda piece: piece,
    finish=lambda piece, out: (out, *piece[1:]),
    lengths=lengths,
    rope=rope,
    layer=layer,
  )
  return out, state


def prefill_by_chunks[X](
  method: Method,
  state: State,
  x: X,
  *,
  project: Callable[[X], Projected],
  finish: Callable[[X, Array], X],
  lengths: Int[Array, "B"],
  rope: Rope,
  layer: int | Array,
  chunk: int = CHUNK,
) -> tuple[X, State]:
  """As :func:`prefill_layer`, for a layer that computes what it can by chunks of the prompt.

  What lies before and after the attention is computed for ``chunk`` tokens at a time: neither all
  queries nor the hidden layer of an MLP exist for a whole prompt. ``x`` is overwritten in place.

  Args:
    x: what goes through the layer, a pytree of arrays ``[B, T, ...]``.
    project: of some tokens of ``x``, queries, keys and values before rotary embedding.
    finish: of the same tokens and their attention output ``[B, S, H, D]``, what leaves the layer,
      in the shapes and dtypes of ``x``.
    chunk: tokens attended at once.

  Returns:
    What leaves the layer, and the state.
  """
  b, t = jax.tree.leaves(x)[0].shape[:2]
  chunk, needs = chunk_of(t, chunk), needs_of(method)
  window = method.window if isinstance(method, Sliding) else None
  width = chunk * -(-t // chunk)
  x = jax.tree.map(lambda a: _widen(a, width), x)

  def piece_of(x: X, start: Array) -> X:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk, 1), x)

  like_q, like_k, like_v = jax.eval_shape(lambda x: project(piece_of(x, jnp.int32(0))), x)
  kv_heads, dim = like_k.shape[2:]
  heads = like_q.shape[2]
  rotated = jnp.zeros((b, kv_heads, width, dim), like_k.dtype)
  values = jnp.zeros((b, kv_heads, width, dim), like_v.dtype)
  keys = jnp.zeros((b, width, kv_heads, dim), like_k.dtype)
  queries = jnp.zeros((b, needs.queries, heads, dim), like_q.dtype)
  sums = jnp.zeros((b, heads, width if needs.sums else 0))
  rows = jnp.arange(b, dtype=jnp.int32)[:, None]

  def step(carry, start):
    x, rotated, values, keys, queries, sums = carry
    piece = piece_of(x, start)
    positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (b, chunk))
    q, k, v = project(piece)
    k_now = rotate(k, positions, rope)
    rotated = jax.lax.dynamic_update_slice_in_dim(rotated, jnp.swapaxes(k_now, 1, 2), start, 2)
    values = jax.lax.dynamic_update_slice_in_dim(values, jnp.swapaxes(v, 1, 2), start, 2)
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k, start, 1)
    q = rotate(q, positions, rope)
    out = attention.causal_chunk(q, rotated, values, start, window=window)
    x = jax.tree.map(
      lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, start, 1),
      x,
      finish(piece, out.astype(q.dtype)),
    )
    if needs.queries:
      place = positions - lengths[:, None] + needs.queries
      inside = (place >= 0) & (place < needs.queries)
      queries = queries.at[rows, jnp.where(inside, place, needs.queries)].set(q, mode="drop")
    if needs.sums:
      sums = sums + attention.column_sums(q, rotated, start, lengths)
    return (x, rotated, values, keys, queries, sums), None

  starts = jnp.arange(0, width, chunk, dtype=jnp.int32)
  carry = (x, rotated, values, keys, queries, sums)
  (x, rotated, values, keys, queries, sums), _ = jax.lax.scan(step, carry, starts)
  prompt = PromptLayer(
    keys[:, :t],
    jnp.swapaxes(rotated, 1, 2)[:, :t],
    jnp.swapaxes(values, 1, 2)[:, :t],
    lengths,
    queries if needs.queries else None,
    sums[..., :t] if needs.sums else None,
  )
  return jax.tree.map(lambda a: a[:, :t], x), method.absorb(state, prompt, layer=layer)


def _widen(a: Array, width: int) -> Array:
  """Zeros behind ``[B, T, ...]`` up to a width."""
  return jnp.pad(a, ((0, 0), (0, width - a.shape[1]), *((0, 0),) * (a.ndim - 2)))


def _check(q: Array, k: Array, v: Array) -> None:
  if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
    raise UserError(
      "prefill_layer: expected q [B, T, H, D] and k and v [B, T, K, D], got "
      f"{q.shape}, {k.shape} and {v.shape}"
    )
  if q.shape[2] % k.shape[2]:
    raise UserError(
      f"prefill_layer: {q.shape[2]} query heads are not a multiple of {k.shape[2]} KV heads"
    )
