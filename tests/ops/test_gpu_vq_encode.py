"""The Mosaic GPU key encoder, interpreted on the CPU with race detection."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from a2ats_jax.errors import UserError
from a2ats_jax.ops.vq_encode import gpu, offsets_of, reference

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# How far below the best a chosen score may lie, in parts of the largest product of norms: the
# rounding of float32 sums. Tensor cores are not emulated; on a GPU this is what to expect of them.
NEAR_TIE = 2e-6


class Shape(NamedTuple):
  keys: int
  kv_heads: int
  codewords: int
  head_dim: int
  dtype: Any = jnp.float32
  tiles: gpu.Tiles | None = None


SHAPES = {
  "default tiles": Shape(65, 1, 72, 64),
  "odd": Shape(67, 2, 33, 40, tiles=gpu.Tiles(codewords=16, stages=2)),
  "one of each": Shape(1, 1, 1, 8),
  "prime, in parts": Shape(
    131, 1, 37, 128, jnp.bfloat16, gpu.Tiles(codewords=24, stages=1, keys=64)
  ),
}
WRONG = SHAPES["odd"]


def arguments(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  rng = np.random.default_rng(23)
  n, k, c, d = shape[:4]
  keys = jnp.asarray(rng.normal(size=(n, k, d)), shape.dtype)
  whitener = np.tril(rng.normal(size=(k, d, d)))
  whitened = jnp.asarray(rng.normal(size=(k, c, d)) @ whitener, jnp.float32)
  return keys, jnp.asarray(whitener, jnp.float32), whitened, offsets_of(whitened)


def run(shape: Shape, args: tuple[jax.Array, ...], fault: Any = None) -> np.ndarray:
  codes = gpu.vq_encode(*args, tiles=shape.tiles, interpret=INTERPRET, _fault=fault)
  assert codes.dtype == jnp.uint16
  return np.asarray(codes)


def lost(args: tuple[jax.Array, ...], codes: np.ndarray) -> float:
  """The most that a chosen score lies below the best, in float64, in parts of |k L| |c L|."""
  keys, whitener, whitened = (np.asarray(x.astype(jnp.float32), np.float64) for x in args[:3])
  z = np.einsum("nkd,kde->nke", keys, whitener)
  scores = np.einsum("nke,kce->nkc", z, whitened) - 0.5 * np.sum(whitened**2, axis=-1)
  chosen = np.take_along_axis(scores, codes[..., None].astype(np.int64), axis=2)[..., 0]
  size = np.linalg.norm(z, axis=-1).max() * np.linalg.norm(whitened, axis=-1).max()
  return float(np.max(np.max(scores, axis=2) - chosen) / size)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_reference(name):
  args = arguments(SHAPES[name])
  codes = run(SHAPES[name], args)
  assert np.array_equal(codes, reference.vq_encode(*args))
  assert lost(args, codes) <= NEAR_TIE


def near(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Codewords of one place, a thousandth of their size apart."""
  keys, whitener, whitened, _ = arguments(shape)
  whitened = whitened[:, :1] + 1e-3 * whitened
  return keys, whitener, whitened, offsets_of(whitened)


def test_near_ties():
  args = near(WRONG)
  codes = run(WRONG, args)
  assert lost(args, codes) <= NEAR_TIE


def test_ties_go_to_the_lowest():
  """Every codeword is there three times, in one block and in two."""
  keys, whitener, whitened, _ = arguments(WRONG)
  whitened = jnp.tile(whitened[:, :11], (1, 3, 1))
  args = keys, whitener, whitened, offsets_of(whitened)
  codes = run(WRONG, args)
  assert codes.max() < 11
  assert np.array_equal(codes, reference.vq_encode(*args))


def test_offsets_are_those_given():
  """Not the norms of the codewords beside them."""
  *args, offsets = arguments(WRONG)
  other = (*args, offsets[:, ::-1])
  codes = run(WRONG, other)
  assert np.array_equal(codes, reference.vq_encode(*other))
  assert not np.array_equal(codes, reference.vq_encode(*args, offsets))


@pytest.mark.parametrize("fault", ["last block", "neighbour", "offset", "stale"])
def test_wrong_kernel_fails(fault):
  args = arguments(WRONG)
  assert not np.array_equal(run(WRONG, args, fault), reference.vq_encode(*args))


def test_one_bfloat16_product_is_too_coarse():
  args = near(WRONG)
  assert lost(args, run(WRONG, args, "rounded")) > NEAR_TIE


@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason="the interpreter of jax 0.11 sees fewer races"
)
def test_race_is_reported():
  with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
    run(WRONG, arguments(WRONG), "wait")


def test_pieces_add_up():
  x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 5, 64)), jnp.float32)
  pieces = np.asarray(gpu._split(x).astype(jnp.float32), np.float64)
  assert np.max(np.abs(pieces.sum(axis=0) - x) / np.abs(x)) <= 2**-24


def test_tiles_by_shape():
  assert gpu.Tiles.of(codewords=1024, head_dim=128) == gpu.Tiles(codewords=64, stages=2)
  assert gpu.Tiles.of(codewords=1024, head_dim=256) == gpu.Tiles(codewords=32, stages=2)
  assert gpu.Tiles.of(codewords=3, head_dim=64) == gpu.Tiles(codewords=8, stages=2)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"codewords": 12, "stages": 1}, "codewords must be a multiple of 8 up to 256, got 12"),
    ({"codewords": 8, "stages": 0}, "stages must be at least 1, got 0"),
    ({"codewords": 8, "stages": 1, "keys": 65}, "keys must be a multiple of 64, got 65"),
  ],
)
def test_bad_tiles_are_refused(sizes, message):
  with pytest.raises(UserError, match=message):
    gpu.Tiles(**sizes)


def test_too_much_shared_memory_is_refused():
  with pytest.raises(UserError, match="shared memory must be at most 228352, got"):
    gpu.vq_encode(*arguments(WRONG), tiles=gpu.Tiles(codewords=256, stages=4))


def test_hindrances():
  args = arguments(WRONG)
  assert gpu.hindrances("gpu", *args) == []
  assert gpu.hindrances("cpu", *args) == ["it needs an NVIDIA GPU, and the backend is cpu"]
  keys, *book = args
  half = [x.astype(jnp.bfloat16) for x in book]
  reasons = gpu.hindrances("gpu", keys[:63], *half)
  assert len(reasons) == 2
  assert "a tile is 64 keys, and 63 are quicker without one" in reasons
