"""L2-norm: of a prompt, the tokens with the smallest keys are kept."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import kept, layer_budget
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.rope import Rope
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "skip", "profile"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class L2Norm:
  """L2-norm eviction (2406.11430; KnormPress of NVIDIA/kvpress).

  Of every KV head's prompt tokens those with the smallest norm of the key stay; the norm does not
  change under rotary embedding. Later tokens all stay. Needs nothing of prefill but keys.

  Device bytes per token kept and layer: ``2 K D`` numbers and ``4 K`` for positions; nothing on the
  host. Slots: what the budget grants at the longest prompt, and one for every later token. A step
  reads every layer as one block as wide as the widest, so layers that keep everything (``skip``)
  cost the others time, though not memory.

  Ours: the budget rounds down, where the paper's code rounds up; no minimum length before anything
  is evicted; evicted once, after the prompt (the paper's language-model runs evict again and
  again).

  Attributes:
    budget: tokens of the prompt that each KV head keeps.
    skip: first layers that keep everything, 2 as in the paper: their keys' norms say little.
    profile: curves of a model, which share the budget out to its layers
      (:mod:`a2ats_jax.methods.layer_budget`); none for equal shares.
  """

  budget: Budget
  skip: int = 2
  profile: Curves = ()

  def __post_init__(self):
    if self.skip < 0:
      raise UserError(f"l2norm: skip must be 0 layers or more, got {self.skip}")

  @property
  def name(self) -> str:
    return "l2norm"

  def _granted(self, longest: int, layers: int) -> Int[np.ndarray, "L lengths"]:
    table = layer_budget.granted(self.budget, longest, layers, self.profile)
    table[: self.skip] = np.arange(longest + 1)
    return table

  def init(self, geometry: Geometry) -> kept.KeptCache:
    table = self._granted(geometry.prompt, geometry.layers)
    return kept.empty(geometry, (table.max(axis=1) + geometry.new).tolist())

  def absorb(
    self, state: kept.KeptCache, prompt: PromptLayer, *, layer: int | Array
  ) -> kept.KeptCache:
    t = prompt.keys.shape[1]
    table = jnp.asarray(self._granted(t, len(state.sizes)))
    count = table[layer, prompt.lengths]
    slot = jnp.arange(t, dtype=jnp.int32)[None]
    norm = jnp.linalg.norm(prompt.keys.astype(jnp.float32), axis=-1)
    stays = kept.best(-jnp.swapaxes(norm, 1, 2), count, slot < prompt.lengths[:, None])
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
