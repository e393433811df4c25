"""Streaming: the first tokens and the latest."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import kept, layer_budget
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats, token_by_token
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "sinks", "profile"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
  """Attention sinks and a window that slides (StreamingLLM, 2309.17453).

  The first ``sinks`` tokens stay, and of the others the latest that the budget grants at the
  present length, prompt and later tokens alike. Needs nothing of prefill.

  Device bytes per token kept and layer: ``2 K D`` numbers and ``4 K`` for positions; nothing on the
  host. Slots: what the budget grants at the longest row there can be.

  Ours: tokens keep their true positions; StreamingLLM numbers them by their place in the cache, so
  that a text may grow beyond the model's context. At least the sinks and the present token are
  read.

  Attributes:
    budget: tokens of each KV head, sinks included.
    sinks: first tokens that stay.
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  sinks: int = 4
  profile: Curves = ()

  @property
  def name(self) -> str:
    return "streaming"

  def __post_init__(self):
    if self.sinks < 0:
      raise UserError(f"streaming: sinks must be 0 or more, got {self.sinks}")

  def _allowed(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    """Tokens held at every length."""
    table = layer_budget.granted(self.budget, longest, layers, self.profile)
    return np.maximum(table, self.sinks + 1)

  def init(self, geometry: Geometry) -> kept.KeptCache:
    table = self._allowed(geometry.capacity, geometry.layers)
    return kept.empty(geometry, table.max(axis=1).tolist())

  def absorb(
    self, state: kept.KeptCache, prompt: PromptLayer, *, layer: int | Array
  ) -> kept.KeptCache:
    _, t, kv_heads, _ = prompt.keys.shape
    table = jnp.asarray(self._allowed(state.capacity, len(state.sizes)))
    recent = table[layer, prompt.lengths] - self.sinks
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    stays = (slot < self.sinks) | (slot >= (prompt.lengths - recent)[:, None])
    stays &= slot < prompt.lengths[:, None]
    stays = jnp.broadcast_to(stays[:, None], (len(stays), kv_heads, t))
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
    table = jnp.asarray(self._allowed(state.capacity, len(state.sizes)))

    def step(state: kept.KeptCache, q: Array, k: Array, v: Array, positions: Array):
      now, held = positions[:, 0], kept.read(state, layer)
      worth = jnp.where(held.positions < self.sinks, jnp.inf, held.positions.astype(jnp.float32))
      allowed = table[layer, now + 1]
      slot = kept.slot_for(held, state.size(layer), allowed, worth, now)
      k = rotate(k, positions, rope)
      state = kept.place(state, k, v, slot[..., None], positions, layer)
      part, stats = kept.attend(rotate(q, positions, rope), kept.read(state, layer), positions)
      return attention.finish(part).astype(q.dtype), state, stats

    return token_by_token(step, state, q, k, v, positions)
