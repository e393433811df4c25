"""Packed integers against an independent reading in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax import quantise
from a2ats_jax.errors import UserError


def told(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
  """What quantised numbers stand for, and the step of each, one group at a time."""
  out, steps = np.zeros(x.shape), np.zeros(x.shape)
  for row in np.ndindex(x.shape[:-1]):
    for start in range(0, x.shape[-1], group):
      part = x[row][start : start + group].astype(np.float64)
      low = float(np.float16(part.min()))
      step = float(np.float16(max(part.max() - low, 0) / (2**bits - 1)))
      code = np.clip(np.rint((part - low) / step), 0, 2**bits - 1) if step else 0 * part
      out[row][start : start + group] = code * step + low
      steps[row][start : start + group] = step
  return out, steps


@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-3, 1.0, 50.0]))
def test_equals_the_formula(bits, seed, size):
  """A number may fall to the neighbouring code where float32 and float64 round apart."""
  x = (size * np.random.default_rng(seed).normal(size=(3, 2, 24)) + size).astype(np.float32)
  packed = quantise.encode(jnp.asarray(x), bits=bits, group=8)
  assert packed.words.shape == (3, 2, 24 * bits // 8)
  want, step = told(x, bits, 8)
  got = np.asarray(quantise.decode(packed))
  assert np.all(np.abs(got - want) <= step * 1.001)
  assert np.mean(np.abs(got - want) > 1e-3 * step) < 0.05
  bound = step / 2 + 2e-3 * np.abs(x).max() * (1 << bits) / ((1 << bits) - 1)
  assert np.all(np.abs(got - x) <= bound)


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_packing_is_reversible(bits, seed):
  codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, 5, 16)).astype(np.uint8)
  words = quantise.pack(jnp.asarray(codes), bits)
  np.testing.assert_array_equal(quantise.unpack(words, bits), codes)


def test_a_worked_example():
  """0, 1, 2, 6 in 2 bits: step 2, codes 0, 0 (half to even), 1, 3; the first in the lowest bits."""
  packed = quantise.encode(jnp.asarray([0.0, 1.0, 2.0, 6.0]), bits=2, group=4)
  assert packed.words.tolist() == [0b11_01_00_00]
  assert quantise.decode(packed).tolist() == [0.0, 0.0, 2.0, 6.0]


def test_a_constant_group_is_given_back():
  x = jnp.full((8,), 1.5)
  np.testing.assert_array_equal(quantise.decode(quantise.encode(x, bits=4, group=8)), x)
  same = quantise.encode(x, bits=16, group=8)
  np.testing.assert_array_equal(same.words, x)
  assert quantise.bytes_of(8, bits=16, group=8, itemsize=4) == 32
  assert quantise.bytes_of(8, bits=4, group=8, itemsize=4) == 8


def test_numbers_beyond_float16_stay_finite():
  x = jnp.asarray([-1e6, 0.0, 1.0, 1e6, 7e4, 7e4, 7e4, 7e4])
  got = quantise.decode(quantise.encode(x, bits=8, group=4))
  assert np.all(np.isfinite(got))
  assert got[0] == -65504.0
  assert got[3] > 1e6 / 2
  np.testing.assert_array_equal(got[4:], got[4])


@pytest.mark.parametrize("bits", quantise.BITS)
def test_zeros_are_what_zeros_are_packed_to(bits):
  want = quantise.encode(jnp.zeros((2, 3, 16)), bits=bits, group=8)
  got = quantise.zeros((2, 3, 16), bits=bits, group=8, dtype=jnp.float32)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("bits", "group"), [(3, 8), (4, 0), (2, 3)])
def test_what_cannot_be_packed_is_refused(bits, group):
  with pytest.raises(UserError, match="expected"):
    quantise.check(bits, group)
