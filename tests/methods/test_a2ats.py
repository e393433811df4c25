"""A2ATS in pages against the reference: the same tokens, the same output, at every step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax import store as paged
from a2ats_jax.errors import UserError
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from tests import cases
from tests.methods.test_a2ats_reference import OPTIONS, caches

# Long enough to fill pages, wrap the ring and open later segments.
LONG = cases.Shape(
  batch=3, layers=2, heads=4, kv_heads=2, head_dim=8, codewords=6, prompt=40, new=30
)
CHECKED = (0, 1, 5, 11, 17, 29)  # steps


def steps_of(method, cache, count=30):
  """Layer 1 of every step: positions, output, statistics, and the last state."""
  layer = jnp.asarray(1, jnp.int32)
  state = cases.prefilled(method, cache)
  for i in range(count):
    positions = cases.step_positions(cache, i)
    out, state, stats, _ = cases.attend(
      method,
      state,
      *cases.tokens_at(cache, 1, positions),
      jnp.asarray(positions),
      cache.rope,
      layer,
    )
    yield i, out, stats, state


def assert_same(fast, reference, cache, count=30):
  """Equal counts of tokens, close outputs."""
  for (i, out, stats, _), (_, want, told, _) in zip(
    steps_of(fast, cache, count), steps_of(reference, cache, count), strict=True
  ):
    for name in ("length", "selected", "read"):
      np.testing.assert_array_equal(getattr(stats, name), getattr(told, name), f"{name}, step {i}")
    np.testing.assert_allclose(out, want, atol=cases.TOLERANCE, rtol=0, err_msg=f"step {i}")
    np.testing.assert_allclose(stats.tail, told.tail, atol=cases.TOLERANCE, rtol=0)
    assert not np.any(stats.dropped)


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_equals_the_reference(options, data):
  """Thirty steps of ragged rows, through page ends and later segments."""
  cache = data.draw(caches(LONG))
  reference = A2ATSReference(codebook=cache.book, **OPTIONS[options])
  assert_same(A2ATS(codebook=cache.book, page=4, **OPTIONS[options]), reference, cache)


@pytest.mark.parametrize(
  "changes",
  [{"order": "arrival"}, {"placement": "device"}, {"placement": "host"}, {"page": 1}, {"page": 16}],
  ids=str,
)
def test_layout_does_not_change_the_output(changes):
  cache = cases.draw_cache(LONG, seed=3, lengths=[40, 17, 1], style="skewed")
  options = OPTIONS["tail of segments"]
  reference = A2ATSReference(codebook=cache.book, **options)
  method = A2ATS(codebook=cache.book, **{"page": 4} | options | changes)
  assert_same(method, reference, cache, 12)


def test_sorting_by_cell_fetches_fewer_pages():
  """What the physical order is for."""
  cache = cases.draw_cache(LONG, seed=3, lengths=[40, 40, 40], style="skewed")
  pages = {}
  for order in ("cell", "arrival"):
    method = A2ATS(codebook=cache.book, page=4, order=order, **OPTIONS["published"])
    pages[order] = sum(int(stats.pages.sum()) for _, _, stats, _ in steps_of(method, cache, 3))
  assert pages["cell"] < pages["arrival"]


def test_quantised_pages_choose_the_same_and_read_nearly_the_same():
  """Fewer bits, fewer bytes moved, larger error; scores come from codewords and do not change."""
  cache = cases.draw_cache(LONG, seed=8, lengths=[40, 31, 22])
  exact = A2ATS(codebook=cache.book, page=4, **OPTIONS["published"])
  errors, moved = [], []
  for bits in (8, 4, 2):
    packed = dataclasses.replace(exact, bits=bits)
    worst, bytes_moved = 0.0, 0.0
    for (_, out, stats, _), (_, want, wanted, _) in zip(
      steps_of(packed, cache, 12), steps_of(exact, cache, 12), strict=True
    ):
      np.testing.assert_array_equal(stats.selected, wanted.selected)
      worst = max(worst, float(np.abs(np.asarray(out) - np.asarray(want)).max()))
      bytes_moved += float(stats.moved.sum())
    errors.append(worst)
    moved.append(bytes_moved)
  assert 0 < errors[0] < 0.05 < errors[1] < errors[2]
  assert moved[0] > moved[1] > moved[2]


def test_the_fetch_bound_drops_and_says_so():
  """Never more pages than allowed; granted tokens are read or counted as dropped."""
  cache = cases.draw_cache(LONG, seed=5, lengths=[40, 31, 22])
  options = OPTIONS["everything"]
  free = A2ATS(codebook=cache.book, page=4, **options)
  bound = dataclasses.replace(free, fetch=3)
  dropped = 0
  for (_, _, stats, _), (_, _, wanted, _) in zip(
    steps_of(bound, cache, 8), steps_of(free, cache, 8), strict=True
  ):
    assert np.all(np.asarray(stats.pages) <= 3)
    np.testing.assert_array_equal(stats.selected + stats.dropped, wanted.selected)
    dropped += int(stats.dropped.sum())
  assert dropped > 0


def test_a_bound_that_is_never_reached_changes_nothing():
  cache = cases.draw_cache(LONG, seed=5, lengths=[40, 31, 22])
  free = A2ATS(codebook=cache.book, page=4, **OPTIONS["published"])
  wide = dataclasses.replace(free, fetch=17)
  for (_, out, _, _), (_, want, _, _) in zip(
    steps_of(wide, cache, 8), steps_of(free, cache, 8), strict=True
  ):
    np.testing.assert_allclose(out, want, atol=1e-6, rtol=0)


def test_tokens_at_once_equal_one_by_one():
  cache = cases.draw_cache(LONG, seed=7, lengths=[40, 12, 5])
  method = A2ATS(codebook=cache.book, page=4, **OPTIONS["tail of segments"])
  layer = jnp.asarray(1, jnp.int32)
  positions = cases.step_positions(cache, 0, 9)
  tokens = cases.tokens_at(cache, 1, positions)
  start = cases.prefilled(method, cache)
  at_once = cases.attend(method, start, *tokens, jnp.asarray(positions), cache.rope, layer)
  singles = list(steps_of(method, cache, 9))
  outs = jnp.concatenate([out for _, out, _, _ in singles], axis=1)
  np.testing.assert_allclose(at_once[0], outs, atol=cases.TOLERANCE, rtol=0)
  cases.assert_close(at_once[1], singles[-1][3], 1e-5)


def test_padding_is_neither_stored_nor_attended():
  """A row at position -1 keeps its cache and gives zeros and empty statistics."""
  cache = cases.draw_cache(LONG, seed=9, lengths=[40, 12, 5])
  method = A2ATS(codebook=cache.book, page=4, **OPTIONS["tail of segments"])
  layer = jnp.asarray(1, jnp.int32)
  *_, (_, _, _, state) = steps_of(method, cache, 3)
  positions = cases.step_positions(cache, 3)
  tokens = cases.tokens_at(cache, 1, positions)
  idle = positions.copy()
  idle[1] = -1
  run = partial(cases.attend, method, state, *tokens, rope=cache.rope, layer=layer)
  want, _, _, _ = run(positions=jnp.asarray(positions))
  out, after, stats, _ = run(positions=jnp.asarray(idle))
  np.testing.assert_array_equal(out[1], 0)
  # Which blocks of pages meet in a stage depends on all rows, so sums may round otherwise.
  others = jnp.asarray([0, 2])
  np.testing.assert_allclose(out[others], want[others], atol=1e-6, rtol=0)
  assert all(not np.any(np.asarray(x)[1]) for x in jax.tree.leaves(stats))
  for name in ("store", "index", "near", "codes", "items", "sums", "members"):
    pairs = zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name)))
    for before, now in pairs:
      np.testing.assert_array_equal(np.asarray(before)[:, 1], np.asarray(now)[:, 1], name)


def test_a_bad_row_stays_alone():
  """NaN in one row's values, in pages, ring and sinks, reaches no other row."""
  cache = cases.draw_cache(LONG, seed=9, lengths=[40, 38, 25])
  bad = dataclasses.replace(cache, v=cache.v.copy())
  bad.v[:, 1] = np.nan
  method = A2ATS(codebook=cache.book, page=4, **OPTIONS["tail of segments"])
  for (_, out, _, _), (_, want, _, _) in zip(steps_of(method, bad, 6), steps_of(method, cache, 6)):
    assert np.all(np.isnan(out[1]))
    np.testing.assert_array_equal(out[jnp.asarray([0, 2])], want[jnp.asarray([0, 2])])


def test_stages_do_not_change_the_output():
  """One page at a time, or many; bytes moved are of stages and quarters of one."""
  cache = cases.draw_cache(LONG, seed=9, lengths=[40, 38, 25])
  options = OPTIONS["everything"]
  whole = A2ATS(codebook=cache.book, page=4, **options)
  single = dataclasses.replace(whole, stage=1)
  size = 2 * 4 * LONG.head_dim * 4
  for (_, out, stats, state), (_, want, told, _) in zip(
    steps_of(single, cache, 6), steps_of(whole, cache, 6), strict=True
  ):
    np.testing.assert_allclose(out, want, atol=cases.TOLERANCE, rtol=0)
    np.testing.assert_array_equal(stats.pages, told.pages)
    np.testing.assert_array_equal(stats.moved, np.asarray(stats.pages) * size)
    pages = np.asarray(told.pages)
    stage = whole.stage_of(
      state.capacity, heads=pages.size, pages=state.store.pages.shape[3], page_bytes=size
    )
    blocks = int(np.sum(-(-pages // stage.size)))
    assert stage.moved(blocks) * size == pytest.approx(float(told.moved.sum()))
    assert 1 < stage.blocks < blocks


def test_the_step_copies_no_cache_and_its_memory_hardly_grows():
  """Read from the compiled program of two lengths, over three layers, the state donated."""
  shape = dataclasses.replace(LONG, layers=3, batch=2)
  book = cases.books(shape)
  method = A2ATS(codebook=book, stage=1 << 14, **OPTIONS["shared, tail of segments"])

  rope = cases.rope_named("plain", shape.head_dim)

  def step(leaves, q, k, v, positions):
    # Leaves: lowering looks at arguments through objects that the annotations refuse.
    state = jax.tree.unflatten(tree, leaves)

    def body(carry, layer):
      x, state = carry
      options = {"positions": positions, "rope": rope, "layer": layer}
      out, state, _ = method.attend(state, q + x, k, v, **options)
      return (x + out, state), None

    x, state = jax.lax.scan(body, (q, state), jnp.arange(3, dtype=jnp.int32))[0]
    return x, jax.tree.leaves(state)

  temporary, index_bytes = [], []
  for prompt in (4096, 32768):
    geometry = dataclasses.replace(shape, prompt=prompt).geometry
    state = jax.jit(lambda g=geometry: method.init(g))()
    heads = [jnp.zeros((2, 1, n, shape.head_dim)) for n in (4, 2, 2)]
    now = jnp.full((2, 1), prompt, jnp.int32)
    leaves, tree = jax.tree.flatten(state)
    compiled = jax.jit(step, donate_argnums=0).lower(leaves, *heads, now).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in leaves)
    temporary.append(memory.temp_size_in_bytes)
    index_bytes.append(sum(x.nbytes for x in jax.tree.leaves(state.index)) // 3)
    assert temporary[-1] < state.store.pages.nbytes / 3
  assert temporary[1] - temporary[0] < index_bytes[1] - index_bytes[0]


def test_pages_lie_in_host_memory():
  cache = cases.draw_cache(LONG, seed=9, lengths=[40, 12, 5])
  for placement, kind in (("host", "pinned_host"), ("device", "device"), ("auto", "pinned_host")):
    method = A2ATS(codebook=cache.book, placement=placement, **OPTIONS["published"])
    state = jax.jit(lambda m: m.init(LONG.geometry))(method)
    assert state.store.pages.sharding.memory_kind == kind


@pytest.mark.parametrize("options", [{"window": 0}, {"page": 0}, {"fetch": -1}])
def test_impossible_options_are_refused(options):
  with pytest.raises(UserError):
    A2ATS(codebook=cases.books(LONG), **OPTIONS["published"] | options)


# --- wrong variants -----------------------------------------------------------------------------


def stale_page(store, k, v, page, *, layer):
  """Forgets to write."""
  return store


def page_off_by_one(store, k, v, page, *, layer):
  return paged_write(store, k, v, jnp.where(page < 0, page, jnp.maximum(page - 1, 0)), layer=layer)


paged_write = paged.write_page


@pytest.mark.parametrize("wrong", [stale_page, page_off_by_one])
def test_wrong_pages_are_caught(monkeypatch, wrong):
  """The comparison with the reference fails when a page is not written, or elsewhere."""
  cache = cases.draw_cache(LONG, seed=11, lengths=[40, 23, 9])
  options = OPTIONS["everything"]
  reference = A2ATSReference(codebook=cache.book, **options)
  monkeypatch.setattr(paged, "write_page", wrong)
  method = A2ATS(codebook=cache.book, page=8, **options)  # no other test compiles this page
  with pytest.raises(AssertionError, match="step"):
    assert_same(method, reference, cache, 12)
