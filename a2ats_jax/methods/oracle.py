"""The oracle: the true top-k tokens by exact logits, beside which selections are judged."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.methods import dense, selection
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "window", "sinks"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
  """Selects like A2ATS, with the true logits as far scores; ties by index. Saves nothing.

  Attributes:
    budget, window, sinks: as in :class:`a2ats_jax.methods.a2ats_reference.A2ATSReference`.
  """

  budget: Budget
  window: int = 64
  sinks: int = 8

  def __post_init__(self):
    selection.check_near(sinks=self.sinks, window=self.window)

  @property
  def name(self) -> str:
    return "oracle"

  def init(self, geometry: Geometry) -> dense.DenseCache:
    return dense.init(geometry)

  def absorb(
    self, state: dense.DenseCache, prompt: PromptLayer, *, layer: int | Array
  ) -> dense.DenseCache:
    return dense.write_prompt_cache(state, prompt, layer)

  def attend(
    self,
    state: dense.DenseCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], dense.DenseCache, Stats]:
    state = dense.DenseCache(
      dense.append(state.k, rotate(k, positions, rope), positions, layer),
      dense.append(state.v, v, positions, layer),
    )
    keys, values = dense.read(state.k, layer), dense.read(state.v, layer)
    kv_heads, slots = keys.shape[1], keys.shape[2]
    q = rotate(q, positions, rope)
    scores = attention.logits(q, keys)
    near, far = selection.near_and_far(positions, slots, sinks=self.sinks, window=self.window)
    no_cells = jnp.zeros((keys.shape[0], kv_heads, slots), jnp.int32)
    ranked = selection.of_budget(self.budget, scores, far, kv_heads)
    chosen = selection.choose(ranked, no_cells, far, positions + 1, self.budget)
    part, _, stats = selection.read_exactly(q, keys, values, chosen, near, positions + 1)
    return attention.finish(part).astype(q.dtype), state, stats
