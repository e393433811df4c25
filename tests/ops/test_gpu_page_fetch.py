"""The Mosaic GPU page fetch, interpreted on the CPU with race detection, equals the reference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from a2ats_jax.errors import UserError
from a2ats_jax.ops.page_fetch import gpu, reference

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


class Shape(NamedTuple):
  pages: int
  width: int
  ids: tuple[int, ...]
  dtype: Any
  piece: int | None = None


SHAPES = {
  "repeated ids": Shape(7, 256, (3, 6, 0, 6, 5), jnp.float32),
  "one page": Shape(1, 128, (0,), jnp.bfloat16),
  "three pieces": Shape(3, 384, (2, 1), jnp.bfloat16, piece=128),
  "odd": Shape(11, 640, (10, 9, 0), jnp.float32),
}


def arguments(shape: Shape) -> tuple[jax.Array, jax.Array]:
  rng = np.random.default_rng(5)
  pages = jnp.asarray(rng.normal(size=(shape.pages, 2, shape.width)), shape.dtype)
  return pages, jnp.asarray(shape.ids, jnp.int32)


def equal(shape: Shape, fault: Any = None) -> bool:
  pages, ids = arguments(shape)
  tiles = None if shape.piece is None else gpu.Tiles(piece=shape.piece)
  out = gpu.page_fetch(pages, ids, tiles=tiles, interpret=INTERPRET, _fault=fault)
  expected = reference.page_fetch(pages, ids)
  return all(np.array_equal(x, y) for x, y in zip(out, expected))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_reference(name):
  assert equal(SHAPES[name])


@pytest.mark.parametrize("fault", ["last page", "neighbour", "swapped halves"])
def test_wrong_kernel_fails(fault):
  assert not equal(SHAPES["repeated ids"], fault)


@pytest.mark.parametrize(
  ("width", "itemsize", "piece"),
  [(2048, 2, 2048), (2048, 4, 1024), (1024, 2, 1024), (4096, 2, 2048), (128 * 17, 2, 128)],
)
def test_pieces_by_shape(width, itemsize, piece):
  assert gpu.Tiles.of(width=width, itemsize=itemsize) == gpu.Tiles(piece=piece)


def test_bad_tiles_are_refused():
  with pytest.raises(UserError, match="piece must be a multiple of 128, got 100"):
    gpu.Tiles(piece=100)
  pages, ids = arguments(SHAPES["odd"])
  with pytest.raises(UserError, match="piece must divide 640, got 256"):
    gpu.page_fetch(pages, ids, tiles=gpu.Tiles(piece=256))


def test_hindrances():
  pages, ids = arguments(SHAPES["odd"])
  assert gpu.hindrances("gpu", pages, ids) == []
  assert gpu.hindrances("cpu", pages, ids) == ["it needs an NVIDIA GPU, and the backend is cpu"]
  assert len(gpu.hindrances("tpu", pages[..., :100].astype(jnp.int8), ids[:0])) == 4
