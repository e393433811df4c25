"""More tokens, lower precision: the prompt is pruned, and what stays is quantised."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention, quantise
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense, kept, layer_budget
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.methods.snapkv import window_scores
from a2ats_jax.quantise import Packed
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "values", "positions", "later", "prompt"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class QPruningState:
  """The cache; C tokens of the prompt are kept.

  Attributes:
    keys, values: ``[L, B, K, C, D]`` before packing, or ``[L, B, K, D, C]`` where groups are tokens
      of one channel.
    positions: of the tokens kept; -1 where a row keeps fewer.
    later: rotated keys and values after the prompt, in full.
    prompt: tokens of each row's prompt.
  """

  keys: Packed
  values: Packed
  positions: Int[Array, "L B K C"]
  later: dense.DenseCache
  prompt: Int[Array, "B"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "bits", "group", "by_channel", "window", "kernel", "profile"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QPruningKV:
  """Quantised pruning (2412.12706): twice the tokens at 8 bits, four times at 4.

  A prompt is pruned as by SnapKV, with window and max-pooling, to ``16 / bits`` times the tokens of
  the budget, and these are quantised, once. Later tokens all stay, in full. Needs the window's
  queries of prefill.

  Device bytes per token kept and layer: ``2 K D bits / 8`` and, with groups of g, ``2 K D 4 / g``
  for float16 scales and floors, ``4 K`` for positions; nothing on the host. A later token takes
  ``2 K D`` numbers.

  Ours: scales from the minimum and the maximum of a group; the repository's quantiser (HQQ) refines
  its zero points further. One choice a KV head. Groups that run along tokens are filled up with the
  last token kept. Layers have the slots of the largest, with a profile too.

  Attributes:
    budget: tokens of 16 bits that each KV head of the prompt may take the room of.
    bits: 2, 4, 8, or 16 for pruning alone.
    group: g, numbers that share a scale.
    by_channel: whose groups run along tokens: ``values``, what the repository does, or ``keys``, as
      KIVI.
    window, kernel: as in :class:`a2ats_jax.methods.snapkv.SnapKV`; 8 and 7 as in the repository.
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  bits: int = 4
  group: int = 64
  by_channel: Literal["values", "keys"] = "values"
  window: int = 8
  kernel: int = 7
  profile: Curves = ()

  def __post_init__(self):
    quantise.check(self.bits, self.group)
    if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
      raise UserError(
        "qpruningkv: window must be at least 1 query and kernel an odd number of tokens, got "
        f"{self.window} and {self.kernel}"
      )

  @property
  def name(self) -> str:
    return "qpruningkv"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window)

  def granted(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    """Tokens that each KV head of a layer keeps, by the prompt's length."""
    table = layer_budget.granted(self.budget, longest, layers, self.profile).astype(np.int64)
    return np.minimum(table * 16 // self.bits, np.arange(longest + 1)).astype(np.int32)

  def init(self, geometry: Geometry) -> QPruningState:
    g = geometry
    if g.head_dim % self.group:
      raise UserError(
        f"qpruningkv: group must divide the model's head size of {g.head_dim}, got {self.group}"
      )
    lead = (g.layers, g.batch, g.kv_heads)
    count = -(-max(int(self.granted(g.prompt, g.layers).max()), 1) // self.group) * self.group

    def packed(by_channel: bool) -> Packed:
      shape = (g.head_dim, count) if by_channel else (count, g.head_dim)
      return quantise.zeros((*lead, *shape), bits=self.bits, group=self.group, dtype=g.dtype)

    return QPruningState(
      packed(self.by_channel == "keys"),
      packed(self.by_channel == "values"),
      jnp.full((*lead, count), -1, jnp.int32),
      dense.zeros((*lead, g.new, g.head_dim), g.dtype),
      jnp.zeros(g.batch, jnp.int32),
    )

  def _pack(self, x: Float[Array, "*lead C D"], by_channel: bool) -> Packed:
    x = jnp.swapaxes(x, -1, -2) if by_channel else x
    return quantise.encode(x, bits=self.bits, group=self.group)

  def _unpack(self, packed: Packed, by_channel: bool, dtype) -> Float[Array, "*lead C D"]:
    x = quantise.decode(packed, dtype)
    return jnp.swapaxes(x, -1, -2) if by_channel else x

  def absorb(
    self, state: QPruningState, prompt: PromptLayer, *, layer: int | Array
  ) -> QPruningState:
    t, count = prompt.keys.shape[1], state.positions.shape[3]
    table = jnp.asarray(self.granted(t, len(state.positions)))
    many = table[layer, prompt.lengths]
    scores = window_scores(prompt, window=self.window, kernel=self.kernel, pool="max")
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    stays = kept.best(scores, many, slot < prompt.lengths[:, None])
    order = jnp.argsort(~stays, axis=-1, stable=True).astype(jnp.int32)
    place = jnp.arange(count, dtype=jnp.int32)[None]
    inside = jnp.clip(place, 0, jnp.maximum(many - 1, 0)[:, None])
    token = jnp.take_along_axis(order, jnp.minimum(inside, t - 1)[:, None], axis=2)
    positions = jnp.where((place < many[:, None])[:, None], token, -1)

    def take(x: Array) -> Array:
      x = jnp.take_along_axis(jnp.swapaxes(x, 1, 2), token[..., None], axis=2)
      return x.astype(state.later.k.dtype)

    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    keys = self._pack(take(prompt.rotated), self.by_channel == "keys")
    values = self._pack(take(prompt.values), self.by_channel == "values")
    return dataclasses.replace(
      state,
      keys=jax.tree.map(put, state.keys, keys),
      values=jax.tree.map(put, state.values, values),
      positions=put(state.positions, positions),
      prompt=prompt.lengths,
    )

  def attend(
    self,
    state: QPruningState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], QPruningState, Stats]:
    place = jnp.where(positions < 0, -1, positions - state.prompt[:, None])
    later = dense.DenseCache(
      dense.append(state.later.k, rotate(k, positions, rope), place, layer),
      dense.append(state.later.v, v, place, layer),
    )
    q = rotate(q, positions, rope)
    packed = (
      jax.tree.map(lambda x: dense.read(x, layer), packed) for packed in (state.keys, state.values)
    )
    keys, values = (
      self._unpack(one, self.by_channel == name, k.dtype)
      for one, name in zip(packed, ("keys", "values"), strict=True)
    )
    old = (state.positions[layer] >= 0)[:, None] & (positions >= 0)[:, :, None, None]
    new = dense.visible(place, later.k.shape[3])[:, :, None]
    parts = [
      dense.attend_masked(q, keys, values, old),
      dense.attend_masked(q, dense.read(later.k, layer), dense.read(later.v, layer), new),
    ]
    out = attention.finish(attention.merge(parts)).astype(q.dtype)
    few, many = (jnp.sum(mask, axis=-1, dtype=jnp.int32) for mask in (old, new))
    d, item = k.shape[3], k.dtype.itemsize
    size = quantise.bytes_of(d, bits=self.bits, group=self.group, itemsize=item)
    read_bytes = few * (2 * size) + many * (2 * d * item)
    stats = dense.on_device(positions + 1, few + many, q.shape[2], read_bytes)
    return out, dataclasses.replace(state, later=later), stats
