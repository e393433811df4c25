"""Full attention: every token is kept on the device and read at every step. The baseline."""

import dataclasses
from functools import partial

import jax

from a2ats_jax import attention
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Full:
  """Exact softmax attention. Device bytes per token and layer: ``2 K D`` numbers."""

  @property
  def name(self) -> str:
    return "full"

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
    mask = dense.visible(positions, state.k.shape[3])[:, :, None]
    keys, values = dense.read(state.k, layer), dense.read(state.v, layer)
    part = dense.attend_masked(rotate(q, positions, rope), keys, values, mask)
    stats = dense.dense_stats(positions, q.shape[2], k.shape[2], keys)
    return attention.finish(part).astype(q.dtype), state, stats
