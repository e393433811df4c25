"""Numbers in nested bit planes: groups of numbers in one pool, each of as many planes as it keeps.

A code is the number of a uniform cell between a group's lowest and highest number, and stands for
the middle of its cell. The top b bits of a code are the code of cells ``2^b`` times as many, so
that a group is quantised again, to fewer bits, by dropping its lowest planes and nothing else.
A group's planes lie one behind the other, the highest first, and groups in order of their number:
where one begins is the sum of the planes before it, and no index is stored.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import quantise
from a2ats_jax.typing import Array, Float, Int, UInt

MOST = 24  # planes of a group: what float32 can tell apart


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["planes", "bits", "low", "span", "place", "exact"],
  meta_fields=["most"],
)
@dataclasses.dataclass(frozen=True)
class PlanePool:
  """Groups of D numbers: ``D / 8`` bytes a plane, ``5 + 3 outliers`` a group.

  Attributes:
    planes: a number's bit each, the first number of each byte in its lowest bit; what lies after
      the last group's planes says nothing.
    bits: planes of each group; 0 too where there is none.
    low, span: float16, from the lowest to the highest number, outliers aside; low is rounded down
      and span up, so that no number lies outside.
    place, exact: which of the numbers are outliers, and these as float16.
    most: planes of a group that was written and not lowered yet.
  """

  planes: UInt[Array, "*lead slots bytes"]
  bits: UInt[Array, "*lead groups"]
  low: Float[Array, "*lead groups"]
  span: Float[Array, "*lead groups"]
  place: UInt[Array, "*lead groups outliers"]
  exact: Float[Array, "*lead groups outliers"]
  most: int


def zeros(
  lead: tuple[int, ...], *, groups: int, slots: int, dim: int, most: int, outliers: int
) -> PlanePool:
  """A pool without groups.

  Args:
    slots: planes there is room for.
    dim: D, a multiple of 8, and at most 256.
    outliers: of a group, on both sides together.
  """
  return PlanePool(
    jnp.zeros((*lead, slots, dim // 8), jnp.uint8),
    jnp.zeros((*lead, groups), jnp.uint8),
    jnp.zeros((*lead, groups), jnp.float16),
    jnp.zeros((*lead, groups), jnp.float16),
    jnp.zeros((*lead, groups, outliers), jnp.uint8),
    jnp.zeros((*lead, groups, outliers), jnp.float16),
    most,
  )


def _half(x: Float[Array, "*lead"], towards: float) -> Float[Array, "*lead"]:
  """The nearest float16 that is not on the wrong side of a number."""
  near = x.astype(jnp.float16)
  back = near.astype(jnp.float32)
  wrong = back > x if towards < 0 else back < x
  return jnp.where(wrong, jnp.nextafter(near, jnp.float16(towards)), near)


def split(x: Float[Array, "*lead groups D"], *, most: int, outliers: int) -> PlanePool:
  """Groups with all their planes, of ``most`` each.

  Args:
    outliers: as in :func:`zeros`: half of them the lowest numbers of a group, half the highest.
  """
  x = x.astype(jnp.float32)
  groups, d = x.shape[-2:]
  side = outliers // 2
  order = jnp.argsort(x, axis=-1, stable=True)
  ranked = jnp.take_along_axis(x, order, axis=-1)

  def ends(x: Array) -> Array:
    return jnp.concatenate([x[..., :side], x[..., d - side :]], axis=-1)

  low = _half(ranked[..., side], -np.inf)
  floor = low.astype(jnp.float32)
  span = _half(ranked[..., d - 1 - side] - floor, np.inf)
  width = span.astype(jnp.float32)[..., None]
  part = jnp.where(width > 0, (x - floor[..., None]) / jnp.where(width > 0, width, 1.0), 0.0)
  codes = jnp.clip(jnp.floor(part * 2.0**most), 0, 2.0**most - 1).astype(jnp.uint32)
  planes = [
    quantise.pack((codes >> jnp.uint32(most - 1 - p)) & jnp.uint32(1), 1) for p in range(most)
  ]
  return PlanePool(
    jnp.stack(planes, axis=-2).reshape(*x.shape[:-2], groups * most, d // 8),
    jnp.full(x.shape[:-1], most, jnp.uint8),
    low,
    span,
    ends(order).astype(jnp.uint8),
    ends(ranked).astype(jnp.float16),
    most,
  )


def begins(bits: UInt[Array, "*lead groups"]) -> Int[Array, "*lead groups"]:
  """Where each group's planes begin."""
  many = bits.astype(jnp.int32)
  return jnp.cumsum(many, axis=-1) - many


def lower(pool: PlanePool, bits: UInt[Array, "*lead groups"], slots: int) -> PlanePool:
  """The pool with fewer planes of some groups, moved together.

  Args:
    bits: no more than each group has, and no more than ``slots`` together.
    slots: of the new pool.
  """
  old, new = begins(pool.bits), begins(bits)
  slot = jnp.arange(slots, dtype=jnp.int32)

  def whence(old: Array, new: Array, bits: Array) -> Array:
    """The slot that each slot's plane comes from."""
    group = jnp.searchsorted(new + bits, slot, side="right").astype(jnp.int32)
    group = jnp.minimum(group, len(new) - 1)
    return jnp.minimum(old[group] + slot - new[group], pool.planes.shape[-2] - 1)

  for _ in range(bits.ndim - 1):
    whence = jax.vmap(whence)
  source = whence(old, new, bits.astype(jnp.int32))
  planes = jnp.take_along_axis(pool.planes, source[..., None], axis=-2)
  return dataclasses.replace(pool, planes=planes, bits=bits)


def append(
  pool: PlanePool, x: Float[Array, "B K groups D"], groups: Int[Array, "B groups"]
) -> PlanePool:
  """Write groups behind those there are, with all their planes.

  Args:
    groups: their numbers, which follow that of the last group; -1 is not stored.
  """
  b, kv_heads, many = x.shape[:3]
  new = split(x, most=pool.most, outliers=pool.place.shape[-1])
  used = jnp.sum(pool.bits, axis=-1, dtype=jnp.int32)
  rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
  at = jnp.where(groups < 0, pool.bits.shape[-1], groups)[:, None]
  real = jnp.repeat(groups >= 0, pool.most, axis=1)[:, None]
  slot = used[..., None] + jnp.arange(many * pool.most, dtype=jnp.int32)[None, None]
  slot = jnp.where(real, slot, pool.planes.shape[-2])

  def put(old: Array, new: Array, at: Array) -> Array:
    return old.at[rows, heads, at].set(new, mode="drop")

  return PlanePool(
    put(pool.planes, new.planes, slot),
    put(pool.bits, new.bits, at),
    put(pool.low, new.low, at),
    put(pool.span, new.span, at),
    put(pool.place, new.place, at),
    put(pool.exact, new.exact, at),
    pool.most,
  )


def decode(pool: PlanePool) -> Float[Array, "*lead groups D"]:
  """The numbers that codes stand for, float32: the middle of their cells, outliers as they are."""
  begin, bits = begins(pool.bits), pool.bits.astype(jnp.int32)
  part = jnp.expand_dims(0.5 / (1 << bits).astype(jnp.float32), -1)
  for p in range(pool.most):
    at = jnp.minimum(begin + p, pool.planes.shape[-2] - 1)
    plane = quantise.unpack(jnp.take_along_axis(pool.planes, at[..., None], axis=-2), 1)
    part = part + jnp.where((p < bits)[..., None], plane.astype(jnp.float32) * 0.5 ** (p + 1), 0.0)
  low, span = (x.astype(jnp.float32)[..., None] for x in (pool.low, pool.span))
  x = low + span * part
  channel = jnp.arange(x.shape[-1], dtype=jnp.uint8)
  channel = jnp.expand_dims(channel, tuple(range(x.ndim - 1)))
  for i in range(pool.place.shape[-1]):
    here = channel == pool.place[..., i : i + 1]
    x = jnp.where(here, pool.exact[..., i : i + 1].astype(jnp.float32), x)
  return x
