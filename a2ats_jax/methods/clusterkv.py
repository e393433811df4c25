"""ClusterKV: keys clustered per prompt, tokens fetched by cluster."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax import index as cells
from a2ats_jax import store as paged
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats, token_by_token
from a2ats_jax.methods.paging import STAGE_BYTES, Blocks, attend_pages, needed, stage_of
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int

_ROUNDS = 20  # of k-means
_BLOCK = 4096  # tokens compared with all centroids at once


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["store", "index", "centroids", "near", "prompt"],
  meta_fields=["clusters", "prompt_slots", "capacity"],
)
@dataclasses.dataclass(frozen=True)
class ClusterState:
  """The cache.

  Attributes:
    store: pages of clustered tokens: the prompt's by cluster, then later ones by arrival.
    index: cluster and rank of every slot.
    centroids: of the prompt's clusters, then of those made later.
    near: rotated keys and values of the sinks, and then of tokens that are not clustered yet: the
      n-th after the prompt in place ``sinks + n mod every``.
    prompt: tokens of each row's prompt.
    clusters: of the prompt.
    prompt_slots: slots of the prompt's tokens.
    capacity: no row ever holds more tokens.
  """

  store: paged.KVStore
  index: cells.CodeIndex
  centroids: Float[Array, "L B K clusters D"]
  near: dense.DenseCache
  prompt: Int[Array, "B"]
  clusters: int
  prompt_slots: int
  capacity: int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "clusters", "sinks", "every", "fresh", "page", "placement"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterKV:
  """ClusterKV (2412.03213): tokens recalled at the granularity of semantic clusters.

  After prefill the rotated keys of every KV head, but for the sinks, are clustered by cosine: 20
  rounds of k-means, a centroid being the mean of its keys. A query head ranks clusters by the
  product of query and centroid and takes their tokens until the budget is full, the last cluster
  in part; a KV head reads what any of its query heads took. Tokens after the prompt are read in any
  case until ``every`` of them are there, which are then clustered by themselves into ``fresh``
  clusters. Needs nothing of prefill but keys.

  Host bytes per token and layer: ``2 K D`` numbers. Device: ``8 K`` for cluster and rank, and
  ``K C (D b + 8)`` once for C clusters; sinks and ``every`` tokens of ``2 K D`` numbers.

  Ours: k-means starts from evenly spaced keys, where the repository draws them; an empty cluster
  keeps its centroid; what is fetched at one step is not kept for the next; every layer selects (the
  repository leaves the first two alone).

  Attributes:
    budget: tokens that each query head may read, sinks included, whoever the budget names.
    clusters: of a prompt; 0 for one to every 80 tokens.
    sinks: first tokens, read in any case.
    every: later tokens clustered at a time, whole pages.
    fresh: clusters made of them.
    page: P, tokens a page.
    placement: of the pages.
  """

  budget: Budget
  clusters: int = 0
  sinks: int = 16
  every: int = 320
  fresh: int = 8
  page: int = 16
  placement: paged.Placement = "auto"

  def __post_init__(self):
    if min(self.page, self.fresh) < 1 or self.sinks < 0 or self.clusters < 0:
      raise UserError(
        "clusterkv: page and fresh must be at least 1, sinks and clusters 0 or more, got "
        f"{self.page}, {self.fresh}, {self.sinks} and {self.clusters}"
      )
    if self.every < self.page or self.every % self.page:
      raise UserError(
        f"clusterkv: every must be whole pages of {self.page} tokens, got {self.every}"
      )

  @property
  def name(self) -> str:
    return "clusterkv"

  def init(self, geometry: Geometry) -> ClusterState:
    g = geometry
    lead = (g.layers, g.batch, g.kv_heads)
    prompt_slots = -(-g.prompt // self.page) * self.page
    groups = g.new // self.every
    slots = prompt_slots + groups * self.every
    count = self.clusters or max(1, g.prompt // 80)
    total = count + groups * self.fresh
    return ClusterState(
      store=paged.open_store(
        layers=g.layers,
        batch=g.batch,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        slots=slots,
        page=self.page,
        dtype=g.dtype,
        placement=self.placement,
      ),
      index=cells.empty(
        lead, count=total, slots=slots, page=self.page, prompt=prompt_slots, order="cell"
      ),
      centroids=jnp.zeros((*lead, total, g.head_dim), g.dtype),
      near=dense.zeros((*lead, self.sinks + self.every, g.head_dim), g.dtype),
      prompt=jnp.zeros(g.batch, jnp.int32),
      clusters=count,
      prompt_slots=prompt_slots,
      capacity=g.capacity,
    )

  def absorb(self, state: ClusterState, prompt: PromptLayer, *, layer: int | Array) -> ClusterState:
    t = prompt.keys.shape[1]
    k, v = jnp.swapaxes(prompt.rotated, 1, 2), jnp.swapaxes(prompt.values, 1, 2)
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    eligible = (slot >= self.sinks) & (slot < prompt.lengths[:, None])
    many = jnp.maximum(prompt.lengths - self.sinks, 1)
    spaced = jnp.arange(state.clusters, dtype=jnp.int32)[None] * many[:, None] // state.clusters
    first = jnp.minimum(self.sinks + spaced, t - 1)[:, None, :, None]
    begin = jnp.take_along_axis(k, first, axis=2).astype(jnp.float32)
    centroids, label = k_means(k, eligible, begin)
    built, token = cells.build(
      label,
      eligible,
      count=state.index.counts.shape[3],
      slots=state.index.slots,
      page=self.page,
    )
    more = ((0, 0), (0, 0), (0, state.prompt_slots - t), (0, 0))
    by_cluster = (jnp.pad(jnp.take_along_axis(x, token[..., None], axis=2), more) for x in (k, v))
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    place = jnp.minimum(jnp.arange(self.sinks, dtype=jnp.int32), t - 1)

    def start(all_layers: Array, x: Array, width: int) -> Array:
      x = x[None].astype(all_layers.dtype)
      return jax.lax.dynamic_update_slice(all_layers, x[:, :, :, :width], (layer, 0, 0, 0, 0))

    near = dense.DenseCache(
      start(state.near.k, k[:, :, place], self.sinks),
      start(state.near.v, v[:, :, place], self.sinks),
    )
    return dataclasses.replace(
      state,
      store=paged.write_prompt(state.store, *by_cluster, layer=layer),
      index=jax.tree.map(put, state.index, built),
      centroids=start(state.centroids, centroids, state.clusters),
      near=near,
      prompt=prompt.lengths,
    )

  def attend(
    self,
    state: ClusterState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ClusterState, Stats]:
    def step(state: ClusterState, q: Array, k: Array, v: Array, positions: Array):
      q, k = rotate(q, positions, rope), rotate(k, positions, rope)
      return self._step(state, q, k, v, positions, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: ClusterState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], ClusterState, Stats]:
    now, later = positions[:, 0], positions - state.prompt[:, None]
    place = jnp.where(positions < 0, -1, self.sinks + later % self.every)
    near = dense.DenseCache(
      dense.append(state.near.k, k, place, layer), dense.append(state.near.v, v, place, layer)
    )
    state = dataclasses.replace(state, near=near)
    taken, ids, count = self.choose(state, q, now, layer)

    by_head = taken.reshape(-1, 1, taken.shape[2])

    def chosen(blocks: Blocks) -> Array:
      slots = cells.look(state.index, blocks.heads, blocks.ids, layer=layer)
      return cells.selected(*slots, by_head[blocks.heads])

    stage = stage_of(
      needed(int(self.budget.resolve(state.capacity).max()), self.budget.per, page=self.page),
      heads=by_head.shape[0],
      pages=state.index.pages,
      most=STAGE_BYTES // state.store.page_bytes,
    )
    far, moved = attend_pages(state.store, q, ids, count, chosen, stage=stage, layer=layer)
    ring = jnp.arange(self.every, dtype=jnp.int32)[None]
    sink = jnp.arange(self.sinks, dtype=jnp.int32)[None] < state.prompt[:, None]
    fresh = ring <= later % self.every
    mask = jnp.concatenate([sink, fresh], axis=1) & (positions >= 0)
    held_k, held_v = dense.read(near.k, layer), dense.read(near.v, layer)
    part = dense.attend_masked(q, held_k, held_v, mask[:, None, None])
    out = attention.finish(attention.merge([far, part]))
    out = jnp.where((positions >= 0)[:, :, None, None], out, 0.0).astype(q.dtype)
    selected = jnp.where(positions < 0, 0, jnp.sum(taken, axis=-1))[:, None]
    read = selected + jnp.sum(mask, axis=-1, dtype=jnp.int32)[:, None, None]
    d, index = k.shape[3], state.index
    extra = state.centroids.shape[3] * (d * k.dtype.itemsize + 4)
    extra += 4 * (index.begins.shape[3] + 2 * index.skip.shape[3])
    later = index.pages - index.sorted_pages  # pages that are not sorted: every slot
    extra = extra + 8 * self.page * (count + later)
    size = read * (2 * d * k.dtype.itemsize) + jnp.where(now[:, None] < 0, 0, extra)[:, None]
    stats = Stats(
      length=positions + 1,
      selected=selected,
      read=read,
      tail=jnp.zeros(q.shape[:3]),
      read_bytes=size.astype(jnp.float32),
      moved=jnp.where(positions[..., None] < 0, 0.0, moved[:, None]),
    )
    return out, self._cluster(state, now, layer), stats

  def choose(
    self, state: ClusterState, q: Float[Array, "B 1 H D"], now: Int[Array, "B"], layer: int | Array
  ) -> tuple[Int[Array, "B K clusters"], Int[Array, "B K listed"], Int[Array, "B K"]]:
    """Tokens taken of every cluster, the pages that hold them, and how many pages.

    Args:
      q: rotated.
    """
    counts = dense.read(state.index.counts, layer)
    scores = attention.logits(q, dense.read(state.centroids, layer))[:, 0]
    table = self.budget.resolve(state.capacity)
    granted = jnp.asarray(table)[jnp.maximum(now + 1, 0)]
    sinks = jnp.minimum(self.sinks, state.prompt)  # a short prompt has fewer
    taken = cells.select(counts, scores, jnp.maximum(granted - sinks, 0))
    taken = jnp.where((now >= 0)[:, None, None], taken, 0)
    most = int(table.max()) * (q.shape[2] // taken.shape[1])
    return taken, *cells.page_numbers(cells.page_cells(state.index, layer=layer), taken, most=most)

  def _cluster(self, state: ClusterState, now: Int[Array, "B"], layer: int | Array) -> ClusterState:
    """Cluster the tokens of rows that have ``every`` of them, and write their pages."""
    if state.centroids.shape[3] == state.clusters:
      return state
    done = now - state.prompt + 1
    ends = (now >= 0) & (done > 0) & (done % self.every == 0)

    def write(state: ClusterState) -> ClusterState:
      k, v = (dense.read(x, layer)[:, :, self.sinks :] for x in (state.near.k, state.near.v))
      everyone = jnp.ones((k.shape[0], self.every), bool)
      spaced = jnp.arange(self.fresh, dtype=jnp.int32) * self.every // self.fresh
      centroids, label = k_means(k, everyone, k[:, :, spaced].astype(jnp.float32))
      group = jnp.maximum(done // self.every - 1, 0)
      cell = state.clusters + group * self.fresh
      number = jnp.arange(self.fresh, dtype=jnp.int32)[None]
      at = jnp.where(ends[:, None], cell[:, None] + number, -1)
      store, index = state.store, state.index
      slot = state.prompt_slots + group * self.every

      def add(i: Array, index: cells.CodeIndex) -> cells.CodeIndex:
        return cells.append(
          index, cell[:, None] + label[:, :, i], jnp.where(ends, slot + i, -1), layer=layer
        )

      index = jax.lax.fori_loop(0, self.every, add, index)
      for i in range(self.every // self.page):
        piece = slice(i * self.page, (i + 1) * self.page)
        page = jnp.where(ends, slot // self.page + i, -1)
        store = paged.write_page(store, k[:, :, piece], v[:, :, piece], page, layer=layer)
      centroids = jnp.swapaxes(centroids, 1, 2)
      return dataclasses.replace(
        state,
        store=store,
        index=index,
        centroids=dense.append(state.centroids, centroids, at, layer),
      )

    return jax.lax.cond(jnp.any(ends), write, lambda state: state, state)


def k_means(
  keys: Float[Array, "B K T D"], eligible: Bool[Array, "B T"], begin: Float[Array, "B K C D"]
) -> tuple[Float[Array, "B K C D"], Int[Array, "B K T"]]:
  """Clusters by cosine, a centroid being the mean of its keys; ties go to the first cluster.

  Args:
    eligible: keys that count; the others get a label that says nothing.
    begin: first centroids, float32.

  Returns:
    Centroids and the cluster of every key.
  """
  t = keys.shape[2]
  block = min(_BLOCK, t)
  more = ((0, 0), (0, 0), (0, -t % block), (0, 0))
  blocks = jnp.moveaxis(
    jnp.pad(keys.astype(jnp.float32), more).reshape(*keys.shape[:2], -1, block, keys.shape[3]), 2, 0
  )

  def assign(centroids: Array) -> Array:
    size = jnp.linalg.norm(centroids, axis=-1, keepdims=True)
    direction = centroids / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)

    def nearest(x: Array) -> Array:
      like = jnp.einsum("bktd,bkcd->bktc", x, direction, precision=jax.lax.Precision.HIGHEST)
      return jnp.argmax(like, axis=-1).astype(jnp.int32)

    label = jnp.moveaxis(jax.lax.map(nearest, blocks), 0, 2)
    return label.reshape(*keys.shape[:2], -1)[:, :, :t]

  def mean_of(label: Array, centroids: Array) -> Array:
    counts = jnp.where(eligible[:, None], label, centroids.shape[2])

    def one(x: Array, label: Array, old: Array) -> Array:
      sums = jnp.zeros_like(old).at[label].add(x, mode="drop")
      number = jnp.zeros(len(old)).at[label].add(1.0, mode="drop")[:, None]
      return jnp.where(number > 0, sums / jnp.maximum(number, 1.0), old)

    return jax.vmap(jax.vmap(one))(keys.astype(jnp.float32), counts, centroids)

  centroids = jax.lax.fori_loop(0, _ROUNDS, lambda _, c: mean_of(assign(c), c), begin)
  return centroids, assign(centroids)
