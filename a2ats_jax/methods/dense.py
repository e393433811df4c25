"""A cache with a slot for every token: what full attention and the references keep."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from a2ats_jax import attention
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.typing import Array, Bool, Float, Int, Shaped


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """Rotated keys, and values; slot = position. Slots that were never written hold zeros."""

  k: Float[Array, "L B K T D"]
  v: Float[Array, "L B K T D"]


def init(geometry: Geometry) -> DenseCache:
  """An empty cache of ``2 L B K T D`` numbers."""
  shape = (
    geometry.layers,
    geometry.batch,
    geometry.kv_heads,
    geometry.capacity,
    geometry.head_dim,
  )
  return zeros(shape, geometry.dtype)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> DenseCache:
  """Keys and values, each in memory of its own: a state's arrays are given away one by one."""
  return DenseCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_prompt(
  cache: Shaped[Array, "L B K T ..."], x: Shaped[Array, "B T0 K ..."], layer: int | Array
) -> Array:
  """Put a layer's prompt into the first slots. Padding is written too and overwritten later."""
  x = jnp.swapaxes(x, 1, 2)[None].astype(cache.dtype)
  return jax.lax.dynamic_update_slice(cache, x, (layer,) + (0,) * (cache.ndim - 1))


def append(cache: Array, x: Array, positions: Int[Array, "B S"], layer: int | Array) -> Array:
  """Write ``[B, S, K, ...]`` at ``positions`` of ``[L, B, K, T, ...]``; position -1 is dropped."""
  slots = jnp.where(positions < 0, cache.shape[3], positions)
  rows = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
  return cache.at[layer, rows, :, slots].set(x.astype(cache.dtype), mode="drop")


def read(cache: Shaped[Array, "L B K T ..."], layer: int | Array) -> Array:
  """One layer of a cache.

  Behind a barrier: XLA's CPU backend otherwise fuses this slice with the write before it and
  copies the whole cache in every layer (docs/performance.md).
  """
  return jax.lax.optimization_barrier(cache[layer])


def visible(positions: Int[Array, "B S"], slots: int) -> Bool[Array, "B S T"]:
  """Which slots each query may see: those up to its own. None for padding."""
  slot = jnp.arange(slots, dtype=positions.dtype)
  return slot[None, None, :] <= positions[:, :, None]


def attend_masked(
  q: Float[Array, "B S H D"],
  k: Float[Array, "B K T D"],
  v: Float[Array, "B K T D"],
  mask: Bool[Array, "B S K_or_1 T"],
) -> attention.Part:
  """Exact attention of rotated queries over the tokens of a mask per KV head."""
  group = q.shape[2] // k.shape[1]
  if mask.shape[2] > 1:
    mask = attention.per_query_head(mask, group)
  return attention.from_logits(attention.logits(q, k), v, mask)


def dense_stats(
  positions: Int[Array, "B S"], heads: int, kv_heads: int, keys: Shaped[Array, "*lead D"]
) -> Stats:
  """The statistics of a method that reads every token of a cache as ``keys`` is."""
  length = positions + 1
  read = jnp.broadcast_to(length[..., None], (*length.shape, kv_heads))
  return on_device(length, read, heads, token_bytes(read, keys))


def on_device(
  length: Int[Array, "B S"],
  read: Int[Array, "B S K"],
  heads: int,
  read_bytes: Shaped[Array, "B S K"],
) -> Stats:
  """The statistics of a method that chooses all it reads, estimates nothing and moves nothing."""
  return Stats(
    length=length,
    selected=read,
    read=read,
    tail=jnp.zeros((*length.shape, heads)),
    read_bytes=read_bytes.astype(jnp.float32),
    moved=jnp.zeros(read.shape),
  )


def token_bytes(read: Int[Array, "B S K"], keys: Shaped[Array, "*lead D"]) -> Float[Array, "B S K"]:
  """Bytes of the keys and values of some tokens, stored side by side as ``keys`` is."""
  return read.astype(jnp.float32) * (2 * keys.shape[-1] * keys.dtype.itemsize)


def write_prompt_cache(cache: DenseCache, prompt: PromptLayer, layer: int | Array) -> DenseCache:
  """Absorb one layer of a prompt."""
  return DenseCache(
    write_prompt(cache.k, prompt.rotated, layer), write_prompt(cache.v, prompt.values, layer)
  )
