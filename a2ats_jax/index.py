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
from collections.abc import Callable
from functools import partial, reduce
from typing import Literal

import jax
import jax.numpy as jnp

from a2ats_jax.ops.lookup import lookup
from a2ats_jax.ops.slot_fetch import slot_fetch
from a2ats_jax.ops.tiles import LANES, SUBLANES
from a2ats_jax.split import WHOLE, Split
from a2ats_jax.typing import Array, Bool, Float, Int, Shaped

NEVER = 2**31 - 1  # a rank that no token has, and a place that no array has
_PARTS = 8  # of an axis, added up side by side
_SUBNORMAL = 2**23 - 1  # positive float32 numbers that are smaller than the least normal one
_FIRST = 12  # halvings before it is worth asking how many cells are left


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["counts", "cells", "ranks", "begins", "begun", "before", "skip"],
  meta_fields=["page", "slots", "sorted_pages"],
)
@dataclasses.dataclass(frozen=True)
class CodeIndex:
  """The far tokens of one layer, or (leading axis L) of all, by cell.

  Invariants: ``counts[c]`` is the number of slots with cell c, and their ranks are 0, 1, ... in the
  order of the tokens' positions. An empty slot has the cell after the last. The first pages are
  sorted by (cell, rank), empty slots last.
  Of a sequence that is split over devices, counts and ranks are of the tokens of all devices and
  the slots those of this one: so each device cuts alike, and reads what it holds of the cut.

  Attributes:
    counts: tokens of every cell.
    cells: the cell of the token in every slot, page by page, in rows of 128 slots
      (:func:`rows_of`): a TPU would fill up rows of P. Slots past the last are empty.
    ranks: its place among the tokens of its cell.
    begins: the place of the page with the first sorted token of every cell, and past the last place
      for a cell without any. Sorted pages have places in eight parts, one page of eight in each
      (:func:`_place_of`), so that running sums over pages are sums of parts.
    begun: of a split sequence, the rank of that token. Without elements otherwise.
    before: of the page in every place, the last cell of the page before; cell 0 where ``skip`` says
      nothing.
    skip: how many tokens of that cell lie before the page, and a number that none has where the
      page begins with another. No page is sorted in order of arrival.
    page: P, slots a page.
    slots: of every row and KV head, whole pages.
    sorted_pages: the first so many. None in order of arrival.
  """

  counts: Int[Array, "*L B K cells"]
  cells: Int[Array, "*L B K rows 128"]
  ranks: Int[Array, "*L B K rows 128"]
  begins: Int[Array, "*L B K begins"]
  begun: Int[Array, "*L B K begun"]
  before: Int[Array, "*L B K places"]
  skip: Int[Array, "*L B K places"]
  page: int
  slots: int
  sorted_pages: int

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


def places_of(pages: int) -> int:
  """Places of so many sorted pages: whole eights, one at least."""
  return max(1, -(-pages // _PARTS)) * _PARTS


def _place_of(page: Int[Array, "*shape"], places: int) -> Int[Array, "*shape"]:
  """Where a sorted page stands: page ``8 i + j`` in place i of part j."""
  return page % _PARTS * (places // _PARTS) + page // _PARTS


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
  sorted_pages = prompt // page if order == "cell" else 0
  every, places = (*lead, rows_of(slots, page), LANES), (*lead, places_of(sorted_pages))
  return CodeIndex(
    counts=jnp.zeros((*lead, count), jnp.int32),
    cells=jnp.full(every, count, jnp.int32),
    ranks=jnp.zeros(every, jnp.int32),
    begins=jnp.full((*lead, count), NEVER, jnp.int32),
    begun=jnp.zeros((*lead, 0 if split.axis is None else count), jnp.int32),
    before=jnp.zeros(places, jnp.int32),
    skip=jnp.full(places, NEVER, jnp.int32),
    page=page,
    slots=slots,
    sorted_pages=sorted_pages,
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
  sorted_pages = -(-t // page) if order == "cell" else 0
  places = places_of(sorted_pages)
  begins = jnp.where((counts > 0) & (order == "cell"), _place_of(starts // page, places), NEVER)
  begun = jnp.zeros((b, kv_heads, 0), jnp.int32)
  if split.axis is not None:
    begun, counts = split.before(counts), split.total(counts)
    further = jnp.take_along_axis(begun, jnp.minimum(in_slot, count - 1), axis=-1)
    ranks = jnp.where(in_slot < count, ranks + further, 0)
  in_slot = jnp.pad(in_slot, more, constant_values=count)
  ranks = jnp.pad(ranks, more)
  first = in_slot[..., : sorted_pages * page : page]
  before = jnp.roll(in_slot[..., page - 1 : sorted_pages * page : page], 1, axis=-1)
  later = jax.lax.broadcasted_iota(jnp.int32, first.shape, 2) > 0
  goes_on = later & (first == before) & (first < count)

  def in_places(x: Array, nothing: int) -> Array:
    x = jnp.where(goes_on, x, nothing)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, places - sorted_pages)), constant_values=nothing)
    x = x.reshape(b, kv_heads, places // _PARTS, _PARTS)
    return jnp.swapaxes(x, 2, 3).reshape(b, kv_heads, places)

  index = CodeIndex(
    counts=counts,
    cells=in_slot.reshape(b, kv_heads, rows, LANES),
    ranks=ranks.reshape(b, kv_heads, rows, LANES),
    begins=begins,
    begun=begun,
    before=in_places(before, 0),
    skip=in_places(ranks[..., : sorted_pages * page : page], NEVER),
    page=page,
    slots=slots,
    sorted_pages=sorted_pages,
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


def _key(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
  """Integers in the order of float32 numbers, one after the other; what is subnormal is zero."""
  size = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)
  size = jnp.maximum(size - _SUBNORMAL, 0)
  return jnp.where(scores < 0, -size, size)


def _score(keys: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
  """The inverse of :func:`_key`."""
  size = jnp.abs(keys) + jnp.where(keys == 0, 0, _SUBNORMAL)
  size = jax.lax.bitcast_convert_type(size, jnp.float32)
  return jnp.where(keys < 0, -size, size)


def _parts(x: Shaped[Array, "*rows n"]) -> list[Shaped[Array, "*rows part"]]:
  """The last axis in eight parts, filled up with zeros where eight does not divide it."""
  more = -x.shape[-1] % _PARTS
  if more:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
  return jnp.split(x, _PARTS, axis=-1)


def _number(
  mask: Bool[Array, "*rows G cells"], counts: Int[Array, "*rows cells"]
) -> Int[Array, "*rows G"]:
  """Sums of the counts under a mask, exact below 2^24.

  Eight parts of the cells are added as they are read, and their sum with ones as a product: XLA's
  CPU backend does not vectorise a sum of integers.
  """
  parts = zip(_parts(mask), _parts(counts[..., None, :]), strict=True)
  under = reduce(jnp.add, (jnp.where(mask, count, 0) for mask, count in parts))
  ones = jnp.ones(under.shape[-1], jnp.float32)
  total = jnp.dot(under.astype(jnp.float32), ones, precision=jax.lax.Precision.HIGHEST)
  return total.astype(jnp.int32)


def cut(
  scores: Float[Array, "*rows G cells"],
  counts: Int[Array, "*rows cells"],
  granted: Int[Array, "*rows"],
) -> Int[Array, "*rows G cells"]:
  """How many tokens of every cell are among the first ``granted``, by (score, cell, index).

  Halves the range that holds the boundary cell's score, counting tokens, until a single cell or a
  single score is left; so no cell is sorted. All tokens where there are fewer than granted.

  Args:
    scores: float32, no NaN. Cells of the same score are taken in their order. What is subnormal
      counts as zero wherever it does for the machine, as on a CPU.
    counts: tokens of every cell, fewer than 2^24 together.
  """
  every, more = counts.shape[-1], -counts.shape[-1] % _PARTS
  scores = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, more)])
  counts = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, more)])
  held = counts[..., None, :]
  wanted = jnp.broadcast_to(granted[..., None], scores.shape[:-1])

  # Scores are compared as floats, and only what bounds them is halved as integers: integers of all
  # cells would be one more array, and compare no faster.
  def reach(key: Array) -> Array:
    return scores >= _score(key)[..., None]

  def distance(low: Array, high: Array) -> Array:
    return (high - low).astype(jnp.uint32)  # wraps to the true one

  def halve(bounds: tuple[Array, ...], by_score: bool) -> tuple[Array, ...]:
    # Invariant: tokens from low on are enough, or all; those from high on are above, too few.
    low, high, above = bounds
    key = low + (distance(low, high) >> 1).astype(jnp.int32)
    if by_score:
      score = 0.5 * _score(low) + 0.5 * _score(high)
      key = jnp.where(jnp.isfinite(score), jnp.clip(_key(score), low + 1, high - 1), key)
    many = _number(reach(key), counts)
    enough = (many >= wanted) | (key == low)  # low itself where nothing is left between
    low, high = jnp.where(enough, key, low), jnp.where(enough, high, key)
    return low, high, jnp.where(enough, above, many)

  def between(low: Array, high: Array) -> Array:
    return reach(low) & ~reach(high)

  def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
    # The middle of the scores leaves few cells soonest; the middle of the bits ends whatever the
    # scores are.
    bounds = state[:3]
    for by_score in (True, True, True, False):
      bounds = halve(bounds, by_score)
    return (*bounds, _number(between(*bounds[:2]) & (held > 0), jnp.ones_like(counts)))

  def open_rows(state: tuple[Array, ...]) -> Array:
    low, high, _, cells = state
    return jnp.any((distance(low, high) > 1) & (cells > 1))

  low, high = _key(jnp.min(scores, axis=-1)), _key(jnp.max(scores, axis=-1)) + 1
  bounds = low, high, jnp.zeros_like(low)
  bounds = jax.lax.fori_loop(0, _FIRST, lambda _, b: halve(b, True), bounds)
  state = (*bounds, jnp.full_like(wanted, 2))
  low, high, above, cells = jax.lax.while_loop(open_rows, narrow, state)
  room = (wanted - above)[..., None]

  def taken(earlier: Callable[[Array], Array]) -> Array:
    tied = jnp.where(between(low, high), held, 0)
    return jnp.where(reach(high), held, jnp.clip(room - earlier(tied), 0, tied))

  # Most often one cell is left in every row, which no other comes before.
  return jax.lax.cond(
    jnp.any(cells > 1),
    lambda: taken(lambda tied: jnp.cumsum(tied, axis=-1) - tied),
    lambda: taken(jnp.zeros_like),
  )[..., :every]


def largest(
  scores: Float[Array, "*rows cells"],
  held: Float[Array, "*#rows cells"] | Int[Array, "*#rows cells"],
) -> Float[Array, "*rows"]:
  """The largest score of a cell that holds tokens; minus infinity if none does."""
  parts = zip(_parts(scores), _parts(held), strict=True)
  best = reduce(jnp.maximum, (jnp.where(tokens > 0, score, -jnp.inf) for score, tokens in parts))
  return jnp.max(jax.lax.optimization_barrier(best), axis=-1)


def kv_head_scores(
  scores: Float[Array, "B S H cells"], counts: Int[Array, "B S K cells"], *, scale: float = 1.0
) -> Float[Array, "B S K cells"]:
  r"""One score a KV head, for budgets that its group shares.

  The logarithm of the attention weight that a token of the cell would get among the far tokens, in
  the query head of the group where that is largest:
  :math:`\max_g \left( l_g - \log \sum_c n_c e^{l_{gc}} \right)`. Ours: the paper grants every query
  head its own tokens.

  Args:
    scores: far scores of query heads.
    counts: tokens of every cell; what a cell without tokens scores says nothing.
    scale: what makes a score a logit l, the exponent of a weight.
  """
  # Two heads that each look at one cell alone give both the share 1: scores tie but for rounding.
  # Between barriers programs of one shape round alike, so that the fast path ties as the reference
  # does. In another batch the sum may round otherwise (docs/performance.md).
  scores, counts = jax.lax.optimization_barrier((scores, counts))
  b, s, h, cells = scores.shape
  kv_heads = counts.shape[2]
  scores = scores.reshape(b, s, kv_heads, h // kv_heads, cells)
  held = counts[:, :, :, None].astype(jnp.float32)
  peak = largest(scores, held)[..., None]
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  # Cells without tokens are kept at the peak, where they cannot overflow.
  parts = zip(_parts(scores), _parts(held), strict=True)
  weights = (jnp.exp(scale * jnp.minimum(score - peak, 0.0)) * many for score, many in parts)
  weight = reduce(jnp.add, weights)
  ones = jnp.ones(weight.shape[-1], jnp.float32)
  total = jnp.dot(weight, ones, precision=jax.lax.Precision.HIGHEST)
  total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
  # Subtracted one after the other, so that heads that look at one cell alone do tie.
  peak, total = jax.lax.optimization_barrier((peak, jnp.log(total)))
  shares = scale * (scores - peak) - total
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
  data_fields=["begins", "begun", "before", "skip", "cells", "ranks"],
  meta_fields=["sorted_pages"],
)
@dataclasses.dataclass(frozen=True)
class PageCells:
  """What says of every page of a layer whether it holds a selected token.

  Attributes:
    begins, begun, before, skip, sorted_pages: of the sorted pages, as in :class:`CodeIndex`.
    cells, ranks: in the slots of the other pages.
  """

  begins: Int[Array, "B K begins"]
  begun: Int[Array, "B K begun"]
  before: Int[Array, "B K places"]
  skip: Int[Array, "B K places"]
  cells: Int[Array, "B K rest P"]
  ranks: Int[Array, "B K rest P"]
  sorted_pages: int


def page_cells(index: CodeIndex, *, layer: int | Array) -> PageCells:
  """Of one layer, from the index of all."""
  _, b, kv_heads, lines, _ = index.cells.shape
  done = index.sorted_pages * index.page
  line, skip = divmod(done, LANES)

  def rest(x: Array) -> Array:
    start, size = (layer, 0, 0, line, 0), (1, b, kv_heads, lines - line, LANES)
    x = jax.lax.dynamic_slice(x, start, size).reshape(b, kv_heads, -1)
    x = x[..., skip : skip + index.slots - done]
    return x.reshape(b, kv_heads, -1, index.page)

  return jax.lax.optimization_barrier(
    PageCells(
      index.begins[layer],
      index.begun[layer],
      index.before[layer],
      index.skip[layer],
      rest(index.cells),
      rest(index.ranks),
      index.sorted_pages,
    )
  )


def page_numbers(
  pages: PageCells, taken: Int[Array, "B K cells"], *, most: int
) -> tuple[Int[Array, "B K listed"], Int[Array, "B K"]]:
  """The pages that hold a selected token, in order, and how many; after them page 0.

  A sorted page holds one if it goes on with the cell that the page before ends with and more of
  that cell are taken than lie before it, or if any token is taken of a cell that begins in it.
  Slots of the other pages are looked at one by one.

  Args:
    most: tokens that are taken of a row and KV head at most. As many pages are listed, or N if that
      is less, one at least.
  """
  b, kv_heads, places = pages.skip.shape
  hit = taken > (pages.begun if pages.begun.shape[-1] else 0)
  begun = jnp.zeros((b, kv_heads, places), jnp.int32)
  begun = _put(begun, jnp.where(hit, pages.begins, NEVER), jnp.ones_like(taken), once=False)
  marked = (begun > 0) | (lookup(taken, pages.before) > pages.skip)
  # Made once: a CPU's fusion would look a number up again for every use.
  marked = jax.lax.optimization_barrier(marked.astype(jnp.int32))
  marked = marked.reshape(b, kv_heads, _PARTS, -1)
  parts = [marked[:, :, part] for part in range(_PARTS)]
  many = reduce(jnp.add, parts)
  upto = jnp.cumsum(many, axis=-1)
  earlier = [jax.lax.optimization_barrier(upto - many)]
  for part in parts[:-1]:
    earlier.append(earlier[-1] + part)
  at = jnp.where(marked > 0, jnp.stack(earlier, axis=2), NEVER)
  number = jax.lax.broadcasted_iota(jnp.int32, marked.shape, 3) * _PARTS
  number += jax.lax.broadcasted_iota(jnp.int32, marked.shape, 2)
  at, number = (x.reshape(b, kv_heads, places) for x in (at, number))

  rest = jnp.any(selected(pages.cells, pages.ranks, taken), axis=-1)
  ids = max(1, min(most, pages.sorted_pages + rest.shape[2]))
  ids = _put(jnp.zeros((b, kv_heads, ids), jnp.int32), at, number)
  done = upto[..., -1:]
  at = jnp.where(rest, done + jnp.cumsum(rest, axis=-1, dtype=jnp.int32) - 1, NEVER)
  ids = _put(ids, at, pages.sorted_pages + jax.lax.broadcasted_iota(jnp.int32, rest.shape, 2))
  return ids, done[..., 0] + jnp.sum(rest, axis=-1, dtype=jnp.int32)


def compact(pages: Bool[Array, "B K N"]) -> tuple[Int[Array, "B K N"], Int[Array, "B K"]]:
  """The numbers of marked pages in order, and how many; places after them hold page 0."""
  upto = jnp.cumsum(pages, axis=-1, dtype=jnp.int32)
  number = jax.lax.broadcasted_iota(jnp.int32, pages.shape, 2)
  ids = _put(jnp.zeros_like(number), jnp.where(pages, upto - 1, NEVER), number)
  return ids, jnp.sum(pages, axis=-1, dtype=jnp.int32)


def _put(
  x: Int[Array, "B K n"], at: Int[Array, "B K m"], new: Int[Array, "B K m"], *, once: bool = True
) -> Int[Array, "B K n"]:
  """Numbers put into some places of an array; past its last, nowhere.

  Args:
    once: no place is named twice. Of numbers put into one place, any is kept.
  """
  b, kv_heads, n = x.shape
  # Into all rows as one: with an index of three numbers a CPU takes several times as long.
  row = jnp.arange(b * kv_heads, dtype=jnp.int32).reshape(b, kv_heads, 1)
  at = jnp.where(at < n, row * n + at, x.size).reshape(-1)
  out = x.reshape(-1).at[at].set(new.reshape(-1), mode="drop", unique_indices=once)
  return out.reshape(x.shape)
