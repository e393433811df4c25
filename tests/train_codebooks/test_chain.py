"""Numbering of codewords."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train_codebooks.chain import chain


def steps(codewords, order):
  return np.linalg.norm(np.diff(codewords[order], axis=0), axis=-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_a_permutation_that_goes_to_the_nearest_left(size, dim, seed):
  x = np.random.default_rng(seed).normal(size=(size, dim)).astype(np.float32)
  order = chain(x)
  assert sorted(order) == list(range(size))
  distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
  for place in range(size - 1):
    left = order[place + 1 :]
    assert distance[order[place], left[0]] <= distance[order[place], left].min() + 1e-5


def test_neighbours_in_number_are_neighbours_in_space():
  x = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
  assert steps(x, chain(x)).mean() < 0.5 * steps(x, np.arange(256)).mean()


def test_points_on_a_line_come_in_order():
  x = np.random.default_rng(1).permutation(50).astype(np.float32)[:, None] + 1000
  ordered = x[chain(x), 0]
  assert np.array_equal(ordered, np.sort(x[:, 0])) or np.array_equal(
    ordered[::-1], np.sort(x[:, 0])
  )


def test_equal_codewords_are_no_trouble():
  assert sorted(chain(np.ones((7, 3), np.float32))) == list(range(7))
