"""The oracle against an independent top-k of the exact logits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st

from a2ats_jax.budget import Budget
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from tests import cases

OPTIONS = [
  ("pairs", Oracle(budget=Budget(ratio=0.15), window=4, sinks=2)),
  ("pairs", Oracle(budget=Budget(tokens=1), window=1, sinks=0)),
  ("pairs", Oracle(budget=Budget(ratio=0.0), window=3, sinks=1)),
  ("triple", Oracle(budget=Budget(tokens=3), window=2, sinks=1)),
  ("pairs", Oracle(budget=Budget(tokens=3, per="kv_head"), window=2, sinks=1)),
]


def compare(method, right, cache: cases.Cache, steps: int) -> None:
  for layer, positions, out, _, stats, _ in cases.run_steps(method, cache, steps):
    for row, position in enumerate(positions[:, 0].tolist()):
      want = cases.expected_step(right, cache, layer, row, position)
      safe = want.gap > 1e-5
      assert assume(safe) if currently_in_test_context() else safe
      np.testing.assert_allclose(out[row, 0], want.out, atol=cases.TOLERANCE, rtol=0)
      assert stats.selected[row, 0].tolist() == [len(u) for u in want.union]
      assert stats.read[row, 0].tolist() == [len(r) for r in want.read]


@pytest.mark.parametrize(("shape", "method"), OPTIONS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_equals_the_independent_top_k(shape, method, data):
  sizes = cases.SHAPES[shape]
  cache = cases.draw_cache(
    sizes,
    seed=data.draw(st.integers(0, 10**6)),
    lengths=[data.draw(st.integers(1, sizes.prompt)) for _ in range(sizes.batch)],
    style=data.draw(st.sampled_from(["spread", "skewed", "no query"])),
    rope=data.draw(st.sampled_from(["plain", "yarn"])),
  )
  compare(method, method, cache, 3)


@pytest.mark.parametrize(
  "wrong",
  [
    {"budget": Budget(tokens=4)},
    {"window": 5},
  ],
  ids=str,
)
def test_wrong_options_are_caught(wrong):
  """The comparison fails when one option is off by one."""
  cache = cases.draw_cache(cases.PAIRS, seed=4, lengths=[40, 36, 30])
  method = Oracle(budget=Budget(tokens=5), window=4, sinks=2)
  compare(method, method, cache, 2)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    compare(dataclasses.replace(method, **wrong), method, cache, 2)


def test_equal_logits_go_to_the_first_tokens():
  """With a zero query every far token ties: the first k by index are read."""
  cache = cases.draw_cache(cases.PAIRS, seed=4, lengths=[40, 36, 30], style="no query")
  method = Oracle(budget=Budget(tokens=5), window=4, sinks=2)
  positions = cases.step_positions(cache, 0)
  out, _, _, _ = cases.attend(
    method,
    cases.prefilled(method, cache),
    *cases.tokens_at(cache, 0, positions),
    jnp.asarray(positions),
    cache.rope,
    jnp.asarray(0, jnp.int32),
  )
  for row, position in enumerate(positions[:, 0].tolist()):
    read = [*range(7), *range(position - 3, position + 1)]
    want = np.repeat(cache.v[0, row, read].mean(axis=0), 2, axis=0)
    np.testing.assert_allclose(out[row, 0], want, atol=cases.TOLERANCE)


def test_budget_one_is_full_attention():
  cache = cases.draw_cache(cases.PAIRS, seed=6, lengths=[40, 1, 13], rope="yarn")
  method = Oracle(budget=Budget(ratio=1.0), window=4, sinks=2)
  for got, want in zip(
    cases.run_steps(method, cache, 2), cases.run_steps(Full(), cache, 2), strict=True
  ):
    np.testing.assert_allclose(got.out, want.out, atol=cases.TOLERANCE, rtol=0)
    np.testing.assert_array_equal(got.stats.read, want.stats.read)


def test_padding_is_neither_stored_nor_attended():
  cache = cases.draw_cache(cases.PAIRS, seed=1, lengths=[25, 26, 27])
  method = Oracle(budget=Budget(tokens=5), window=4, sinks=2)
  start = cases.prefilled(method, cache)
  positions = cases.step_positions(cache, 0)
  tokens = cases.tokens_at(cache, 0, positions)
  positions[1] = -1
  out, state, stats, _ = cases.attend(
    method, start, *tokens, jnp.asarray(positions), cache.rope, jnp.asarray(0, jnp.int32)
  )
  assert not np.any(out[1])
  assert np.all(np.any(np.asarray(out[::2]) != 0, axis=(1, 2, 3)))
  for leaf in (stats.length, stats.selected, stats.read, stats.tail):
    assert not np.any(leaf[1])
  np.testing.assert_array_equal(state.k[:, 1], start.k[:, 1])
