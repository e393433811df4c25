"""MagicPIG: tokens sampled by locality-sensitive hashing, and weighted by how likely that was."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax import index as cells
from a2ats_jax import store as paged
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats, token_by_token
from a2ats_jax.methods.paging import STAGE_BYTES, Blocks, in_stages, stage_of
from a2ats_jax.ops.pages import Pages
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int, UInt16

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 1024  # prompt tokens hashed at once
_LEAST = 1e-4  # of a collision probability: what float32 resolves of an angle close to pi


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["store", "codes", "mean", "near", "projections"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class HashedState:
  """The cache.

  Attributes:
    store: pages in order of arrival: position p in slot p. A page is written when its last token
      is there; those of the prompt all at once.
    codes: of the token in every slot, one a table; a table's lie side by side.
    mean: of the prompt's rotated keys.
    near: rotated keys and values of the sinks, and then of the last ``window`` tokens: position p
      in place ``sinks + p mod window``.
    projections: what every layer and head hashes with, from :func:`projections`.
  """

  store: paged.KVStore
  codes: UInt16[Array, "L B K tables T"]
  mean: Float[Array, "L B K D"]
  near: dense.DenseCache
  projections: Float[Array, "tables bits D"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["tables", "bits", "sinks", "window", "page", "seed", "placement"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MagicPIG:
  r"""MagicPIG (2410.16179): tokens sampled by hash, attended with importance weights.

  A hash table gives a vector the signs of its products with ``bits`` random directions. Keys are
  hashed after the prompt's mean key is taken off, queries as they are. A query head samples the
  tokens whose code equals its own in at least two tables (section 4). One sign agrees with
  probability :math:`p = 1 - \arccos(\cos(q, k - \bar k)) / \pi`, a table with :math:`a = p^{bits}`,
  so a token is sampled with probability
  :math:`u = 1 - (1 - a)^{tables} - tables\, a\, (1 - a)^{tables - 1}`, and its weight is
  :math:`e^{l} / u` for its logit l: numerator and denominator of the softmax are unbiased
  estimates. The first tokens and the last ones are read in any case, with weight :math:`e^l`.
  A KV head fetches a page where any of its query heads sampled a token; each head attends to its
  own sample. Needs nothing of prefill but keys. The same directions serve all layers and heads.

  Host bytes per token and layer: ``2 K D`` numbers. Device: ``2 K tables`` for codes; once per row
  and layer, sinks and ``window`` tokens of ``2 K D`` numbers and ``4 K D`` for the mean; once,
  ``4 D tables bits`` for the directions.

  The paper keeps hash tables and this part of attention on the CPU, where a sampled token costs no
  transfer. Here pages in order of arrival come to the device, so more is moved than is sampled, and
  a step compares the codes of all slots, ``2 tables`` bytes each, where the paper looks buckets up.

  Ours: the mean is that of the whole prompt, where the repository leaves sinks and window out of
  it; tokens that leave the window are hashed too, where the repository keeps all generated ones on
  the GPU; :math:`\log u` is taken as it is, where the repository adds 1e-4 to u; every layer
  samples (the repository leaves every sixteenth, the first included, alone).

  Attributes:
    tables: hash tables, the paper's L, at least 2.
    bits: of a code, the paper's K, at most 16; with 0 every token is sampled, with weight 1.
    sinks: first tokens, read in any case.
    window: last tokens, read in any case; at least a page.
    page: P, tokens a page.
    seed: of the directions.
    placement: of the pages.
  """

  tables: int = 150
  bits: int = 10
  sinks: int = 4
  window: int = 64
  page: int = 16
  seed: int = 0
  placement: paged.Placement = "auto"

  def __post_init__(self):
    if self.tables < 2 or not 0 <= self.bits <= 16:
      raise UserError(
        f"magicpig: expected 2 tables or more and 0 to 16 bits, got {self.tables} and {self.bits}"
      )
    if self.page < 1 or self.sinks < 0 or not 0 <= self.seed < 1 << 31:
      raise UserError(
        "magicpig: expected a page of at least 1 token, 0 sinks or more and a seed of 31 bits, got "
        f"{self.page}, {self.sinks} and {self.seed}"
      )
    if self.window < self.page:
      raise UserError(
        f"magicpig: expected a window of at least a page, {self.page} tokens, got {self.window}"
      )

  @property
  def name(self) -> str:
    return "magicpig"

  def init(self, geometry: Geometry) -> HashedState:
    g = geometry
    lead, slots = (g.layers, g.batch, g.kv_heads), -(-g.capacity // self.page) * self.page
    return HashedState(
      store=paged.open_store(
        layers=g.layers,
        batch=g.batch,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        slots=slots,
        page=self.page,
        dtype=g.dtype,
        placement=self.placement,
      ),
      codes=jnp.zeros((*lead, self.tables, slots), jnp.uint16),
      mean=jnp.zeros((*lead, g.head_dim)),
      near=dense.zeros((*lead, self.sinks + self.window, g.head_dim), g.dtype),
      projections=projections(self.seed, tables=self.tables, bits=self.bits, dim=g.head_dim),
    )

  def absorb(self, state: HashedState, prompt: PromptLayer, *, layer: int | Array) -> HashedState:
    b, t, kv_heads, d = prompt.rotated.shape
    inside = jnp.arange(t, dtype=jnp.int32)[None] < prompt.lengths[:, None]
    keys = jnp.where(inside[..., None, None], prompt.rotated.astype(jnp.float32), 0.0)
    count = jnp.maximum(prompt.lengths, 1).astype(jnp.float32)
    mean = jnp.sum(keys, axis=1) / count[:, None, None]
    block = min(_BLOCK, t)
    blocks = jnp.pad(keys - mean[:, None], ((0, 0), (0, -t % block), (0, 0), (0, 0)))
    blocks = jnp.swapaxes(blocks.reshape(b, -1, block, kv_heads, d), 0, 1)
    codes = jax.lax.map(lambda x: codes_of(x, state.projections), blocks)
    codes = jnp.swapaxes(codes, 0, 1).reshape(b, -1, kv_heads, self.tables)[:, :t]
    codes = jnp.moveaxis(codes, 1, 3)[None]

    k, v = jnp.swapaxes(prompt.rotated, 1, 2), jnp.swapaxes(prompt.values, 1, 2)
    more = ((0, 0), (0, 0), (0, -t % self.page), (0, 0))
    # The position in every near place; places that no token has reached hold some other's.
    first = jnp.broadcast_to(jnp.arange(self.sinks, dtype=jnp.int32)[None], (b, self.sinks))
    held = jnp.concatenate([first, self._held(prompt.lengths - 1)], axis=1)
    held = jnp.clip(held, 0, t - 1)[:, None, :, None]

    def put(all_layers: Array, x: Array) -> Array:
      return jax.lax.dynamic_update_index_in_dim(all_layers, x.astype(all_layers.dtype), layer, 0)

    return dataclasses.replace(
      state,
      store=paged.write_prompt(state.store, jnp.pad(k, more), jnp.pad(v, more), layer=layer),
      codes=jax.lax.dynamic_update_slice(state.codes, codes, (layer, 0, 0, 0, 0)),
      mean=put(state.mean, mean),
      near=dense.DenseCache(
        put(state.near.k, jnp.take_along_axis(k, held, axis=2)),
        put(state.near.v, jnp.take_along_axis(v, held, axis=2)),
      ),
    )

  def attend(
    self,
    state: HashedState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], HashedState, Stats]:
    def step(state: HashedState, q: Array, k: Array, v: Array, positions: Array):
      q, k = rotate(q, positions, rope), rotate(k, positions, rope)
      return self._step(state, q, k, v, positions, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: HashedState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], HashedState, Stats]:
    now = positions[:, 0]
    state = self._remember(state, k, v, now, layer)
    far, selected, moved = self.sample(state, q, now, layer)
    held = self._held(now)
    sink = jnp.arange(self.sinks, dtype=jnp.int32)[None] <= now[:, None]
    near = jnp.concatenate([sink, held >= self.sinks], axis=1)  # none for padding
    near_k, near_v = dense.read(state.near.k, layer), dense.read(state.near.v, layer)
    part = dense.attend_masked(q, near_k, near_v, near[:, None, None])
    out = attention.finish(attention.merge([far, part])).astype(q.dtype)
    selected = selected[:, None]
    read = selected + jnp.sum(near, axis=-1, dtype=jnp.int32)[:, None, None]
    d, kv_heads, slots = k.shape[3], k.shape[2], state.codes.shape[4]
    # Codes of every slot, the mean, and this head's part of the directions, which all share.
    index = 2 * self.tables * slots + 4 * d + 4 * state.projections.size // kv_heads
    size = dense.token_bytes(read, near_k) + jnp.where(now < 0, 0.0, index)[:, None, None]
    stats = Stats(
      length=positions + 1,
      selected=selected,
      read=read,
      tail=jnp.zeros(q.shape[:3]),
      read_bytes=size,
      moved=jnp.where(now[:, None] < 0, 0.0, moved)[:, None],
    )
    return out, state, stats

  def sample(
    self, state: HashedState, q: Float[Array, "B 1 H D"], now: Int[Array, "B"], layer: int | Array
  ) -> tuple[attention.Part, Int[Array, "B K"], Float[Array, "B K"]]:
    """Weighted attention over the sampled tokens between sinks and window, their number, and bytes
    moved.

    Args:
      q: rotated.
      now: its position, -1 for padding; tokens up to it are in the state.
    """
    _, b, kv_heads, _, slots = state.codes.shape
    drawn = self._collide(state, q, now, layer)
    by_page = drawn.reshape(*drawn.shape[:3], -1, self.page)
    ids, count = cells.compact(jnp.any(by_page, axis=(2, 4)))
    stage = stage_of(
      slots // self.page,  # as many as a KV head has: how many are drawn is not known
      heads=b * kv_heads,
      pages=slots // self.page,
      most=STAGE_BYTES // state.store.page_bytes,
    )
    q = q.astype(jnp.float32)
    mean = dense.read(state.mean, layer)[:, :, None]
    shift = attention.logits(q, mean)
    shift = shift.reshape(b * kv_heads, 1, -1, 1)
    mean = mean.reshape(b * kv_heads, 1, 1, -1)
    by_head = by_page.reshape(b * kv_heads, *by_page.shape[2:])

    def decode(q: Array, pages: Pages, blocks: Blocks) -> attention.Part:
      w, f = blocks.ids.shape
      keys, values = (x.reshape(w, 1, f * self.page, -1) for x in (pages.keys, pages.values))
      centred = keys.astype(jnp.float32) - mean[blocks.heads]
      dot = attention.logits(q, centred)
      size = jnp.linalg.norm(centred, axis=-1)[:, None]
      size = size * jnp.linalg.norm(q, axis=-1)[..., None]
      cosine = dot * math.sqrt(q.shape[3]) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
      scores = dot + shift[blocks.heads] - log_inclusion(cosine, tables=self.tables, bits=self.bits)
      # Of W heads, G and F: the query heads of a block see its pages' drawn tokens.
      seen = by_head[blocks.heads[:, None], :, blocks.ids].swapaxes(1, 2)
      seen &= blocks.used[:, None, :, None]
      return attention.from_logits(scores, values, seen.reshape(scores.shape))

    part, moved = in_stages(state.store, q, ids, count, decode, stage=stage, layer=layer)
    return part, jnp.sum(jnp.any(drawn, axis=2), axis=-1, dtype=jnp.int32), moved

  def _collide(
    self, state: HashedState, q: Float[Array, "B 1 H D"], now: Int[Array, "B"], layer: int | Array
  ) -> Bool[Array, "B K G T"]:
    """Tokens between sinks and window whose code a query head meets in two tables or more."""
    _, b, kv_heads, tables, slots = state.codes.shape
    own = codes_of(q[:, 0], state.projections).reshape(b, kv_heads, -1, tables)

    def meet(table: Array, seen: tuple[Array, Array]) -> tuple[Array, Array]:
      once, twice = seen
      start, size = (layer, 0, 0, table, 0), (1, b, kv_heads, 1, slots)
      codes = jax.lax.dynamic_slice(state.codes, start, size)[0]
      here = codes == jax.lax.dynamic_slice_in_dim(own, table, 1, axis=3)
      return once | here, twice | (once & here)

    none = jnp.zeros((*own.shape[:3], slots), bool)
    _, drawn = jax.lax.fori_loop(0, tables, meet, (none, none))
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    far = (slot >= self.sinks) & (slot <= (now - self.window)[:, None])
    return drawn & far[:, None, None]

  def _held(self, now: Int[Array, "B"]) -> Int[Array, "B R"]:
    """The position in every place of the ring, at most ``now``; negative where none has been."""
    place = jnp.arange(self.window, dtype=jnp.int32)[None]
    return now[:, None] - (now[:, None] - place) % self.window

  def _remember(
    self,
    state: HashedState,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    now: Int[Array, "B"],
    layer: int | Array,
  ) -> HashedState:
    """The new token into the ring, and among the sinks if it is one; a page that ends is written.

    Every token that has left the window is in a written page: the window is no shorter than one.
    """
    place = jnp.where(now < 0, -1, self.sinks + now % self.window)
    places = jnp.stack([place, jnp.where(now < self.sinks, now, -1)], axis=1)

    def remember(cache: Array, x: Array) -> Array:
      return dense.append(cache, jnp.repeat(x, 2, axis=1), places, layer)

    near = dense.DenseCache(remember(state.near.k, k), remember(state.near.v, v))
    mean = dense.read(state.mean, layer)[:, None]
    rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    slot = jnp.where(now < 0, state.codes.shape[4], now)[:, None]
    code = codes_of(k.astype(jnp.float32) - mean, state.projections)
    ends = (now >= 0) & ((now + 1) % self.page == 0)

    def write(pages: Array) -> Array:
      inside = now[:, None] - self.page + 1 + jnp.arange(self.page, dtype=jnp.int32)[None]
      inside = (self.sinks + inside % self.window)[:, None]
      heads = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :, None]
      full_k, full_v = (x[layer, rows[..., None], heads, inside] for x in (near.k, near.v))
      number = jnp.where(ends, now // self.page, -1)
      store = dataclasses.replace(state.store, pages=pages)
      return paged.write_page(store, full_k, full_v, number, layer=layer).pages

    pages = jax.lax.cond(jnp.any(ends), write, lambda pages: pages, state.store.pages)
    return dataclasses.replace(
      state,
      store=dataclasses.replace(state.store, pages=pages),
      codes=state.codes.at[layer, rows, :, :, slot].set(code, mode="drop"),
      near=near,
    )


def projections(seed: int, *, tables: int, bits: int, dim: int) -> Float[Array, "tables bits D"]:
  """Random directions, independent standard normal numbers."""
  return jax.random.normal(jax.random.key(seed), (tables, bits, dim), jnp.float32)


def codes_of(
  x: Float[Array, "*lead D"], directions: Float[Array, "tables bits D"]
) -> UInt16[Array, "*lead tables"]:
  """The code of a vector in every table: bit i says whether its i-th product is positive."""
  products = jnp.einsum("...d,tbd->...tb", x.astype(jnp.float32), directions, precision=_HIGHEST)
  bit = jnp.left_shift(jnp.uint16(1), jnp.arange(directions.shape[1], dtype=jnp.uint16))
  bit = jnp.broadcast_to(bit, products.shape)
  return jnp.sum(jnp.where(products > 0, bit, jnp.uint16(0)), axis=-1, dtype=jnp.uint16)


def log_inclusion(
  cosine: Float[Array, "*lead"], *, tables: int, bits: int
) -> Float[Array, "*lead"]:
  r"""The logarithm of the probability that two vectors' codes agree in two tables or more.

  With :math:`a = p^{bits}` that of one table, :math:`\sum_{j \ge 2} \binom{tables}{j} a^j
  (1 - a)^{tables - j}`: one minus the other two terms, or where that would cancel in float32, the
  sum's first terms.
  """
  p = 1.0 - jnp.arccos(jnp.clip(cosine, -1.0, 1.0)) / math.pi
  log_a = bits * jnp.log(jnp.maximum(p, _LEAST))
  a = jnp.exp(log_a)
  few = a * tables < 0.1
  small = jnp.where(few, a, 0.0)
  term = more = jnp.ones_like(a)
  for j in range(3, 6):  # each term relative to the one of j = 2; the rest is below 1e-6 of it
    term = term * ((tables - j + 1) / j) * small / (1.0 - small)
    more = more + term
  series = math.log(math.comb(tables, 2)) + 2 * log_a
  series = series + (tables - 2) * jnp.log1p(-small) + jnp.log(more)
  large = jnp.where(few, 1.0, a)
  none_or_one = jnp.log1p((tables - 1) * large) + (tables - 1) * jnp.log1p(-large)
  return jnp.where(few, series, jnp.log(-jnp.expm1(none_or_one)))
