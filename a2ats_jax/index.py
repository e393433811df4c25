"""Which tokens lie in which cell, and the cut that turns cell scores into selected tokens.

A far token's score depends on its cell alone: its (segment, codeword) pair, or itself where it
follows the prompt under segments. So what a query head is granted are all tokens of the better
cells and the first tokens, by position, of the boundary one; and for a KV head the union over its
group is, per cell, the longest of these prefixes: one number a cell. Nothing is sorted when a query
comes, and no token of the prompt has a score of its own.

This chooses exactly the tokens that ``choose`` and ``union`` of
:mod:`a2ats_jax.methods.selection` choose, ties included: the order (score, cell, index) makes every
selected set a prefix of each cell.
"""

import dataclasses
import math
from functools import partial, reduce
from typing import Literal

import jax
import jax.numpy as jnp

from a2ats_jax.ops.lookup import lookup
from a2ats_jax.ops.slot_fetch import slot_fetch
from a2ats_jax.ops.tiles import LANES, SUBLANES
from a2ats_jax.split import WHOLE, Split
from a2ats_jax.typing import Array, Bool, Float, Int

NEVER = 2**31 - 1  # a rank that no token has
_TRIANGLE = 64  # numbers that are summed up at once
_FIRST = 12  # halvings before it is worth asking how many cells are left


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["counts", "cells", "ranks", "skip", "last", "begun"],
  meta_fields=["page", "slots"],
)
@dataclasses.dataclass(frozen=True)
class CodeIndex:
  """The far tokens of one layer, or (leading axis L) of all, by cell.

  Invariants: ``counts[c]`` is the number of slots with cell c, and their ranks are 0, 1, ... in the
  order of the tokens' positions. An empty slot has the cell after the last. The first pages, those
  that ``skip`` and ``last`` describe, are sorted by (cell, rank), empty slots last.
  Of a sequence that is split over devices, counts and ranks are of the tokens of all devices and
  the slots those of this one: so each device cuts alike, and reads what it holds of the cut.

  Attributes:
    counts: tokens of every cell.
    cells: the cell of the token in every slot, page by page, in rows of 128 slots
      (:func:`rows_of`): a TPU would fill up rows of P. Slots past the last are empty.
    ranks: its place among the tokens of its cell.
    skip: of every sorted page, the rank of its first slot where that goes on with the cell that
      the page before ends with, and a rank that no token has elsewhere. No page is sorted in order
      of arrival.
    last: of every sorted page, the last cell with a token in it or in a page before; cell 0 where
      there is none.
    begun: of a split sequence, the rank of the first token of every cell in the sorted pages of
      this device, and a rank that no token has for a cell without any. Without elements otherwise.
    page: P, slots a page.
    slots: of every row and KV head, whole pages.
  """

  counts: Int[Array, "*L B K cells"]
  cells: Int[Array, "*L B K rows 128"]
  ranks: Int[Array, "*L B K rows 128"]
  skip: Int[Array, "*L B K sorted"]
  last: Int[Array, "*L B K sorted"]
  begun: Int[Array, "*L B K begun"]
  page: int
  slots: int

  @property
  def pages(self) -> int:
    """N, pages of every row and KV head."""
    return self.slots // self.page


Order = Literal["cell", "arrival"]


def rows_of(slots: int, page: int) -> int:
  """Rows of 128 that hold so many slots: whole pages, and whole tiles where a row is whole pages.

  Args:
    slots: of a row and KV head.
    page: P.
  """
  unit = math.lcm(LANES, page) if LANES % page else SUBLANES * LANES
  return -(-slots // unit) * unit // LANES


def empty(
  lead: tuple[int, ...],
  *,
  count: int,
  slots: int,
  page: int,
  prompt: int,
  order: Order,
  split: Split = WHOLE,
) -> CodeIndex:
  """An index that holds no token.

  Args:
    lead: the leading axes, ``(L, B, K)``.
    count: number of cells.
    slots: of tokens, a multiple of ``page``.
    page: P, slots a page.
    prompt: the first slots, a multiple of ``page`` too, which :func:`build` fills in ``order``.
    split: how the sequence lies on devices; slots are those of one.
  """
  pages = (*lead, prompt // page if order == "cell" else 0)
  every = (*lead, rows_of(slots, page), LANES)
  return CodeIndex(
    counts=jnp.zeros((*lead, count), jnp.int32),
    cells=jnp.full(every, count, jnp.int32),
    ranks=jnp.zeros(every, jnp.int32),
    skip=jnp.full(pages, NEVER, jnp.int32),
    last=jnp.zeros(pages, jnp.int32),
    begun=jnp.full((*lead, 0 if split.axis is None else count), NEVER, jnp.int32),
    page=page,
    slots=slots,
  )


def build(
  cells: Int[Array, "B K T"],
  eligible: Bool[Array, "B T"],
  *,
  count: int,
  slots: int,
  page: int,
  order: Order = "cell",
  split: Split = WHOLE,
) -> tuple[CodeIndex, Int[Array, "B K T"]]:
  """Index a prompt, or this device's range of it.

  Args:
    cells: of every token, 0 .. ``count`` - 1.
    eligible: tokens to index; the others get no slot.
    count: number of cells.
    slots: room for the prompt, whole pages, and for tokens appended later.
    page: P, slots a page.
    order: ``cell`` puts a cell's tokens side by side, ``arrival`` keeps tokens by position.
    split: how the prompt lies on devices.

  Returns:
    The index, and for every slot up to T the token that belongs there; slots after a row's
    eligible tokens are empty, whatever token they name.
  """
  b, kv_heads, t = cells.shape
  there = jnp.broadcast_to(eligible[:, None], cells.shape)
  marked = jnp.where(there, cells, count)
  by_cell = jnp.argsort(marked, axis=-1, stable=True)
  sorted_cells = jnp.take_along_axis(marked, by_cell, axis=-1)
  rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
  counts = jnp.zeros((b, kv_heads, count), jnp.int32).at[rows, heads, marked].add(1, mode="drop")
  starts = jnp.cumsum(counts, axis=-1) - counts
  place = jnp.arange(t, dtype=jnp.int32)[None, None]
  begin = jnp.take_along_axis(starts, jnp.minimum(sorted_cells, count - 1), axis=-1)
  sorted_ranks = jnp.where(sorted_cells < count, place - begin, 0)
  if order == "cell":
    token, in_slot, ranks = by_cell, sorted_cells, sorted_ranks
  else:
    token = jnp.argsort(~there, axis=-1, stable=True)
    back = jnp.argsort(by_cell, axis=-1)  # where each token stands in the order by cell
    in_slot = jnp.take_along_axis(marked, token, axis=-1)
    ranks = jnp.take_along_axis(jnp.take_along_axis(sorted_ranks, back, axis=-1), token, axis=-1)
  rows = rows_of(slots, page)
  more = ((0, 0), (0, 0), (0, rows * LANES - t))
  begun = jnp.zeros((b, kv_heads, 0), jnp.int32)
  if split.axis is not None:
    before = split.before(counts)
    begun = jnp.where(counts > 0, before, NEVER)
    counts = split.total(counts)
    further = jnp.take_along_axis(before, jnp.minimum(in_slot, count - 1), axis=-1)
    ranks = jnp.where(in_slot < count, ranks + further, 0)
  in_slot = jnp.pad(in_slot, more, constant_values=count)
  ranks = jnp.pad(ranks, more)
  end = -(-t // page) * page if order == "cell" else 0
  first = in_slot[..., :end:page]
  ends = jnp.roll(in_slot[..., page - 1 : end : page], 1, axis=-1)
  later = jax.lax.broadcasted_iota(jnp.int32, first.shape, 2) > 0
  goes_on = later & (first == ends) & (first < count)
  largest = jnp.max(jnp.where(in_slot < count, in_slot, 0), axis=-1, keepdims=True)
  index = CodeIndex(
    counts=counts,
    cells=in_slot.reshape(b, kv_heads, rows, LANES),
    ranks=ranks.reshape(b, kv_heads, rows, LANES),
    skip=jnp.where(goes_on, ranks[..., :end:page], NEVER),
    last=jnp.minimum(in_slot[..., page - 1 : end : page], largest),
    begun=begun,
    page=page,
    slots=slots,
  )
  return index, token


def append(
  index: CodeIndex, cell: Int[Array, "B K"], slot: Int[Array, "B"], *, layer: int | Array
) -> CodeIndex:
  """Put one token of every row, later than all before it, into an empty slot of a layer.

  Args:
    index: of all layers.
    cell: of the token.
    slot: after the sorted pages; past the last if another device has it; -1 for no token.
  """
  _, b, kv_heads, lines, _ = index.cells.shape
  rows = jnp.arange(b, dtype=jnp.int32)[:, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None]
  there, slot = (slot >= 0)[:, None], slot[:, None]
  line, lane = jnp.where(there & (slot < index.slots), slot // LANES, lines), slot % LANES
  # The rank is read after the count goes up: read before, the counts of all layers are copied.
  counts = index.counts.at[layer, rows, heads, cell].add(there.astype(jnp.int32))
  rank = counts[layer, rows, heads, cell] - 1
  return dataclasses.replace(
    index,
    counts=counts,
    cells=index.cells.at[layer, rows, heads, line, lane].set(cell, mode="drop"),
    ranks=index.ranks.at[layer, rows, heads, line, lane].set(rank, mode="drop"),
  )


def _ordered(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
  """Integers in the order of float32 scores; both zeros are one number."""
  bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
  return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _score(keys: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
  """The inverse of :func:`_ordered`."""
  return jax.lax.bitcast_convert_type(keys ^ ((keys >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)


def _number(
  mask: Bool[Array, "*rows G cells"], counts: Int[Array, "*rows cells"]
) -> Int[Array, "*rows G"]:
  """Sums of the counts under a mask, exact below 2^24.

  A product with ones: XLA's CPU backend does not vectorise a sum of integers.
  """
  under = jnp.where(mask, counts[..., None, :].astype(jnp.float32), 0.0)
  ones = jnp.ones(mask.shape[-1], jnp.float32)
  return jnp.dot(under, ones, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)


def _running(x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
  """Sums up to and with each place of whole numbers, none negative, below 2^24 together.

  As products with triangles of ones: XLA's CPU backend makes a cumulative sum one number at a time.
  """
  n, highest = x.shape[-1], jax.lax.Precision.HIGHEST
  if n <= _TRIANGLE:
    return jnp.dot(x, jnp.triu(jnp.ones((n, n), jnp.float32)), precision=highest)
  blocks = -(-n // _TRIANGLE)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * _TRIANGLE - n)])
  x = x.reshape(*x.shape[:-1], blocks, _TRIANGLE)
  sums = jnp.dot(x, jnp.ones(_TRIANGLE, jnp.float32), precision=highest)
  # What came before a block is added to its first number, so that one product makes its sums. It
  # is made once: a CPU's fusion would make it again for every number.
  before = jax.lax.optimization_barrier(_running(sums) - sums)
  first = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == 0
  sums = _running(jnp.where(first, x + before[..., None], x))
  return sums.reshape(*x.shape[:-2], blocks * _TRIANGLE)[..., :n]


def cut(
  scores: Float[Array, "*rows G cells"],
  counts: Int[Array, "*rows cells"],
  granted: Int[Array, "*rows"],
) -> Int[Array, "*rows G cells"]:
  """How many tokens of every cell are among the first ``granted``, by (score, cell, index).

  Halves the range that holds the boundary cell's score, counting tokens, until a single cell or a
  single score is left; so no cell is sorted. All tokens where there are fewer than granted.

  Args:
    scores: float32, no NaN. Cells of the same score are taken in their order.
    counts: tokens of every cell, fewer than 2^24 together.
  """
  keys = _ordered(scores)
  wanted = jnp.minimum(granted, jnp.sum(counts, axis=-1))[..., None]
  wanted = jnp.broadcast_to(wanted, keys.shape[:-1])
  full = (counts > 0).astype(jnp.int32)

  def halve(bounds: tuple[Array, ...], by_score: bool) -> tuple[Array, ...]:
    # Invariant: tokens from low on are enough, tokens above high are not.
    low, high, above = bounds
    span = (high - low).astype(jnp.uint32)  # wraps to the true distance
    key = low + ((span >> 1) + (span & 1)).astype(jnp.int32)
    if by_score:
      score = 0.5 * _score(low) + 0.5 * _score(high)
      key = jnp.where(jnp.isfinite(score), jnp.clip(_ordered(score), low + 1, high), key)
    many = _number(keys >= key[..., None], counts)
    enough, still = many >= wanted, low < high
    return (
      jnp.where(enough & still, key, low),
      jnp.where(enough | ~still, high, key - 1),
      jnp.where(enough | ~still, above, many),
    )

  def between(low: Array, high: Array) -> Array:
    return (keys >= low[..., None]) & (keys <= high[..., None])

  def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
    # The middle of the scores leaves few cells soonest; the middle of the bits ends whatever the
    # scores are.
    bounds = state[:3]
    for by_score in (True, True, True, False):
      bounds = halve(bounds, by_score)
    return (*bounds, _number(between(*bounds[:2]), full))

  def open_rows(state: tuple[Array, ...]) -> Array:
    low, high, _, cells = state
    return jnp.any((low < high) & (cells > 1))

  # Of the floats and not of their keys, as XLA's CPU backend is slow at the range of integers.
  low, high = (_ordered(of(scores, axis=-1)) for of in (jnp.min, jnp.max))
  bounds = low, high, jnp.zeros(keys.shape[:-1], jnp.int32)
  bounds = jax.lax.fori_loop(0, _FIRST, lambda _, b: halve(b, True), bounds)
  state = (*bounds, _number(between(*bounds[:2]), full))
  low, high, above, cells = jax.lax.while_loop(open_rows, narrow, state)
  counts = counts[..., None, :]
  better = jnp.where(keys > high[..., None], counts, 0)
  tied = jnp.where(between(low, high), counts, 0)
  room = (wanted - above)[..., None]
  earlier = jax.lax.cond(
    jnp.any(cells > 1), lambda: jnp.cumsum(tied, axis=-1) - tied, lambda: jnp.zeros_like(tied)
  )
  return better + jnp.clip(room - earlier, 0, tied)


def kv_head_scores(
  logits: Float[Array, "B S H cells"], counts: Int[Array, "B S K cells"]
) -> Float[Array, "B S K cells"]:
  r"""One score a KV head, for budgets that its group shares.

  The logarithm of the attention weight that a token of the cell would get among the far tokens, in
  the query head of the group where that is largest:
  :math:`\max_g \left( l_g - \log \sum_c n_c e^{l_{gc}} \right)`. Ours: the paper grants every query
  head its own tokens.

  Args:
    logits: far scores of query heads, divided by ``sqrt(D)``.
    counts: tokens of every cell; what a cell without tokens scores says nothing.
  """
  # Two heads that each look at one cell alone give both the share 1: scores tie but for rounding.
  # Between barriers programs of one shape round alike, so that the fast path ties as the reference
  # does. In another batch the sum may round otherwise (docs/performance.md).
  logits, counts = jax.lax.optimization_barrier((logits, counts))
  b, s, h, cells = logits.shape
  kv_heads = counts.shape[2]
  logits = logits.reshape(b, s, kv_heads, h // kv_heads, cells)
  held = counts[:, :, :, None]
  peak = jnp.max(jnp.where(held > 0, logits, -jnp.inf), axis=-1, keepdims=True)
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  # Cells without tokens are kept at the peak, where they cannot overflow.
  weight = jnp.exp(jnp.minimum(logits - peak, 0.0)) * held.astype(jnp.float32)
  total = jnp.dot(weight, jnp.ones(cells, jnp.float32), precision=jax.lax.Precision.HIGHEST)
  total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
  shares = logits - peak - jnp.log(total)
  # One query head after the other: XLA's CPU backend is slow at the largest over a middle axis.
  best = reduce(jnp.maximum, (shares[:, :, :, head] for head in range(shares.shape[3])))
  return jax.lax.optimization_barrier(best)


def select(
  counts: Int[Array, "B K cells"],
  scores: Float[Array, "B heads cells"],
  granted: Int[Array, "B"],
) -> Int[Array, "B K cells"]:
  """Tokens to read of every cell: for each KV head the longest prefix over its group.

  Args:
    scores: of query heads, each with ``granted`` tokens of its own, or of KV heads
      (:func:`kv_head_scores`).
    granted: tokens each head that has scores may read.
  """
  b, kv_heads, cells = counts.shape
  grouped = scores.reshape(b, kv_heads, -1, cells)
  taken = cut(grouped, counts, jnp.broadcast_to(granted[:, None], (b, kv_heads)))
  return jnp.max(taken, axis=2)


def selected(
  cells: Int[Array, "B K *slots"], ranks: Int[Array, "B K *slots"], taken: Int[Array, "B K cells"]
) -> Bool[Array, "B K *slots"]:
  """The slots whose tokens are read: rank below what is taken of the slot's cell."""
  b, kv_heads, count = taken.shape
  flat = cells.reshape(b, kv_heads, -1)
  limit = lookup(taken, jnp.minimum(flat, count - 1)).reshape(cells.shape)
  return (ranks < limit) & (cells < count)


def look(
  index: CodeIndex, heads: Int[Array, "W"], ids: Int[Array, "W F"], *, layer: int | Array
) -> tuple[Int[Array, "W 1 F P"], Int[Array, "W 1 F P"]]:
  """Cells and ranks in some pages of a layer, as of one KV head in each of W rows.

  Args:
    index: of all layers; only the rows asked for are read.
    heads: ``row * K + KV head`` of the pages.
    ids: 0 .. N - 1.
    layer: whose pages.
  """
  _, b, kv_heads, lines, _ = index.cells.shape
  pages = lines * LANES // index.page
  number = ((layer * b * kv_heads + heads) * pages)[:, None] + ids
  number = number[:, None]
  return (
    slot_fetch(index.cells, number, index.page),
    slot_fetch(index.ranks, number, index.page),
  )


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["skip", "last", "begun", "cells", "ranks"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PageCells:
  """What says of every page of a layer whether it holds a selected token.

  Attributes:
    skip, last, begun: of the sorted pages, as in :class:`CodeIndex`.
    cells, ranks: in the slots of the other pages.
  """

  skip: Int[Array, "B K sorted"]
  last: Int[Array, "B K sorted"]
  begun: Int[Array, "B K begun"]
  cells: Int[Array, "B K rest P"]
  ranks: Int[Array, "B K rest P"]


def page_cells(index: CodeIndex, *, layer: int | Array) -> PageCells:
  """Of one layer, from the index of all."""
  _, b, kv_heads, lines, _ = index.cells.shape
  done = index.last.shape[3] * index.page
  line, skip = divmod(done, LANES)

  def rest(x: Array) -> Array:
    start, size = (layer, 0, 0, line, 0), (1, b, kv_heads, lines - line, LANES)
    x = jax.lax.dynamic_slice(x, start, size).reshape(b, kv_heads, -1)
    x = x[..., skip : skip + index.slots - done]
    return x.reshape(b, kv_heads, -1, index.page)

  return jax.lax.optimization_barrier(
    PageCells(
      index.skip[layer],
      index.last[layer],
      index.begun[layer],
      rest(index.cells),
      rest(index.ranks),
    )
  )


def pages_of(pages: PageCells, taken: Int[Array, "B K cells"]) -> Bool[Array, "B K N"]:
  """The pages that hold a selected token.

  A sorted page holds one if it goes on with the cell that the page before ends with and more of
  that cell are taken than lie before it, or if any token is taken of a cell that begins in it.
  Slots of the other pages are looked at one by one.

  Unless ``begun`` tells, a taken cell whose every token came after the prompt marks a sorted page
  too: the first whose ``last`` is not below it, if there is one. That is page 0 for a cell before
  the row's first, and for cell 0 in a row without sorted tokens.
  """
  here = taken > (pages.begun if pages.begun.shape[-1] else 0)
  # Made once each, not again for every number that is looked up or compared.
  upto = jax.lax.optimization_barrier(_running(here.astype(jnp.float32)).astype(jnp.int32))
  begun, many = (lookup(x, pages.last) for x in (upto, taken))
  begun, many = jax.lax.optimization_barrier((begun, many))

  def before(x: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)

  found = (before(many) > pages.skip) | (begun > before(begun))
  rest = jnp.any(selected(pages.cells, pages.ranks, taken), axis=-1)
  return jnp.concatenate([found, rest], axis=-1)


def compact(pages: Bool[Array, "B K N"]) -> tuple[Int[Array, "B K N"], Int[Array, "B K"]]:
  """The numbers of the marked pages in order, and how many; places after them hold page 0."""
  b, kv_heads, n = pages.shape
  # Padded to whole blocks, as cutting the running sums back to n takes a CPU longer.
  blocks = max(1, -(-n // _TRIANGLE))
  marked = jnp.pad(pages, ((0, 0), (0, 0), (0, blocks * _TRIANGLE - n)))
  upto = _running(marked.astype(jnp.float32)).astype(jnp.int32)
  row = jnp.arange(b * kv_heads, dtype=jnp.int32).reshape(b, kv_heads, 1)
  # Into all rows as one: with an index of three numbers a CPU takes several times as long.
  at = jnp.where(marked, row * n + upto - 1, pages.size).reshape(-1)
  number = jax.lax.broadcasted_iota(jnp.int32, marked.shape, 2).reshape(-1)
  ids = jnp.zeros(pages.size, jnp.int32)
  ids = ids.at[at].set(number, mode="drop", unique_indices=True)
  return ids.reshape(pages.shape), upto[..., -1]
