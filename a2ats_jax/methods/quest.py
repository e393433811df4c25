"""Quest: pages whose keys could score highest are read."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats, token_by_token
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int


@partial(
  jax.tree_util.register_dataclass, data_fields=["cache", "low", "high"], meta_fields=["capacity"]
)
@dataclasses.dataclass(frozen=True)
class QuestState:
  """The cache, and bounds of every page.

  Attributes:
    cache: rotated keys and values by position, whole pages.
    low, high: of every channel, over the keys of a page that have been written.
    capacity: no row ever holds more tokens.
  """

  cache: dense.DenseCache
  low: Float[Array, "L B K N D"]
  high: Float[Array, "L B K N D"]
  capacity: int


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "page"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest:
  """Quest (2406.10774): query-aware pages.

  A page's score is the most that any key within its bounds could score:
  ``sum_d max(q_d low_d, q_d high_d)``. Each query head reads the pages of the highest scores that
  the budget grants, and the page that is being written. Needs nothing of prefill.

  Device bytes per token and layer: ``2 K D`` numbers, and ``2 K D / P`` for bounds; nothing on the
  host: Quest saves reading, not memory.

  Ours: every layer selects, where the published runs leave the first two alone.

  Attributes:
    budget: tokens that each query head may read, whoever the budget names; whole pages, rounded
      down.
    page: P, tokens a page.
  """

  budget: Budget
  page: int = 16

  def __post_init__(self):
    if self.page < 1:
      raise UserError(f"quest: page must be at least 1 token, got {self.page}")

  @property
  def name(self) -> str:
    return "quest"

  def init(self, geometry: Geometry) -> QuestState:
    g = geometry
    pages = -(-g.capacity // self.page)
    lead = (g.layers, g.batch, g.kv_heads)
    return QuestState(
      dense.zeros((*lead, pages * self.page, g.head_dim), g.dtype),
      jnp.zeros((*lead, pages, g.head_dim), g.dtype),
      jnp.zeros((*lead, pages, g.head_dim), g.dtype),
      g.capacity,
    )

  def absorb(self, state: QuestState, prompt: PromptLayer, *, layer: int | Array) -> QuestState:
    b, t, kv_heads, d = prompt.keys.shape
    pages = -(-t // self.page)
    here = (jnp.arange(t, dtype=jnp.int32)[None] < prompt.lengths[:, None])[..., None, None]

    def bound(fill: float, reduce) -> Array:
      keys = jnp.where(here, prompt.rotated, fill)
      more = ((0, 0), (0, pages * self.page - t), (0, 0), (0, 0))
      keys = jnp.pad(keys, more, constant_values=fill)
      of = reduce(keys.reshape(b, pages, self.page, kv_heads, d), axis=2)
      return jnp.where(jnp.isfinite(of), of, 0)  # a page without tokens

    low, high = bound(jnp.inf, jnp.min), bound(-jnp.inf, jnp.max)
    return dataclasses.replace(
      state,
      cache=dense.write_prompt_cache(state.cache, prompt, layer),
      low=dense.write_prompt(state.low, low, layer),
      high=dense.write_prompt(state.high, high, layer),
    )

  def attend(
    self,
    state: QuestState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], QuestState, Stats]:
    def step(state: QuestState, q: Array, k: Array, v: Array, positions: Array):
      q, k = rotate(q, positions, rope), rotate(k, positions, rope)
      return self._step(state, q, k, v, positions, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: QuestState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], QuestState, Stats]:
    now, (b, _, kv_heads, d) = positions[:, 0], k.shape
    heads, pages = q.shape[2], state.low.shape[3]
    state = self._remember(state, k, v, positions, layer)
    ids, used = self.choose(state, q, now, layer)
    rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    owner = (jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads))[None, :, None]

    def gather(x: Array) -> Array:
      """Pages of every query head, ``[B, H, F P, D]``."""
      paged = x.reshape(*x.shape[:3], pages, self.page, d)
      return paged[layer, rows, owner, ids].reshape(b, heads, -1, d)

    inside = jnp.arange(self.page, dtype=jnp.int32)[None, None, None]
    token = (ids[..., None] * self.page + inside).reshape(b, heads, -1)
    mask = jnp.repeat(used, self.page, axis=-1) & (token <= now[:, None, None])
    part = dense.attend_masked(q, gather(state.cache.k), gather(state.cache.v), mask[:, None])
    out = attention.finish(part).astype(q.dtype)
    chosen = jnp.zeros((b, heads, pages), bool)
    every = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    chosen = chosen.at[rows, every, jnp.where(used, ids, pages)].set(True, mode="drop")
    of_group = jnp.any(chosen.reshape(b, kv_heads, -1, pages), axis=2)
    start = jnp.arange(pages, dtype=jnp.int32)[None, None] * self.page
    held = jnp.clip(now[:, None, None] + 1 - start, 0, self.page)
    read = jnp.sum(jnp.where(of_group, held, 0), axis=-1, dtype=jnp.int32)[:, None]
    # Query heads gather by themselves: what two of a group chose is read twice.
    tokens = jnp.sum(mask, axis=-1).reshape(b, 1, kv_heads, -1).sum(axis=-1)
    bounds = jnp.where(now < 0, 0, -(-(now + 1) // self.page))[:, None, None]
    size = (tokens + bounds) * (2 * d * k.dtype.itemsize)
    return out, state, dense.on_device(positions + 1, read, heads, size)

  def _remember(
    self,
    state: QuestState,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> QuestState:
    """The new token into its page, and into the page's bounds."""
    now = positions[:, 0]
    number = jnp.maximum(now, 0) // self.page
    rows = jnp.arange(len(now), dtype=jnp.int32)[:, None]
    heads = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    first = (now % self.page == 0)[:, None, None]
    key, at = k[:, 0].astype(state.low.dtype), jnp.where(now < 0, -1, number)[:, None]

    def bound(x: Array, combine) -> Array:
      old = x[layer, rows, heads, number[:, None]]
      new = jnp.where(first, key, combine(old, key))
      return dense.append(x, new[:, None], at, layer)

    return dataclasses.replace(
      state,
      cache=dense.DenseCache(
        dense.append(state.cache.k, k, positions, layer),
        dense.append(state.cache.v, v, positions, layer),
      ),
      low=bound(state.low, jnp.minimum),
      high=bound(state.high, jnp.maximum),
    )

  def choose(
    self, state: QuestState, q: Float[Array, "B 1 H D"], now: Int[Array, "B"], layer: int | Array
  ) -> tuple[Int[Array, "B H F"], Bool[Array, "B H F"]]:
    """Pages that each query head reads, and which of them count; the one being written is last.

    Ties go to the earlier page.

    Args:
      q: rotated.
    """
    low, high = dense.read(state.low, layer), dense.read(state.high, layer)
    b, kv_heads, pages, _ = low.shape
    query = attention.grouped(q, kv_heads)[:, 0]
    # The most a key within the bounds can score, as two products instead of [H, N, D] numbers.
    product = partial(
      jnp.einsum,
      "bkgd,bknd->bkgn",
      preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST,
    )
    score = product(jnp.maximum(query, 0), high) + product(jnp.minimum(query, 0), low)
    score = score.reshape(b, -1, pages)
    last = jnp.maximum(now, 0) // self.page
    before = jnp.arange(pages, dtype=jnp.int32)[None, None] < last[:, None, None]
    table = self.budget.resolve(state.capacity) // self.page
    most = min(max(int(table.max()), 1), pages)
    granted = jnp.asarray(table)[jnp.maximum(now + 1, 0)]
    best, ids = jax.lax.top_k(jnp.where(before, score, -jnp.inf), most)
    place = jnp.arange(most, dtype=jnp.int32)[None, None]
    used = (best > -jnp.inf) & (place < granted[:, None, None])
    written = jnp.broadcast_to(last[:, None, None], (*ids.shape[:2], 1))
    live = jnp.broadcast_to((now >= 0)[:, None, None], written.shape)
    return (
      jnp.concatenate([ids.astype(jnp.int32), written], axis=-1),
      jnp.concatenate([used & live, live], axis=-1),
    )
