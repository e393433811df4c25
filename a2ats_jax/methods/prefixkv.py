"""PrefixKV: of every layer, the tokens that carry the same share of its attention."""

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

_BACK = 25  # the token that goes is this many from the end


@partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "profile", "start"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixKV:
  """PrefixKV (2412.03409): budgets by layer, one choice for all heads of a layer.

  A prompt's tokens are ranked by the attention they receive, averaged over heads. Every layer keeps
  its best tokens, as many as its share of the budget: the shares come from a profile of the model,
  made from a few texts, so that every layer keeps the same part of its attention. The first
  ``start`` tokens and the last one always stay. While decoding, when a layer holds what it is
  granted at the present length, the token 25 from the end goes (the repository's "elastic" rule;
  the middle one of a shorter cache). Needs the sums of the prompt's attention of prefill.

  Device bytes per token kept and layer: ``2 K D`` numbers and ``4 K`` for positions; nothing on the
  host. Slots: what each layer is granted at the longest row there can be.

  Ours: the profile is an average of curves, from which shares follow for any budget, where the
  published runs store one list of ratios for each; without a profile all layers keep the same.

  Attributes:
    budget: tokens of each KV head, averaged over layers.
    profile: curves of :func:`layer_budget.curves_of`; none for equal shares.
    start: first tokens that stay.
  """

  budget: Budget
  profile: Curves = ()
  start: int = 1

  @property
  def name(self) -> str:
    return "prefixkv"

  @property
  def across_heads(self) -> str:
    return "all heads of a layer keep the same tokens"

  @property
  def needs(self) -> Needs:
    return Needs(sums=True)

  def granted(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    """Tokens that each layer holds, by the length of a row; at least start, the last and one."""
    table = layer_budget.granted(self.budget, longest, layers, self.profile)
    return np.maximum(table, self.start + 2)

  def init(self, geometry: Geometry) -> kept.KeptCache:
    return kept.empty(
      geometry, self.granted(geometry.capacity, geometry.layers).max(axis=1).tolist()
    )

  def absorb(
    self, state: kept.KeptCache, prompt: PromptLayer, *, layer: int | Array
  ) -> kept.KeptCache:
    if prompt.sums is None:
      raise UserError("prefixkv: the sums of the prompt's attention were not handed over")
    t, kv_heads = prompt.keys.shape[1:3]
    table = jnp.asarray(self.granted(state.capacity, len(state.sizes)))
    count = table[layer, prompt.lengths]
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    always = (slot < self.start) | (slot == prompt.lengths[:, None] - 1)
    worth = jnp.where(always, jnp.inf, jnp.mean(prompt.sums, axis=1))[:, None]
    stays = kept.best(worth, count, slot < prompt.lengths[:, None])
    stays = jnp.broadcast_to(stays, (len(stays), kv_heads, t))
    return kept.write_prompt(state, prompt, stays, layer)

  def attend(
    self,
    state: kept.KeptCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], kept.KeptCache, Stats]:
    table = jnp.asarray(self.granted(state.capacity, len(state.sizes)))

    def step(state: kept.KeptCache, q: Array, k: Array, v: Array, positions: Array):
      now, held = positions[:, 0], kept.read(state, layer)
      allowed = table[layer, now + 1]
      worth = jnp.where(_goes(held, self.start), 0.0, jnp.inf)
      slot = kept.slot_for(held, state.size(layer), allowed, worth, now)
      k = rotate(k, positions, rope)
      state = kept.place(state, k, v, slot[..., None], positions, layer)
      part, stats = kept.attend(rotate(q, positions, rope), kept.read(state, layer), positions)
      return attention.finish(part).astype(q.dtype), state, stats

    return token_by_token(step, state, q, k, v, positions)


def _goes(held: kept.Kept, start: int) -> Array:
  """The slot of the token that makes room: with the new one, 25 from the end, or the middle one of
  a shorter cache; never one of the first ``start``."""
  there = held.positions >= 0
  count = jnp.sum(there, axis=-1, keepdims=True) + 1  # with the new one, which comes last
  order = jnp.argsort(jnp.where(there, held.positions, 1 << 30), axis=-1)
  place = jnp.argsort(order, axis=-1)
  goes = jnp.where(count > _BACK, count - _BACK, count // 2)
  return there & (place == jnp.maximum(goes, start))
