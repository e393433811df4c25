"""How kernels cut their work: tile sizes with a choice by shape, and the bytes of a page on a TPU.

Sizes are chosen from what fits the fast memory and from how many bytes have to be under way to
cover a copy's latency. No size here was measured on a device; what was measured on one goes before
(:mod:`a2ats_jax.ops.stored_tiles`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int8

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Array, Float

LANES = 128
"""Numbers in a row of a TPU tile, whatever their size."""

SUBLANES = 8
"""Rows of a tile of 32-bit numbers."""

BYTE_ROWS = 32
"""Rows of a tile of bytes: pages that a TPU copies from host memory are whole tiles of 4 KiB."""

HEAD_DIMS = (64, 128, 256)
"""Head sizes that pages of bytes are laid out for."""

DECODE_BYTES = 512 << 10
"""Of a block of pages of ``paged_decode``, of which two are held."""

_HOST_BYTES = 256 << 10  # under way from host memory: 8 us at 32 GB/s
_DEVICE_BYTES = 1 << 20  # under way from device memory: 1 us at 1 TB/s
_ENCODE_KEYS, _ENCODE_CODEWORDS = 512, 512  # a block of scores is 1 MiB


def _at_least_one(op: str, **sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1:
      raise UserError(f"{op}: tile size {name} must be at least 1, got {size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchTiles:
  """Of ``page_fetch``.

  Attributes:
    depth: copies under way at once, each with a semaphore.
  """

  depth: int

  def __post_init__(self):
    _at_least_one("page_fetch", depth=self.depth)
    if self.depth > 64:
      raise UserError(f"page_fetch: tile size depth must be at most 64, got {self.depth}")

  @classmethod
  def of(cls, *, pages: int, page_bytes: int, host: bool) -> "FetchTiles":
    """Enough copies to cover the latency of the memory that is read.

    Args:
      pages: to fetch.
      page_bytes: of one.
      host: whether they lie in host memory.
    """
    wanted = -(-(_HOST_BYTES if host else _DEVICE_BYTES) // page_bytes)
    return cls(depth=max(1, min(wanted, 64 if not host else 32, pages)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiles:
  """Of ``paged_decode``.

  Attributes:
    pages: pages of one KV head attended at a time.
  """

  pages: int

  def __post_init__(self):
    _at_least_one("paged_decode", pages=self.pages)

  @classmethod
  def of(cls, *, pages: int, page_bytes: int) -> "DecodeTiles":
    """Blocks as even as can be, none above half a megabyte unless a page is.

    Args:
      pages: F, of one KV head.
      page_bytes: of one, keys and values.
    """
    most = max(1, DECODE_BYTES // page_bytes)
    blocks = -(-pages // most)
    return cls(pages=-(-pages // blocks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeTiles:
  """Of ``vq_encode``.

  Attributes:
    keys: keys of one KV head encoded at a time, a multiple of 128 unless it is all of them.
    codewords: codewords scored at a time, a multiple of 8 unless it is all of them.
  """

  keys: int
  codewords: int

  def __post_init__(self):
    _at_least_one("vq_encode", keys=self.keys, codewords=self.codewords)

  @classmethod
  def of(cls, *, keys: int, codewords: int) -> "EncodeTiles":
    """Blocks of 512 x 512 scores, or all there are.

    Args:
      keys: n.
      codewords: C.
    """
    return cls(keys=min(keys, _ENCODE_KEYS), codewords=min(codewords, _ENCODE_CODEWORDS))

  def check(self, *, keys: int, codewords: int) -> None:
    """Whether blocks of this size can be cut from n keys and C codewords.

    Raises:
      UserError: they cannot; the message says which and why.
    """
    for name, size, whole, unit in (
      ("keys", self.keys, keys, LANES),
      ("codewords", self.codewords, codewords, SUBLANES),
    ):
      if size > whole or (size < whole and size % unit):
        raise UserError(
          f"vq_encode: tile size {name} must be a multiple of {unit} below {whole}, or {whole}, "
          f"got {size}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupTiles:
  """Of ``lookup``.

  Attributes:
    rows: of 128 numbers of a table, gathered from in one pass of the loop, so that their latencies
      overlap.
  """

  rows: int

  def __post_init__(self):
    _at_least_one("lookup", rows=self.rows)
    if self.rows > 32:
      raise UserError(f"lookup: tile size rows must be at most 32, got {self.rows}")

  @classmethod
  def of(cls, *, numbers: int) -> "LookupTiles":
    """Four rows, whose gathers share their latency, or all that a table has.

    Args:
      numbers: of a table.
    """
    return cls(rows=max(1, min(4, -(-numbers // LANES))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageFormat:
  r"""A page of keys and values as rows of 128 bytes, which a TPU copies and reinterprets in place.

  A TPU copies a page from host memory by a dynamic number only where the page is whole tiles of
  bytes, so pages are stored as ``int8[R, 128]``. In fast memory ``pltpu.bitcast`` then makes
  numbers of ``s`` bytes from ``s`` consecutive ROWS: number ``[a, l]`` takes byte j (j = 0 the
  lowest) from byte row ``s a + j``, lane l. So a row of numbers is stored as s rows, first the
  lowest bytes of all its 128 numbers and last the highest. It is not the order in which the numbers
  lie in a computer's memory.

  Rows of numbers, by head size:

  - D = 128: P rows of keys, then P rows of values, a token a row.
  - D = 256: P rows of the first 128 dimensions of the keys, P of the others, then values likewise.
  - D = 64: P rows, a token each, its key in lanes 0..63 and its value in lanes 64..127.

  Attributes:
    page: P, tokens a page.
    dim: D.
    dtype: of the numbers, bfloat16 or float32.
  """

  page: int
  dim: int
  dtype: np.dtype

  def __post_init__(self):
    reasons = self.hindrances(page=self.page, dim=self.dim, dtype=self.dtype)
    if reasons:
      raise UserError(f"pages of bytes: {'; '.join(reasons)}")

  @staticmethod
  def hindrances(*, page: int, dim: int, dtype: np.dtype) -> list[str]:
    """Why pages of this shape cannot be bytes in whole tiles, a sentence each; empty if they can.

    Args:
      page: P.
      dim: D.
      dtype: of the numbers.
    """
    reasons = []
    if dim not in HEAD_DIMS:
      reasons.append(f"head size must be one of {', '.join(map(str, HEAD_DIMS))}, got {dim}")
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
      reasons.append(f"dtype must be bfloat16 or float32, got {dtype}")
    if reasons:
      return reasons
    unit = BYTE_ROWS * LANES // (2 * dim * dtype.itemsize)  # tokens that fill a tile of bytes
    if page < 1 or page % unit:
      what = f"for {dtype} and head size {dim}"
      reasons.append(f"tokens a page must be a multiple of {unit} {what}, got {page}")
    return reasons

  @property
  def width(self) -> int:
    """Rows of numbers that a key takes: D / 128, and 1 for D = 64."""
    return max(1, self.dim // LANES)

  @property
  def number_rows(self) -> int:
    """Rows of 128 numbers a page."""
    return 2 * self.page * self.dim // LANES

  @property
  def rows(self) -> int:
    """R, rows of 128 bytes a page: a multiple of 32."""
    return self.number_rows * self.dtype.itemsize

  def pack(
    self, k: Float[Array, "*lead P D"], v: Float[Array, "*lead P D"]
  ) -> Int8[Array, "*lead R 128"]:
    """Bytes of pages.

    Args:
      k, v: keys and values of whole pages, in the format's dtype.
    """
    lead = k.shape[:-2]
    if self.dim < LANES:
      x = jnp.concatenate([k, v], axis=-1)
    else:
      parts = (*lead, self.page, self.width, LANES)
      x = jnp.concatenate([jnp.swapaxes(x.reshape(parts), -2, -3) for x in (k, v)], axis=-3)
    x = x.reshape(*lead, self.number_rows, LANES)
    as_bytes = jax.lax.bitcast_convert_type(x, jnp.int8)  # the last axis holds a number's bytes
    return jnp.swapaxes(as_bytes, -1, -2).reshape(*lead, self.rows, LANES)

  def unpack(
    self, pages: Int8[Array, "*lead R 128"]
  ) -> tuple[Float[Array, "*lead P D"], Float[Array, "*lead P D"]]:
    """Keys and values of pages, bit for bit those that were packed."""
    lead = pages.shape[:-2]
    as_bytes = pages.reshape(*lead, self.number_rows, self.dtype.itemsize, LANES)
    x = jax.lax.bitcast_convert_type(jnp.swapaxes(as_bytes, -1, -2), self.dtype)
    if self.dim < LANES:
      return x[..., : self.dim], x[..., self.dim :]
    x = x.reshape(*lead, 2, self.width, self.page, LANES)
    x = jnp.swapaxes(x, -2, -3).reshape(*lead, 2, self.page, self.dim)
    return x[..., 0, :, :], x[..., 1, :, :]
