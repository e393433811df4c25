"""Attention over a window that slides: what a model's local layers do, exactly."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["window"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliding:
  """Keys and values of the latest tokens, position p in slot ``p mod window``.

  Not a choice of the user but what a checkpoint's local layers ask for; nothing is lost. Device
  bytes per layer, whatever the prompt: ``2 K window D`` numbers. Keeps no statistics.

  Attributes:
    window: W, tokens that a query sees, itself included.
  """

  window: int

  @property
  def name(self) -> str:
    return "sliding"

  def init(self, geometry: Geometry) -> dense.DenseCache:
    return dense.init(dataclasses.replace(geometry, prompt=self.window, new=0))

  def absorb(
    self, state: dense.DenseCache, prompt: PromptLayer, *, layer: int | Array
  ) -> dense.DenseCache:
    place = jnp.maximum(self._held(prompt.lengths), 0)[:, :, None, None]

    def latest(x: Array) -> Array:
      return jnp.take_along_axis(x, place, axis=1)

    return dense.DenseCache(
      dense.write_prompt(state.k, latest(prompt.rotated), layer),
      dense.write_prompt(state.v, latest(prompt.values), layer),
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
  ) -> tuple[Float[Array, "B S H D"], dense.DenseCache, None]:
    q, k = rotate(q, positions, rope), rotate(k, positions, rope).astype(state.k.dtype)
    v = v.astype(state.v.dtype)
    valid = positions >= 0
    first = jnp.min(jnp.where(valid, positions, jnp.iinfo(jnp.int32).max), axis=1)
    keys, values = dense.read(state.k, layer), dense.read(state.v, layer)
    old = dense.attend_masked(q, keys, values, self._sees(positions, self._held(first)))
    new = dense.attend_masked(
      q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), self._sees(positions, positions)
    )
    out = attention.finish(attention.merge([old, new])).astype(q.dtype)
    # Of more tokens than slots the latest stay, for a scatter has no order; written when the old
    # ones are read.
    stays = valid & (positions > jnp.max(positions, axis=1, keepdims=True) - self.window)
    slots = jnp.where(stays, positions % self.window, -1)
    out, k, v = jax.lax.optimization_barrier((out, k, v))
    state = dense.DenseCache(
      dense.append(state.k, k, slots, layer), dense.append(state.v, v, slots, layer)
    )
    return out, state, None

  def _held(self, lengths: Int[Array, "B"]) -> Int[Array, "B W"]:
    """The position in each slot once a row has so many tokens; negative where there is none."""
    slot = jnp.arange(self.window, dtype=jnp.int32)[None]
    last = lengths[:, None] - 1
    return last - (last - slot) % self.window

  def _sees(self, positions: Int[Array, "B S"], held: Int[Array, "B n"]) -> Array:
    """Which tokens each query sees, ``[B, S, 1, n]``; padding sees none and is not seen."""
    q, k = positions[:, :, None], held[:, None]
    return ((k >= 0) & (k <= q) & (k > q - self.window))[:, :, None]
