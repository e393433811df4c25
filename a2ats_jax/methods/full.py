"""Full attention: every token is kept on the device and read at every step. The baseline."""

import dataclasses
from functools import partial

import jax

from a2ats_jax import attention
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.split import WHOLE, Split
from a2ats_jax.typing import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["split"])
@dataclasses.dataclass(frozen=True)
class Full:
  """Exact softmax attention. Device bytes per token and layer: ``2 K D`` numbers.

  Attributes:
    split: how the cache lies on devices: each holds a range of positions.
  """

  split: Split = WHOLE

  @property
  def name(self) -> str:
    return "full"

  def init(self, geometry: Geometry) -> dense.DenseCache:
    g = geometry
    slots = self.split.share(g.capacity)
    return dense.zeros((g.layers, g.batch, g.kv_heads, slots, g.head_dim), g.dtype)

  def own(self, state: dense.DenseCache) -> list[Array]:
    return [state.k, state.v]

  def absorb(
    self, state: dense.DenseCache, prompt: PromptLayer, *, layer: int | Array
  ) -> dense.DenseCache:
    share = state.k.shape[3]
    k, v = (self.split.mine(x, share) for x in (prompt.rotated, prompt.values))
    return dense.DenseCache(
      dense.write_prompt(state.k, k, layer), dense.write_prompt(state.v, v, layer)
    )

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
    here = positions - self.split.number * state.k.shape[3]  # beyond the slots: not this device's
    state = dense.DenseCache(
      dense.append(state.k, rotate(k, positions, rope), here, layer),
      dense.append(state.v, v, here, layer),
    )
    mask = dense.visible(here, state.k.shape[3])[:, :, None]
    keys, values = dense.read(state.k, layer), dense.read(state.v, layer)
    part = self.split.merge(dense.attend_masked(rotate(q, positions, rope), keys, values, mask))
    stats = dense.dense_stats(positions, q.shape[2], k.shape[2], keys)
    return attention.finish(part).astype(q.dtype), state, stats
