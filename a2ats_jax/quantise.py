"""Numbers as packed integers of 2, 4 or 8 bits, a group of neighbours with one scale and one floor.

Groups lie along the last axis; who wants them along tokens puts tokens last. 16 bits means that
numbers are kept as they are: the same code then says what quantisation costs.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Array, Float, Shaped, UInt

BITS = (2, 4, 8, 16)


@partial(
  jax.tree_util.register_dataclass, data_fields=["words", "scale", "low"], meta_fields=["bits"]
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """Quantised numbers, n of them along the last axis.

  Attributes:
    words: ``n bits / 8`` bytes, the first number of each byte in its lowest bits; with 16 bits the
      numbers themselves.
    scale, low: float16, one a group: number = code * scale + low. Without elements with 16 bits.
    bits: of a number.
  """

  words: Shaped[Array, "*lead words"]
  scale: Float[Array, "*lead groups"]
  low: Float[Array, "*lead groups"]
  bits: int


def check(bits: int, group: int) -> None:
  """Refuse what cannot be packed."""
  if bits not in BITS:
    raise UserError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits}")
  if group < 1 or group * bits % 8:
    raise UserError(f"group: expected numbers that fill whole bytes, got {group} of {bits} bits")


def pack(codes: UInt[Array, "*lead n"], bits: int) -> UInt[Array, "*lead words"]:
  """Codes below ``2 ** bits`` as bytes; n a multiple of ``8 / bits``."""
  each = 8 // bits
  pieces = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, each)
  shifts = jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(bits)
  shifted = pieces << jnp.expand_dims(shifts, tuple(range(pieces.ndim - 1)))
  return jnp.sum(shifted, axis=-1, dtype=jnp.uint8)


def unpack(words: UInt[Array, "*lead words"], bits: int) -> UInt[Array, "*lead n"]:
  """The inverse of :func:`pack`."""
  each = 8 // bits
  shifts = jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(bits)
  pieces = words[..., None] >> jnp.expand_dims(shifts, tuple(range(words.ndim)))
  pieces &= jnp.uint8((1 << bits) - 1)
  return pieces.reshape(*words.shape[:-1], -1)


def encode(x: Float[Array, "*lead n"], *, bits: int, group: int) -> Packed:
  r"""Quantise: ``scale = (max - min) / (2^bits - 1)``, ``code = round((x - min) / scale)``.

  As KIVI's repository does (``new_pack.py``), with guards: the scale of a constant group is 0 and
  its floor gives it back; floors and scales stay in float16's range, so that numbers beyond 65504
  come back as the largest there is and never as an infinity. Codes are taken against the float16
  scale and floor that are stored, so that reading is the exact inverse of writing.

  Args:
    x: n a multiple of ``group``.
    bits: 2, 4, 8, or 16 for no quantisation.
    group: numbers that share a scale and a floor.
  """
  if bits == 16:
    none = jnp.zeros((*x.shape[:-1], 0), jnp.float16)
    return Packed(x, none, none, bits)
  groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
  most = float(jnp.finfo(jnp.float16).max)
  low = jnp.clip(jnp.min(groups, axis=-1), -most, most).astype(jnp.float16)
  floor = low.astype(jnp.float32)
  top = (1 << bits) - 1
  scale = jnp.clip((jnp.max(groups, axis=-1) - floor) / top, 0.0, most).astype(jnp.float16)
  step = scale.astype(jnp.float32)[..., None]
  codes = jnp.where(step > 0, (groups - floor[..., None]) / jnp.where(step > 0, step, 1.0), 0.0)
  codes = jnp.clip(jnp.rint(codes), 0, top).astype(jnp.uint8)
  return Packed(pack(codes.reshape(x.shape), bits), scale, low, bits)


def zeros(shape: tuple[int, ...], *, bits: int, group: int, dtype: DTypeLike) -> Packed:
  """What :func:`encode` makes of zeros, without computing it.

  Args:
    shape: before packing.
    dtype: of numbers that are not quantised.
  """
  *lead, n = shape
  words = jnp.zeros(shape, dtype) if bits == 16 else jnp.zeros((*lead, n * bits // 8), jnp.uint8)
  groups = (*lead, 0 if bits == 16 else n // group)
  scale, low = jnp.zeros(groups, jnp.float16), jnp.zeros(groups, jnp.float16)  # two arrays
  return Packed(words, scale, low, bits)


def decode(packed: Packed, dtype=jnp.float32) -> Float[Array, "*lead n"]:
  """The numbers that quantised ones stand for."""
  if packed.bits == 16:
    return packed.words.astype(dtype)
  codes = unpack(packed.words, packed.bits)
  groups = codes.reshape(*packed.scale.shape, -1).astype(jnp.float32)
  scale, low = (x.astype(jnp.float32)[..., None] for x in (packed.scale, packed.low))
  return (groups * scale + low).reshape(codes.shape).astype(dtype)


def bytes_of(n: int, *, bits: int, group: int, itemsize: int) -> int:
  """Bytes of n quantised numbers, their scales and floors.

  Args:
    itemsize: bytes of a number that is not quantised.
  """
  return n * itemsize if bits == 16 else n * bits // 8 + n // group * 4
