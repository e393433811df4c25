"""Segments: one for every position, for ever, with a representative inside it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from tests import independent

LONGEST = 20000


@partial(jax.jit, static_argnames=("far", "window"))
def _segment_of(far, positions, prompt, window):
  return far.segment_of(positions, far.starts(prompt, window, LONGEST))


@partial(jax.jit, static_argnames=("far", "window", "count"))
def _distances(far, query, prompt, window, count):
  return far.distances(query, far.starts(prompt, window, LONGEST), count)


def segments_at(far: FarPosition, positions, prompt: int, window: int) -> np.ndarray:
  rows = jnp.asarray([prompt], jnp.int32)
  return np.asarray(_segment_of(far, jnp.asarray([positions], jnp.int32), rows, window)[0])


def distances_at(far: FarPosition, query: int, prompt: int, window: int, count: int) -> np.ndarray:
  rows = jnp.asarray([prompt], jnp.int32)
  return np.asarray(_distances(far, jnp.asarray([[query]], jnp.int32), rows, window, count)[0, 0])


def test_hand_worked_example():
  """T0 = 64, w = 4, two ranges: cut at round(4 * 16^(1/2)) = 16 from the end."""
  far = FarPosition.segments(2, span=8)
  got = segments_at(far, range(80), 64, 4)
  want = [0] * 48 + [1] * 12 + [2] * 8 + [3] * 8 + [4] * 4
  assert got.tolist() == want
  assert far.count(4, 16) == 2 + 3
  # The middles: (0+47)//2, (48+59)//2, then 60 + 3 + 8 z.
  assert distances_at(far, 79, 64, 4, 5).tolist() == [79 - 23, 79 - 53, 79 - 63, 79 - 71, 79 - 79]


@pytest.mark.parametrize(
  ("count", "span", "window"),
  [(1, 64, 64), (3, 5, 4), (4, 1, 1), (8, 64, 64), (9, 7, 2), (2, 70, 33), (5, 3, 70)],
)
@settings(max_examples=10, deadline=None)
@given(prompt=st.integers(1, 3000), new=st.integers(0, 90))
@example(prompt=1, new=0)
@example(prompt=3000, new=90)
def test_equals_the_ranges_written_out(count, span, window, prompt, new):
  """Monotone, covering, as many as ``count`` says, and the middle of a range lies inside it."""
  far, ranges = FarPosition.segments(count, span=span), independent.Segments(count, span)
  total, most = far.count(window, new), far.count(window, 90)
  got = segments_at(far, range(3090), prompt, window)[: prompt + new]
  assert np.all(np.diff(got) >= 0)
  assert got.min() >= 0
  assert got.max() < total
  away = distances_at(far, prompt + new, prompt, window, most)[:total]
  for index in range(total):
    start, end = independent.segment_range(ranges, index, prompt, window)
    held = np.flatnonzero(got == index)
    assert held.tolist() == list(range(max(start, 0), min(end, prompt + new)))
    if start < end:
      middle = prompt + new - away[index]
      assert middle == independent.representative(ranges, index, prompt, window)
      assert start <= middle < end


@settings(max_examples=15, deadline=None)
@given(prompt=st.integers(1, 200), later=st.integers(0, 50))
def test_middles_never_move(prompt, later):
  """A later query is further from every segment by as much as it is later."""
  far = FarPosition.segments(3, span=5)
  count = far.count(16, 60)
  one = distances_at(far, prompt, prompt, 16, count)
  two = distances_at(far, prompt + later, prompt, 16, count)
  np.testing.assert_array_equal(two - one, later)


def test_rows_of_different_prompts():
  """Each row is cut by its own prompt."""
  far = FarPosition.segments(3, span=4)
  prompts = [1, 3, 4, 5, 64, 200]
  positions = jnp.broadcast_to(jnp.arange(210, dtype=jnp.int32), (len(prompts), 210))
  starts = far.starts(jnp.asarray(prompts, jnp.int32), 4, 200)
  together = far.segment_of(positions, starts)
  queries = jnp.asarray([[p, p + 2] for p in prompts], jnp.int32)
  away = far.distances(queries, starts, 9)
  assert away.shape == (len(prompts), 2, 9)
  for row, prompt in enumerate(prompts):
    np.testing.assert_array_equal(together[row], segments_at(far, range(210), prompt, 4))
    for column, query in enumerate((prompt, prompt + 2)):
      np.testing.assert_array_equal(away[row, column], distances_at(far, query, prompt, 4, 9))


@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
def test_prompt_within_the_window_has_no_old_segment(prompt):
  """All of it belongs to the ranges of what is written later."""
  far = FarPosition.segments(5, span=3)
  got = segments_at(far, range(prompt), prompt, 4)
  assert got.min() >= 5
  assert got.tolist() == [5 + (t + 4 - prompt) // 3 for t in range(prompt)]


@pytest.mark.parametrize("count", [3, 8])
def test_cuts_are_exact_at_any_length(count):
  """The rounded cut of every prompt up to 20000 tokens is the rounded real number.

  float32 powers are off by one at some lengths, and not at the same ones on every backend.
  """
  far, prompts, window = FarPosition.segments(count), np.arange(1, LONGEST + 1), 64
  stretch = np.maximum(prompts, window)[:, None] / window
  cuts = np.round(window * stretch ** (np.arange(count - 1, 0, -1) / count))
  # The first position of each inner segment lies in it, and the one before in an older one.
  first = (prompts[:, None] - cuts).astype(np.int32)
  rows = jnp.asarray(prompts, jnp.int32)
  index = np.broadcast_to(np.arange(1, count), first.shape)
  inside = (first >= 0) & (prompts > window)[:, None]
  starts = far.starts(rows, window, LONGEST)
  at = np.asarray(far.segment_of(jnp.asarray(first), starts))
  before = np.asarray(far.segment_of(jnp.asarray(first - 1), starts))
  assert np.all((at >= index) | ~inside)
  assert np.all((before < index) | ~inside)


def test_constant_is_one_segment_at_one_distance():
  far = FarPosition.constant(2048)
  assert far.count(64, 1000) == 1
  assert segments_at(far, range(9), 5, 4).tolist() == [0] * 9
  assert distances_at(far, 7, 5, 4, 1).tolist() == [2048]


@pytest.mark.parametrize(
  "make",
  [
    lambda: FarPosition.constant(-1),
    lambda: FarPosition.segments(0),
    lambda: FarPosition.segments(2, span=0),
  ],
)
def test_impossible_positions_are_refused(make):
  with pytest.raises(UserError, match="far position"):
    make()


def test_names_tell_options_apart():
  """Two options that compute different things have different names."""
  options = [
    FarPosition.constant(),
    FarPosition.constant(64),
    FarPosition.segments(4),
    FarPosition.segments(4, span=16),
    FarPosition.segments(5),
  ]
  assert len({str(option) for option in options}) == len(options)
