"""Full attention over ragged rows, by the naive causal form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax.methods.full import Full
from tests import cases, independent


@pytest.mark.parametrize("shape", list(cases.SHAPES))
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_equals_naive_causal_attention(shape, data):
  """Every decode step reads the row's own prompt and what was written since, nothing else."""
  sizes = cases.SHAPES[shape]
  cache = cases.draw_cache(
    sizes,
    seed=data.draw(st.integers(0, 10**6)),
    lengths=[data.draw(st.integers(1, sizes.prompt)) for _ in range(sizes.batch)],
    rope=data.draw(st.sampled_from(["plain", "yarn"])),
  )
  steps, inv_freq = 3, np.asarray(cache.rope.inv_freq)
  want = {}
  for layer in range(sizes.layers):
    for row, length in enumerate(cache.lengths):
      arrays = [x[layer, row, : length + steps] for x in (cache.q, cache.k, cache.v)]
      want[layer, row] = independent.causal_attention(*arrays, inv_freq, float(cache.rope.scale))
  for layer, positions, out, _, stats, _ in cases.run_steps(Full(), cache, steps):
    for row, position in enumerate(positions[:, 0]):
      np.testing.assert_allclose(out[row, 0], want[layer, row][position], atol=cases.TOLERANCE)
      assert int(stats.length[row, 0]) == position + 1
      assert stats.read[row, 0].tolist() == [position + 1] * sizes.kv_heads
      assert not np.any(stats.tail[row])


def test_tokens_at_once_equal_one_by_one():
  cache = cases.draw_cache(cases.PAIRS, seed=0, lengths=[40, 1, 7])
  start, layer = cases.prefilled(Full(), cache), jnp.asarray(1, jnp.int32)
  positions = cases.step_positions(cache, 0, 4)
  q, k, v = cases.tokens_at(cache, 1, positions)
  out, state, stats, _ = cases.attend(
    Full(), start, q, k, v, jnp.asarray(positions), cache.rope, layer
  )
  one_by_one = start
  for i in range(4):
    now = slice(i, i + 1)
    one, one_by_one, one_stats, _ = cases.attend(
      Full(),
      one_by_one,
      q[:, now],
      k[:, now],
      v[:, now],
      jnp.asarray(positions[:, now]),
      cache.rope,
      layer,
    )
    np.testing.assert_allclose(out[:, now], one, atol=cases.TOLERANCE)
    np.testing.assert_array_equal(stats.read[:, now], one_stats.read)
  cases.assert_close(state, one_by_one, 1e-6)


def test_padding_is_neither_stored_nor_attended():
  """Zeros out, zeros counted, the cache untouched."""
  cache = cases.draw_cache(cases.PAIRS, seed=1, lengths=[5, 6, 7])
  start = cases.prefilled(Full(), cache)
  positions = cases.step_positions(cache, 0)
  q, k, v = cases.tokens_at(cache, 0, positions)
  positions[1] = -1
  out, state, stats, _ = cases.attend(
    Full(), start, q, k, v, jnp.asarray(positions), cache.rope, jnp.asarray(0, jnp.int32)
  )
  assert not np.any(out[1])
  for leaf in (stats.length, stats.selected, stats.read, stats.tail):
    assert not np.any(leaf[1])
    assert leaf is stats.tail or np.all(np.asarray(leaf[0]) == 6)
  np.testing.assert_array_equal(state.k[:, 1], start.k[:, 1])
  np.testing.assert_array_equal(state.v[:, 1], start.v[:, 1])


def test_a_layer_leaves_the_others_alone():
  cache = cases.draw_cache(cases.PAIRS, seed=2, lengths=[5, 6, 7])
  start = cases.prefilled(Full(), cache)
  positions = cases.step_positions(cache, 0)
  _, state, _, _ = cases.attend(
    Full(),
    start,
    *cases.tokens_at(cache, 1, positions),
    jnp.asarray(positions),
    cache.rope,
    jnp.asarray(1, jnp.int32),
  )
  np.testing.assert_array_equal(state.k[0], start.k[0])
  assert np.any(np.asarray(state.k[1]) != np.asarray(start.k[1]))
