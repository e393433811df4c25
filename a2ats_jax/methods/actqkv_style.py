"""ActQKV-style: blocks by their leading tokens, budgets of layers by the entropy of a probe."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax import store as paged
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats, token_by_token
from a2ats_jax.methods.paging import STAGE_BYTES, Blocks, attend_pages, stage_of
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int

_EVEN = 1e-6  # added to deviations and to entropies: nothing is divided by zero
_HAIR = 1e-3  # of a block: what a share may lose to float32 before it is rounded down


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["store", "marks", "entropy", "near", "blocks"],
  meta_fields=["capacity"],
)
@dataclasses.dataclass(frozen=True)
class ActQKVState:
  """The cache; P tokens a block, N blocks.

  Attributes:
    store: a page for each block, in order of position: the first begins after the sinks.
    marks: mean of each block's representative keys, rotated.
    entropy: of the probe's scores over blocks, averaged over KV heads.
    near: rotated keys and values of all other tokens by position: the sinks, then those after the
      last block, position p in place ``p - P blocks``.
    blocks: of each row.
    capacity: no row ever holds more tokens.
  """

  store: paged.KVStore
  marks: Float[Array, "L B K N D"]
  entropy: Float[Array, "L B"]
  near: dense.DenseCache
  blocks: Int[Array, "B"]
  capacity: int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "block", "repr", "sinks", "local", "window", "most", "placement"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActQKVStyle:
  """In the style of ActQKV (2502.13542), whose formulas are not public.

  What follows is a reading of the paper's abstract and of its reviews; that more entropy means more
  budget, and how a bias is measured, are part of it. A prompt is cut into blocks of P tokens, each
  represented by its ``repr`` keys of most attention, averaged over the query heads of a KV head.
  Scores are linear in keys, so only the mean of these is kept. The last ``window`` queries of the
  prompt make one probe query a head, weighted by how unusual each token's queries are:
  ``bias_i = mean_hc ((q_ihc - mu_hc) / sd_hc)^2``, over heads and channels, and
  ``probe = sum_i bias_i q_i / sum_i bias_i``. The entropy of a layer is that of the softmax of the
  probe's block scores. Layers share the budget in proportion to their entropies, each between a
  ``most``-th and ``most`` times the mean. A step ranks blocks by the scores of its own query,
  summed over the query heads of a KV head, and reads the best ones that its layer is granted, and
  in any case the sinks, the last ``local`` tokens of the prompt and all later ones. Needs the
  window's queries and the sums of the prompt's attention of prefill.

  Device bytes per prompt token and layer, at b bytes a number: ``K D b / P`` for marks; host:
  ``2 K D b``. Once per row and layer: 4 for the entropy, and ``2 K D b`` for each of the sinks, the
  ``local`` tokens and P - 1 that fill no block. A later token takes ``2 K D b`` on the device.

  Ours: prompts are attended exactly, where the paper also retrieves blocks for every window of the
  prompt; budgets follow the prompt's probe, as a step's first layer cannot know the scores of the
  later ones; equal queries weigh the same; shares that are cut off at a bound, or at all blocks,
  are handed to the other layers, so that the budget is spent; scores are those of rotated queries
  and keys, where InfLLM, on which the paper builds, takes far keys at one position; defaults are
  smaller than InfLLM's (128 sinks, 4096 local tokens).

  Attributes:
    budget: tokens of blocks that a KV head may read, averaged over layers, whoever the budget
      names; whole blocks, rounded down.
    block: P, tokens a block.
    repr: tokens of a block that represent it.
    sinks: first tokens, read in any case.
    local: last tokens of the prompt, read in any case.
    window: W, last queries of the prompt that make the probe.
    most: how far a layer's budget may be from the mean, as a factor; 1 for equal budgets.
    placement: of the pages.
  """

  budget: Budget
  block: int = 32
  repr: int = 4
  sinks: int = 16
  local: int = 64
  window: int = 512
  most: int = 4
  placement: paged.Placement = "auto"

  def __post_init__(self):
    if min(self.sinks, self.local) < 0 or min(self.window, self.most) < 1:
      raise UserError(
        "actqkv_style: window and most must be at least 1, sinks and local 0 or more, got "
        f"{self.window}, {self.most}, {self.sinks} and {self.local}"
      )
    if not 1 <= self.repr <= self.block:
      raise UserError(
        "actqkv_style: repr must be at least 1 and at most the tokens of a block, got "
        f"{self.repr} of {self.block}"
      )

  @property
  def name(self) -> str:
    return "actqkv_style"

  @property
  def across_heads(self) -> str:
    return "a query's measure is the mean over all heads"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window, sums=True)

  def init(self, geometry: Geometry) -> ActQKVState:
    g, p = geometry, self.block
    lead = (g.layers, g.batch, g.kv_heads)
    count = max((g.prompt - self.sinks - self.local) // p, 1)
    near = min(self.sinks + self.local + p - 1, g.prompt) + g.new
    return ActQKVState(
      store=paged.open_store(
        layers=g.layers,
        batch=g.batch,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        slots=count * p,
        page=p,
        dtype=g.dtype,
        placement=self.placement,
      ),
      marks=jnp.zeros((*lead, count, g.head_dim), g.dtype),
      entropy=jnp.zeros((g.layers, g.batch)),
      near=dense.zeros((*lead, near, g.head_dim), g.dtype),
      blocks=jnp.zeros(g.batch, jnp.int32),
      capacity=g.capacity,
    )

  def absorb(self, state: ActQKVState, prompt: PromptLayer, *, layer: int | Array) -> ActQKVState:
    if prompt.queries is None or prompt.sums is None:
      raise UserError("actqkv_style: the prompt's last queries and sums were not handed over")
    b, t, kv_heads, _ = prompt.keys.shape
    p, count = self.block, state.marks.shape[3]
    blocks = jnp.maximum(prompt.lengths - self.sinks - self.local, 0) // p
    keys, values = jnp.swapaxes(prompt.rotated, 1, 2), jnp.swapaxes(prompt.values, 1, 2)
    end = self.sinks + count * p

    def in_blocks(x: Float[Array, "B K T *rest"]) -> Float[Array, "B K slots *rest"]:
      more = ((0, 0), (0, 0), (0, max(end - t, 0)), *[(0, 0)] * (x.ndim - 3))
      return jnp.pad(x, more)[:, :, self.sinks : end]

    place = jnp.arange(state.near.k.shape[3], dtype=jnp.int32)[None]
    position = place + jnp.where(place < self.sinks, 0, (blocks * p)[:, None])
    position = jnp.minimum(position, t - 1)[:, None, :, None]  # later ones are overwritten

    def put(all_layers: Array, one: Array) -> Array:
      one = one.astype(all_layers.dtype)
      return jax.lax.dynamic_update_index_in_dim(all_layers, one, layer, 0)

    sums = jnp.mean(prompt.sums.reshape(b, kv_heads, -1, t), axis=2)
    sums = in_blocks(sums).reshape(b, kv_heads, count, p)
    of_block = in_blocks(keys).reshape(b, kv_heads, count, p, -1)
    top = jax.lax.top_k(sums, self.repr)[1]
    marks = jnp.take_along_axis(of_block, top[..., None], axis=3).astype(jnp.float32)
    marks = jnp.mean(marks, axis=3).astype(state.marks.dtype)
    probe = probe_of(prompt.queries, prompt.lengths).astype(prompt.queries.dtype)
    return dataclasses.replace(
      state,
      store=paged.write_prompt(state.store, in_blocks(keys), in_blocks(values), layer=layer),
      marks=put(state.marks, marks),
      entropy=put(state.entropy, jnp.mean(entropy_of(scores_of(probe, marks, blocks)), axis=1)),
      near=dense.DenseCache(
        put(state.near.k, jnp.take_along_axis(keys, position, axis=2)),
        put(state.near.v, jnp.take_along_axis(values, position, axis=2)),
      ),
      blocks=blocks,
    )

  def attend(
    self,
    state: ActQKVState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ActQKVState, Stats]:
    def step(state: ActQKVState, q: Array, k: Array, v: Array, positions: Array):
      q, k = rotate(q, positions, rope), rotate(k, positions, rope)
      return self._step(state, q, k, v, positions, layer)

    return token_by_token(step, state, q, k, v, positions)

  def _step(
    self,
    state: ActQKVState,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    positions: Int[Array, "B 1"],
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], ActQKVState, Stats]:
    live = positions >= 0
    place = jnp.where(live, positions - (state.blocks * self.block)[:, None], -1)
    near = dense.DenseCache(
      dense.append(state.near.k, k, place, layer), dense.append(state.near.v, v, place, layer)
    )
    state = dataclasses.replace(state, near=near)
    ids, count = self.choose(state, q, positions[:, 0], layer)

    def whole(blocks: Blocks) -> Array:
      w, f = blocks.ids.shape
      return jnp.ones((w, 1, f, self.block), bool)

    many = ids.shape[2]  # no KV head reads more
    heads, most = k.shape[0] * k.shape[2], STAGE_BYTES // state.store.page_bytes
    stage = stage_of(many, heads=heads, pages=many, most=most)
    far, moved = attend_pages(state.store, q, ids, count, whole, stage=stage, layer=layer)
    held_k, held_v = dense.read(near.k, layer), dense.read(near.v, layer)
    mask = dense.visible(place, held_k.shape[2])[:, :, None]
    part = dense.attend_masked(q, held_k, held_v, mask)
    out = attention.finish(attention.merge([far, part])).astype(q.dtype)
    selected = (count * self.block)[:, None]
    read = selected + jnp.sum(mask, axis=-1, dtype=jnp.int32)
    layers, _, kv_heads, blocks, d = state.marks.shape
    index = blocks * d * state.marks.dtype.itemsize + 4 * layers / kv_heads
    size = dense.token_bytes(read, held_k) + jnp.where(live[..., None], index, 0.0)
    stats = Stats(
      length=positions + 1,
      selected=selected,
      read=read,
      tail=jnp.zeros(q.shape[:3]),
      read_bytes=size,
      moved=jnp.where(live[..., None], moved[:, None], 0.0),
    )
    return out, state, stats

  def choose(
    self, state: ActQKVState, q: Float[Array, "B 1 H D"], now: Int[Array, "B"], layer: int | Array
  ) -> tuple[Int[Array, "B K F"], Int[Array, "B K"]]:
    """Blocks in the order of their scores, ties to the earlier, and how many of them are read.

    Args:
      q: rotated.
    """
    table = self.budget.resolve(state.capacity)
    widest = min(max(self.most * int(table.max()) // self.block, 1), state.marks.shape[3])
    mean = jnp.asarray(table)[jnp.maximum(now + 1, 0)]
    count = self.grants(state.entropy, mean, state.blocks)[layer]
    count = jnp.where(now < 0, 0, jnp.clip(count, 0, widest))
    scores = scores_of(q[:, 0], dense.read(state.marks, layer), state.blocks)
    ids = jax.lax.top_k(scores, widest)[1]
    return ids, jnp.broadcast_to(count[:, None], ids.shape[:2])

  def grants(
    self, entropy: Float[Array, "L B"], mean: Int[Array, "B"], blocks: Int[Array, "B"]
  ) -> Int[Array, "L B"]:
    """Blocks that each layer may read.

    Args:
      mean: tokens granted to a layer, averaged over layers.
      blocks: of each row.
    """
    every, tokens = (blocks * self.block).astype(jnp.float32), mean.astype(jnp.float32)
    low = jnp.where(tokens >= every, every, tokens / self.most)
    high = jnp.minimum(tokens * self.most, every)
    tokens = share(entropy + _EVEN, low, high, tokens)
    return jnp.floor(tokens / self.block + _HAIR).astype(jnp.int32)


def probe_of(queries: Float[Array, "B W H D"], lengths: Int[Array, "B"]) -> Float[Array, "B H D"]:
  """Queries of a window summed by how far each token's are from their mean, float32.

  Args:
    queries: place i that of position ``length - W + i``; those of negative positions do not count.
  """
  x, w = queries.astype(jnp.float32), queries.shape[1]
  there = jnp.arange(w, dtype=jnp.int32)[None] >= w - lengths[:, None]
  there = there.astype(jnp.float32)[..., None, None]
  number = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1.0)
  away = x - jnp.sum(x * there, axis=1, keepdims=True) / number
  deviation = jnp.sqrt(jnp.sum(away**2 * there, axis=1, keepdims=True) / number)
  bias = jnp.mean((away / (deviation + _EVEN)) ** 2, axis=(2, 3), keepdims=True) * there
  total = jnp.sum(bias, axis=1, keepdims=True)
  weight = jnp.where(total > 0, bias / jnp.where(total > 0, total, 1.0), there / number)
  return jnp.sum(weight * x, axis=1)


def scores_of(
  q: Float[Array, "B H D"], marks: Float[Array, "B K N D"], blocks: Int[Array, "B"]
) -> Float[Array, "B K N"]:
  """Scores of blocks, summed over the query heads of each KV head; ``-inf`` where there is none."""
  b, kv_heads, count, _ = marks.shape
  scores = attention.logits(q[:, None], marks)[:, 0].reshape(b, kv_heads, -1, count)
  there = jnp.arange(count, dtype=jnp.int32)[None, None] < blocks[:, None, None]
  return jnp.where(there, jnp.sum(scores, axis=2), -jnp.inf)


def entropy_of(scores: Float[Array, "B K N"]) -> Float[Array, "B K"]:
  """Of the softmax of some scores, in nats; ``-inf`` is left out, and nothing at all gives 0."""
  there = scores > -jnp.inf
  log_p = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
  log_p = jnp.where(there, log_p, 0.0)
  return -jnp.sum(jnp.where(there, jnp.exp(log_p) * log_p, 0.0), axis=-1)


def share(
  weight: Float[Array, "L B"],
  low: Float[Array, "B"],
  high: Float[Array, "B"],
  mean: Float[Array, "B"],
) -> Float[Array, "L B"]:
  """Numbers in proportion to weights but within ``low .. high``, that average ``mean``.

  Their sum grows with the factor of proportion, along a line between the 2 L factors at which a
  number meets a bound: the one wanted lies between two of these.

  Args:
    weight: above 0.
    mean: within the bounds; all numbers are at the bound that it is beyond.
  """
  low, high = low[None], high[None]
  bends = jnp.concatenate([low / weight, high / weight])
  sums = jnp.sum(jnp.clip(bends[:, None] * weight[None], low[None], high[None]), axis=1)
  total = len(weight) * mean[None]
  below, above = sums <= total, sums >= total
  left = jnp.max(jnp.where(below, bends, 0.0), axis=0, keepdims=True)
  furthest = jnp.max(bends, axis=0, keepdims=True)
  right = jnp.min(jnp.where(above, bends, furthest), axis=0, keepdims=True)
  least = jnp.max(jnp.where(below, sums, 0.0), axis=0, keepdims=True)
  most = jnp.min(jnp.where(above, sums, jnp.inf), axis=0, keepdims=True)
  part = jnp.where(most > least, (total - least) / (most - least), 0.0)
  return jnp.clip((left + part * (right - left)) * weight, low, high)
