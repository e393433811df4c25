"""A2ATS with the cache in pages: the reference's tokens, found by cell and fetched by page.

A prompt's far tokens are written to pages sorted by cell, layer by layer as each ends. The device
keeps the index, the sinks, a ring of recent tokens and, for the tail, the sum of values of every
codeword. A decode step scores the cells, cuts them, fetches the pages that hold a chosen token and
attends to the chosen tokens alone, so its output is that of
:class:`a2ats_jax.methods.a2ats_reference.A2ATSReference`.

What is near and the tail are attended in one call, and the pages of every stage merged into it.

A token joins the index when it leaves the window and is read from the ring until its page is full;
then the page is sealed, written as one block. Tokens that follow the prompt lie in order of
arrival.

Pages are fetched a stage at a time into a buffer whose size is fixed, blocks of whichever row and
KV head needs them (:mod:`a2ats_jax.methods.paging`): device memory does not grow with the budget,
and nothing granted is left out unless ``fetch`` says so.
"""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from a2ats_jax import attention, quantise
from a2ats_jax import index as cells
from a2ats_jax import store as paged
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, encode
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods import dense, selection
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats, token_by_token
from a2ats_jax.methods.paging import STAGE_BYTES, Blocks, Stage, attend_pages, needed, stage_of
from a2ats_jax.ops.paged_decode import paged_decode
from a2ats_jax.ops.pages import FloatPages
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.split import WHOLE, Split
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["length", "selected", "read", "tail", "read_bytes", "moved", "pages", "dropped"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PageStats(Stats):
  """What a step read; ``moved`` counts whole blocks, and a share of those fetched in vain.

  Attributes:
    pages: pages that hold a chosen token.
    dropped: far tokens the budget granted and the fetch bound did not.
  """

  pages: Int[Array, "*L B S K"]
  dropped: Int[Array, "*L B S K"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["store", "index", "near", "codes", "items", "sums", "members", "starts", "prompt"],
  meta_fields=["segments", "prompt_slots", "capacity"],
)
@dataclasses.dataclass(frozen=True)
class PagedState:
  """The cache.

  Attributes:
    store: pages of far tokens: those of the prompt by cell, then later ones by arrival.
    index: cell and rank of every slot of the store.
    near: keys and values of the first tokens, the sinks, and then of the last R tokens: position p
      in place ``sinks + p mod R``.
    codes: of the tokens in the ring, position p in place p mod R.
    items: codes of the tokens that are cells of their own, M of them.
    sums, members: of every codeword's far tokens, the sum of values and their number.
    starts: where each row's segments start, from :meth:`FarPosition.starts`.
    prompt: tokens of each row's prompt.
    segments: Z.
    prompt_slots: slots of the prompt's far tokens on a device; later tokens follow.
    capacity: no row ever holds more tokens.
  """

  store: paged.KVStore
  index: cells.CodeIndex
  near: dense.DenseCache
  codes: Int[Array, "L B K R"]
  items: Int[Array, "L B K M"]
  sums: Float[Array, "L B K C D"]
  members: Float[Array, "L B K C"]
  starts: Int[Array, "B cuts"]
  prompt: Int[Array, "B"]
  segments: int
  prompt_slots: int
  capacity: int

  @property
  def page(self) -> int:
    """P, tokens a page."""
    return self.store.page


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["codebook"],
  meta_fields=[
    "budget",
    "far",
    "tail",
    "window",
    "sinks",
    "page",
    "fetch",
    "stage",
    "order",
    "placement",
    "bits",
    "split",
  ],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class A2ATS:
  """Options and codebooks.

  Attributes:
    codebook, budget, far, tail, window, sinks: as in the reference.
    page: P, tokens a page.
    fetch: pages a KV head may fetch in a step; 0 leaves it to the budget, so that nothing is ever
      dropped. Where the granted tokens need more, every query head of the KV head gives up its
      lowest-scoring tokens until they fit, and the statistics say how many.
    stage: bytes at most of the device buffer that pages are fetched to, but at least a page.
    order: of the prompt's tokens in pages; the output is the same.
    placement: of the pages.
    bits: of a number in a page, 2, 4 or 8, so that fetching moves that much less; 16 keeps numbers
      as they are. Sinks, ring and the tail's values are never quantised. Ours: the paper's cache is
      not quantised.
    split: how the far tokens lie on devices: each has a range of the prompt, and pages sealed later
      are dealt in turn. All else is the same on each, and each chooses alike.
  """

  codebook: Codebook
  budget: Budget
  far: FarPosition = FarPosition.constant()
  tail: Literal["none", "centroid"] = "none"
  window: int = 64
  sinks: int = 8
  page: int = 16
  fetch: int = 0
  stage: int = STAGE_BYTES
  order: cells.Order = "cell"
  placement: paged.Placement = "auto"
  bits: int = 16
  split: Split = WHOLE

  def __post_init__(self):
    selection.check_near(sinks=self.sinks, window=self.window)
    if self.bits not in quantise.BITS:
      raise UserError(f"a2ats: bits must be one of {quantise.BITS}, got {self.bits}")
    if self.tail not in ("none", "centroid"):
      raise UserError(f"a2ats: tail must be none or centroid, got {self.tail!r}")
    if self.page < 1 or self.fetch < 0 or self.stage < 1:
      raise UserError(
        "a2ats: page must be at least 1 token, fetch 0 pages or more and stage at least 1 byte, "
        f"got {self.page}, {self.fetch} and {self.stage}"
      )

  @property
  def name(self) -> str:
    return "a2ats"

  @property
  def reference(self) -> A2ATSReference:
    """The method in reference form, which chooses and reads the same tokens."""
    names = [field.name for field in dataclasses.fields(A2ATSReference)]
    return A2ATSReference(**{name: getattr(self, name) for name in names})

  def stage_of(self, capacity: int, *, heads: int, pages: int, page_bytes: int) -> Stage:
    """How many pages are fetched at once: see :func:`a2ats_jax.methods.paging.stage_of`.

    Args:
      capacity: tokens of a row at most.
      heads: rows times KV heads.
      pages: of each KV head, N.
      page_bytes: of a page of one.
    """
    granted = self.split.share(int(self.budget.resolve(capacity).max()))
    need = needed(granted, self.budget.per, page=self.page)
    return stage_of(need, heads=heads, pages=pages, most=self.stage // page_bytes)

  def init(self, geometry: Geometry) -> PagedState:
    g = geometry
    size, dim = self.codebook.size, g.head_dim
    prompt_slots = _whole(self.split.share(g.prompt), self.page)
    slots = prompt_slots + self.split.share(_whole(g.new, self.page) // self.page) * self.page
    lead = (g.layers, g.batch, g.kv_heads)
    ring = ring_of(self.window, self.page)
    near = (*lead, self.sinks + ring, dim)
    return PagedState(
      store=paged.open_store(
        layers=g.layers,
        batch=g.batch,
        kv_heads=g.kv_heads,
        head_dim=dim,
        slots=slots,
        page=self.page,
        dtype=g.dtype,
        placement=self.placement,
        bits=self.bits,
      ),
      index=cells.empty(
        lead,
        count=self.far.cells(self.window, g.new, size),
        slots=slots,
        page=self.page,
        prompt=prompt_slots,
        order=self.order,
        split=self.split,
      ),
      near=dense.DenseCache(jnp.zeros(near, g.dtype), jnp.zeros(near, g.dtype)),
      codes=jnp.zeros((*lead, ring), jnp.int32),
      items=jnp.zeros((*lead, self.far.items(self.window, g.new)), jnp.int32),
      sums=jnp.zeros((*lead, size, dim)),
      members=jnp.zeros((*lead, size)),
      starts=self.far.starts(jnp.zeros(g.batch, jnp.int32), self.window, 0),
      prompt=jnp.zeros(g.batch, jnp.int32),
      segments=self.far.count(self.window, g.new),
      prompt_slots=prompt_slots,
      capacity=g.capacity,
    )

  def own(self, state: PagedState) -> list[Array]:
    x = state.index
    return [state.store.pages, x.cells, x.ranks, x.begins, x.begun, x.before, x.skip]

  def absorb(self, state: PagedState, prompt: PromptLayer, *, layer: int | Array) -> PagedState:
    b, t = prompt.keys.shape[:2]
    lengths, size, book = prompt.lengths, self.codebook.size, self.codebook.layer(layer)
    starts = self.far.starts(lengths, self.window, t)
    share = self.split.share(t)
    keys, k, v = (self.split.mine(x, share) for x in (prompt.keys, prompt.rotated, prompt.values))
    codes = jnp.swapaxes(encode(keys, book), 1, 2).astype(jnp.int32)
    slot = self.split.number * share + jnp.arange(share, dtype=jnp.int32)
    slot = jnp.broadcast_to(slot[None], (b, share))
    eligible = (slot >= self.sinks) & (slot < lengths[:, None] - self.window)
    built, token = cells.build(
      self.far.cells_of(slot, codes, starts, size),
      eligible,
      count=state.index.counts.shape[3],
      slots=state.index.slots,
      page=self.page,
      order=self.order,
      split=self.split,
    )
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    more = ((0, 0), (0, 0), (0, state.prompt_slots - share), (0, 0))
    sorted_k, sorted_v = (
      jnp.pad(jnp.take_along_axis(x, token[..., None], axis=2), more) for x in (k, v)
    )
    # The position in every place: first tokens, then the latest of each place of the ring. Places
    # that no token has reached hold position 0's.
    ring = state.codes.shape[3]
    first = jnp.broadcast_to(jnp.arange(self.sinks, dtype=jnp.int32)[None], (b, self.sinks))
    last = lengths[:, None] - 1
    latest = last - (last - jnp.arange(ring, dtype=jnp.int32)[None]) % ring
    place = jnp.clip(jnp.concatenate([first, latest], axis=1), 0, t - 1)[:, :, None, None]
    near_keys, near_k, near_v = (
      jnp.take_along_axis(x, place, axis=1) for x in (prompt.keys, prompt.rotated, prompt.values)
    )
    near_codes = encode(near_keys[:, self.sinks :], book).astype(jnp.int32)
    far = eligible[:, None, :, None]
    sums = _by_code(jnp.where(far, v, 0).astype(jnp.float32), codes, size)
    ones = jnp.broadcast_to(far.astype(jnp.float32), (*codes.shape, 1))
    members = _by_code(ones, codes, size)[..., 0]
    sums, members = self.split.total((sums, members))
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return dataclasses.replace(
      state,
      store=paged.write_prompt(state.store, sorted_k, sorted_v, layer=layer),
      index=jax.tree.map(put, state.index, built),
      near=dense.DenseCache(
        put(state.near.k, jnp.swapaxes(near_k, 1, 2).astype(state.near.k.dtype)),
        put(state.near.v, jnp.swapaxes(near_v, 1, 2).astype(state.near.v.dtype)),
      ),
      codes=put(state.codes, jnp.swapaxes(near_codes, 1, 2)),
      sums=put(state.sums, sums),
      members=put(state.members, members),
      starts=starts,
      prompt=lengths,
    )

  def attend(
    self,
    state: PagedState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], PagedState, PageStats]:
    def step(state: PagedState, q: Array, k: Array, v: Array, now: Array):
      return self._step(state, q, k, v, now, rope, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: PagedState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], PagedState, PageStats]:
    """Store the token, index the one that leaves the window, choose, fetch, attend."""
    now, book = positions[:, 0], self.codebook.layer(layer)
    state = self._remember(state, k, v, now, rope, book, layer)
    state = self._index_one(state, now, layer)
    counts = dense.read(state.index.counts, layer)
    table = self.score(state, q, positions, rope, layer)
    taken, ids, pages, dropped = self.choose(state, counts, table, now, layer)
    rotated = rotate(q, positions, rope)
    rest = None
    if self.tail == "centroid":
      rest = self._tail(state, table, counts - taken, layer)
    near, read = self._near(state, rotated, taken, rest, now, layer)
    part, moved = self._fetched(state, rotated, taken, ids, pages, near, layer)
    part = self.split.merge(part)
    selected = jnp.sum(taken, axis=-1)
    tail = jnp.zeros(q.shape[:3])
    if rest is not None:
      share = rest.total * jnp.exp(rest.peak - jnp.where(part.total > 0, part.peak, 0.0))
      tail = share / jnp.maximum(part.total, jnp.finfo(jnp.float32).tiny)
    many = (selected + read[:, None])[:, None]
    far = state.store.page_bytes // self.page  # of a far token's key and value
    exact = read[:, None] * (2 * k.shape[3] * state.near.k.dtype.itemsize)
    touched = (exact + selected * far).astype(jnp.float32)
    looked = self._index_bytes(state, pages)
    looked, moved, pages = self.split.total((looked, moved, pages))
    stats = PageStats(
      length=positions + 1,
      selected=selected[:, None],
      read=many,
      tail=tail,
      read_bytes=(touched + looked)[:, None],
      moved=moved[:, None],
      pages=pages[:, None],
      dropped=dropped[:, None],
    )
    live = now >= 0
    stats = jax.tree.map(
      lambda x: jnp.where(jnp.expand_dims(live, tuple(range(1, x.ndim))), x, 0), stats
    )
    out = jnp.where(live[:, None, None, None], attention.finish(part), 0.0)
    return out.astype(q.dtype), state, stats

  def _remember(
    self,
    state: PagedState,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    now: Int[Array, "B"],
    rope: Rope,
    book: Codebook,
    layer: int | Array,
  ) -> PagedState:
    """The new token into the ring, and among the sinks if it is one."""
    ring = state.codes.shape[3]
    code = encode(k, book).astype(jnp.int32)
    rotated = rotate(k, now[:, None], rope)
    place = jnp.where(now < 0, -1, now % ring)
    both = jnp.stack(
      [
        jnp.where(now < 0, -1, self.sinks + place),
        jnp.where(now < self.sinks, now, -1),  # a short prompt's sinks are still to come
      ],
      axis=1,
    )

    def twice(x: Array) -> Array:
      return jnp.broadcast_to(x, (x.shape[0], 2, *x.shape[2:]))

    return dataclasses.replace(
      state,
      near=dense.DenseCache(
        dense.append(state.near.k, twice(rotated), both, layer),
        dense.append(state.near.v, twice(v), both, layer),
      ),
      codes=dense.append(state.codes, code, place[:, None], layer),
    )

  def _index_one(self, state: PagedState, now: Int[Array, "B"], layer: int | Array) -> PagedState:
    """The token that leaves the window joins the index and the sums; a full page is sealed."""
    ring, size = state.codes.shape[3], self.codebook.size
    leaving = now - self.window
    place = jnp.maximum(leaving, 0) % ring
    item = now - state.prompt  # how many tokens left before it
    there = (now >= 0) & (item >= 0) & (leaving >= self.sinks)
    b, kv_heads = state.codes.shape[1:3]
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[None]
    code, value = jax.lax.optimization_barrier(
      (
        state.codes[layer, rows, heads, place[:, None]],
        state.near.v[layer, rows, heads, self.sinks + place[:, None]],
      )
    )
    cell = self.far.cells_of(leaving[:, None], code[:, :, None], state.starts, size)[..., 0]
    cell = jnp.clip(cell, 0, state.index.counts.shape[3] - 1)
    one = there.astype(jnp.float32)[:, None]
    items = state.items
    if items.shape[3]:
      items = dense.append(items, code[:, None], jnp.where(there, item, -1)[:, None], layer)
    return dataclasses.replace(
      state,
      index=cells.append(
        state.index, cell, jnp.where(there, self._slot(state, item), -1), layer=layer
      ),
      items=items,
      sums=state.sums.at[layer, rows, heads, code].add(value.astype(jnp.float32) * one[..., None]),
      members=state.members.at[layer, rows, heads, code].add(one),
      store=self._seal(state, jnp.where(now < 0, -1, item), layer),
    )

  def _slot(self, state: PagedState, item: Int[Array, "B"]) -> Int[Array, "B"]:
    """Where a token after the prompt's far ones lies; past the last slot on other devices.

    Args:
      item: its place among them, 0 or more to count.
    """
    page = item // self.page
    slot = state.prompt_slots + page // self.split.devices * self.page + item % self.page
    return jnp.where(self.split.has(page), slot, state.index.slots)

  def _full(self, state: PagedState, now: Int[Array, "B"]) -> Int[Array, "B"]:
    """Pages after the prompt's that are full, of all devices."""
    return jnp.maximum(now - state.prompt + 1, 0) // self.page

  def _seal(self, state: PagedState, item: Int[Array, "B"], layer: int | Array) -> paged.KVStore:
    """Write the page that ends with a row's ``item``, if one does and this device is to hold it."""
    number = self._slot(state, item) // self.page
    ends = (item >= 0) & ((item + 1) % self.page == 0) & (number < state.index.pages)

    def write(pages: Array) -> Array:
      ring = state.codes.shape[3]
      inside = (item - self.page + 1)[:, None] + jnp.arange(self.page, dtype=jnp.int32)[None]
      inside = (state.prompt[:, None] - self.window + inside) % ring + self.sinks
      rows = jnp.arange(inside.shape[0], dtype=jnp.int32)[:, None, None]
      heads = jnp.arange(state.codes.shape[2], dtype=jnp.int32)[None, :, None]
      k, v = (x[layer, rows, heads, inside[:, None]] for x in (state.near.k, state.near.v))
      store = dataclasses.replace(state.store, pages=pages)
      return paged.write_page(store, k, v, jnp.where(ends, number, -1), layer=layer).pages

    pages = jax.lax.cond(jnp.any(ends), write, lambda pages: pages, state.store.pages)
    return dataclasses.replace(state.store, pages=pages)

  def score(
    self,
    state: PagedState,
    q: Float[Array, "B 1 H D"],
    positions: Int[Array, "B 1"],
    rope: Rope,
    layer: int | Array,
  ) -> Float[Array, "B H cells"]:
    """The far score of every cell, as in the reference.

    Args:
      q: before rotary embedding.
    """
    table = selection.far_scores(
      q,
      dense.read(state.items, layer),
      positions=positions,
      starts=state.starts,
      far=self.far,
      segments=state.segments,
      book=self.codebook.layer(layer),
      rope=rope,
    )
    return table[:, 0]

  def choose(
    self,
    state: PagedState,
    counts: Int[Array, "B K cells"],
    table: Float[Array, "B H cells"],
    now: Int[Array, "B"],
    layer: int | Array,
  ) -> tuple[
    Int[Array, "B K cells"], Int[Array, "B K listed"], Int[Array, "B K"], Int[Array, "B K"]
  ]:
    """From scores to tokens taken of every cell and the pages that hold them.

    The page that is not full yet is in the ring, and none of these pages.

    Args:
      counts: tokens of every cell.
      now: positions of the queries.

    Returns:
      Tokens taken of every cell, page numbers, how many of these count, and how many tokens the
      fetch bound took away.
    """
    budget = self.budget.resolve(state.capacity)
    b, kv_heads, size = counts.shape
    scores = table
    if self.budget.per == "kv_head":
      scale = self.codebook.codewords.shape[-1] ** -0.5
      scores = cells.kv_head_scores(table[:, None], counts[:, None], scale=scale)[:, 0]
    # Each KV head by itself from here on, so that one that does not fit leaves others alone.
    scores = scores.reshape(b * kv_heads, -1, size)
    alone = counts.reshape(b * kv_heads, 1, size)
    held = cells.page_cells(state.index, layer=layer)
    # Pages not sealed yet are in the ring: their slots are emptied, so that none is marked.
    number = jnp.arange(held.sorted_pages, state.index.pages, dtype=jnp.int32)
    sealed = state.prompt_slots // self.page + self.split.dealt(self._full(state, now))
    there = (number[None] < sealed[:, None])[:, None, :, None]
    held = dataclasses.replace(held, cells=jnp.where(there, held.cells, size))
    held = jax.tree.map(lambda x: x.reshape(b * kv_heads, 1, *x.shape[2:]), held)
    granted = jnp.repeat(jnp.asarray(budget)[now + 1], kv_heads)
    most = int(budget.max()) * scores.shape[1]

    def pick(count: Int[Array, "rows"]) -> tuple[Array, Array, Array]:
      taken = cells.select(alone, scores, count)
      return taken, *cells.page_numbers(held, taken, most=most)

    taken, ids, pages = pick(granted)
    dropped = jnp.zeros_like(granted)
    if self.fetch:

      def fits(pages: Array) -> Array:
        return self.split.total(pages[:, 0]) <= self.fetch

      def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low fits
        middle = (low + high + 1) // 2
        good = fits(pick(middle)[2])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

      def shrink() -> tuple[Array, Array, Array]:
        steps = max(int(budget.max()).bit_length(), 1)
        return pick(jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(granted), granted))[0])

      chosen = taken, ids, pages
      taken, ids, pages = jax.lax.cond(jnp.all(fits(pages)), lambda: chosen, shrink)
      dropped = jnp.sum(chosen[0] - taken, axis=(1, 2))
    taken, ids, pages = (x.reshape(b, kv_heads, *x.shape[2:]) for x in (taken, ids, pages))
    return taken, ids, pages, dropped.reshape(b, kv_heads)

  def _fetched(
    self,
    state: PagedState,
    q: Float[Array, "B 1 H D"],
    taken: Int[Array, "B K cells"],
    ids: Int[Array, "B K listed"],
    count: Int[Array, "B K"],
    near: attention.Part,
    layer: int | Array,
  ) -> tuple[attention.Part, Float[Array, "B K"]]:
    """Attention over the chosen tokens of sealed pages and all that is near, and bytes moved."""
    b, kv_heads, _ = ids.shape
    pages, bytes_each = state.index.pages, state.store.page_bytes
    stage = self.stage_of(state.capacity, heads=b * kv_heads, pages=pages, page_bytes=bytes_each)
    by_head = taken.reshape(b * kv_heads, 1, -1)

    def chosen(blocks: Blocks) -> Array:
      slots = cells.look(state.index, blocks.heads, blocks.ids, layer=layer)
      return cells.selected(*slots, by_head[blocks.heads])

    return attend_pages(state.store, q, ids, count, chosen, stage=stage, layer=layer, start=near)

  def _index_bytes(self, state: PagedState, pages: Int[Array, "B K"]) -> Float[Array, "B K"]:
    """Bytes read on this device to choose tokens and to estimate the others.

    Args:
      pages: fetched.
    """
    size, dim, items = *state.sums.shape[3:], state.items.shape[3]
    index, word = state.index, 4  # codes, counts and sums are int32 and float32
    whole = (size + items) * dim + items  # codewords, and those of later tokens
    whole += 2 * (index.counts.shape[3] + index.skip.shape[3]) + index.begun.shape[3]
    whole += 2 * (index.pages - index.sorted_pages) * self.page
    whole += size * (dim + 1) if self.tail == "centroid" else 0
    return (word * (whole + 2 * self.page * pages)).astype(jnp.float32)

  def _near(
    self,
    state: PagedState,
    q: Float[Array, "B 1 H D"],
    taken: Int[Array, "B K cells"],
    rest: attention.Tail | None,
    now: Int[Array, "B"],
    layer: int | Array,
  ) -> tuple[attention.Part, Int[Array, "B"]]:
    """Attention over sinks, window and chosen tokens of the page that is not full yet, and a tail.

    Of a split, that device alone counts these which is to hold the page.

    Args:
      rest: the tail, if there is one.
    """
    ring, page = state.codes.shape[3], self.page
    place = jnp.arange(ring, dtype=jnp.int32)[None]
    held = now[:, None] - (now[:, None] - place) % ring  # the position in each place
    recent = (held >= self.sinks) & (held > now[:, None] - self.window)
    sink = jnp.arange(self.sinks, dtype=jnp.int32)[None] <= now[:, None]
    always = jnp.concatenate([sink, recent], axis=1)

    b, kv_heads = taken.shape[:2]
    full = self._full(state, now)
    number = state.prompt_slots // page + full // self.split.devices
    number = jnp.minimum(number, state.index.pages - 1)
    number = jnp.repeat(number, kv_heads)[:, None]
    heads = jnp.arange(b * kv_heads, dtype=jnp.int32)
    slots = cells.look(state.index, heads, number, layer=layer)
    cell, rank = (x.reshape(b, kv_heads, page) for x in slots)
    chosen = cells.selected(cell, rank, taken)
    item = held - (state.prompt - self.window + full * page)[:, None]
    inside = (item >= 0) & (held <= (now - self.window)[:, None])
    item = jnp.broadcast_to(jnp.clip(item, 0, page - 1)[:, None], (b, kv_heads, ring))
    chosen = jnp.take_along_axis(chosen, item, axis=2) & inside[:, None]
    chosen = jnp.pad(chosen, ((0, 0), (0, 0), (self.sinks, 0)))
    here = self.split.has(full)[:, None, None]
    mask = (always[:, None] | chosen) & here
    if rest is not None:
      rest = dataclasses.replace(
        rest,
        weights=jnp.where(here[..., None], rest.weights, 0.0),
        peak=jnp.where(here, rest.peak, -jnp.inf),
        total=jnp.where(here, rest.total, 0.0),
      )
    size = math.gcd(self.sinks, page)  # which divides sinks and ring
    keys, values = (
      dense.read(x, layer).reshape(b, kv_heads, -1, size, x.shape[-1])
      for x in (state.near.k, state.near.v)
    )
    pages = FloatPages(keys, values)
    part = paged_decode(q, pages, mask.reshape(keys.shape[:-1]), tail=rest)
    return part, jnp.sum(always, axis=-1, dtype=jnp.int32)

  def _tail(
    self,
    state: PagedState,
    table: Float[Array, "B H cells"],
    rest: Int[Array, "B K cells"],
    layer: int | Array,
  ) -> attention.Tail:
    """What was not taken: weight by cell, value by codeword."""
    b, heads, count = table.shape
    kv_heads, size = rest.shape[1], self.codebook.size
    group, old = heads // kv_heads, self.far.prompt_segments
    left = jnp.repeat(rest, group, axis=1)
    scale, peak = state.sums.shape[-1] ** -0.5, cells.largest(table, left)
    base = jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None]

    def weigh(table: Array, left: Array) -> Array:
      # Cells with none left are kept at the peak, where they cannot overflow.
      return jnp.exp(scale * jnp.minimum(table - base, 0.0)) * left.astype(jnp.float32)

    # Apart, so that sums over segments read the table, and no weights of all cells are written.
    by_code = _over_segments(weigh(table[..., : old * size], left[..., : old * size]), old)
    if count > old * size:
      # A group's weights of a token as one row: a scatter of single numbers takes a CPU twice as
      # long, and a TPU nine times by its compiler's estimate (docs/performance.md).
      later = weigh(table[..., old * size :], left[..., old * size :])
      later = later.reshape(b, kv_heads, group, -1)
      later = _by_code(jnp.swapaxes(later, 2, 3), dense.read(state.items, layer), size)
      by_code += jnp.swapaxes(later, 2, 3).reshape(b, heads, size)
    members = jnp.repeat(dense.read(state.members, layer), group, axis=1)
    return attention.Tail(
      weights=(by_code / jnp.maximum(members, 1.0))[:, None],
      sums=dense.read(state.sums, layer),
      peak=scale * peak[:, None],
      total=jnp.sum(by_code, axis=-1)[:, None],
    )


def _whole(tokens: int, page: int) -> int:
  """Tokens rounded up to whole pages."""
  return -(-tokens // page) * page


def ring_of(window: int, page: int) -> int:
  """R: the window and the page that is not full yet, rounded up to whole pages."""
  return _whole(window, page) + page


def _over_segments(x: Float[Array, "B H cells"], count: int) -> Float[Array, "B H C"]:
  """Sums over segments, half of them onto the other half: a CPU reduces a middle axis slowly."""
  if count == 1:
    return x
  size, half = x.shape[-1] // count, (count + 1) // 2
  low, high = x[..., : half * size], x[..., half * size :]
  missing = low.shape[-1] - high.shape[-1]  # a segment if the number is odd
  return _over_segments(low + jnp.pad(high, ((0, 0), (0, 0), (0, missing))), half)


def _by_code(
  x: Float[Array, "B K T n"], codes: Int[Array, "B K T"], size: int
) -> Float[Array, "B K C n"]:
  """Sums of x over the tokens of each codeword."""

  def one(x: Array, code: Array) -> Array:
    return jnp.zeros((size, x.shape[-1]), x.dtype).at[code].add(x)

  return jax.vmap(jax.vmap(one))(x, codes)
