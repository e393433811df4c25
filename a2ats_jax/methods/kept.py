"""A cache that holds some of a row's tokens: what methods that evict keep.

The slots of all layers lie side by side, so that layers may hold different numbers of tokens and
every slot that a budget does not grant is memory that does not exist. A slot says which position it
holds; which tokens deserve one is the method's business.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.methods.dense import attend_masked, on_device, token_bytes
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int, Shaped


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["k", "v", "positions", "filled"],
  meta_fields=["sizes", "capacity"],
)
@dataclasses.dataclass(frozen=True)
class KeptCache:
  """Rotated keys, and values, of the tokens that were kept.

  Attributes:
    k, v: the slots of layer 0, then those of layer 1, and so on; where layers differ in size, the
      last one is followed by room for the largest, so that every layer is read as one block.
    positions: of the token in each slot; -1 where there is none.
    filled: slots of each layer that the prompt and :func:`append` have filled, the first ones.
      Methods that overwrite slots (:func:`slot_for`) go by positions alone.
    sizes: slots of every layer.
    capacity: no row ever has more tokens, kept or not.
  """

  k: Float[Array, "B K pool D"]
  v: Float[Array, "B K pool D"]
  positions: Int[Array, "B K pool"]
  filled: Int[Array, "L B K"]
  sizes: tuple[int, ...]
  capacity: int

  def offset(self, layer: int | Array) -> Int[Array, ""]:
    """Where a layer's slots begin."""
    return jnp.asarray(np.cumsum((0, *self.sizes[:-1])), jnp.int32)[layer]

  def size(self, layer: int | Array) -> Int[Array, ""]:
    """Slots of a layer."""
    return jnp.asarray(self.sizes, jnp.int32)[layer]


@dataclasses.dataclass(frozen=True)
class Kept:
  """One layer of a cache, as wide as the largest; slots that are not this layer's are empty."""

  k: Float[Array, "B K S D"]
  v: Float[Array, "B K S D"]
  positions: Int[Array, "B K S"]


def empty(geometry: Geometry, sizes: Iterable[int]) -> KeptCache:
  """A cache without tokens: ``2 B K pool D`` numbers and a position of 4 bytes a slot.

  Args:
    sizes: slots of every layer, each at least 1.
  """
  g, sizes = geometry, tuple(int(size) for size in sizes)
  offsets = np.cumsum((0, *sizes[:-1]))
  pool = int(offsets[-1]) + max(sizes)
  shape = (g.batch, g.kv_heads, pool)
  return KeptCache(
    jnp.zeros((*shape, g.head_dim), g.dtype),
    jnp.zeros((*shape, g.head_dim), g.dtype),
    jnp.full(shape, -1, jnp.int32),
    jnp.zeros((g.layers, g.batch, g.kv_heads), jnp.int32),
    sizes,
    g.capacity,
  )


def best(
  scores: Float[Array, "B K T"], count: Int[Array, "B"], eligible: Bool[Array, "B T"]
) -> Bool[Array, "B K T"]:
  """The ``count`` eligible tokens with the highest scores; ties go to the earlier token."""
  masked = jnp.where(eligible[:, None], scores, -jnp.inf)
  order = jnp.argsort(-masked, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return (rank < count[:, None, None]) & eligible[:, None]


def write_prompt(
  cache: KeptCache, prompt: PromptLayer, kept: Bool[Array, "B K T"], layer: int | Array
) -> KeptCache:
  """Store a prompt's kept tokens in the first slots of a layer, by position.

  Layers come in ascending order: where they differ in size, one clears what follows its own slots.

  Args:
    kept: no more tokens of a KV head than the layer has slots; later ones are lost.
  """
  width = min(max(cache.sizes), kept.shape[2])
  token = jnp.argsort(~kept, axis=-1, stable=True)[..., :width].astype(jnp.int32)
  count = jnp.minimum(jnp.sum(kept, axis=-1, dtype=jnp.int32), cache.size(layer))
  there = jnp.arange(width, dtype=jnp.int32)[None, None] < count[..., None]
  at = cache.offset(layer)

  def put(all_slots: Array, new: Array) -> Array:
    """Places that hold nothing may be the next layer's, which is written after this one."""
    start = (0, 0, at, 0)[: all_slots.ndim]
    return jax.lax.dynamic_update_slice(all_slots, new.astype(all_slots.dtype), start)

  def take(x: Array) -> Array:
    x = jnp.take_along_axis(jnp.swapaxes(x, 1, 2), token[..., None], axis=2)
    return jnp.where(there[..., None], x, 0)

  return dataclasses.replace(
    cache,
    k=put(cache.k, take(prompt.rotated)),
    v=put(cache.v, take(prompt.values)),
    positions=put(cache.positions, jnp.where(there, token, -1)),
    filled=jax.lax.dynamic_update_index_in_dim(cache.filled, count, layer, 0),
  )


def place(
  cache: KeptCache,
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  slots: Int[Array, "B K S"],
  positions: Int[Array, "B S"],
  layer: int | Array,
) -> KeptCache:
  """Write tokens into slots of a layer, over what is there.

  Args:
    k: rotated.
    slots: of the layer; -1 for a token that is not stored.
  """
  pool = cache.k.shape[2]
  at = jnp.where(slots < 0, pool, cache.offset(layer) + slots)
  rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :, None]

  def put(all_slots: Array, new: Array) -> Array:
    return all_slots.at[rows, heads, at].set(new.astype(all_slots.dtype), mode="drop")

  return dataclasses.replace(
    cache,
    k=put(cache.k, jnp.swapaxes(k, 1, 2)),
    v=put(cache.v, jnp.swapaxes(v, 1, 2)),
    positions=put(cache.positions, jnp.broadcast_to(positions[:, None], at.shape)),
  )


def append(
  cache: KeptCache,
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  positions: Int[Array, "B S"],
  layer: int | Array,
) -> KeptCache:
  """Write tokens into the next free slots; position -1 is not stored.

  A layer without a free slot loses the token: methods size their layers so that it cannot be.
  """
  real = (positions >= 0).astype(jnp.int32)
  filled = cache.filled[layer]
  slots = filled[..., None] + (jnp.cumsum(real, axis=1) - 1)[:, None]
  slots = jnp.where((real > 0)[:, None] & (slots < cache.size(layer)), slots, -1)
  count = jnp.minimum(filled + jnp.sum(real, axis=1)[:, None], cache.size(layer))
  cache = place(cache, k, v, slots, positions, layer)
  filled = jax.lax.dynamic_update_index_in_dim(cache.filled, count, layer, 0)
  return dataclasses.replace(cache, filled=filled)


def read(cache: KeptCache, layer: int | Array) -> Kept:
  """One layer."""
  width, at = max(cache.sizes), cache.offset(layer)
  k, v, positions = (
    jax.lax.dynamic_slice_in_dim(x, at, width, axis=2) for x in (cache.k, cache.v, cache.positions)
  )
  mine = jnp.arange(width, dtype=jnp.int32) < cache.size(layer)
  positions = jnp.where(mine[None, None], positions, -1)
  return Kept(*jax.lax.optimization_barrier((k, v, positions)))


def visible(kept: Kept, positions: Int[Array, "B S"]) -> Bool[Array, "B S K slots"]:
  """Slots that each query may see: tokens up to its own. None for padding."""
  held = kept.positions[:, None]
  return (held >= 0) & (held <= positions[:, :, None, None])


def attend(
  q: Float[Array, "B S H D"], kept: Kept, positions: Int[Array, "B S"]
) -> tuple[attention.Part, Stats]:
  """Exact attention over the tokens that were kept, and the statistics of that.

  Args:
    q: rotated.
  """
  mask = visible(kept, positions)
  read = jnp.sum(mask, axis=-1, dtype=jnp.int32)
  stats = on_device(positions + 1, read, q.shape[2], token_bytes(read, kept.k))
  return attend_masked(q, kept.k, kept.v, mask), stats


def append_and_attend(
  cache: KeptCache,
  q: Float[Array, "B S H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  *,
  positions: Int[Array, "B S"],
  rope: Rope,
  layer: int | Array,
) -> tuple[Float[Array, "B S H D"], KeptCache, Stats]:
  """A step of a method that evicts from the prompt alone: later tokens all stay.

  Args:
    q, k: before rotary embedding.
  """
  cache = append(cache, rotate(k, positions, rope), v, positions, layer)
  part, stats = attend(rotate(q, positions, rope), read(cache, layer), positions)
  return attention.finish(part).astype(q.dtype), cache, stats


def slot_for(
  kept: Kept,
  size: Int[Array, ""],
  allowed: Int[Array, "B"],
  worth: Float[Array, "B K S"],
  now: Int[Array, "B"],
) -> Int[Array, "B K"]:
  """Where a new token goes: a free slot while fewer tokens than allowed are held, else the slot of
  the token of least worth, the earlier on ties; -1 for padding.

  Args:
    size: slots of the layer, at least what is allowed.
    worth: of the tokens held; infinite for those that must not go.
    now: position of the token, -1 for padding.
  """
  there = kept.positions >= 0
  mine = jnp.arange(there.shape[2], dtype=jnp.int32)[None, None] < size
  free = jnp.argmax(mine & ~there, axis=-1).astype(jnp.int32)
  room = (jnp.sum(there, axis=-1) < allowed[:, None]) & jnp.any(mine & ~there, axis=-1)
  least = jnp.where(there, worth, jnp.inf)
  order = jnp.where(least == jnp.min(least, axis=-1, keepdims=True), kept.positions, 1 << 30)
  victim = jnp.argmin(jnp.where(there, order, 1 << 30), axis=-1).astype(jnp.int32)
  return jnp.where(now[:, None] < 0, -1, jnp.where(room, free, victim))


def weights(
  q: Float[Array, "B 1 H D"], kept: Kept, positions: Int[Array, "B 1"]
) -> tuple[Float[Array, "B K G S"], Bool[Array, "B K S"]]:
  """Attention weights of one query over the tokens it may see, and which these are.

  Args:
    q: rotated.
  """
  mask = visible(kept, positions)[:, 0]
  b, kv_heads, slots = mask.shape
  scores = attention.logits(q, kept.k)[:, 0].reshape(b, kv_heads, -1, slots)
  scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
  peak = jnp.max(scores, axis=-1, keepdims=True)
  weight = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
  total = jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  return weight / total, mask


def beside(
  pool: Shaped[Array, "B K pool *rest"], cache: KeptCache, layer: int | Array
) -> Shaped[Array, "B K S *rest"]:
  """A layer of what a method keeps beside the cache's slots, one of each slot."""
  return jax.lax.dynamic_slice_in_dim(pool, cache.offset(layer), max(cache.sizes), axis=2)


def put_beside(
  pool: Shaped[Array, "B K pool *rest"],
  one: Shaped[Array, "B K S *rest"],
  cache: KeptCache,
  layer: int | Array,
) -> Shaped[Array, "B K pool *rest"]:
  """The inverse of :func:`beside`; slots that are another layer's stay as they are."""
  mine = jnp.arange(one.shape[2], dtype=jnp.int32) < cache.size(layer)
  mine = jnp.expand_dims(mine, (0, 1, *range(3, one.ndim)))
  one = jnp.where(mine, one, beside(pool, cache, layer))
  return jax.lax.dynamic_update_slice_in_dim(pool, one, cache.offset(layer), axis=2)
