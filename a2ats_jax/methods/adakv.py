"""Ada-KV: SnapKV with the heads of a layer sharing one budget."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import dense, layer_budget
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.methods.snapkv import window_scores
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int

_SAFE = 1e9  # added to the scores of tokens that no other head can take the place of


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["k", "v", "owner", "later", "prompt"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AdaKVState:
  """The cache; N slots of a layer serve all its KV heads.

  Attributes:
    k, v: rotated keys, and values, of the prompt tokens that stay, by KV head and position.
    owner: the KV head of each slot; -1 where there is none.
    later: rotated keys, and values, of the tokens after the prompt.
    prompt: tokens of each row's prompt.
  """

  k: Float[Array, "L B N D"]
  v: Float[Array, "L B N D"]
  owner: Int[Array, "L B N"]
  later: dense.DenseCache
  prompt: Int[Array, "B"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "window", "kernel", "pool", "safeguard", "profile"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV:
  """Ada-KV over SnapKV (2407.11550): budgets by head, as scattered attention asks for them.

  Tokens are scored as by :class:`a2ats_jax.methods.snapkv.SnapKV`. The KV heads of a layer have one
  budget together, which goes to the best tokens of any of them; of every head, a share of an even
  budget is safe whatever the others score. Later tokens all stay. Needs the window's queries of
  prefill.

  Device bytes per token kept, KV head and layer: ``2 D`` numbers and 1 for its head; ``2 K D``
  numbers for a later token; nothing on the host.

  Ours: the slots of a layer lie in one array, so that heads can differ in size, and a query's
  logits are taken with all of them and masked, which is K times the products of one head's. Layers
  have the slots of the largest, with a profile too.

  Attributes:
    budget: tokens of the prompt that each KV head keeps, averaged over the heads of a layer.
    window, kernel, pool: as in SnapKV.
    safeguard: share of an even budget that is safe, 0.2 as in the paper and in NVIDIA/kvpress.
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  window: int = 32
  kernel: int = 7
  pool: Literal["max", "mean"] = "max"
  safeguard: float = 0.2
  profile: Curves = ()

  def __post_init__(self):
    if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
      raise UserError(
        "adakv: window must be at least 1 query and kernel an odd number of tokens, got "
        f"{self.window} and {self.kernel}"
      )
    if not 0 <= self.safeguard <= 1:
      raise UserError(f"adakv: safeguard must lie in [0, 1], got {self.safeguard}")

  @property
  def name(self) -> str:
    return "adakv"

  @property
  def across_heads(self) -> str:
    return "the heads of a layer share one budget"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window)

  def granted(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    """Tokens of a KV head on average, by the prompt's length."""
    return layer_budget.granted(self.budget, longest, layers, self.profile)

  def init(self, geometry: Geometry) -> AdaKVState:
    g = geometry
    slots = max(int(self.granted(g.prompt, g.layers).max()), 1) * g.kv_heads
    lead = (g.layers, g.batch)
    return AdaKVState(
      jnp.zeros((*lead, slots, g.head_dim), g.dtype),
      jnp.zeros((*lead, slots, g.head_dim), g.dtype),
      jnp.full((*lead, slots), -1, jnp.int8),
      dense.zeros((*lead, g.kv_heads, g.new, g.head_dim), g.dtype),
      jnp.zeros(g.batch, jnp.int32),
    )

  def choose(self, prompt: PromptLayer, granted: Int[Array, "B"]) -> Bool[Array, "B K T"]:
    """Tokens that stay; ties go to the earlier KV head, then to the earlier token.

    Args:
      granted: tokens of a KV head on average.
    """
    b, t, kv_heads, _ = prompt.keys.shape
    scores = window_scores(prompt, window=self.window, kernel=self.kernel, pool=self.pool)
    here = (jnp.arange(t, dtype=jnp.int32)[None] < prompt.lengths[:, None])[:, None]
    scores = jnp.where(here, scores, -jnp.inf)
    safe = jnp.floor(granted.astype(jnp.float32) * self.safeguard).astype(jnp.int32)
    scores = jnp.where(_rank(scores) < safe[:, None, None], scores + _SAFE, scores)
    chosen = _rank(scores.reshape(b, -1)) < (granted * kv_heads)[:, None]
    return chosen.reshape(b, kv_heads, t) & here

  def absorb(self, state: AdaKVState, prompt: PromptLayer, *, layer: int | Array) -> AdaKVState:
    b, t, kv_heads, _ = prompt.keys.shape
    table = jnp.asarray(self.granted(t, state.k.shape[0]))
    chosen = self.choose(prompt, table[layer, prompt.lengths]).reshape(b, -1)
    slots = state.k.shape[2]
    entry = jnp.argsort(~chosen, axis=-1, stable=True)[:, :slots].astype(jnp.int32)
    there = jnp.arange(slots, dtype=jnp.int32)[None] < jnp.sum(chosen, axis=-1)[:, None]
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)

    def take(x: Array) -> Array:
      flat = jnp.swapaxes(x, 1, 2).reshape(b, kv_heads * t, -1)
      rows = jnp.take_along_axis(flat, entry[..., None], axis=1)
      return jnp.where(there[..., None], rows, 0).astype(state.k.dtype)

    return dataclasses.replace(
      state,
      k=put(state.k, take(prompt.rotated)),
      v=put(state.v, take(prompt.values)),
      owner=put(state.owner, jnp.where(there, entry // t, -1).astype(jnp.int8)),
      prompt=prompt.lengths,
    )

  def attend(
    self,
    state: AdaKVState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], AdaKVState, Stats]:
    place = jnp.where(positions < 0, -1, positions - state.prompt[:, None])
    later = dense.DenseCache(
      dense.append(state.later.k, rotate(k, positions, rope), place, layer),
      dense.append(state.later.v, v, place, layer),
    )
    q = rotate(q, positions, rope)
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    owner, live = state.owner[layer].astype(jnp.int32), positions >= 0
    head = jnp.arange(kv_heads, dtype=jnp.int32)
    mine = (owner[:, None] == head[None, :, None])[:, None] & live[..., None, None]  # [B, S, K, N]
    keys, values = (dense.read(x, layer)[:, None] for x in (state.k, state.v))
    new = dense.visible(place, later.k.shape[3])[:, :, None]
    parts = [
      attention.from_logits(attention.logits(q, keys), values, jnp.repeat(mine, group, axis=2)),
      dense.attend_masked(q, dense.read(later.k, layer), dense.read(later.v, layer), new),
    ]
    out = attention.finish(attention.merge(parts)).astype(q.dtype)
    read = jnp.sum(mine, axis=-1, dtype=jnp.int32) + jnp.sum(new, axis=-1, dtype=jnp.int32)
    stats = dense.on_device(positions + 1, read, q.shape[2], dense.token_bytes(read, keys))
    return out, dataclasses.replace(state, later=later), stats


def _rank(scores: Float[Array, "*lead T"]) -> Int[Array, "*lead T"]:
  """The place of each token by score, the highest first; ties to the earlier."""
  order = jnp.argsort(-scores, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1)
