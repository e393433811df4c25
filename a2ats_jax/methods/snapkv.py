"""SnapKV: of a prompt, the tokens that its last queries attend to are kept."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import kept, layer_budget
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, Stats
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.rope import Rope
from a2ats_jax.typing import Array, Float, Int

_BETA = 20  # PyramidKV: the last layer keeps a beta-th of what the layers keep on average
_FIRST = 1e6  # added to the scores of the window, which always stays


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["budget", "window", "kernel", "pool", "layers", "profile"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV:
  """SnapKV (2404.14469), and PyramidKV's budgets by layer.

  The weights of the last ``window`` queries are added up for every token before them, pooled over
  neighbours, and averaged over the query heads of a KV head, which keeps the best tokens and the
  window itself. Later tokens all stay. Needs the window's queries of prefill.

  Device bytes per token kept and layer: ``2 K D`` numbers and ``4 K`` for positions; nothing on the
  host. Slots: what the budget grants at the longest prompt, and one for every later token.

  Ours: one choice a KV head, as NVIDIA/kvpress; the original repeats keys and chooses for every
  query head, which stores G times as much.

  Attributes:
    budget: tokens of the prompt that each KV head keeps, window included.
    window: W, last queries that vote.
    kernel: tokens pooled, an odd number.
    pool: ``max`` as published, or ``mean``, kvpress's.
    layers: ``uniform``, or ``pyramid``: budgets fall linearly with depth (2406.02069; beta 20).
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  window: int = 32
  kernel: int = 7
  pool: Literal["max", "mean"] = "max"
  layers: Literal["uniform", "pyramid"] = "uniform"
  profile: Curves = ()

  def __post_init__(self):
    if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
      raise UserError(
        "snapkv: window must be at least 1 query and kernel an odd number of tokens, got "
        f"{self.window} and {self.kernel}"
      )
    if self.layers == "pyramid" and self.profile:
      raise UserError("snapkv: expected layers=uniform with a profile, got layers=pyramid")

  @property
  def name(self) -> str:
    return "snapkv"

  @property
  def needs(self) -> Needs:
    return Needs(queries=self.window)

  def granted(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    """Tokens that a KV head of each layer keeps, by the prompt's length."""
    if self.layers == "uniform" or layers == 1:
      return layer_budget.granted(self.budget, longest, layers, self.profile)
    total = self.budget.resolve(longest).astype(np.int64)
    window = np.minimum(self.window, total)
    low = (total - window) // _BETA
    high = 2 * (total - window) - low
    step = (high - low) // (layers - 1)
    table = high[None] - np.arange(layers)[:, None] * step[None] + window[None]
    return np.minimum(table, np.arange(longest + 1)).astype(np.int32)

  def init(self, geometry: Geometry) -> kept.KeptCache:
    table = self.granted(geometry.prompt, geometry.layers)
    return kept.empty(geometry, (table.max(axis=1) + geometry.new).tolist())

  def absorb(
    self, state: kept.KeptCache, prompt: PromptLayer, *, layer: int | Array
  ) -> kept.KeptCache:
    t = prompt.keys.shape[1]
    count = jnp.asarray(self.granted(t, len(state.sizes)))[layer, prompt.lengths]
    scores = window_scores(prompt, window=self.window, kernel=self.kernel, pool=self.pool)
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    stays = kept.best(scores, count, slot < prompt.lengths[:, None])
    return kept.write_prompt(state, prompt, stays, layer)

  def attend(
    self,
    state: kept.KeptCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], kept.KeptCache, Stats]:
    return kept.append_and_attend(state, q, k, v, positions=positions, rope=rope, layer=layer)


def window_scores(
  prompt: PromptLayer, *, window: int, kernel: int, pool: Literal["max", "mean"]
) -> Float[Array, "B K T"]:
  """How much the last queries attend to every token, pooled; the window's own tokens come first,
  the latest before the others."""
  if prompt.queries is None:
    raise UserError("window scores: the prompt's last queries were not handed over")
  b, t, kv_heads, _ = prompt.keys.shape
  keys = jnp.swapaxes(prompt.rotated, 1, 2)
  weight = attention.window_weights(prompt.queries, keys, prompt.lengths)
  votes = jnp.mean(weight, axis=1)  # of every query head, over the window
  slot = jnp.arange(t, dtype=jnp.int32)[None]
  inside = slot >= prompt.lengths[:, None] - window
  votes = jnp.where(inside[:, None], 0.0, votes)
  start, add = (0.0, jax.lax.add) if pool == "mean" else (-jnp.inf, jax.lax.max)
  half = (0, 0), (0, 0), (kernel // 2, kernel // 2)
  pooled = jax.lax.reduce_window(votes, start, add, (1, 1, kernel), (1, 1, 1), half)
  scores = jnp.mean(pooled.reshape(b, kv_heads, -1, t), axis=2)
  last = _FIRST + slot.astype(jnp.float32)
  return jnp.where(inside[:, None], last[:, None], scores)
