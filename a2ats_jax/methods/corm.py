"""CORM: a token goes when none of the last queries has found it important."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import kept, layer_budget
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats, token_by_token
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int, UInt


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "votes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CORMState:
  """The cache, and which of the last queries found each token important.

  Attributes:
    votes: a bit a query, that of position p in bit ``p mod 8`` of byte ``(p mod w) // 8``.
  """

  cache: kept.KeptCache
  votes: UInt[Array, "B K pool bytes"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "window", "recent", "profile"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CORM:
  """CORM (2404.15949): eviction without a fixed budget.

  A query finds a token important if the token's weight is at least one over the number of tokens
  attended, in any query head of the KV head. A token that none of the last ``window`` queries found
  important goes, unless it is one of the latest ``recent``. Needs the window's queries of prefill.

  Device bytes per slot and layer: ``2 K D`` numbers, ``4 K`` for positions and ``K window / 8`` for
  votes; nothing on the host. Slots: what the budget grants at the longest row there can be, two at
  least.

  Ours: shapes are static in JAX, so the budget bounds the slots; where more tokens are important,
  the one with the fewest votes goes first, the oldest on ties, and the latest take no more than
  half of slots that do not hold the whole context. How many tokens are read is up to
  the attention alone (the statistics say how many). Importance is measured against the tokens that
  are still there, and the paper does not say how query heads share a KV head.

  Attributes:
    budget: bound on the tokens of each KV head.
    window: w, queries remembered, a multiple of 8.
    recent: latest tokens that stay, fewer where slots are few.
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  window: int = 256
  recent: int = 256
  profile: Curves = ()

  def __post_init__(self):
    if self.window < 8 or self.window % 8 or self.recent < 1:
      raise UserError(
        "corm: window must be a multiple of 8 queries and recent at least 1 token, got "
        f"{self.window} and {self.recent}"
      )

  @property
  def name(self) -> str:
    return "corm"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window)

  def init(self, geometry: Geometry) -> CORMState:
    table = layer_budget.granted(self.budget, geometry.capacity, geometry.layers, self.profile)
    sizes = np.clip(table.max(axis=1), min(2, geometry.capacity), None)
    cache = kept.empty(geometry, sizes.tolist())
    shape = (*cache.positions.shape, self.window // 8)
    return CORMState(cache, jnp.zeros(shape, jnp.uint8))

  def _recent(self, cache: kept.KeptCache, layer: int | Array) -> Int[Array, ""]:
    """Latest tokens of a layer that stay."""
    recent = [self.recent if n >= cache.capacity else min(self.recent, n // 2) for n in cache.sizes]
    return jnp.asarray(recent, jnp.int32)[layer]

  def absorb(self, state: CORMState, prompt: PromptLayer, *, layer: int | Array) -> CORMState:
    if prompt.queries is None:
      raise UserError("corm: the prompt's last queries were not handed over")
    b, t, kv_heads, _ = prompt.keys.shape
    heads, w = prompt.queries.shape[2], self.window
    at = prompt.lengths[:, None] - w + jnp.arange(w, dtype=jnp.int32)[None]
    least = 1.0 / jnp.maximum(at + 1, 1).astype(jnp.float32)
    votes = []
    for head in range(kv_heads):  # W x T numbers for the query heads of one KV head at a time
      group = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
      weight = attention.window_weights(
        prompt.queries[:, :, group], prompt.rotated[:, :, head][:, None], prompt.lengths
      )
      votes.append(jnp.any(weight >= least[:, :, None, None], axis=2))
    vote = jnp.stack(votes, axis=1) & (at >= 0)[:, None, :, None]  # [B, K, W, T]
    # In the order of the ring: the query of position p in place p mod w.
    place = (jnp.arange(w, dtype=jnp.int32)[None] - prompt.lengths[:, None]) % w
    vote = jnp.take_along_axis(vote, place[:, None, :, None], axis=2)
    count = jnp.sum(vote, axis=2).astype(jnp.float32)
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    late = (slot >= (prompt.lengths - self._recent(state.cache, layer))[:, None])[:, None]
    here = (slot < prompt.lengths[:, None])[:, None]
    stays = here & (late | (count > 0))
    worth = jnp.where(stays, jnp.where(late, jnp.inf, count), -1.0)
    # Of equal votes the oldest goes: best keeps the earlier, so it is asked in reverse order.
    size = jnp.broadcast_to(state.cache.size(layer), (b,))
    chosen = kept.best(worth[..., ::-1], size, jnp.ones((b, t), bool))[..., ::-1] & stays
    cache = kept.write_prompt(state.cache, prompt, chosen, layer)
    held = kept.read(cache, layer)
    token = jnp.maximum(held.positions, 0)[:, :, None]
    vote = jnp.take_along_axis(vote, token, axis=3) & (held.positions >= 0)[:, :, None]
    packed = jnp.packbits(jnp.swapaxes(vote, 2, 3), axis=-1, bitorder="little")
    return CORMState(cache, kept.put_beside(state.votes, packed, cache, layer))

  def attend(
    self,
    state: CORMState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], CORMState, Stats]:
    def step(state: CORMState, q: Array, k: Array, v: Array, positions: Array):
      return self._step(
        state, rotate(q, positions, rope), rotate(k, positions, rope), v, positions, layer
      )

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: CORMState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], CORMState, Stats]:
    now, held = positions[:, 0], kept.read(state.cache, layer)
    votes = kept.beside(state.votes, state.cache, layer)
    recent = self._recent(state.cache, layer)
    late = held.positions > (now - recent)[:, None, None]
    worth = jnp.where(late, jnp.inf, _many(votes))
    allowed = jnp.broadcast_to(state.cache.size(layer), now.shape)
    slot = kept.slot_for(held, state.cache.size(layer), allowed, worth, now)
    cache = kept.place(state.cache, k, v, slot[..., None], positions, layer)
    held = kept.read(cache, layer)
    width = held.positions.shape[2]
    new = jnp.arange(width, dtype=jnp.int32)[None, None] == slot[..., None]
    votes = jnp.where(new[..., None], jnp.uint8(0), votes)
    weight, mask = kept.weights(q, held, positions)
    attended = jnp.maximum(jnp.sum(mask, axis=-1), 1)[:, :, None, None]
    important = mask & jnp.any(weight >= 1.0 / attended.astype(jnp.float32), axis=2)
    votes = self._vote(votes, important, now)
    # Gone at once: no vote left and no longer recent. The query itself has read it.
    late = held.positions > (now - recent)[:, None, None]
    gone = (held.positions >= 0) & ~late & (_many(votes) == 0) & (now >= 0)[:, None, None]
    positions_left = jnp.where(gone, -1, held.positions)
    cache = dataclasses.replace(
      cache, positions=kept.put_beside(cache.positions, positions_left, cache, layer)
    )
    part, stats = kept.attend(q, held, positions)
    extra = (jnp.sum(mask, axis=-1) * votes.shape[-1])[:, None].astype(jnp.float32)
    stats = dataclasses.replace(stats, read_bytes=stats.read_bytes + extra)
    state = CORMState(cache, kept.put_beside(state.votes, votes, cache, layer))
    return attention.finish(part).astype(q.dtype), state, stats

  def _vote(
    self, votes: UInt[Array, "B K S bytes"], important: Bool[Array, "B K S"], now: Int[Array, "B"]
  ) -> UInt[Array, "B K S bytes"]:
    """The present query's votes in place of those of the query ``window`` before it."""
    place = now % self.window
    byte = jnp.arange(votes.shape[-1], dtype=jnp.int32)[None] == (place // 8)[:, None]
    bit = jnp.where(byte, jnp.uint8(1) << (place % 8).astype(jnp.uint8)[:, None], jnp.uint8(0))
    bit = jnp.where((now >= 0)[:, None], bit, jnp.uint8(0))[:, None, None]
    return (votes & ~bit) | jnp.where(important[..., None], bit, jnp.uint8(0))


def _many(votes: UInt[Array, "B K S bytes"]) -> Float[Array, "B K S"]:
  """How many of the queries remembered found each token important."""
  return jnp.sum(jax.lax.population_count(votes), axis=-1, dtype=jnp.uint32).astype(jnp.float32)
