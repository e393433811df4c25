"""The cell index chooses the reference's tokens, ties included, in any physical order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a2ats_jax import index as cell_index
from a2ats_jax.budget import Budget
from a2ats_jax.methods import selection
from a2ats_jax.split import Split

B, K, G, CELLS, T, NEW, P = 2, 2, 3, 12, 24, 8, 4
SLOTS = T + NEW
SPLIT = Split("devices", 5)


@partial(jax.jit, static_argnames="order")
def build(cells, eligible, order="cell"):
  options = {"count": CELLS, "slots": SLOTS, "page": P, "order": order}
  index, token = cell_index.build(cells, eligible, **options)
  return jax.tree.map(lambda x: x[None], index), token  # one layer


append = jax.jit(partial(cell_index.append, layer=0))


def every_slot(index):
  """Cells and ranks of one layer, page by page."""
  b, kv_heads = index.counts.shape[1:3]
  heads = jnp.arange(b * kv_heads, dtype=jnp.int32)
  ids = jnp.broadcast_to(jnp.arange(index.pages, dtype=jnp.int32), (b * kv_heads, index.pages))
  found = cell_index.look(index, heads, ids, layer=0)
  return tuple(x.reshape(b, kv_heads, index.pages, index.page) for x in found)


@jax.jit
def choose_by_cell(index, scores, granted):
  """Slots chosen, and pages found without looking at the slots of sorted ones."""
  taken = cell_index.select(index.counts[0], scores, granted)
  pages = cell_index.page_numbers(cell_index.page_cells(index, layer=0), taken, most=SLOTS)
  return pages, cell_index.selected(*every_slot(index), taken).reshape(B, K, SLOTS)


@partial(jax.jit, static_argnames="budget")
def choose_by_token(scores, cells, eligible, lengths, budget):
  """The reference: every token with its cell's score."""
  per_token = jnp.take_along_axis(scores, jnp.repeat(cells, G, axis=1), axis=-1)
  chosen = selection.choose(per_token[:, None], cells, eligible[:, None], lengths[:, None], budget)
  return selection.union(chosen, K)[:, 0]


@st.composite
def cases(draw):
  """Cells skewed or all one, scores with heavy ties and both zeros, ragged rows."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  tokens = draw(st.sampled_from([T, T + NEW]))
  kind = draw(st.sampled_from(["spread", "skewed", "one"]))
  if kind == "spread":
    cells = rng.integers(0, CELLS, (B, K, tokens))
  elif kind == "skewed":
    cells = np.minimum(rng.geometric(0.5, (B, K, tokens)) - 1, CELLS - 1)
  else:
    cells = np.full((B, K, tokens), CELLS - 1)
  levels = draw(st.sampled_from([1, 3, 1000]))
  scores = rng.integers(-levels, levels + 1, (B, K * G, CELLS)) / np.float32(7)
  scores = np.where(rng.random(scores.shape) < 0.1, np.float32(-0.0), scores)
  lengths = rng.integers(0, tokens + 1, B)
  sinks = draw(st.integers(0, 5))
  slot = np.arange(tokens)
  eligible = (slot[None] < lengths[:, None]) & (slot[None] >= sinks)
  budget = draw(st.sampled_from([0, 1, 3, 7, 20, 1000]))
  return cells.astype(np.int32), scores.astype(np.float32), eligible, budget


def reference(cells, scores, eligible, budget):
  tokens = np.full(B, cells.shape[2], np.int32)
  return np.asarray(
    choose_by_token(*map(jnp.asarray, (scores, cells, eligible, tokens)), Budget(tokens=budget))
  )


def in_slots(index_chosen, token, eligible) -> np.ndarray:
  """Which tokens the chosen slots hold."""
  out = np.zeros((B, K, eligible.shape[1]), bool)
  for row, head in np.ndindex(B, K):
    held = np.asarray(token)[row, head, np.flatnonzero(np.asarray(index_chosen)[row, head])]
    assert len(set(held.tolist())) == len(held)
    out[row, head, held] = True
  return out


def assert_consistent(index) -> None:
  """The invariants of CodeIndex."""
  slots = every_slot(index)
  for row, head in np.ndindex(B, K):
    cells, ranks = (np.asarray(x)[row, head].ravel() for x in slots)
    for cell, count in enumerate(np.asarray(index.counts)[0, row, head]):
      assert sorted(ranks[cells == cell]) == list(range(count))


def assert_pages(pages, chosen) -> None:
  """The numbers of the pages that hold a chosen slot, in order, and zeros after them."""
  chosen = np.asarray(chosen)
  ids, count = map(np.asarray, pages)
  lead, held = chosen.shape[:2], chosen.reshape(*chosen.shape[:2], -1, P).any(axis=-1)
  for row, head in np.ndindex(lead):
    (want,) = np.nonzero(held[row, head])
    assert count[row, head] == len(want)
    np.testing.assert_array_equal(ids[row, head], np.pad(want, (0, ids.shape[2] - len(want))))


def granted(budget):
  return jnp.full(B, budget, jnp.int32)


@pytest.mark.parametrize("order", ["cell", "arrival"])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_equals_the_reference(order, case):
  cells, scores, eligible, budget = case
  cells, eligible = cells[..., :T], eligible[:, :T]
  index, token = build(jnp.asarray(cells), jnp.asarray(eligible), order=order)
  assert_consistent(index)
  pages, chosen = choose_by_cell(index, jnp.asarray(scores), granted(budget))
  assert_pages(pages, chosen)
  got = in_slots(chosen, token, eligible)
  np.testing.assert_array_equal(got, reference(cells, scores, eligible, budget))


@partial(jax.jit, static_argnames="order")
def choose_split(cells, eligible, scores, granted, order):
  """What each of several devices chooses of its range of a prompt.

  Returns:
    Slots chosen, pages found, and the position of the token in every slot, by device.
  """
  share = SPLIT.share(T)

  def on_device(_):
    mine = jnp.swapaxes(SPLIT.mine(jnp.swapaxes(cells, 1, 2), share), 1, 2)
    options = {"count": CELLS, "slots": 2 * P, "page": P, "order": order, "split": SPLIT}
    index, token = cell_index.build(mine, SPLIT.mine(eligible, share), **options)
    taken = cell_index.select(index.counts, scores, granted)
    layers = jax.tree.map(lambda x: x[None], index)
    pages = cell_index.page_numbers(cell_index.page_cells(layers, layer=0), taken, most=T)
    chosen = cell_index.selected(*every_slot(layers), taken)
    return chosen, pages, token + SPLIT.number * share

  return jax.vmap(on_device, axis_name="devices")(jnp.arange(SPLIT.devices))


@pytest.mark.parametrize("order", ["cell", "arrival"])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_devices_choose_what_one_would(order, case):
  """Ranges of 5 in pages of 4, the last not full."""
  cells, scores, eligible, budget = case
  cells, eligible = cells[..., :T], eligible[:, :T]
  found = choose_split(*map(jnp.asarray, (cells, eligible, scores)), granted(budget), order)
  chosen, pages, token = jax.tree.map(np.asarray, found)
  for device in range(SPLIT.devices):
    assert_pages([x[device] for x in pages], chosen[device])
  got = np.zeros(cells.shape, bool)
  for device, row, head in np.ndindex(SPLIT.devices, B, K):
    held = chosen[device, row, head].reshape(-1)[: SPLIT.share(T)]
    got[row, head, token[device, row, head][held]] = True
  np.testing.assert_array_equal(got, reference(cells, scores, eligible, budget))
  assert got.sum() == chosen.sum()  # no token twice


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_the_reference_as_tokens_are_appended(case):
  """A prompt of T tokens, then one at a time into the slots after it."""
  cells, scores, eligible, budget = case
  if cells.shape[2] == T:
    return
  index, token = build(jnp.asarray(cells[..., :T]), jnp.asarray(eligible[:, :T]))
  token = np.concatenate([np.asarray(token), np.zeros((B, K, NEW), np.int32)], axis=-1)
  for step in range(NEW):
    slot = np.where(eligible[:, T + step], T + step, -1)
    index = append(index, jnp.asarray(cells[..., T + step]), jnp.asarray(slot, jnp.int32))
    token[..., T + step] = T + step
    assert_consistent(index)
    seen = eligible & (np.arange(SLOTS) <= T + step)[None]
    pages, chosen = choose_by_cell(index, jnp.asarray(scores), granted(budget))
    assert_pages(pages, chosen)
    got = in_slots(chosen, token, seen)
    np.testing.assert_array_equal(got, reference(cells, scores, seen, budget))


@settings(max_examples=60, deadline=None)
@given(
  scores=st.lists(
    st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=6, max_size=6
  ),
  counts=st.lists(st.integers(0, 9), min_size=6, max_size=6),
  wanted=st.integers(0, 60),
)
@example(scores=[0.0, -0.0, 0.0, -0.0, 0.0, 0.0], counts=[1] * 6, wanted=3)
@example(scores=[float(i) for i in range(6)], counts=[1] * 6, wanted=60)
@example(scores=[1e-40, -1e-40, 0.0, 2e-38, -2e-38, 1e-45], counts=[2] * 6, wanted=5)
@example(scores=[-1e-40, 1e-40, -2e-38, -0.0, -3e-38, -1.0], counts=[2] * 6, wanted=9)
@example(scores=[float("inf"), float("-inf"), 3e38, -3e38, 1e-30, -1e-30], counts=[2] * 6, wanted=7)
def test_cut_is_the_sorted_prefix(scores, counts, wanted):
  """Against sorting in Python, with any finite or infinite scores; what is subnormal is zero."""
  normal = [0.0 if abs(score) < np.finfo(np.float32).tiny else score for score in scores]
  got = jax.jit(cell_index.cut)(
    jnp.asarray([[scores]], jnp.float32),
    jnp.asarray([counts], jnp.int32),
    jnp.asarray([wanted], jnp.int32),
  )
  left, want = wanted, [0] * 6
  for cell in sorted(range(6), key=lambda c: (-np.float32(normal[c]), c)):
    want[cell] = min(counts[cell], left)
    left -= want[cell]
  assert np.asarray(got)[0, 0].tolist() == want


@pytest.mark.parametrize("cells", [100, 100_000])
def test_counting_is_exact(cells):
  """Sums in float32 of integers up to 2^23 are the integers of NumPy."""
  rng = np.random.default_rng(0)
  mask = rng.random((1, 2, 2, cells)) < 0.5
  counts = rng.integers(0, 2**23 // cells + 1, (1, 2, cells)).astype(np.int32)
  got = jax.jit(cell_index._number)(jnp.asarray(mask), jnp.asarray(counts))
  np.testing.assert_array_equal(got, (mask * counts[:, :, None]).sum(-1))


def test_a_cells_tokens_lie_side_by_side():
  rng = np.random.default_rng(3)
  cells = rng.integers(0, CELLS, (B, K, T)).astype(np.int32)
  index, _ = build(jnp.asarray(cells), jnp.ones((B, T), bool))
  in_slot = np.asarray(every_slot(index)[0]).reshape(B, K, SLOTS)
  assert np.all(np.diff(in_slot[..., :T], axis=-1) >= 0)
  assert np.all(in_slot[..., T:] == CELLS)


@pytest.mark.parametrize(
  ("prompt", "new", "page"), [(1016, 48, 8), (240, 48, 24), (250, 30, 5), (128, 0, 16)]
)
def test_pages_lie_in_rows_of_128_slots(prompt, new, page):
  """Pages that cross a row, tokens appended in every row, more than one tile; against NumPy."""
  rng = np.random.default_rng(page)
  cells = rng.integers(0, CELLS, (B, K, prompt + new)).astype(np.int32)
  built, token = cell_index.build(
    jnp.asarray(cells[..., :prompt]),
    jnp.ones((B, prompt), bool),
    count=CELLS,
    slots=prompt + new,
    page=page,
  )
  index = jax.tree.map(lambda x: x[None], built)
  for step in range(new):
    slot = jnp.full(B, prompt + step, jnp.int32)
    index = append(index, jnp.asarray(cells[..., prompt + step]), slot)
  later = np.broadcast_to(np.arange(prompt, prompt + new), (B, K, new))
  place = np.concatenate([np.asarray(token), later], axis=-1)
  same = cells[..., :, None] == cells[..., None, :]
  ranks = np.sum(np.tril(same, -1), axis=-1)
  held = [np.take_along_axis(x, place, axis=-1) for x in (cells, ranks)]
  held = [x.reshape(B, K, -1, page) for x in held]
  for got, want in zip(every_slot(index), held, strict=True):
    np.testing.assert_array_equal(got, want)
  found = cell_index.page_cells(index, layer=0)
  for got, want in zip((found.cells, found.ranks), held, strict=True):
    np.testing.assert_array_equal(got, want[:, :, -(-prompt // page) :])
  # A token of another device counts, and takes no slot here, not even one that fills up a row.
  past = jnp.full(B, prompt + new, jnp.int32)
  further = append(index, jnp.zeros((B, K), jnp.int32), past)
  assert np.all(np.asarray(further.counts - index.counts)[..., 0] == 1)
  np.testing.assert_array_equal(further.cells, index.cells)
  np.testing.assert_array_equal(further.ranks, index.ranks)


@pytest.mark.parametrize("order", ["cell", "arrival"])
@pytest.mark.parametrize("prompt", [3, 28, 32, 36, 300, 1000])
def test_page_numbers(prompt, order):
  """Sorted pages in eights and beside them, and later ones: few are taken of, all, and none."""
  rng = np.random.default_rng(prompt)
  cells = np.minimum(rng.geometric(0.05, (B, K, prompt)), 99).astype(np.int32)
  eligible = jnp.asarray(np.arange(prompt)[None] < [[prompt], [prompt // 2]])
  slots = -(-prompt // P) * P + NEW
  options = {"count": 100, "slots": slots, "page": P, "order": order}
  built, _ = cell_index.build(jnp.asarray(cells), eligible, **options)
  index = jax.tree.map(lambda x: x[None], built)
  for step in range(NEW):
    cell = jnp.asarray(rng.integers(0, 100, (B, K)), jnp.int32)
    index = append(index, cell, jnp.asarray([slots - NEW + step, -1], jnp.int32))
  counts = np.asarray(index.counts[0])
  few = np.where(rng.random(counts.shape) < 0.1, rng.integers(0, counts + 1), 0)
  held = cell_index.page_cells(index, layer=0)
  for taken in (few, counts, np.zeros_like(counts)):
    for most in {max(taken.sum(axis=-1).max(), 1), slots}:
      taken = jnp.asarray(taken, jnp.int32)
      pages = jax.jit(partial(cell_index.page_numbers, most=int(most)))(held, taken)
      assert pages[0].shape[2] == min(most, slots // P)
      assert_pages(pages, cell_index.selected(*every_slot(index), taken))


def test_numbers_without_sorted_pages_or_tokens_taken():
  index, _ = build(jnp.zeros((B, K, 0), jnp.int32), jnp.ones((B, 0), bool))
  held = cell_index.page_cells(index, layer=0)
  none = jnp.zeros((B, K, CELLS), jnp.int32)
  ids, count = cell_index.page_numbers(held, none, most=0)
  assert ids.shape == (B, K, 1)
  assert not np.asarray(count).any()
  index = append(index, jnp.full((B, K), 2, jnp.int32), jnp.asarray([P, -1], jnp.int32))
  held = cell_index.page_cells(index, layer=0)
  ids, count = cell_index.page_numbers(held, none.at[..., 2].set(1), most=3)
  assert np.asarray(count).tolist() == [[1, 1], [0, 0]]
  assert np.asarray(ids).tolist() == [[[1, 0, 0]] * 2, [[0, 0, 0]] * 2]


@pytest.mark.parametrize("n", [0, 1, 5, 130])
def test_compact_lists_the_marked_pages(n):
  """Against NumPy: some pages, all of them, the last alone, none."""
  pages = np.random.default_rng(0).random((2, 2, n)) < 0.4
  pages[0, 1], pages[1, 0], pages[1, 1] = True, np.arange(n) == n - 1, False
  ids, count = map(np.asarray, jax.jit(cell_index.compact)(jnp.asarray(pages)))
  for row, head in np.ndindex(2, 2):
    (want,) = np.nonzero(pages[row, head])
    assert count[row, head] == len(want)
    np.testing.assert_array_equal(ids[row, head], np.pad(want, (0, n - len(want))))


@pytest.mark.parametrize(("group", "scale"), [(1, 1.0), (2, 0.25), (3, 1.0)])
def test_kv_head_scores_are_log_shares_of_attention(group, scale):
  """Against NumPy; cells without tokens count for nothing, however high they score."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1, 2, 2 * group, 6)).astype(np.float32) * 5
  counts = rng.integers(0, 4, (1, 2, 2, 6)).astype(np.int32)
  counts[..., 3], logits[..., 3] = 0, 1e30
  scores = jnp.asarray(logits / np.float32(scale))  # by a power of two
  got = jax.jit(partial(cell_index.kv_head_scores, scale=scale))(scores, jnp.asarray(counts))
  for s, head in np.ndindex(2, 2):
    best = np.full(6, -np.inf)
    for g in range(group * head, group * head + group):
      row = logits[0, s, g].astype(np.float64)
      held = counts[0, s, head] > 0
      total = np.sum(counts[0, s, head][held] * np.exp(row[held]))
      best = np.maximum(best, row - np.log(total))
    both = np.asarray(got)[0, s, head, held], best[held]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


def test_heads_that_look_at_one_cell_alone_tie():
  """Whatever the logit: a share of 1, and exactly that."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1, 500, 2, 4)).astype(np.float32) - 300
  logits[:, :, 0, 1], logits[:, :, 1, 2] = rng.normal(30, 20, (2, 500)).astype(np.float32)
  got = jax.jit(partial(cell_index.kv_head_scores, scale=0.3))(
    jnp.asarray(logits), jnp.ones((1, 500, 1, 4), jnp.int32)
  )
  assert not np.any(np.asarray(got)[..., 0, 1:3])


def test_kv_head_scores_of_an_empty_index_are_finite():
  got = jax.jit(cell_index.kv_head_scores)(
    jnp.zeros((1, 1, 2, 3)), jnp.zeros((1, 1, 1, 3), jnp.int32)
  )
  assert np.all(np.isfinite(got))


WRONG = {
  "the boundary cell whole": lambda better, room, earlier, tied: better + tied,
  "ties from the last cell": lambda better, room, earlier, tied: (
    better + jnp.clip(room - (jnp.sum(tied, -1, keepdims=True) - earlier - tied), 0, tied)
  ),
  "one token too many": lambda better, room, earlier, tied: (
    better + jnp.clip(room + 1 - earlier, 0, tied)
  ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_cuts_are_caught(wrong):
  """The comparison above fails for a cut that settles the boundary otherwise."""
  rng = np.random.default_rng(0)
  cells = rng.integers(0, CELLS, (B, K, T)).astype(np.int32)
  scores = rng.integers(-1, 2, (B, K * G, CELLS)).astype(np.float32)
  eligible = np.ones((B, T), bool)
  index, token = build(jnp.asarray(cells), jnp.asarray(eligible))
  counts = jnp.repeat(index.counts[0], G, axis=1)
  top = jnp.max(jnp.asarray(scores), axis=-1, keepdims=True)
  tied = jnp.where(jnp.asarray(scores) == top, counts, 0)
  room = jnp.full((B, K * G, 1), 4, jnp.int32)
  earlier = jnp.cumsum(tied, axis=-1) - tied
  taken = WRONG[wrong](jnp.zeros_like(tied), room, earlier, tied)
  taken = jnp.max(taken.reshape(B, K, G, CELLS), axis=2)
  chosen = cell_index.selected(*every_slot(index), taken)
  got = in_slots(np.asarray(chosen).reshape(B, K, SLOTS), token, eligible)
  assert not np.array_equal(got, reference(cells, scores, eligible, 4))


@pytest.mark.parametrize("eligible", [True, False])
@pytest.mark.parametrize("cell", [0, 2, 3, 6, 7])
def test_later_tokens_name_no_page_of_the_prompt(eligible, cell):
  """Cells 2 2 2 2, 5 5 6 6 on two pages of four, or none; one later token is chosen, on page 2."""
  cells = jnp.asarray([2, 2, 2, 2, 5, 5, 6, 6], jnp.int32)[None, None]
  index, _ = cell_index.build(cells, jnp.full((1, 8), eligible), count=8, slots=12, page=4)
  index = jax.tree.map(lambda x: x[None], index)
  index = append(index, jnp.asarray([[cell]], jnp.int32), jnp.asarray([8], jnp.int32))
  taken = jnp.zeros((1, 1, 8), jnp.int32).at[0, 0, cell].set(index.counts[0, 0, 0, cell])
  ids, count = cell_index.page_numbers(cell_index.page_cells(index, layer=0), taken, most=8)
  early = {2: [0], 6: [1]}.get(cell, []) if eligible else []
  assert np.asarray(ids)[0, 0, : int(count[0, 0])].tolist() == [*early, 2]


def test_rows_of_one_cut_end_apart():
  """Rows with fewer tokens than granted, ties at the end: each range closes, and stays closed."""
  cut = jax.jit(cell_index.cut)
  for seed in range(12):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, 2, 112)) * rng.uniform(1, 50, (2, 2, 1))
    scores[..., :8] = scores.min(axis=-1, keepdims=True)
    counts = rng.integers(1, 3, (2, 112)).astype(np.int32)
    got = cut(jnp.asarray(scores, jnp.float32), jnp.asarray(counts), jnp.full(2, 4096, jnp.int32))
    np.testing.assert_array_equal(got, np.broadcast_to(counts[:, None], scores.shape))
