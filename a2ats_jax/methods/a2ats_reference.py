r"""A2ATS in reference form: the definition that every fast path has to equal.

Prefill is exact. A decode step (2502.12665, sec. 4; the numbered steps of the authors' accuracy
path) codes the new key, scores every far token by its codeword with the query rotated to a far
distance (Eq. 12), takes the first k tokens per query head, joins the choices of a group, and runs
exact attention with ordinary rotary embedding over them, the sinks and the window.

Three extensions, all off by default: far positions by segment
(:class:`a2ats_jax.far.FarPosition`), ``tail="centroid"``, which estimates what is not read from the
codewords, and budgets that a group shares (:class:`a2ats_jax.budget.Budget`).

Differs from the authors' code: where the budget grants more tokens than are eligible just those are
chosen (theirs would choose sinks and window again), ties go by (score, cell, index), and rows of a
batch may differ in length.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, encode
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.index import kv_head_scores
from a2ats_jax.methods import dense, selection
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int, UInt16


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["cache", "codes", "starts"],
  meta_fields=["segments"],
)
@dataclasses.dataclass(frozen=True)
class ReferenceState:
  """The dense cache with a code beside every key.

  Attributes:
    cache: rotated keys, and values.
    codes: codeword of every key.
    starts: where each row's segments start, from :meth:`FarPosition.starts`.
    segments: Z.
  """

  cache: dense.DenseCache
  codes: UInt16[Array, "L B K T"]
  starts: Int[Array, "B cuts"]
  segments: int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["codebook"],
  meta_fields=["budget", "far", "tail", "window", "sinks"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class A2ATSReference:
  """Options and codebooks of the reference.

  Attributes:
    codebook: of all layers.
    budget: far tokens per query head, or per KV head.
    far: where far tokens are taken to stand; the default is the paper's.
    tail: ``"centroid"`` adds every far token that was not chosen with the weight of its cell's
      score and, as value, the mean value of its codeword over all far tokens of the row.
    window: ``w``, tokens read exactly up to and including the current one.
    sinks: first tokens of the context, always read.
  """

  codebook: Codebook
  budget: Budget
  far: FarPosition = FarPosition.constant()
  tail: Literal["none", "centroid"] = "none"
  window: int = 64
  sinks: int = 8

  def __post_init__(self):
    selection.check_near(sinks=self.sinks, window=self.window)
    if self.tail not in ("none", "centroid"):
      raise UserError(f"a2ats: tail must be none or centroid, got {self.tail!r}")

  @property
  def name(self) -> str:
    return "a2ats_reference"

  def init(self, geometry: Geometry) -> ReferenceState:
    cache = dense.init(geometry)
    return ReferenceState(
      cache=cache,
      codes=jnp.zeros(cache.k.shape[:-1], jnp.uint16),
      starts=self.far.starts(jnp.zeros(geometry.batch, jnp.int32), self.window, 0),
      segments=self.far.count(self.window, geometry.new),
    )

  def absorb(
    self, state: ReferenceState, prompt: PromptLayer, *, layer: int | Array
  ) -> ReferenceState:
    codes = encode(prompt.keys, self.codebook.layer(layer))
    return dataclasses.replace(
      state,
      cache=dense.write_prompt_cache(state.cache, prompt, layer),
      codes=dense.write_prompt(state.codes, codes, layer),
      starts=self.far.starts(prompt.lengths, self.window, prompt.keys.shape[1]),
    )

  def attend(
    self,
    state: ReferenceState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ReferenceState, Stats]:
    state = self.append(state, k, v, positions=positions, rope=rope, layer=layer)
    scores, chosen, near, far = self.select(state, q, positions=positions, rope=rope, layer=layer)
    part, selected, stats = selection.read_exactly(
      rotate(q, positions, rope),
      dense.read(state.cache.k, layer),
      dense.read(state.cache.v, layer),
      chosen,
      near,
      positions + 1,
    )
    if self.tail == "centroid":
      rest = self._tail(state, scores, far, far[:, :, None] & ~selected, layer)
      whole = attention.merge([part, rest])
      share = rest.total * jnp.exp(rest.peak - jnp.where(whole.total > 0, whole.peak, 0.0))
      share = share / jnp.maximum(whole.total, jnp.finfo(jnp.float32).tiny)
      part, stats = whole, dataclasses.replace(stats, tail=share)
    return attention.finish(part).astype(q.dtype), state, stats

  def append(
    self,
    state: ReferenceState,
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> ReferenceState:
    """Step 1: store new tokens, rotated and coded like any other."""
    codes = encode(k, self.codebook.layer(layer))
    cache = dense.DenseCache(
      dense.append(state.cache.k, rotate(k, positions, rope), positions, layer),
      dense.append(state.cache.v, v, positions, layer),
    )
    return dataclasses.replace(
      state, cache=cache, codes=dense.append(state.codes, codes, positions, layer)
    )

  def select(
    self,
    state: ReferenceState,
    q: Float[Array, "B S H D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[
    Float[Array, "B S H T"], Bool[Array, "B S H T"], Bool[Array, "B S T"], Bool[Array, "B S T"]
  ]:
    """Steps 2 to 5: score, mask, choose; the tokens are already appended.

    Args:
      q: before rotary embedding.

    Returns:
      Far scores (no ``1/sqrt(D)``), the tokens chosen, the tokens read in any case, and the
      eligible tokens.
    """
    b, heads = q.shape[0], q.shape[2]
    kv_heads, slots = state.codes.shape[2:]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=positions.dtype)[None], (b, slots))
    codes = dense.read(state.codes, layer).astype(jnp.int32)
    cells = self.far.cells_of(slot, codes, state.starts, self.codebook.size)
    items = (state.segments - self.far.prompt_segments) * self.far.span
    later = state.starts[:, -1:] + jnp.arange(items, dtype=jnp.int32)[None]
    table = selection.far_scores(
      q,
      jnp.take_along_axis(codes, jnp.clip(later, 0, slots - 1)[:, None], axis=2),
      positions=positions,
      starts=state.starts,
      far=self.far,
      segments=state.segments,
      book=self.codebook.layer(layer),
      rope=rope,
    )
    cells = jnp.minimum(cells, table.shape[-1] - 1)  # slots that no token of the row will reach
    near, far = selection.near_and_far(positions, slots, sinks=self.sinks, window=self.window)

    def of_tokens(table: Float[Array, "B S heads cells"]) -> Float[Array, "B S heads T"]:
      mine = jnp.repeat(cells, table.shape[2] // kv_heads, axis=1)
      return jnp.take_along_axis(table, mine[:, None], axis=-1)

    scores = of_tokens(table)
    if self.budget.per == "query_head":
      chosen = selection.choose(scores, cells, far, positions + 1, self.budget)
      return scores, chosen, near, far
    counts = _by_cell(far, cells, table.shape[-1])
    shared = of_tokens(kv_head_scores(table, counts, scale=q.shape[-1] ** -0.5))
    chosen = selection.choose(shared, cells, far, positions + 1, self.budget)
    return scores, jnp.repeat(chosen, heads // kv_heads, axis=2), near, far

  def _tail(
    self,
    state: ReferenceState,
    scores: Float[Array, "B S H T"],
    far: Bool[Array, "B S T"],
    rest: Bool[Array, "B S K T"],
    layer: int | Array,
  ) -> attention.Part:
    """The part of the far tokens in ``rest``: weight by cell, value by codeword.

    The mean value of a codeword is over ALL far tokens with that code. Written on tokens: the
    weights of a codeword are summed and spread evenly over its far tokens.
    """
    b, s, h, _ = scores.shape
    kv_heads, size = state.codes.shape[2], self.codebook.size
    codes = jnp.broadcast_to(
      dense.read(state.codes, layer).astype(jnp.int32)[:, None], (b, s, *state.codes.shape[2:])
    )
    group = h // kv_heads
    rest = attention.per_query_head(rest, group)
    scores = jnp.where(rest, scores * state.cache.k.shape[-1] ** -0.5, -jnp.inf)
    peak = jnp.max(scores, axis=-1)
    weight = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None])

    def by_code(x: Array, code: Array) -> Array:
      return jnp.zeros(size, jnp.float32).at[code].add(x)

    per_head = jax.vmap(jax.vmap(jax.vmap(by_code)))
    codes_of_heads = jnp.repeat(codes, group, axis=2)
    mass = per_head(weight, codes_of_heads)
    seen = jnp.broadcast_to(far[:, :, None].astype(jnp.float32), codes.shape)
    members = jnp.repeat(per_head(seen, codes), group, axis=2)
    share = jnp.take_along_axis(mass / jnp.maximum(members, 1.0), codes_of_heads, axis=-1)
    share = jnp.where(far[:, :, None], share, 0.0)
    out = attention.weigh(share, dense.read(state.cache.v, layer))
    return attention.Part(out, peak, jnp.sum(weight, axis=-1))


def _by_cell(
  far: Bool[Array, "B S T"], cells: Int[Array, "B K T"], count: int
) -> Int[Array, "B S K cells"]:
  """Eligible tokens of every cell."""

  def one(there: Array, cell: Array) -> Array:
    return jnp.zeros(count, jnp.int32).at[cell].add(there.astype(jnp.int32))

  of_heads = jax.vmap(one, in_axes=(None, 0))
  of_queries = jax.vmap(of_heads, in_axes=(0, None))
  return jax.vmap(of_queries)(far, cells)
