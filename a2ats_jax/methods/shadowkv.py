"""ShadowKV: low-rank keys on the device, values in host memory, chunks found by landmarks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax import store as paged
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats, token_by_token
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["store", "weights", "basis", "landmarks", "special", "numbers", "recent", "chunks"],
  meta_fields=["capacity"],
)
@dataclasses.dataclass(frozen=True)
class ShadowState:
  """The cache; P tokens a chunk, N chunks, r the rank, O outlier chunks.

  Attributes:
    store: values of every chunk: the first half of its tokens where a page has keys, then the rest.
    weights, basis: keys before rotary embedding are their product, all KV heads side by side.
    landmarks: mean of each chunk's rotated keys.
    special: rotated keys and values of the outlier chunks.
    numbers: of the outlier chunks; N where a row has fewer.
    recent: rotated keys and values after the last chunk: position p of a row in place
      ``p - P chunks``.
    chunks: of each row.
    capacity: no row ever holds more tokens.
  """

  store: paged.KVStore
  weights: Float[Array, "L B T r"]
  basis: Float[Array, "L B r channels"]
  landmarks: Float[Array, "L B K N D"]
  special: dense.DenseCache
  numbers: Int[Array, "L B K O"]
  recent: dense.DenseCache
  chunks: Int[Array, "B"]
  capacity: int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "rank", "chunk", "outliers", "local", "placement"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowKV:
  """ShadowKV (2410.21465): chunks by landmark, keys rebuilt from a low-rank product.

  A prompt's keys before rotary embedding, all KV heads of a layer side by side, are replaced by
  their best rank-r product. A step scores every chunk by the product of query and landmark, as a
  softmax over chunks and the largest share over the group; the best chunks that the budget grants
  are read: their keys rebuilt and rotated, their values fetched. Outlier chunks, whose keys are
  least like their mean, the last ``local`` tokens and all later ones are read in any case, exactly.

  Device bytes per prompt token and layer, at b bytes a number: ``r b`` for weights and
  ``K D b / P`` for landmarks; host: ``K D b``. Once per row and layer: ``r K D b`` for the basis,
  ``2 K O P D b`` for outliers. A later token takes ``2 K D b`` on the device.

  Ours: the product comes from eigenvectors of the keys' second moments, which is the same subspace;
  tokens that no chunk holds are read exactly; the number of chunks follows the budget.

  Attributes:
    budget: tokens that a KV head may read beside outliers and recent ones; whole chunks.
    rank: r, at most K D.
    chunk: P, an even number of tokens.
    outliers: O, chunks of each KV head that are kept exactly.
    local: last tokens of the prompt that are kept exactly.
    placement: of the values.
  """

  budget: Budget
  rank: int = 160
  chunk: int = 8
  outliers: int = 48
  local: int = 32
  placement: paged.Placement = "auto"

  def __post_init__(self):
    if self.rank < 1 or self.chunk < 2 or self.chunk % 2 or self.outliers < 0 or self.local < 0:
      raise UserError(
        "shadowkv: rank must be at least 1, chunk an even number of tokens, outliers and local 0 "
        f"or more, got {self.rank}, {self.chunk}, {self.outliers} and {self.local}"
      )

  @property
  def name(self) -> str:
    return "shadowkv"

  @property
  def across_heads(self) -> str:
    return "one basis serves the keys of all heads"

  def init(self, geometry: Geometry) -> ShadowState:
    g, p = geometry, self.chunk
    lead, count = (g.layers, g.batch, g.kv_heads), -(-g.prompt // p)
    rank = min(self.rank, g.kv_heads * g.head_dim)
    return ShadowState(
      store=paged.open_store(
        layers=g.layers,
        batch=g.batch,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        slots=count * p // 2,
        page=p // 2,
        dtype=g.dtype,
        placement=self.placement,
      ),
      weights=jnp.zeros((g.layers, g.batch, count * p, rank), g.dtype),
      basis=jnp.zeros((g.layers, g.batch, rank, g.kv_heads * g.head_dim), g.dtype),
      landmarks=jnp.zeros((*lead, count, g.head_dim), g.dtype),
      special=dense.zeros((*lead, self.outliers * p, g.head_dim), g.dtype),
      numbers=jnp.zeros((*lead, self.outliers), jnp.int32),
      recent=dense.zeros((*lead, self.local + p - 1 + g.new, g.head_dim), g.dtype),
      chunks=jnp.zeros(g.batch, jnp.int32),
      capacity=g.capacity,
    )

  def absorb(self, state: ShadowState, prompt: PromptLayer, *, layer: int | Array) -> ShadowState:
    b, t, kv_heads, d = prompt.keys.shape
    p, count, rank = self.chunk, state.landmarks.shape[3], state.weights.shape[3]
    chunks = jnp.maximum(prompt.lengths - self.local, 0) // p
    more = ((0, 0), (0, count * p - t), (0, 0), (0, 0))
    slot = jnp.arange(count * p, dtype=jnp.int32)[None]
    inside = (slot < (chunks * p)[:, None])[..., None, None]
    keys, rotated, values = (
      jnp.where(inside, jnp.pad(x, more), 0) for x in (prompt.keys, prompt.rotated, prompt.values)
    )
    flat = keys.astype(jnp.float32).reshape(b, count * p, kv_heads * d)
    moments = jnp.einsum("btm,btn->bmn", flat, flat, precision=_HIGHEST)
    basis = jnp.linalg.eigh(moments)[1][..., ::-1][..., :rank]  # largest first
    weights = jnp.einsum("btm,bmr->btr", flat, basis, precision=_HIGHEST)

    def by_chunk(x: Array) -> Array:
      return jnp.swapaxes(x, 1, 2).reshape(b, kv_heads, count, p, d)

    rotated, values = by_chunk(rotated), by_chunk(values)
    landmarks = jnp.mean(rotated, axis=3)
    numbers = self._unlike(rotated, landmarks, chunks)

    def chosen(x: Array) -> Array:
      at = jnp.minimum(numbers, count - 1)[..., None, None]
      return jnp.take_along_axis(x, at, axis=2).reshape(b, kv_heads, -1, d)

    place = (chunks * p)[:, None] + jnp.arange(state.recent.k.shape[3], dtype=jnp.int32)[None]
    place = jnp.clip(place, 0, t - 1)[
      :, None, :, None
    ]  # of later tokens: overwritten when they come

    def last(x: Array) -> Array:
      return jnp.take_along_axis(jnp.swapaxes(x, 1, 2), place, axis=2)

    def put(all_layers: Array, one: Array) -> Array:
      one = one.astype(all_layers.dtype)
      return jax.lax.dynamic_update_index_in_dim(all_layers, one, layer, 0)

    halves = values.reshape(b, kv_heads, count, 2, p // 2, d)
    first, second = (halves[:, :, :, i].reshape(b, kv_heads, -1, d) for i in range(2))
    return dataclasses.replace(
      state,
      store=paged.write_prompt(state.store, first, second, layer=layer),
      weights=put(state.weights, weights),
      basis=put(state.basis, jnp.swapaxes(basis, 1, 2)),
      landmarks=put(state.landmarks, landmarks),
      special=dense.DenseCache(
        put(state.special.k, chosen(rotated)), put(state.special.v, chosen(values))
      ),
      numbers=put(state.numbers, numbers),
      recent=dense.DenseCache(
        put(state.recent.k, last(prompt.rotated)), put(state.recent.v, last(prompt.values))
      ),
      chunks=chunks,
    )

  def _unlike(
    self,
    rotated: Float[Array, "B K N P D"],
    landmarks: Float[Array, "B K N D"],
    chunks: Int[Array, "B"],
  ) -> Int[Array, "B K O"]:
    """Chunks with the smallest cosine between any of their keys and their mean."""
    count = rotated.shape[2]
    mean = landmarks[:, :, :, None]
    size = jnp.linalg.norm(rotated, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    like = jnp.min(jnp.sum(rotated * mean, axis=-1) / jnp.maximum(size, 1e-20), axis=-1)
    there = jnp.arange(count, dtype=jnp.int32)[None, None] < chunks[:, None, None]
    like = jnp.where(there, like, jnp.inf)
    order = jnp.argsort(like, axis=-1, stable=True)[..., : self.outliers].astype(jnp.int32)
    order = jnp.where(jnp.take_along_axis(like, order, axis=-1) < jnp.inf, order, count)
    missing = self.outliers - order.shape[2]
    return jnp.pad(order, ((0, 0), (0, 0), (0, missing)), constant_values=count)

  def attend(
    self,
    state: ShadowState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ShadowState, Stats]:
    def step(state: ShadowState, q: Array, k: Array, v: Array, now: Array):
      return self._step(state, q, k, v, now, rope, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: ShadowState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], ShadowState, Stats]:
    live = positions >= 0
    begin = (state.chunks * self.chunk)[:, None]  # the position in the first recent place
    place = jnp.where(live, positions - begin, -1)
    recent = dense.DenseCache(
      dense.append(state.recent.k, rotate(k, positions, rope), place, layer),
      dense.append(state.recent.v, v, place, layer),
    )
    state = dataclasses.replace(state, recent=recent)
    q = rotate(q, positions, rope)
    ids, used = self.choose(state, q, positions[:, 0], layer)
    keys, values = self._chunks(state, ids, rope, layer)
    far = jnp.repeat(used, self.chunk, axis=-1)[:, None] & live[..., None, None]
    near = dense.visible(place, recent.k.shape[3])[:, :, None]
    near = jnp.broadcast_to(near, (*near.shape[:2], k.shape[2], near.shape[3]))
    special = state.numbers[layer] < state.landmarks.shape[3]
    special = jnp.repeat(special, self.chunk, axis=-1)[:, None] & live[..., None, None]
    parts = [
      dense.attend_masked(q, keys, values, far),
      dense.attend_masked(q, dense.read(recent.k, layer), dense.read(recent.v, layer), near),
      dense.attend_masked(
        q, dense.read(state.special.k, layer), dense.read(state.special.v, layer), special
      ),
    ]
    out = attention.finish(attention.merge(parts)).astype(q.dtype)

    def many(mask: Bool[Array, "B 1 K slots"]) -> Int[Array, "B 1 K"]:
      return jnp.sum(mask, axis=-1, dtype=jnp.int32)

    selected, exact = many(far), many(near) + many(special)
    kv_heads, item = k.shape[2], state.weights.dtype.itemsize
    d, rank = k.shape[3], state.weights.shape[3]
    index = state.landmarks.shape[3] * d + rank * d  # landmarks, and this head's part of the basis
    index = jnp.where(live[..., None], index * item, 0)
    a_token = (rank // kv_heads + d) * item  # weights are shared by the KV heads
    moved = ids.shape[2] * state.store.page_bytes
    stats = Stats(
      length=positions + 1,
      selected=selected,
      read=selected + exact,
      tail=jnp.zeros(q.shape[:3]),
      read_bytes=(selected * a_token + exact * 2 * d * item + index).astype(jnp.float32),
      moved=jnp.where(live[..., None], jnp.full(exact.shape, moved, jnp.float32), 0.0),
    )
    return out, state, stats

  def choose(
    self,
    state: ShadowState,
    q: Float[Array, "B 1 H D"],
    now: Int[Array, "B"],
    layer: int | Array,
  ) -> tuple[Int[Array, "B K F"], Bool[Array, "B K F"]]:
    """Chunks to read, best first, and which of them count.

    Args:
      q: rotated.
    """
    landmarks, numbers = dense.read(state.landmarks, layer), state.numbers[layer]
    b, kv_heads, count, _ = landmarks.shape
    number = jnp.arange(count, dtype=jnp.int32)
    taken = jnp.any(numbers[..., None] == number[None, None, None], axis=2)
    open_ = (number[None, None] < state.chunks[:, None, None]) & ~taken
    scores = attention.logits(q, landmarks)[:, 0].reshape(b, kv_heads, -1, count)
    scores = jnp.where(open_[:, :, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    share = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.maximum(jnp.sum(share, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    share = jnp.where(open_, jnp.max(share / total, axis=2), -1.0)
    table = self.budget.resolve(state.capacity) // self.chunk
    most = max(1, min(int(table.max()), count))
    granted = jnp.asarray(table)[jnp.maximum(now + 1, 0)]
    best, ids = jax.lax.top_k(share, most)
    place = jnp.arange(most, dtype=jnp.int32)[None, None]
    return ids, (best >= 0) & (place < granted[:, None, None])

  def _chunks(
    self, state: ShadowState, ids: Int[Array, "B K F"], rope: Rope, layer: int | Array
  ) -> tuple[Float[Array, "B K slots D"], Float[Array, "B K slots D"]]:
    """Rotated keys, rebuilt, and values, fetched, of some chunks."""
    b, kv_heads, many = ids.shape
    rank, p = state.weights.shape[3], self.chunk
    inside = jnp.arange(p, dtype=jnp.int32)[None, None, None]
    token = (ids[..., None] * p + inside).reshape(b, kv_heads, many * p)
    rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    weights = state.weights[layer, rows, token]
    basis = dense.read(state.basis, layer).reshape(b, rank, kv_heads, -1)
    keys = jnp.einsum(
      "bktr,brkd->bktd",
      weights,
      basis,
      precision=_HIGHEST,
      preferred_element_type=jnp.float32,
    ).astype(weights.dtype)
    keys = rotate(keys[..., None, :], token, rope)[..., 0, :]
    first, second = paged.fetch(state.store, ids, layer=layer)
    values = jnp.concatenate([first, second], axis=3).reshape(b, kv_heads, many * p, -1)
    return keys, values
