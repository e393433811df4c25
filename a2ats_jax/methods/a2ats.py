"""A2ATS with the cache in pages: the reference's tokens, found by cell and fetched by page.

A prompt's far tokens are written to pages sorted by cell, layer by layer as each ends. The device
keeps the index, the sinks, a ring of recent tokens and, for the tail, the sum of values of every
codeword. A decode step scores the cells, cuts them, fetches the pages that hold a chosen token and
attends to the chosen tokens alone, so its output is that of
:class:`a2ats_jax.methods.a2ats_reference.A2ATSReference`.

A token joins the index when it leaves the window, and its page is written at once; tokens that
follow the prompt lie in order of arrival.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax import index as cells
from a2ats_jax import store as paged
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, encode, score_table
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods import dense, selection
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.rope import Rope, far_query, rotate
from a2ats_jax.typing import Array, Bool, Float, Int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["length", "selected", "read", "tail", "pages", "dropped"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PageStats(Stats):
  """What a step read, and moved.

  Attributes:
    pages: pages fetched that hold a chosen token.
    dropped: far tokens the budget granted and the fetch bound did not.
  """

  pages: Int[Array, "*L B S K"]
  dropped: Int[Array, "*L B S K"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["store", "index", "sinks", "ring", "codes", "sums", "members", "starts", "first"],
  meta_fields=["segments", "prompt_slots"],
)
@dataclasses.dataclass(frozen=True)
class PagedState:
  """The cache.

  Attributes:
    store: pages of far tokens: those of the prompt by cell, then later ones by arrival.
    index: cell and rank of every slot of the store.
    sinks: keys and values of the first tokens.
    ring: keys and values of the last R tokens, position p in place p mod R.
    codes: of the tokens in the ring.
    sums, members: of every codeword's far tokens, the sum of values and their number.
    starts: where each row's segments start, from :meth:`FarPosition.starts`.
    first: the first position of each row that is indexed after the prompt.
    segments: Z.
    prompt_slots: slots of the prompt's far tokens; later tokens follow.
  """

  store: paged.KVStore
  index: cells.CodeIndex
  sinks: dense.DenseCache
  ring: dense.DenseCache
  codes: Int[Array, "L B K R"]
  sums: Float[Array, "L B K C D"]
  members: Float[Array, "L B K C"]
  starts: Int[Array, "B cuts"]
  first: Int[Array, "B"]
  segments: int
  prompt_slots: int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["codebook"],
  meta_fields=["budget", "far", "tail", "window", "sinks", "page", "fetch", "order", "placement"],
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
    order: of the prompt's tokens in pages; the output is the same.
    placement: of the pages.
  """

  codebook: Codebook
  budget: Budget
  far: FarPosition = FarPosition.constant()
  tail: Literal["none", "centroid"] = "none"
  window: int = 64
  sinks: int = 8
  page: int = 16
  fetch: int = 0
  order: Literal["cell", "arrival"] = "cell"
  placement: paged.Placement = "auto"

  def __post_init__(self):
    selection.check_near(sinks=self.sinks, window=self.window)
    if self.tail not in ("none", "centroid"):
      raise UserError(f"a2ats: tail must be none or centroid, got {self.tail!r}")
    if self.page < 1 or self.fetch < 0:
      raise UserError(
        f"a2ats: page must be at least 1 token and fetch 0 pages or more, got {self.page} and "
        f"{self.fetch}"
      )

  @property
  def name(self) -> str:
    return "a2ats"

  def init(self, geometry: Geometry) -> PagedState:
    g = geometry
    segments = self.far.count(self.window, g.new)
    prompt_slots = _whole(g.prompt, self.page)
    slots = prompt_slots + _whole(g.new + self.window, self.page)
    lead = (g.layers, g.batch, g.kv_heads)
    recent = _whole(self.window, self.page) + self.page
    size, dim = self.codebook.size, g.head_dim
    count = segments * size

    def cache(tokens: int) -> dense.DenseCache:
      shape = (*lead, tokens, dim)
      return dense.DenseCache(jnp.zeros(shape, g.dtype), jnp.zeros(shape, g.dtype))

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
      ),
      index=cells.CodeIndex(
        jnp.zeros((*lead, count), jnp.int32),
        jnp.full((*lead, slots), count, jnp.int32),
        jnp.zeros((*lead, slots), jnp.int32),
      ),
      sinks=cache(max(self.sinks, 1)),
      ring=cache(recent),
      codes=jnp.zeros((*lead, recent), jnp.int32),
      sums=jnp.zeros((*lead, size, dim)),
      members=jnp.zeros((*lead, size)),
      starts=self.far.starts(jnp.zeros(g.batch, jnp.int32), self.window, 0),
      first=jnp.zeros(g.batch, jnp.int32),
      segments=segments,
      prompt_slots=prompt_slots,
    )

  def absorb(self, state: PagedState, prompt: PromptLayer, *, layer: int | Array) -> PagedState:
    b, t, _, _ = prompt.keys.shape
    lengths = prompt.lengths
    starts = self.far.starts(lengths, self.window, t)
    codes = jnp.swapaxes(encode(prompt.keys, self.codebook.layer(layer)), 1, 2).astype(jnp.int32)
    slot = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    eligible = (slot >= self.sinks) & (slot < lengths[:, None] - self.window)
    segment = self.far.segment_of(slot, starts)
    index, token = cells.build(
      segment[:, None] * self.codebook.size + codes,
      eligible,
      count=state.segments * self.codebook.size,
      slots=state.index.cells.shape[3],
      order=self.order,
    )
    k, v = jnp.swapaxes(prompt.rotated, 1, 2), jnp.swapaxes(prompt.values, 1, 2)
    more = ((0, 0), (0, 0), (0, state.prompt_slots - t), (0, 0))
    sorted_k, sorted_v = (
      jnp.pad(jnp.take_along_axis(x, token[..., None], axis=2), more) for x in (k, v)
    )
    # The latest position of each place of the ring; places no token has reached hold position 0's.
    place = jnp.arange(state.ring.k.shape[3], dtype=jnp.int32)[None]
    last = lengths[:, None] - 1
    recent = jnp.maximum(last - (last - place) % state.ring.k.shape[3], 0)[:, None, :, None]
    first = jnp.arange(state.sinks.k.shape[3], dtype=jnp.int32)
    first = jnp.broadcast_to(jnp.minimum(first, t - 1)[None, None, :, None], (b, 1, len(first), 1))
    far_value = jnp.where(eligible[:, None, :, None], v, 0).astype(jnp.float32)
    sums = _by_code(far_value, codes, self.codebook.size)
    members = _by_code(
      jnp.broadcast_to(eligible[:, None, :, None], (*codes.shape, 1)).astype(jnp.float32),
      codes,
      self.codebook.size,
    )
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return dataclasses.replace(
      state,
      store=paged.write_prompt(state.store, sorted_k, sorted_v, layer=layer),
      index=jax.tree.map(put, state.index, index),
      sinks=dense.DenseCache(
        put(state.sinks.k, jnp.take_along_axis(k, first, axis=2).astype(state.sinks.k.dtype)),
        put(state.sinks.v, jnp.take_along_axis(v, first, axis=2).astype(state.sinks.v.dtype)),
      ),
      ring=dense.DenseCache(
        put(state.ring.k, jnp.take_along_axis(k, recent, axis=2).astype(state.ring.k.dtype)),
        put(state.ring.v, jnp.take_along_axis(v, recent, axis=2).astype(state.ring.v.dtype)),
      ),
      codes=put(state.codes, jnp.take_along_axis(codes, recent[..., 0], axis=2)),
      sums=put(state.sums, sums),
      members=put(state.members, members[..., 0]),
      starts=starts,
      first=jnp.maximum(lengths - self.window, self.sinks),
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
    def one(state: PagedState, token: tuple[Array, ...]):
      q, k, v, now = (x[:, None] for x in token)
      out, state, stats = self._step(state, q, k, v, now, rope, layer)
      return state, (out, stats)

    if q.shape[1] == 1:
      return self._step(state, q, k, v, positions, rope, layer)
    tokens = tuple(jnp.swapaxes(x, 0, 1) for x in (q, k, v, positions))
    state, (out, stats) = jax.lax.scan(one, state, tokens)

    def together(x: Array) -> Array:
      return jnp.swapaxes(x[:, :, 0], 0, 1)  # [S, B, 1, ...] to [B, S, ...]

    return together(out), state, jax.tree.map(together, stats)

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
    now = positions[:, 0]
    state = self._remember(state, k, v, now, rope, layer)
    state, index = self._index_one(state, now, layer)
    table = self._scores(state, q, positions, rope, layer)
    granted = jnp.asarray(self.budget.resolve(dense_capacity(state)))[positions[:, 0] + 1]
    taken, chosen, dropped = self._choose(index, table, granted)
    rotated = rotate(q, positions, rope)
    part, near, pages = self._read(state, rotated, chosen, now, layer)
    count = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
    tail = jnp.zeros(q.shape[:3])
    if self.tail == "centroid":
      rest = self._tail(state, table, index.counts - taken, layer)
      whole = attention.merge([part, rest])
      share = rest.total * jnp.exp(rest.peak - jnp.where(whole.total > 0, whole.peak, 0.0))
      tail = share / jnp.maximum(whole.total, jnp.finfo(jnp.float32).tiny)
      part = whole
    stats = PageStats(
      length=positions + 1,
      selected=count[:, None],
      read=(count + near[:, None])[:, None],
      tail=tail,
      pages=pages[:, None],
      dropped=dropped[:, None],
    )
    stats = jax.tree.map(
      lambda x: jnp.where(jnp.expand_dims(now >= 0, tuple(range(1, x.ndim))), x, 0), stats
    )
    live = (now >= 0)[:, None, None, None]
    return jnp.where(live, attention.finish(part), 0.0).astype(q.dtype), state, stats

  def _remember(
    self,
    state: PagedState,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    now: Int[Array, "B"],
    rope: Rope,
    layer: int | Array,
  ) -> PagedState:
    """The new token into the ring, and among the sinks if it is one."""
    code = encode(k, self.codebook.layer(layer)).astype(jnp.int32)
    rotated = rotate(k, now[:, None], rope)
    place = jnp.where(now < 0, -1, now % state.ring.k.shape[3])[:, None]
    sink = jnp.where(now < state.sinks.k.shape[3], now, -1)[:, None]
    return dataclasses.replace(
      state,
      ring=dense.DenseCache(
        dense.append(state.ring.k, rotated, place, layer),
        dense.append(state.ring.v, v, place, layer),
      ),
      sinks=dense.DenseCache(
        dense.append(state.sinks.k, rotated, sink, layer),
        dense.append(state.sinks.v, v, sink, layer),
      ),
      codes=dense.append(state.codes, code, place, layer),
    )

  def _index_one(
    self, state: PagedState, now: Int[Array, "B"], layer: int | Array
  ) -> tuple[PagedState, cells.CodeIndex]:
    """The token that leaves the window joins the index, the sums and its page."""
    ring = state.ring.k.shape[3]
    leaving = now - self.window
    there = (now >= 0) & (leaving >= state.first)
    slot = jnp.where(there, state.prompt_slots + leaving - state.first, -1)
    place = (jnp.maximum(leaving, 0) % ring)[:, None, None]
    code = jnp.take_along_axis(dense.read(state.codes, layer), place, axis=2)[..., 0]
    segment = self.far.segment_of(jnp.maximum(leaving, 0)[:, None], state.starts)
    cell = jnp.minimum(segment, state.segments - 1) * self.codebook.size + code
    index = cells.append(jax.tree.map(lambda x: dense.read(x, layer), state.index), cell, slot)
    ring_k, ring_v = dense.read(state.ring.k, layer), dense.read(state.ring.v, layer)
    value = jnp.take_along_axis(ring_v, place[..., None], axis=2)[:, :, 0]
    b, kv_heads = code.shape
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[None]
    one = there.astype(jnp.float32)[:, None]
    # The whole page of that slot, from the ring; slots still to be filled get older tokens.
    page = jnp.where(there, slot // self.page, -1)
    start = state.first + page * self.page - state.prompt_slots
    inside = (start[:, None] + jnp.arange(self.page, dtype=jnp.int32)[None]) % ring
    inside = inside[:, None, :, None]
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    state = dataclasses.replace(
      state,
      index=jax.tree.map(put, state.index, index),
      sums=state.sums.at[layer, rows, heads, code].add(value.astype(jnp.float32) * one[..., None]),
      members=state.members.at[layer, rows, heads, code].add(one),
      store=paged.write_page(
        state.store,
        jnp.take_along_axis(ring_k, inside, axis=2),
        jnp.take_along_axis(ring_v, inside, axis=2),
        page,
        layer=layer,
      ),
    )
    return state, index

  def _scores(
    self,
    state: PagedState,
    q: Float[Array, "B 1 H D"],
    positions: Int[Array, "B 1"],
    rope: Rope,
    layer: int | Array,
  ) -> Float[Array, "B H cells"]:
    """The far score of every cell, as in the reference."""
    distance = self.far.distances(positions, state.starts, state.segments)
    moved = far_query(
      jnp.broadcast_to(q[:, :, None], (*q.shape[:2], state.segments, *q.shape[2:])), distance, rope
    )
    return score_table(moved, self.codebook.layer(layer).codewords)[:, 0]

  def _choose(
    self, index: cells.CodeIndex, table: Float[Array, "B H cells"], granted: Int[Array, "B"]
  ) -> tuple[Int[Array, "B K cells"], Bool[Array, "B K slots"], Int[Array, "B K"]]:
    """Tokens taken of every cell, their slots, and how many the fetch bound took away."""
    kv_heads = index.counts.shape[1]
    b, heads, size = table.shape
    # Each KV head by itself from here on, so that one that does not fit leaves others alone.
    alone = cells.CodeIndex(*(x.reshape(b * kv_heads, 1, -1) for x in _fields(index)))
    scores = table.reshape(b * kv_heads, heads // kv_heads, size)
    most = jnp.repeat(granted, kv_heads)

    def pick(count: Int[Array, "rows"]) -> tuple[Array, Array]:
      taken = cells.select(alone, scores, count)
      return taken, cells.selected(alone, taken)

    taken, chosen = pick(most)
    wanted = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
    if self.fetch:

      def fits(count: Array) -> Array:
        pages = cells.pages_of(pick(count)[1], self.page)
        return jnp.sum(pages, axis=(1, 2)) <= self.fetch

      def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low fits
        middle = (low + high + 1) // 2
        good = fits(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

      def shrink() -> tuple[Array, Array]:
        steps = max(int(self.budget.resolve(chosen.shape[-1]).max()).bit_length(), 1)
        return pick(jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(most), most))[0])

      taken, chosen = jax.lax.cond(jnp.all(fits(most)), lambda: (taken, chosen), shrink)
    dropped = wanted - jnp.sum(chosen, axis=-1, dtype=jnp.int32)
    return (
      taken.reshape(b, kv_heads, size),
      chosen.reshape(b, kv_heads, -1),
      dropped.reshape(b, kv_heads),
    )

  def _read(
    self,
    state: PagedState,
    q: Float[Array, "B 1 H D"],
    chosen: Bool[Array, "B K slots"],
    now: Int[Array, "B"],
    layer: int | Array,
  ) -> tuple[attention.Part, Int[Array, "B"], Int[Array, "B K"]]:
    """Exact attention over chosen tokens, sinks and window; what was read in any case; pages."""
    b, kv_heads, slots = chosen.shape
    total = slots // self.page
    bound = min(self.fetch or total, total)
    holds = cells.pages_of(chosen, self.page)
    pages = jnp.sum(holds, axis=-1, dtype=jnp.int32)
    rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    place = jnp.where(holds, jnp.cumsum(holds, axis=-1, dtype=jnp.int32) - 1, bound)
    number = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32)[None, None], holds.shape)
    ids = jnp.full((b, kv_heads, bound), -1, jnp.int32)
    ids = ids.at[rows, heads, place].set(number, mode="drop")
    used = ids >= 0
    ids = jnp.maximum(ids, 0)
    fetched_k, fetched_v = paged.fetch(state.store, ids, layer=layer)
    of_page = chosen.reshape(b, kv_heads, total, self.page)
    mask = jnp.take_along_axis(of_page, ids[..., None], axis=2) & used[..., None]
    mask = mask.reshape(b, 1, kv_heads, bound * self.page)
    parts = [dense.attend_masked(q, fetched_k, fetched_v, mask)]

    sink = jnp.arange(state.sinks.k.shape[3], dtype=jnp.int32)[None]
    sink = (sink < self.sinks) & (sink <= now[:, None])
    ring = state.ring.k.shape[3]
    held = jnp.arange(ring, dtype=jnp.int32)[None]
    held = now[:, None] - (now[:, None] - held) % ring  # the position in each place
    recent = (held >= self.sinks) & (held > now[:, None] - self.window)
    for cache, seen in ((state.sinks, sink), (state.ring, recent)):
      keys, values = dense.read(cache.k, layer), dense.read(cache.v, layer)
      parts.append(dense.attend_masked(q, keys, values, seen[:, None, None]))
    near = jnp.sum(sink, axis=-1, dtype=jnp.int32) + jnp.sum(recent, axis=-1, dtype=jnp.int32)
    return attention.merge(parts), near, pages

  def _tail(
    self,
    state: PagedState,
    table: Float[Array, "B H cells"],
    rest: Int[Array, "B K cells"],
    layer: int | Array,
  ) -> attention.Part:
    """What was not taken: weight by cell, value by codeword."""
    b, heads, count = table.shape
    kv_heads = rest.shape[1]
    group, size = heads // kv_heads, self.codebook.size
    left = jnp.repeat(rest, group, axis=1)
    scores = jnp.where(left > 0, table * state.sums.shape[-1] ** -0.5, -jnp.inf)
    peak = jnp.max(scores, axis=-1)
    weight = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None])
    weight = weight * left.astype(jnp.float32)
    by_code = jnp.sum(weight.reshape(b, heads, count // size, size), axis=2)
    members = dense.read(state.members, layer)[..., None]
    mean = dense.read(state.sums, layer) / jnp.maximum(members, 1.0)
    out = attention.weigh(by_code[:, None], mean)
    return attention.Part(out, peak[:, None], jnp.sum(weight, axis=-1)[:, None])


def dense_capacity(state: PagedState) -> int:
  """No row ever holds more tokens."""
  return state.index.cells.shape[3] + state.sinks.k.shape[3] + state.ring.k.shape[3]


def _fields(index: cells.CodeIndex) -> tuple[Array, Array, Array]:
  return index.counts, index.cells, index.ranks


def _whole(tokens: int, page: int) -> int:
  """Tokens rounded up to whole pages."""
  return -(-tokens // page) * page


def _by_code(
  x: Float[Array, "B K T n"], codes: Int[Array, "B K T"], size: int
) -> Float[Array, "B K C n"]:
  """Sums of x over the tokens of each codeword."""

  def one(x: Array, code: Array) -> Array:
    return jnp.zeros((size, x.shape[-1]), x.dtype).at[code].add(x)

  return jax.vmap(jax.vmap(one))(x, codes)
