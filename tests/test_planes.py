"""Bit planes against an independent reading in NumPy, number by number."""

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import planes


def half(x: float, towards: float) -> float:
  """A float16 that does not lie on the wrong side of x."""
  near = np.float16(x)
  if (float(near) > x) if towards < 0 else (float(near) < x):
    near = np.nextafter(near, np.float16(towards))
  return float(near)


def told(x: np.ndarray, bits: int, side: int) -> tuple[np.ndarray, float]:
  """What one group stands for with so many bits, and the width of a cell."""
  order = np.argsort(x, kind="stable")
  inside = x[order[side : len(x) - side]]
  low = half(inside.min(), -np.inf)
  span = half(inside.max() - low, np.inf)
  cell = span / 2**bits
  out = np.full(len(x), low)
  if span:
    out += (np.clip(np.floor((x - low) / cell), 0, 2**bits - 1) + 0.5) * cell
  ends = np.concatenate([order[:side], order[len(x) - side :]])
  out[ends] = x[ends].astype(np.float16)
  return out, cell


def drawn(groups: int, dim: int, seed: int = 0) -> np.ndarray:
  """Groups of different sizes and means, one of them constant and one far from 0."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2, groups, dim)) * 10.0 ** rng.integers(-3, 3, size=(2, groups, 1))
  x[0, 1], x[1, 0] = 0.3, x[1, 0] + 1000
  return x.astype(np.float32)


def check(x: np.ndarray, bits: np.ndarray, side: int, got: np.ndarray) -> None:
  for place in np.ndindex(bits.shape):
    want, _ = told(x[place].astype(np.float64), int(bits[place]), side)
    scale = np.abs(x[place]).max()
    np.testing.assert_allclose(got[place], want, atol=3e-7 * scale, rtol=0, err_msg=str(place))


@pytest.mark.parametrize("side", [0, 1, 3])
def test_any_number_of_planes_is_quantisation_to_that_many_bits(side):
  """Lowered in two steps, to every number from 7 to 0."""
  x = drawn(9, 16)
  pool = planes.split(jnp.asarray(x), most=7, outliers=2 * side)
  check(x, np.full((2, 9), 7), side, np.asarray(planes.decode(pool)))
  first = np.array([[7, 5, 6, 4, 3, 7, 2, 1, 5], [4, 7, 7, 3, 0, 6, 5, 2, 1]])
  pool = planes.lower(pool, jnp.asarray(first, jnp.uint8), 50)
  assert pool.planes.shape == (2, 50, 2)
  check(x, first, side, np.asarray(planes.decode(pool)))
  second = np.maximum(first - np.arange(9)[None] % 4, 0)
  pool = planes.lower(pool, jnp.asarray(second, jnp.uint8), 50)
  check(x, second, side, np.asarray(planes.decode(pool)))


def test_the_range_holds_every_number():
  """Rounded to float16 outwards: with 24 planes nothing is lost but what float32 loses."""
  x = drawn(40, 8, seed=1)
  pool = planes.split(jnp.asarray(x), most=24, outliers=0)
  low, span = (np.asarray(y, np.float64) for y in (pool.low, pool.span))
  assert np.all(low <= x.min(axis=-1))
  assert np.all(low + span >= x.max(axis=-1).astype(np.float64))
  scale = np.abs(x).max(axis=-1, keepdims=True)
  assert np.all(np.abs(np.asarray(planes.decode(pool)) - x) <= 3e-7 * scale)


def test_eight_numbers_by_hand():
  """0 to 7 in cells of 7/8: codes 0 1 2 3 4 5 6 7."""
  pool = planes.split(jnp.arange(8.0)[None, None], most=3, outliers=0)
  np.testing.assert_array_equal(pool.planes[0, :, 0], [0b11110000, 0b11001100, 0b10101010])
  for bits, want in {
    3: (np.arange(8) + 0.5) * 0.875,
    2: [0.875, 0.875, 2.625, 2.625, 4.375, 4.375, 6.125, 6.125],
    1: [1.75] * 4 + [5.25] * 4,
    0: [3.5] * 8,
  }.items():
    lowered = planes.lower(pool, jnp.full((1, 1), bits, jnp.uint8), 3)
    np.testing.assert_array_equal(planes.decode(lowered)[0, 0], want)


def test_outliers_by_hand():
  """-100 and 60 are themselves; the others lie in two cells from 2 to 6."""
  x = jnp.asarray([2.0, 60.0, 3.0, 3.5, -100.0, 5.0, 6.0, 4.5])
  pool = planes.split(x[None, None], most=1, outliers=2)
  want = [3, 60, 3, 3, -100, 5, 5, 5]
  np.testing.assert_array_equal(planes.decode(pool)[0, 0], want)


def test_groups_are_appended_behind_what_is_left():
  """Rows of different lengths; a row that appends nothing keeps every bit."""
  x = drawn(6, 8, seed=2).reshape(2, 1, 6, 8)
  bits = np.array([[[3, 1, 2, 0, 0, 0]], [[4, 2, 0, 0, 0, 0]]], np.uint8)
  pool = planes.lower(planes.split(jnp.asarray(x), most=4, outliers=2), jnp.asarray(bits), 20)
  new = drawn(2, 8, seed=3).reshape(2, 1, 2, 8)
  pool = planes.append(pool, jnp.asarray(new), jnp.asarray([[3, 4], [-1, -1]], jnp.int32))
  bits[0, 0, 3:5] = 4
  np.testing.assert_array_equal(pool.bits, bits)
  x[0, 0, 3:5] = new[0, 0]
  got = np.asarray(planes.decode(pool))
  check(x[0], bits[0], 1, got[0])
  check(x[1, :, :2], bits[1, :, :2], 1, got[1, :, :2])
