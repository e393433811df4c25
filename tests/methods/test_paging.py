"""How many pages are fetched at once, and that every page that counts is, once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax import attention, store
from a2ats_jax.methods import paging
from a2ats_jax.methods.paging import Stage, needed, stage_of
from a2ats_jax.ops.paged_decode import paged_decode
from a2ats_jax.ops.pages import FloatPages


@pytest.mark.parametrize(
  ("granted", "per", "want"),
  [(2048, "kv_head", 192), (2048, "query_head", 384), (2049, "query_head", 387), (0, "kv_head", 0)],
)
def test_pages_needed(granted, per, want):
  assert needed(granted, per, page=16) == want


@pytest.mark.parametrize(
  ("need", "heads", "pages", "most", "want"),
  [
    (192, 8, 9999, 9999, Stage(32, 16)),  # 1536 pages, a third is 512
    (192, 8, 9999, 100, Stage(6, 16)),  # no more than the buffer holds
    (27, 24, 9999, 9999, Stage(24, 9)),  # a third of what is needed is a block
    (12, 24, 9999, 9999, Stage(12, 8)),  # but not fewer than eight
    (192, 8, 4, 9999, Stage(3, 4)),  # nor more than there are
    (192, 8, 9999, 0, Stage(1, 1)),
    (0, 8, 0, 9999, Stage(1, 1)),
  ],
)
def test_a_stage_is_a_third_of_what_is_needed(need, heads, pages, most, want):
  assert stage_of(need, heads=heads, pages=pages, most=most) == want


@pytest.mark.parametrize(
  ("blocks", "want"), [(0, 0), (1, 2 * 7), (2, 2 * 7), (3, 4 * 7), (10, 10 * 7), (21, 22 * 7)]
)
def test_less_than_a_stage_is_fetched_in_quarters(blocks, want):
  """Ten blocks of seven pages are a stage, two of them a part."""
  assert Stage(10, 7).moved(blocks) == want


B, K, G, N, P, D = 2, 3, 2, 11, 2, 4


@settings(max_examples=30, deadline=None)
@given(
  counts=st.lists(st.integers(0, N), min_size=B * K, max_size=B * K),
  stage=st.sampled_from([Stage(1, 1), Stage(2, 4), Stage(5, 3), Stage(3, N), Stage(9, 8)]),
  seed=st.integers(0, 9),
)
def test_every_page_that_counts_is_attended_once(counts, stage, seed):
  """Against attention over a KV head's pages at once; bytes are of stages and quarters of one.

  Which tokens count differs from page to page, as a block is told whose pages it has.
  """
  rng = np.random.default_rng(seed)
  held = store.open_store(
    layers=2, batch=B, kv_heads=K, head_dim=D, slots=N * P, page=P, dtype="float32"
  )
  k, v = (jnp.asarray(rng.normal(size=(B, K, N * P, D)), jnp.float32) for _ in range(2))
  held = store.write_prompt(held, k, v, layer=1)
  picked = jnp.asarray(rng.random((B * K, N, P)) < 0.7)
  ids = jnp.asarray(rng.permuted(np.tile(np.arange(N), (B, K, 1)), axis=2), jnp.int32)
  count = jnp.asarray(counts, jnp.int32).reshape(B, K)
  q = jnp.asarray(rng.normal(size=(B, 1, K * G, D)), jnp.float32)

  def chosen(blocks):
    return picked[blocks.heads[:, None], blocks.ids][:, None]

  k, v = (jnp.asarray(rng.normal(size=(B, K, 1, P, D)), jnp.float32) for _ in range(2))
  near = paged_decode(q, FloatPages(k, v), jnp.ones((B, K, 1, P), bool))
  part, moved = paging.attend_pages(held, q, ids, count, chosen, stage=stage, layer=1, start=near)
  seen = jnp.arange(N, dtype=jnp.int32)[None, None] < count[..., None]
  mask = jnp.take_along_axis(picked.reshape(B, K, N, P), ids[..., None], axis=2) & seen[..., None]
  want = attention.merge([near, paged_decode(q, store.fetch(held, ids, layer=1), mask)])
  np.testing.assert_allclose(attention.finish(part), attention.finish(want), atol=1e-5)
  np.testing.assert_allclose(part.total, want.total, rtol=1e-5)
  blocks = sum(-(-n // stage.size) for n in counts)
  whole = stage.moved(blocks) * held.page_bytes
  np.testing.assert_allclose(float(jnp.sum(moved)), whole, rtol=1e-5)


def test_what_one_kv_head_holds_touches_no_other():
  """NaN in the values of a page stays with its own KV head."""
  one = attention.Part(jnp.zeros((3, 1, 2, 4)), jnp.full((3, 1, 2), -jnp.inf), jnp.zeros((3, 1, 2)))
  new = jax.tree.map(lambda x: jnp.ones((2, *x.shape[1:])), one)
  new = attention.Part(new.out.at[0].set(jnp.nan), new.peak, new.total)
  merged = attention.merge_rows(one, new, jnp.asarray([1, 2], jnp.int32))
  out = np.asarray(attention.finish(merged))
  assert np.isnan(out[1]).all()
  assert (out[0] == 0).all()
  assert (out[2] == 1).all()
