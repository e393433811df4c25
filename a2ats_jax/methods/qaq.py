"""QAQ: bits of every token from an error budget, keys and values by a rule of their own."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention, planes
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats, token_by_token
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int, UInt

_QUERIES = 32  # of a prompt, whose norms are measured
_SHARE = 0.9  # of the norms that the one taken is not below


def read_error(text: str) -> float:
  """A decimal number above 0."""
  if not re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", text) or float(text) <= 0:
    raise UserError(f"expected a number above 0, got {text!r}")
  return float(text)


@partial(jax.tree_util.register_dataclass, data_fields=["pool", "weights", "norms"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QAQState:
  """The cache.

  Attributes:
    pool: rotated keys and values, ``[L, B, K, ...]``: group ``2 t`` is the key of position t, group
      ``2 t + 1`` its value.
    weights: attention of the last n queries, the largest of a group's query heads, float16: that of
      position p in place ``p mod n``.
    norms: of queries, squared.
  """

  pool: planes.PlanePool
  weights: Float[Array, "L B K window T"]
  norms: Float[Array, "L B K"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["bits", "least", "most", "window", "outliers", "key_error", "value_error"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QAQ:
  r"""QAQ (2403.04643): quality-adaptive quantisation, the bits of a token from an error budget.

  The key and the value of a token, of one layer and KV head, are a group of D numbers each, of
  ``clamp(ceil(log2(range / 2e + 1)), least, most)`` bits with :math:`e = \sqrt{12} \sigma`, where
  T tokens are cached and

  * of a value :math:`\sigma = \sigma_X / (\sqrt{T} S_t)`: the attention :math:`S_t` that a token
    may receive is the most it received from any of the last n queries and G query heads;
  * of a key :math:`\sigma^2 = \ln(\sigma_S^2 T^3 / (T - 1) + 1) / |Q|^2`: :math:`|Q|^2` is the
    90th percentile of the squared norms of queries.

  The newest n - 1 tokens have the most bits. The lowest and highest numbers of a group are kept as
  float16, and its range is that of the others. Bits are settled after every step. Nothing is
  evicted: every token is read. Needs the last 32 queries of prefill, or n.

  Device bytes per token and layer: ``2 K D bits / 8`` of planes; ``2 K (5 + 6 outliers)`` for the
  bits, range and outliers of key and value; ``2 K n`` for the weights of the last n queries. Once a
  layer: ``2 K D most n / 8`` for the newest tokens and ``4 K`` for the norm. Nothing on the host.

  The number of bits is the repository's. A cell of ``range / 2^bits`` with an error of sigma has
  ``ceil(log2(range / e))`` bits, which is what the paper's text has: up to one bit more.

  Ours: no copy of the cache is kept on the host, so bits are only ever lowered: a token has the
  fewest bits that the rule ever gave it, and one that is attended to again stays coarse. Codes are
  nested, cell and midpoint from the lowest number as in the paper's text (the repository rounds
  about the mean), so that lowering drops bit planes in place. Memory is bounded: key and value
  share a pool of ``bits`` planes a number on average, and where the rule asks for more than there
  is, tokens of the least :math:`S_t` fall first, down to ``least``, the value before the key.
  :math:`|Q|^2` is measured on the last 32 queries of each prompt and KV head and then stays; the
  repository takes 300. Outliers are counted per group (2 of 64 numbers, 3%), not 1% of it. Every
  step moves a layer's planes together, which ``read_bytes`` does not count.

  Attributes:
    bits: planes of a number on average, for which there is memory.
    least, most: bits of a number; one of 0 bits is the middle of its group's range.
    window: n, queries whose attention counts.
    outliers: of a group, exact on each side; without them accuracy falls by 12 to 26% (paper).
    key_error: sigma_S, error of an attention weight, of which keys may cause so much.
    value_error: sigma_X, error of an output that values may cause.
  """

  bits: int = 3
  least: int = 2
  most: int = 4
  window: int = 5
  outliers: int = 1
  key_error: float = 1.0
  value_error: float = 1.0

  def __post_init__(self):
    if not 0 <= self.least <= self.bits <= self.most <= planes.MOST or self.most < 1:
      raise UserError(
        f"qaq: expected 0 <= least <= bits <= most <= {planes.MOST} and most at least 1, got "
        f"least {self.least}, bits {self.bits} and most {self.most}"
      )
    if self.window < 1 or self.outliers < 0:
      raise UserError(
        "qaq: window must be at least 1 query and outliers 0 or more, got "
        f"{self.window} and {self.outliers}"
      )
    if not (self.key_error > 0 and self.value_error > 0):
      raise UserError(
        f"qaq: errors must be above 0, got key_error {self.key_error} and value_error "
        f"{self.value_error}"
      )

  @property
  def name(self) -> str:
    return "qaq"

  @property
  def needs(self) -> Needs:
    return Needs(queries=max(self.window, _QUERIES))

  def init(self, geometry: Geometry) -> QAQState:
    g = geometry
    if g.head_dim % 8 or not 2 * self.outliers < g.head_dim <= 256:
      raise UserError(
        "qaq: the model's head size must be a multiple of 8, at most 256 and more than the "
        f"outliers of both sides, got {g.head_dim} and twice {self.outliers}"
      )
    lead = (g.layers, g.batch, g.kv_heads)
    pool = planes.zeros(
      lead,
      groups=2 * g.capacity,
      slots=2 * (self.bits * g.capacity + self.most * self.window),
      dim=g.head_dim,
      most=self.most,
      outliers=2 * self.outliers,
    )
    weights = jnp.zeros((*lead, self.window, g.capacity), jnp.float16)
    return QAQState(pool, weights, jnp.zeros(lead))

  def absorb(self, state: QAQState, prompt: PromptLayer, *, layer: int | Array) -> QAQState:
    if prompt.queries is None:
      raise UserError("qaq: the prompt's last queries were not handed over")
    b, t, kv_heads, d = prompt.keys.shape
    capacity, slots = state.weights.shape[4], state.pool.planes.shape[3]
    here = jnp.arange(t, dtype=jnp.int32)[None] < prompt.lengths[:, None]
    x = jnp.stack([prompt.rotated, prompt.values], axis=2)  # [B, T, 2, K, D]
    x = jnp.where(here[:, :, None, None, None], x, 0)
    x = jnp.pad(x, ((0, 0), (0, capacity - t), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(b, 2 * capacity, kv_heads, d).swapaxes(1, 2)
    pool = planes.split(x, most=self.most, outliers=2 * self.outliers)
    queries = prompt.queries[:, -self.window :]
    keys = jnp.swapaxes(prompt.rotated, 1, 2)
    weight = _of_kv_heads(attention.window_weights(queries, keys, prompt.lengths), kv_heads)
    place = jnp.arange(self.window, dtype=jnp.int32)[None]
    query = (place - prompt.lengths[:, None]) % self.window  # the one whose place this is
    weight = jnp.take_along_axis(weight, query[:, None, :, None], axis=2)
    weight = jnp.pad(weight, ((0, 0), (0, 0), (0, 0), (0, capacity - t)))
    norm = _percentile(prompt.queries, prompt.lengths, kv_heads)
    bits = self._bits(pool, weight, norm, prompt.lengths, slots)
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return QAQState(
      jax.tree.map(put, state.pool, planes.lower(pool, bits, slots)),
      put(state.weights, weight),
      put(state.norms, norm),
    )

  def attend(
    self,
    state: QAQState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], QAQState, Stats]:
    def step(state: QAQState, q: Array, k: Array, v: Array, positions: Array):
      q, k = rotate(q, positions, rope), rotate(k, positions, rope)
      return self._step(state, q, k, v, positions, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: QAQState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], QAQState, Stats]:
    b, _, kv_heads, d = k.shape
    capacity, slots = state.weights.shape[4], state.pool.planes.shape[3]
    here = positions >= 0
    pair = jnp.arange(2, dtype=jnp.int32)[None]
    pool = jax.tree.map(lambda x: dense.read(x, layer), state.pool)
    x = jnp.concatenate([k, v], axis=1).swapaxes(1, 2)
    pool = planes.append(pool, x, jnp.where(here, 2 * positions + pair, -1))
    x = planes.decode(pool).astype(k.dtype).reshape(b, kv_heads, capacity, 2, d)
    mask = dense.visible(positions, capacity)[:, :, None]
    scores = attention.logits(q, x[:, :, :, 0])
    part = attention.from_logits(scores, x[:, :, :, 1], mask)
    out = attention.finish(part).astype(q.dtype)
    weight = jnp.exp(scores - part.peak[..., None]) / part.total[..., None]
    weight = _of_kv_heads(jnp.where(mask, weight, 0.0), kv_heads)
    place = jnp.where(here, positions % self.window, -1)
    weights = dense.append(state.weights, weight.swapaxes(1, 2), place, layer)
    used = jnp.sum(pool.bits, axis=-1, dtype=jnp.int32)[:, None]
    beside = (positions + 1) * (2 * (5 + 6 * self.outliers) + 2 * self.window)
    size = jnp.where(here[..., None], used * (d // 8) + beside[..., None], 0)
    latest = dense.read(weights, layer)
    bits = self._bits(pool, latest, state.norms[layer], positions[:, 0] + 1, slots)
    bits = jnp.where(here[..., None], bits, pool.bits)
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    pool = jax.tree.map(put, state.pool, planes.lower(pool, bits, slots))
    read = jnp.broadcast_to((positions + 1)[..., None], (b, 1, kv_heads))
    stats = dense.on_device(positions + 1, read, q.shape[2], size)
    return out, QAQState(pool, weights, state.norms), stats

  def _bits(
    self,
    pool: planes.PlanePool,
    weights: Float[Array, "B K window T"],
    norms: Float[Array, "B K"],
    tokens: Int[Array, "B"],
    slots: int,
  ) -> UInt[Array, "B K groups"]:
    """Bits that every key and value keeps, so that one more token finds room.

    Args:
      pool: of a layer. weights, norms: of its queries.
      tokens: of every row.
      slots: planes of the layer's pool.
    """
    b, kv_heads, _, t = weights.shape
    token = jnp.arange(t, dtype=jnp.int32)[None]
    held = (token < tokens[:, None])[:, None, :, None]
    newest = (token > (tokens - self.window)[:, None])[:, None]
    most_weight = jnp.max(weights, axis=2).astype(jnp.float32)
    number = jnp.maximum(tokens, 1).astype(jnp.float32)[:, None, None]
    spread = self.key_error**2 * number**3 / jnp.maximum(number - 1, 1.0) + 1
    of_key = jnp.sqrt(12 * jnp.log(spread) / norms[..., None])
    of_value = jnp.sqrt(12 / number) * self.value_error / most_weight  # inf: 0 bits
    errors = jnp.stack(jnp.broadcast_arrays(of_key, of_value), axis=-1)
    cells = pool.span.astype(jnp.float32).reshape(b, kv_heads, t, 2) / (2 * errors) + 1
    powers = jnp.asarray([2.0**p for p in range(self.most)])
    asked = jnp.sum(cells[..., None] > powers[None, None, None, None], axis=-1, dtype=jnp.int32)
    asked = jnp.where(newest[..., None], self.most, jnp.maximum(asked, self.least))
    has = pool.bits.astype(jnp.int32).reshape(b, kv_heads, t, 2)
    extra = jnp.where(held, jnp.minimum(has, asked) - self.least, 0)
    # Room beside the least bits of every token and the most of the next one, best token first.
    room = slots - 2 * self.most - 2 * self.least * tokens
    order = jnp.argsort(-jnp.where(newest, jnp.inf, most_weight), axis=-1, stable=True)
    ranked = jnp.take_along_axis(extra, order[..., None], axis=2).reshape(b, kv_heads, 2 * t)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    given = jnp.minimum(ranked, jnp.maximum(room[:, None, None] - before, 0))
    given = given.reshape(b, kv_heads, t, 2)
    given = jnp.take_along_axis(given, jnp.argsort(order, axis=-1)[..., None], axis=2)
    bits = jnp.where(held, self.least + given, 0)
    return bits.astype(jnp.uint8).reshape(b, kv_heads, 2 * t)


def _of_kv_heads(weight: Float[Array, "B S H T"], kv_heads: int) -> Float[Array, "B K S T"]:
  """The largest of a group's query heads, as it is stored."""
  b, s, h, t = weight.shape
  most = jnp.max(weight.reshape(b, s, kv_heads, h // kv_heads, t), axis=3)
  return jnp.swapaxes(most, 1, 2).astype(jnp.float16)


def _percentile(
  queries: Float[Array, "B W H D"], lengths: Int[Array, "B"], kv_heads: int
) -> Float[Array, "B K"]:
  """The 90th percentile, by nearest rank, of squared norms of the queries that a KV head sees."""
  b, w, h, _ = queries.shape
  norms = jnp.sum(jnp.square(queries.astype(jnp.float32)), axis=-1)
  there = jnp.arange(w, dtype=jnp.int32)[None] >= (w - lengths)[:, None]
  norms = jnp.where(there[..., None], norms, jnp.inf).reshape(b, w, kv_heads, h // kv_heads)
  ranked = jnp.sort(jnp.swapaxes(norms, 1, 2).reshape(b, kv_heads, -1), axis=-1)
  table = [max(math.ceil(_SHARE * n * (h // kv_heads)) - 1, 0) for n in range(w + 1)]
  rank = jnp.asarray(table, jnp.int32)[jnp.minimum(lengths, w)]
  return jnp.take_along_axis(ranked, rank[:, None, None], axis=-1)[..., 0]
