"""The order (score, cell, index), the cut of a budget, and what is near or far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax.budget import Budget
from a2ats_jax.methods import selection
from tests import independent

B, S, H, K, T, CELLS = 2, 2, 4, 2, 19, 5
BUDGETS = [
  Budget(ratio=0.3),
  Budget(ratio=1.0),
  Budget(ratio=0.0),
  Budget(tokens=0),
  Budget(tokens=1),
  Budget(tokens=7),
  Budget(tokens=1000),
]
choose = jax.jit(selection.choose, static_argnames="budget")


def chosen_by_sorting(scores, cells, eligible, lengths, budget) -> np.ndarray:
  """Sort the eligible tokens of each query head and take the first k."""
  out = np.zeros((B, S, H, T), bool)
  for b, s, h in np.ndindex(B, S, H):
    k = independent.granted(int(lengths[b, s]), budget.ratio, budget.tokens)
    cell = cells[b, h // (H // K)]
    order = sorted(np.flatnonzero(eligible[b, s]), key=lambda t: (-scores[b, s, h, t], cell[t], t))
    out[b, s, h, order[:k]] = True
  return out


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 10**6),
  distinct=st.integers(1, 6),
  share=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
  per_token=st.booleans(),
)
def test_choose_equals_sorting(budget, seed, distinct, share, per_token):
  """Scores with many ties, between cells and within them; few, many or no eligible tokens."""
  rng = np.random.default_rng(seed)
  cells = rng.integers(0, CELLS, size=(B, K, T)).astype(np.int32)
  if per_token:  # the oracle: no cells, every token a score of its own
    cells[:] = 0
    scores = rng.integers(-distinct, distinct, size=(B, S, H, T)).astype(np.float32)
  else:
    table = rng.integers(-distinct, distinct, size=(B, S, H, CELLS)).astype(np.float32)
    scores = np.take_along_axis(table, np.repeat(cells, H // K, axis=1)[:, None], axis=-1)
  eligible = rng.random((B, S, T)) < share
  lengths = rng.integers(0, T + 1, size=(B, S)).astype(np.int32)
  eligible &= np.arange(T) < lengths[..., None]
  got = choose(*(jnp.asarray(x) for x in (scores, cells, eligible, lengths)), budget=budget)
  np.testing.assert_array_equal(got, chosen_by_sorting(scores, cells, eligible, lengths, budget))


def test_cells_break_ties_before_the_index():
  """Equal scores in two cells: the lower cell's tokens come first, whatever their index."""
  cells = jnp.asarray([[[1, 0, 1, 0]]], jnp.int32)
  got = choose(
    jnp.zeros((1, 1, 1, 4)),
    cells,
    jnp.ones((1, 1, 4), bool),
    jnp.asarray([[4]], jnp.int32),
    budget=Budget(tokens=3),
  )
  assert got[0, 0, 0].tolist() == [True, True, False, True]


@settings(max_examples=25, deadline=None)
@given(
  position=st.integers(-1, T - 1),
  window=st.integers(1, 25),
  sinks=st.integers(0, 25),
)
def test_near_and_far_by_position_alone(position, window, sinks):
  """Every slot up to the query is near or far, by the published rule; later slots are neither."""
  near, far = selection.near_and_far(
    jnp.asarray([[position]], jnp.int32), T, sinks=sinks, window=window
  )
  eligible = independent.eligible_tokens(position + 1, window, sinks)
  assert np.flatnonzero(far[0, 0]).tolist() == eligible
  assert np.flatnonzero(near[0, 0]).tolist() == [
    t for t in range(position + 1) if t not in eligible
  ]


def test_union_is_within_a_group():
  """Heads 0 and 1 belong to KV head 0, heads 2 and 3 to KV head 1."""
  chosen = np.zeros((1, 1, 4, 3), bool)
  chosen[0, 0, 0, 0] = chosen[0, 0, 1, 2] = chosen[0, 0, 3, 1] = True
  got = selection.union(jnp.asarray(chosen), 2)
  assert got[0, 0].tolist() == [[True, False, True], [False, True, False]]


def test_read_exactly_counts_a_token_once():
  """A token chosen by two heads counts once; near tokens are read without being chosen."""
  chosen = np.zeros((1, 1, 2, 5), bool)
  chosen[0, 0, :, 1] = chosen[0, 0, 0, 2] = True
  near = np.array([[[True, False, False, False, True]]])
  part, selected, stats = selection.read_exactly(
    jnp.zeros((1, 1, 2, 4)),
    jnp.zeros((1, 1, 5, 4)),
    jnp.broadcast_to(jnp.arange(5.0)[:, None], (1, 1, 5, 4)),
    jnp.asarray(chosen),
    jnp.asarray(near),
    jnp.asarray([[5]], jnp.int32),
  )
  assert (stats.selected.item(), stats.read.item(), stats.length.item()) == (2, 4, 5)
  assert selected[0, 0, 0].tolist() == [False, True, True, False, False]
  np.testing.assert_allclose(part.out[0, 0, :, 0] / part.total[0, 0], (0 + 1 + 2 + 4) / 4)
