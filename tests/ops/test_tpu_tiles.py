"""Tile sizes, and the bytes of a page as a TPU reads them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from a2ats_jax.errors import UserError
from a2ats_jax.ops import tiles
from a2ats_jax.ops.paged_decode import tpu

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
FORMS = [
  tiles.PageFormat(page=page, dim=dim, dtype=dtype)
  for dim, page, dtype in (
    (64, 16, BF16),
    (64, 32, BF16),
    (64, 8, F32),
    (128, 8, BF16),
    (128, 16, BF16),
    (128, 4, F32),
    (128, 24, F32),
    (256, 4, BF16),
    (256, 16, BF16),
    (256, 2, F32),
  )
]


def _bits(form: tiles.PageFormat, shape: tuple[int, ...], seed: int) -> jax.Array:
  """Numbers of every bit pattern, not-a-numbers with their payloads too."""
  rng = np.random.default_rng(seed)
  size = 8 * form.dtype.itemsize
  raw = rng.integers(0, 1 << size, shape, dtype=f"uint{size}")
  return jax.lax.bitcast_convert_type(jnp.asarray(raw), form.dtype)


def _u8(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint8)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pages_come_back_bit_for_bit(form):
  k, v = (_bits(form, (2, 3, form.page, form.dim), seed) for seed in (0, 1))
  packed = form.pack(k, v)
  assert packed.shape == (2, 3, form.rows, 128)
  assert packed.dtype == jnp.int8
  assert form.rows % 32 == 0
  assert form.rows * 128 == 2 * form.page * form.dim * form.dtype.itemsize
  for got, want in zip(form.unpack(packed), (k, v)):
    np.testing.assert_array_equal(_u8(got), _u8(want))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_byte_lies_where_the_format_says(form):
  """Against shifts of integers: no conversion of XLA's, nor the order of a machine's bytes."""
  k, v = (_bits(form, (form.page, form.dim), seed) for seed in (2, 3))
  size = form.dtype.itemsize
  integers = jnp.uint16 if size == 2 else jnp.uint32
  numbers = [np.asarray(jax.lax.bitcast_convert_type(x, integers)) for x in (k, v)]
  want = np.zeros((form.rows, 128), np.uint8)
  for which, x in enumerate(numbers):
    for token in range(form.page):
      for dim in range(form.dim):
        if form.dim == 64:
          row, lane = token, 64 * which + dim
        else:
          row = (which * form.dim // 128 + dim // 128) * form.page + token
          lane = dim % 128
        for byte in range(size):
          want[size * row + byte, lane] = int(x[token, dim]) >> 8 * byte & 0xFF
  np.testing.assert_array_equal(np.asarray(form.pack(k, v)).view(np.uint8), want)


def _split(refs_in, keys, values, *, form):
  parts = tpu._packed([refs_in], form=form)
  for out, found in zip((keys, values), parts):
    out[...] = jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_kernel_sees_the_keys_and_values(form):
  """What ``pltpu.bitcast`` makes of the bytes, in interpret mode."""
  pages = 3
  k, v = (_bits(form, (pages, form.page, form.dim), seed) for seed in (4, 5))
  width = max(form.dim, 128)
  out = jax.ShapeDtypeStruct((pages * form.page, width), form.dtype)
  call = pl.pallas_call(partial(_split, form=form), out_shape=[out, out], interpret=True)
  keys, values = call(form.pack(k, v)[None])
  flat = [x.reshape(-1, form.dim) for x in (k, v)]
  np.testing.assert_array_equal(_u8(keys[:, : form.dim]), _u8(flat[0]))
  np.testing.assert_array_equal(_u8(values[:, width - form.dim :]), _u8(flat[1]))


@pytest.mark.parametrize(
  ("page", "dim", "dtype", "message"),
  [
    (16, 80, BF16, "head size must be one of 64, 128, 256, got 80"),
    (16, 128, jnp.dtype(jnp.float16), "dtype must be bfloat16 or float32, got float16"),
    (12, 128, BF16, "must be a multiple of 8 for bfloat16 and head size 128, got 12"),
    (4, 64, F32, "must be a multiple of 8 for float32 and head size 64, got 4"),
    (0, 64, F32, "must be a multiple of 8 for float32 and head size 64, got 0"),
  ],
)
def test_a_format_that_is_no_whole_tile_is_refused(page, dim, dtype, message):
  with pytest.raises(UserError, match=re.escape(message)):
    tiles.PageFormat(page=page, dim=dim, dtype=dtype)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: tiles.FetchTiles(depth=0), "tile size depth must be at least 1, got 0"),
    (lambda: tiles.FetchTiles(depth=65), "tile size depth must be at most 64, got 65"),
    (lambda: tiles.DecodeTiles(pages=0), "tile size pages must be at least 1, got 0"),
    (lambda: tiles.EncodeTiles(keys=0, codewords=1), "tile size keys must be at least 1, got 0"),
    (
      lambda: tiles.EncodeTiles(keys=100, codewords=8).check(keys=200, codewords=8),
      "tile size keys must be a multiple of 128 below 200, or 200, got 100",
    ),
    (
      lambda: tiles.EncodeTiles(keys=7, codewords=9).check(keys=7, codewords=8),
      "tile size codewords must be a multiple of 8 below 8, or 8, got 9",
    ),
  ],
)
def test_a_size_that_cannot_be_is_refused(make, message):
  with pytest.raises(UserError, match=re.escape(message)):
    make()


def test_the_choice_by_shape_fits():
  for pages in (1, 2, 7, 127, 128, 1000):
    for page_bytes in (4096, 8192, 1 << 20):
      for host in (True, False):
        chosen = tiles.FetchTiles.of(pages=pages, page_bytes=page_bytes, host=host)
        assert chosen.depth <= pages
      block = tiles.DecodeTiles.of(pages=pages, page_bytes=page_bytes).pages
      assert 1 <= block <= pages
      assert block == 1 or block * page_bytes <= 1 << 19
      blocks = -(-pages // block)
      assert blocks * block - pages < blocks, "blocks are as even as can be"
  for keys in (1, 7, 128, 513):
    for codewords in (1, 6, 256, 1000):
      tiles.EncodeTiles.of(keys=keys, codewords=codewords).check(keys=keys, codewords=codewords)
