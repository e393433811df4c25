"""ThinK: channels of the prompt's keys that say least are not stored."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["pruned", "channels", "whole", "values", "begin"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ThinKState:
  """The cache.

  Attributes:
    pruned: rotated keys of the prompt by position, the channels that stay.
    channels: which these are, ascending.
    whole: rotated keys with all channels: position p of a row in place ``p - begin``.
    values: by position.
    begin: prompt tokens of each row whose keys are pruned.
  """

  pruned: Float[Array, "L B K prompt kept"]
  channels: Int[Array, "L B K kept"]
  whole: Float[Array, "L B K late D"]
  values: Float[Array, "L B K T D"]
  begin: Int[Array, "B"]


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["prune", "window"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinK:
  """ThinK (2407.21018): thinner keys.

  Per KV head a channel's score is the mean square of the last ``window`` queries in it, averaged
  over the group, times the mean square of the prompt's keys in it; the ``int(prune D)`` channels of
  the lowest scores are dropped from the keys of all prompt tokens but the last ``window``. Later
  keys are stored whole, values always. Logits are still divided by ``sqrt(D)``. Needs the window's
  queries of prefill.

  Device bytes per prompt token and layer: ``K (2 D - int(prune D))`` numbers; ``2 K D`` for a later
  token; ``window K D`` once for the whole keys of the last ones, whose slots among the thin keys
  stay unused. Nothing on the host.

  Ours: one choice a KV head as in NVIDIA/kvpress (which only zeroes channels), where the paper's
  code repeats keys and chooses for every query head.

  Attributes:
    prune: share of channels dropped, 0 to below 1.
    window: last prompt tokens that vote and whose keys stay whole.
  """

  prune: float = 0.4
  window: int = 32

  def __post_init__(self):
    if not 0 <= self.prune < 1 or self.window < 1:
      raise UserError(
        "think: prune must lie in [0, 1) and window be at least 1 token, got "
        f"{self.prune} and {self.window}"
      )

  @property
  def name(self) -> str:
    return "think"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window)

  def init(self, geometry: Geometry) -> ThinKState:
    g = geometry
    lead, stay = (g.layers, g.batch, g.kv_heads), g.head_dim - int(self.prune * g.head_dim)
    return ThinKState(
      pruned=jnp.zeros((*lead, g.prompt, stay), g.dtype),
      channels=jnp.zeros((*lead, stay), jnp.int32),
      whole=jnp.zeros((*lead, self.window + g.new, g.head_dim), g.dtype),
      values=jnp.zeros((*lead, g.capacity, g.head_dim), g.dtype),
      begin=jnp.zeros(g.batch, jnp.int32),
    )

  def absorb(self, state: ThinKState, prompt: PromptLayer, *, layer: int | Array) -> ThinKState:
    t = prompt.keys.shape[1]
    keys = jnp.swapaxes(prompt.rotated, 1, 2)
    channels = channels_of(prompt, state.channels.shape[3])
    begin = jnp.maximum(prompt.lengths - self.window, 0)
    place = begin[:, None] + jnp.arange(state.whole.shape[3], dtype=jnp.int32)[None]
    place = jnp.minimum(place, t - 1)[
      :, None, :, None
    ]  # of later tokens: overwritten when they come
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    pruned = jnp.take_along_axis(keys, channels[:, :, None], axis=3)
    return ThinKState(
      pruned=put(state.pruned, pruned.astype(state.pruned.dtype)),
      channels=put(state.channels, channels),
      whole=put(state.whole, jnp.take_along_axis(keys, place, axis=2).astype(state.whole.dtype)),
      values=dense.write_prompt(state.values, prompt.values, layer),
      begin=begin,
    )

  def attend(
    self,
    state: ThinKState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ThinKState, Stats]:
    place = jnp.where(positions < 0, -1, positions - state.begin[:, None])
    state = dataclasses.replace(
      state,
      whole=dense.append(state.whole, rotate(k, positions, rope), place, layer),
      values=dense.append(state.values, v, positions, layer),
    )
    q = rotate(q, positions, rope)
    channels, values = state.channels[layer], dense.read(state.values, layer)
    whole, pruned = dense.read(state.whole, layer), dense.read(state.pruned, layer)
    _, _, heads, d = q.shape
    kv_heads, stay = channels.shape[1:]
    slot = jnp.arange(pruned.shape[2], dtype=jnp.int32)[None, None]
    old = (slot < state.begin[:, None, None]) & (positions >= 0)[:, :, None]
    early = attention.from_logits(
      thin_logits(q, pruned, channels),
      values[:, :, : pruned.shape[2]],
      old[:, :, None],
    )
    new = dense.visible(place, whole.shape[2])
    at = state.begin[:, None] + jnp.arange(whole.shape[2], dtype=jnp.int32)[None]
    at = jnp.minimum(at, values.shape[2] - 1)[:, None, :, None]
    late = dense.attend_masked(q, whole, jnp.take_along_axis(values, at, axis=2), new[:, :, None])
    out = attention.finish(attention.merge([early, late])).astype(q.dtype)
    few, many = (jnp.sum(mask, axis=-1, dtype=jnp.int32)[..., None] for mask in (old, new))
    read = jnp.broadcast_to(few + many, (*positions.shape, kv_heads))
    size = (few * (stay + d) + many * 2 * d) * pruned.dtype.itemsize
    size = jnp.where(read > 0, size + 4 * stay, 0)  # and the numbers of the channels
    return out, state, dense.on_device(positions + 1, read, heads, size)


def channels_of(prompt: PromptLayer, stay: int) -> Int[Array, "B K stay"]:
  """The channels whose logits weigh most between a prompt's last queries and its keys, ascending.

  Args:
    stay: how many.
  """
  if prompt.queries is None:
    raise UserError("think: the prompt's last queries were not handed over")
  b, t, kv_heads, d = prompt.keys.shape
  keys = jnp.swapaxes(prompt.rotated, 1, 2)
  slot = jnp.arange(t, dtype=jnp.int32)[None]
  here = (slot < prompt.lengths[:, None])[:, None, :, None]
  count = prompt.lengths[:, None, None].astype(jnp.float32)
  of_keys = jnp.sum(jnp.where(here, jnp.square(keys.astype(jnp.float32)), 0), axis=2) / count
  squares = jnp.mean(jnp.square(prompt.queries.astype(jnp.float32)), axis=1)
  of_queries = jnp.mean(squares.reshape(b, kv_heads, -1, d), axis=2)
  order = jnp.argsort(-of_queries * of_keys, axis=-1, stable=True)[..., :stay]
  return jnp.sort(order, axis=-1).astype(jnp.int32)


def thin_logits(
  q: Float[Array, "B S H D"], keys: Float[Array, "B K T stay"], channels: Int[Array, "B K stay"]
) -> Float[Array, "B S H T"]:
  """Logits of whole queries with keys that hold some channels, still divided by ``sqrt(D)``."""
  (_, _, heads, d), stay = q.shape, channels.shape[2]
  mine = jnp.repeat(channels, heads // channels.shape[1], axis=1)[:, None]
  thin = jnp.take_along_axis(q, jnp.broadcast_to(mine, (*q.shape[:3], stay)), axis=3)
  return attention.logits(thin, keys) * (stay / d) ** 0.5
