"""H2O: the tokens that have received most attention, and the latest."""

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
from a2ats_jax.typing import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "scores"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class H2OState:
  """The cache, and the attention that every kept token has received."""

  cache: kept.KeptCache
  scores: Float[Array, "B K pool"]


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "profile"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O:
  """Heavy-hitter oracle (2306.14048): half of the budget for tokens of most attention, half for the
  latest.

  A token's score is the attention that it has received from all queries since it came, summed over
  the query heads of its KV head. When a KV head holds what the budget grants, the token with the
  lowest score outside the latest half makes room for the new one. Needs the sums of the prompt's
  attention of prefill.

  Device bytes per token kept and layer: ``2 K D`` numbers and ``8 K`` for positions and scores;
  nothing on the host. Slots: what the budget grants at the longest row there can be.

  Ours: one choice a KV head; prefill attention is exact, so a prompt's tokens are chosen once, by
  their sums over the whole prompt. At least two tokens are held.

  Attributes:
    budget: tokens of each KV head.
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  profile: Curves = ()

  @property
  def name(self) -> str:
    return "h2o"

  @property
  def needs(self) -> Needs:
    return Needs(sums=True)

  def _allowed(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    """Tokens held at every length."""
    return np.maximum(layer_budget.granted(self.budget, longest, layers, self.profile), 2)

  def init(self, geometry: Geometry) -> H2OState:
    table = self._allowed(geometry.capacity, geometry.layers)
    cache = kept.empty(geometry, table.max(axis=1).tolist())
    return H2OState(cache, jnp.zeros(cache.positions.shape))

  def absorb(self, state: H2OState, prompt: PromptLayer, *, layer: int | Array) -> H2OState:
    if prompt.sums is None:
      raise UserError("h2o: the sums of the prompt's attention were not handed over")
    b, t, kv_heads, _ = prompt.keys.shape
    sums = jnp.sum(prompt.sums.reshape(b, kv_heads, -1, t), axis=2)
    table = jnp.asarray(self._allowed(state.cache.capacity, len(state.cache.sizes)))
    allowed = table[layer, prompt.lengths]
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    recent = slot >= (prompt.lengths - allowed // 2)[:, None]
    worth = jnp.where(recent[:, None], jnp.inf, sums)
    stays = kept.best(worth, allowed, slot < prompt.lengths[:, None])
    cache = kept.write_prompt(state.cache, prompt, stays, layer)
    held = kept.read(cache, layer)
    scores = jnp.take_along_axis(sums, jnp.maximum(held.positions, 0), axis=-1)
    scores = jnp.where(held.positions >= 0, scores, 0.0)
    return H2OState(cache, kept.put_beside(state.scores, scores, cache, layer))

  def attend(
    self,
    state: H2OState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], H2OState, Stats]:
    table = jnp.asarray(self._allowed(state.cache.capacity, len(state.cache.sizes)))

    def step(state: H2OState, q: Array, k: Array, v: Array, positions: Array):
      now, held = positions[:, 0], kept.read(state.cache, layer)
      old = kept.beside(state.scores, state.cache, layer)
      allowed = table[layer, now + 1]
      recent = held.positions > (now - allowed // 2)[:, None, None]
      worth = jnp.where(recent, jnp.inf, old)
      slot = kept.slot_for(held, state.cache.size(layer), allowed, worth, now)
      k, q = rotate(k, positions, rope), rotate(q, positions, rope)
      cache = kept.place(state.cache, k, v, slot[..., None], positions, layer)
      held = kept.read(cache, layer)
      weight, mask = kept.weights(q, held, positions)
      width = held.positions.shape[2]
      new = jnp.arange(width, dtype=jnp.int32)[None, None] == slot[..., None]
      gained = jnp.sum(jnp.where(mask[:, :, None], weight, 0.0), axis=2)
      scores = kept.put_beside(state.scores, jnp.where(new, 0.0, old) + gained, cache, layer)
      part, stats = kept.attend(q, held, positions)
      extra = jnp.where(mask, 4.0, 0.0).sum(axis=-1)[:, None]  # scores looked at
      stats = dataclasses.replace(stats, read_bytes=stats.read_bytes + extra)
      return attention.finish(part).astype(q.dtype), H2OState(cache, scores), stats

    return token_by_token(step, state, q, k, v, positions)
