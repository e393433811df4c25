r"""Exact attention over parts of a cache, and the merge that makes parts one softmax.

A part is attention over some of the keys: the unnormalised output, the running maximum of its
logits and the running sum of weights. Parts are merged in any order, so a cache may be attended
where its pieces lie, and an estimate can be one more part.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax.typing import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


@partial(jax.tree_util.register_dataclass, data_fields=["out", "peak", "total"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Part:
  r"""Softmax attention over some keys, not yet normalised.

  Attributes:
    out: :math:`\sum_t e^{l_t - peak} v_t`, ``[B, S, H, D]`` float32.
    peak: the largest logit, ``-inf`` where the part holds no key.
    total: :math:`\sum_t e^{l_t - peak}`.
  """

  out: Float[Array, "B S H D"]
  peak: Float[Array, "B S H"]
  total: Float[Array, "B S H"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["weights", "sums", "peak", "total"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Tail:
  r"""An estimate of attention over tokens that are not read, by codeword: weight times mean value.

  Attributes:
    weights: of every codeword, the weight of its tokens that are not read over the number of all
      its far tokens, relative to :math:`e^{peak}`; float32, 0 where the peak is ``-inf``.
    sums: of the values of all its far tokens, float32.
    peak: the largest logit of a token that is not read, ``-inf`` where there is none.
    total: the weight of all tokens that are not read, relative to :math:`e^{peak}`; 0 where the
      peak is ``-inf``.
  """

  weights: Float[Array, "B 1 H C"]
  sums: Float[Array, "B K C D"]
  peak: Float[Array, "B 1 H"]
  total: Float[Array, "B 1 H"]

  def part(self) -> Part:
    """The part that it stands for."""
    return Part(weigh(self.weights, self.sums), self.peak, self.total)


def grouped(q: Float[Array, "B S H D"], kv_heads: int) -> Float[Array, "B S K G D"]:
  """Query heads beside the KV head they share: head ``h`` belongs to KV head ``h // G``."""
  b, s, h, d = q.shape
  return q.reshape(b, s, kv_heads, h // kv_heads, d)


def logits(q: Float[Array, "B S H D"], k: Float[Array, "B K T D"]) -> Float[Array, "B S H T"]:
  """``q . k / sqrt(D)`` in float32, no mask. Both already rotated, or neither."""
  b, s, h, d = q.shape
  out = jnp.einsum(
    "bskgd,bktd->bskgt",
    grouped(q, k.shape[1]),
    k,
    preferred_element_type=jnp.float32,
    precision=_HIGHEST,
  )
  return out.reshape(b, s, h, k.shape[2]) * d**-0.5


def from_logits(
  scores: Float[Array, "B S H T"],
  values: Float[Array, "B K T D"],
  mask: Bool[Array, "B S H_or_1 T"],
) -> Part:
  """The part of the tokens in ``mask``.

  Args:
    scores: logits, float32.
    values: one per token and KV head.
    mask: tokens that count; the head axis may be 1.
  """
  scores = jnp.where(mask, scores, -jnp.inf)
  peak = jnp.max(scores, axis=-1)
  base = jnp.where(jnp.isfinite(peak), peak, 0.0)
  p = jnp.exp(scores - base[..., None])
  total = jnp.sum(p, axis=-1)
  return Part(weigh(p, values), peak, total)


def weigh(p: Float[Array, "B S H T"], values: Float[Array, "B K T D"]) -> Float[Array, "B S H D"]:
  """Values summed with weights, in float32; the weights take the values' dtype first.

  The contraction leaves its KV heads before its queries: asked for the other order, XLA's CPU
  backend takes a path that is five times slower (docs/performance.md).
  """
  b, s, h, t = p.shape
  _, kv_heads, _, d = values.shape
  out = jnp.einsum(
    "bskgt,bktd->bksgd",
    p.reshape(b, s, kv_heads, h // kv_heads, t).astype(values.dtype),
    values,
    preferred_element_type=jnp.float32,
    precision=_HIGHEST,
  )
  return jnp.swapaxes(out, 1, 2).reshape(b, s, h, d)


def per_query_head(mask: Bool[Array, "B S K T"], group: int) -> Bool[Array, "B S H T"]:
  """A mask of KV heads, repeated for the query heads of each group."""
  return jnp.repeat(mask, group, axis=2)


def merge(parts: Sequence[Part]) -> Part:
  """One part over the union of disjoint parts."""
  peak = jnp.max(jnp.stack([part.peak for part in parts]), axis=0)
  base = jnp.where(jnp.isfinite(peak), peak, 0.0)
  out, total = jnp.zeros_like(parts[0].out), jnp.zeros_like(parts[0].total)
  for part in parts:
    scale = jnp.exp(part.peak - base)
    out, total = out + part.out * scale[..., None], total + part.total * scale
  return Part(out, peak, total)


def merge_rows(part: Part, new: Part, rows: Int[Array, "W"]) -> Part:
  """Each row of a part merged with the new rows that belong to it, and with no other.

  On a GPU new rows of one row are added in no fixed order.

  Args:
    part: S = 1.
    new: W rows of as many heads.
    rows: of the part, that each of these belongs to; any number of times.
  """
  peak = part.peak.at[rows].max(new.peak)
  base = jnp.where(jnp.isfinite(peak), peak, 0.0)
  old, scale = jnp.exp(part.peak - base), jnp.exp(new.peak - base[rows])
  return Part(
    (part.out * old[..., None]).at[rows].add(new.out * scale[..., None]),
    peak,
    (part.total * old).at[rows].add(new.total * scale),
  )


def merge_across(part: Part, axis: str) -> Part:
  """:func:`merge` of the parts of all devices along a mesh axis, inside ``shard_map``.

  Exchanges ``B S H (D + 2)`` float32 numbers, whatever was attended.
  """
  peak = jax.lax.pmax(part.peak, axis)
  scale = jnp.exp(part.peak - jnp.where(jnp.isfinite(peak), peak, 0.0))
  out, total = jax.lax.psum((part.out * scale[..., None], part.total * scale), axis)
  return Part(out, peak, total)


def finish(part: Part) -> Float[Array, "B S H D"]:
  """The normalised output; zero where no key was attended."""
  return (
    jnp.where(part.total > 0, 1.0, 0.0)[..., None]
    * part.out
    / jnp.maximum(part.total, jnp.finfo(jnp.float32).tiny)[..., None]
  )


def causal_chunk(
  q: Float[Array, "B S H D"],
  k: Float[Array, "B K T D"],
  v: Float[Array, "B K T D"],
  start: Int[Array, ""],
  *,
  window: int | None = None,
) -> Float[Array, "B S H D"]:
  """Exact causal attention of one chunk of prompt queries over the keys up to its end.

  Walks key blocks of S tokens with a running softmax, so nothing larger than S x S per head is
  built, and blocks after the chunk, or wholly before the window, are never touched.

  Args:
    q: rotated queries at positions ``start .. start + S - 1``.
    k, v: rotated keys and values of the prompt by position; T a multiple of S.
    start: position of the first query, a multiple of S.
    window: keys that a query sees, its own included; all unless given.
  """
  b, s, h, d = q.shape
  kv_heads = k.shape[1]
  group = h // kv_heads
  rows = grouped(q, kv_heads).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * s, d)
  row = jnp.tile(jnp.arange(s, dtype=jnp.int32), group) + start

  def block(index, carry):
    out, peak, total = carry
    kb = jax.lax.dynamic_slice_in_dim(k, index * s, s, axis=2)
    vb = jax.lax.dynamic_slice_in_dim(v, index * s, s, axis=2)
    scores = jnp.einsum(
      "bkrd,bktd->bkrt", rows, kb, preferred_element_type=jnp.float32, precision=_HIGHEST
    )
    scores = scores * d**-0.5
    column = index * s + jnp.arange(s, dtype=jnp.int32)
    seen = column[None, :] <= row[:, None]
    if window is not None:
      seen &= column[None, :] > row[:, None] - window
    scores = jnp.where(seen[None, None], scores, -jnp.inf)
    new = jnp.maximum(peak, jnp.max(scores, axis=-1))
    p = jnp.exp(scores - new[..., None])
    shrink = jnp.exp(peak - new)
    out = out * shrink[..., None] + jnp.einsum(
      "bkrt,bktd->bkrd",
      p.astype(v.dtype),
      vb,
      preferred_element_type=jnp.float32,
      precision=_HIGHEST,
    )
    return out, new, total * shrink + jnp.sum(p, axis=-1)

  first = 0 if window is None else jnp.maximum(start - window + 1, 0) // s
  shape = rows.shape[:-1]
  # The running peak starts finite: in the first block of a window some rows see no key.
  carry = (
    jnp.zeros((*shape, d), jnp.float32),
    jnp.full(shape, jnp.finfo(jnp.float32).min),
    jnp.zeros(shape, jnp.float32),
  )
  out, _, total = jax.lax.fori_loop(first, start // s + 1, block, carry)
  out = (out / total[..., None]).reshape(b, kv_heads, group, s, d)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d)


def column_sums(
  q: Float[Array, "B S H D"],
  k: Float[Array, "B K T D"],
  start: Int[Array, ""],
  lengths: Int[Array, "B"],
) -> Float[Array, "B H T"]:
  """The attention that every key receives from one chunk of prompt queries, summed over them.

  Walks key blocks of S tokens twice, once for the normaliser of each query and once to add up.

  Args:
    q, k, start: as in :func:`causal_chunk`.
    lengths: tokens of each row; queries after them give nothing.
  """
  b, s, h, _ = q.shape
  row = start + jnp.arange(s, dtype=jnp.int32)

  def block(index: Array) -> Float[Array, "B S H S"]:
    keys = jax.lax.dynamic_slice_in_dim(k, index * s, s, axis=2)
    seen = (index * s + jnp.arange(s, dtype=jnp.int32))[None, :] <= row[:, None]
    return jnp.where(seen[None, :, None], logits(q, keys), -jnp.inf)

  def normaliser(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    peak, total = carry
    scores = block(index)
    new = jnp.maximum(peak, jnp.max(scores, axis=-1))
    return new, total * jnp.exp(peak - new) + jnp.sum(jnp.exp(scores - new[..., None]), axis=-1)

  blocks = start // s + 1
  carry = (jnp.full((b, s, h), -jnp.inf), jnp.zeros((b, s, h)))
  peak, total = jax.lax.fori_loop(0, blocks, normaliser, carry)
  gives = (row[None] < lengths[:, None])[:, :, None, None]

  def add(index: Array, sums: Array) -> Array:
    weight = jnp.exp(block(index) - peak[..., None]) / total[..., None]
    weight = jnp.sum(jnp.where(gives, weight, 0.0), axis=1)
    return jax.lax.dynamic_update_slice_in_dim(sums, weight, index * s, axis=2)

  return jax.lax.fori_loop(0, blocks, add, jnp.zeros((b, h, k.shape[2])))


def window_weights(
  q: Float[Array, "B W H D"], k: Float[Array, "B K T D"], lengths: Int[Array, "B"]
) -> Float[Array, "B W H T"]:
  """Causal attention weights of each row's last W queries, W x T numbers a query head.

  Args:
    q: rotated, place i that of position ``length - W + i``; a negative position gives zeros.
    k: rotated, slot = position.
  """
  w = q.shape[1]
  position = lengths[:, None] - w + jnp.arange(w, dtype=jnp.int32)[None]
  seen = jnp.arange(k.shape[2], dtype=jnp.int32)[None, None] <= position[:, :, None]
  scores = jnp.where(seen[:, :, None], logits(q, k), -jnp.inf)
  peak = jnp.max(scores, axis=-1, keepdims=True)
  weight = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
  total = jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  return weight / total
