"""KIVI: packed integers, keys by channel and values by token, the latest tokens in full."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention, quantise
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense, think
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats, token_by_token
from a2ats_jax.quantise import Packed
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "values", "recent", "channels"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KIVIState:
  """The cache.

  Attributes:
    keys: rotated, ``[L, B, K, stay, T]`` before packing: groups are tokens of one channel.
    values: ``[L, B, K, T, D]`` before packing: groups are channels of one token.
    recent: rotated keys and values of the last R tokens, position p in place ``p mod R``.
    channels: of the quantised keys, ascending; none where all stay.
  """

  keys: Packed
  values: Packed
  recent: dense.DenseCache
  channels: Int[Array, "L B K stay"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["bits", "group", "residual", "prune", "window"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KIVI:
  """KIVI (2402.02750): asymmetric quantisation, keys per channel, values per token.

  Keys are quantised R at a time: a token's key is exact until the block of R positions that it
  belongs to is full. A value is exact while it is one of the last R. Nothing is evicted: every
  token is read. Needs nothing of prefill.

  With ``prune``, ThinK under it (2407.21018, its combination with KIVI): the channels of a KV
  head's keys that weigh least are not quantised but dropped, chosen from the prompt as
  :class:`a2ats_jax.methods.think.ThinK` does; the last R keys keep all. Then the queries of prefill
  are needed.

  Device bytes per token and layer: ``2 K D bits / 8`` and, with groups of g, ``2 K D 4 / g`` for
  float16 scales and floors, of keys for the channels that stay; R tokens of full keys and values
  beside it. Nothing on the host. With 16 bits numbers stay as they are, for comparison.

  Ours: a constant group is given back exactly, where the repository divides by zero. The value that
  leaves the last R is quantised before the step's attention, in the repository after it. The
  attention is not fused with unpacking: a layer's cache is unpacked for a step.

  Attributes:
    bits: of a number: 2, 4 (as recommended with grouped queries), 8 or 16.
    group: g, numbers that share a scale; D and ``residual`` are multiples of it.
    residual: R, tokens that are kept in full.
    prune: share of the channels of keys that are dropped, 0 to below 1.
    window: last queries of the prompt that choose the channels.
  """

  bits: int = 4
  group: int = 32
  residual: int = 128
  prune: float = 0.0
  window: int = 32

  def __post_init__(self):
    quantise.check(self.bits, self.group)
    if self.residual < 1 or self.residual % self.group:
      raise UserError(
        f"kivi: residual must be a multiple of group, got {self.residual} and {self.group}"
      )
    if not 0 <= self.prune < 1 or self.window < 1:
      raise UserError(
        "kivi: prune must lie in [0, 1) and window be at least 1 query, got "
        f"{self.prune} and {self.window}"
      )

  @property
  def name(self) -> str:
    return "kivi"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window if self.prune else 0)

  def init(self, geometry: Geometry) -> KIVIState:
    g = geometry
    if g.head_dim % self.group:
      raise UserError(
        f"kivi: group must divide the model's head size of {g.head_dim}, got {self.group}"
      )
    lead, slots = (g.layers, g.batch, g.kv_heads), -(-g.capacity // self.residual) * self.residual

    def packed(shape: tuple[int, ...]) -> Packed:
      return quantise.zeros((*lead, *shape), bits=self.bits, group=self.group, dtype=g.dtype)

    stay = g.head_dim - int(self.prune * g.head_dim)
    return KIVIState(
      packed((stay, slots)),
      packed((g.capacity, g.head_dim)),
      dense.zeros((*lead, self.residual, g.head_dim), g.dtype),
      jnp.zeros((*lead, stay if self.prune else 0), jnp.int32),
    )

  def absorb(self, state: KIVIState, prompt: PromptLayer, *, layer: int | Array) -> KIVIState:
    t, r = prompt.keys.shape[1], self.residual
    keys, values = jnp.swapaxes(prompt.rotated, 1, 2), jnp.swapaxes(prompt.values, 1, 2)
    blocks, channels = jnp.swapaxes(keys, 2, 3), state.channels
    if self.prune:
      mine = think.channels_of(prompt, channels.shape[3])
      blocks = jnp.take_along_axis(blocks, mine[..., None], axis=2)
      channels = jax.lax.dynamic_update_index_in_dim(channels, mine, layer, 0)
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (0, -t % r)))
    last = prompt.lengths[:, None] - 1
    latest = last - (last - jnp.arange(r, dtype=jnp.int32)[None]) % r  # position in each place
    place = jnp.clip(latest, 0, t - 1)[:, None, :, None]
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)

    def start(all_layers: Packed, one: Packed) -> Packed:
      """A layer's first tokens; padding is written too and overwritten when its token comes."""
      return jax.tree.map(
        lambda a, x: jax.lax.dynamic_update_slice(a, x[None].astype(a.dtype), (layer, 0, 0, 0, 0)),
        all_layers,
        one,
      )

    def take(all_layers: Array, x: Array) -> Array:
      return put(all_layers, jnp.take_along_axis(x, place, axis=2).astype(all_layers.dtype))

    encode = partial(quantise.encode, bits=self.bits, group=self.group)
    return KIVIState(
      start(state.keys, encode(blocks)),
      start(state.values, encode(values)),
      dense.DenseCache(take(state.recent.k, keys), take(state.recent.v, values)),
      channels,
    )

  def attend(
    self,
    state: KIVIState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], KIVIState, Stats]:
    def step(state: KIVIState, q: Array, k: Array, v: Array, positions: Array):
      q, k = rotate(q, positions, rope), rotate(k, positions, rope)
      return self._step(state, q, k, v, positions, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: KIVIState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], KIVIState, Stats]:
    r, now = self.residual, positions[:, 0]
    b, _, kv_heads, d = k.shape
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[None]
    place = jnp.where(positions < 0, -1, positions % r)
    # The value that leaves the last R tokens.
    old = state.recent.v[layer, rows, heads, jnp.maximum(place, 0)]
    leaving = jnp.where(now >= r, now - r, -1)
    values = jax.tree.map(
      lambda a, x: dense.append(a, x[:, None], leaving[:, None], layer),
      state.values,
      quantise.encode(old, bits=self.bits, group=self.group),
    )
    recent = dense.DenseCache(
      dense.append(state.recent.k, k, place, layer), dense.append(state.recent.v, v, place, layer)
    )
    held_k, held_v = dense.read(recent.k, layer), dense.read(recent.v, layer)
    packed_k, packed_v = (
      jax.tree.map(lambda x: dense.read(x, layer), packed) for packed in (state.keys, values)
    )
    base = (now - now % r)[:, None, None]  # keys before it are quantised
    at = jnp.arange(r, dtype=jnp.int32)[None]
    at = (now[:, None] - (now[:, None] - at) % r)[:, None]  # position in each place
    live = (now >= 0)[:, None, None]
    t = packed_v.words.shape[2]
    slot = jnp.arange(t, dtype=jnp.int32)[None, None]
    keys = quantise.decode(packed_k, k.dtype)[..., :t]
    exact, thin = attention.logits(q, held_k), jnp.swapaxes(keys, 2, 3)
    if self.prune:
      coarse = think.thin_logits(q, thin, state.channels[layer])
    else:
      coarse = attention.logits(q, thin)
    # Each logit goes with its own value: quantised keys may still have full values.
    whole = at >= 0
    far, near = (slot < base) & live, (at >= base) & whole & live
    value = quantise.decode(packed_v, v.dtype)
    late = slot > (now - r)[:, None, None]  # values that are still in full
    spread = jnp.where(at >= 0, at, t)
    coarse = jnp.where(far[:, :, None], coarse, -jnp.inf)
    by_place = jnp.take_along_axis(
      coarse, jnp.broadcast_to(jnp.minimum(spread, t - 1)[:, :, None], exact.shape), axis=3
    )
    full = jnp.where(near[:, :, None], exact, by_place)
    parts = [
      attention.from_logits(coarse, value, (far & ~late)[:, :, None]),
      attention.from_logits(full, held_v, (whole & live)[:, :, None]),
    ]
    out = attention.finish(attention.merge(parts)).astype(q.dtype)
    keys = self._flush(state, held_k, now, layer)
    read = jnp.broadcast_to((positions + 1)[..., None], (b, 1, kv_heads))
    item = k.dtype.itemsize
    size = partial(quantise.bytes_of, bits=self.bits, group=self.group, itemsize=item)
    coded = jnp.sum(far, axis=-1)[..., None], jnp.maximum(now + 1 - r, 0)[:, None, None]
    several = coded[0] * size(thin.shape[3]) + coded[1] * size(d)
    several = several + (2 * read - coded[0] - coded[1]) * (d * item)
    stats = dense.on_device(positions + 1, read, q.shape[2], several)
    return out, KIVIState(keys, values, recent, state.channels), stats

  def _flush(
    self, state: KIVIState, held: Float[Array, "B K R D"], now: Int[Array, "B"], layer: int | Array
  ) -> Packed:
    """Quantise the keys of rows whose block of R is full."""
    if self.prune:
      held = jnp.take_along_axis(held, state.channels[layer][:, :, None], axis=3)
    ends = (now >= 0) & ((now + 1) % self.residual == 0)

    def write(keys: Packed) -> Packed:
      block = quantise.encode(jnp.swapaxes(held, 2, 3), bits=self.bits, group=self.group)

      def put(all_layers: Array, x: Array) -> Array:
        b, kv_heads, d, many = x.shape
        column = (now // self.residual * many)[:, None] + jnp.arange(many, dtype=jnp.int32)[None]
        column = jnp.where(ends[:, None], column, all_layers.shape[4])
        rows = jnp.arange(b, dtype=jnp.int32)[:, None, None, None]
        heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None, None]
        channel = jnp.arange(d, dtype=jnp.int32)[None, None, :, None]
        at = all_layers.at[layer, rows, heads, channel, column[:, None, None]]
        return at.set(x.astype(all_layers.dtype), mode="drop")

      return jax.tree.map(put, keys, block)

    return jax.lax.cond(jnp.any(ends), write, lambda keys: keys, state.keys)
