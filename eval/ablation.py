"""Diagnostic methods: windowed positions without a quantiser, and the quantiser without them.

They save nothing. Both choose, read and count exactly like A2ATS; only the far score differs.
"""

import dataclasses
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, encode
from a2ats_jax.far import FarPosition
from a2ats_jax.methods import dense, selection
from a2ats_jax.methods.base import Geometry, PromptLayer, Stats
from a2ats_jax.methods.registry import BOOK, METHODS, NEAR, Entry, Option, Table, read_far
from a2ats_jax.rope import Rope, far_query, rotate
from a2ats_jax.typing import Array, Bool, Float, Int

Selection = tuple[
  Float[Array, "B S H T"], Bool[Array, "B S H T"], Bool[Array, "B S T"], Bool[Array, "B S T"]
]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["cache", "scored", "prompt"],
  meta_fields=["segments"],
)
@dataclasses.dataclass(frozen=True)
class AblationState:
  """The dense cache, and beside every key the vector that is scored in its stead.

  Attributes:
    cache: rotated keys, and values.
    scored: the key before rotary embedding, or its codeword after it.
    prompt: T0, tokens of each row's prompt.
    segments: Z.
  """

  cache: dense.DenseCache
  scored: Float[Array, "L B K T D"]
  prompt: Int[Array, "B"]
  segments: int


def _init(geometry: Geometry, segments: int) -> AblationState:
  cache = dense.init(geometry)
  return AblationState(
    cache, jnp.zeros_like(cache.k), jnp.zeros(geometry.batch, jnp.int32), segments
  )


def _absorb(
  state: AblationState, prompt: PromptLayer, scored: Float[Array, "B T K D"], layer: int | Array
) -> AblationState:
  return dataclasses.replace(
    state,
    cache=dense.write_prompt_cache(state.cache, prompt, layer),
    scored=dense.write_prompt(state.scored, scored, layer),
    prompt=prompt.lengths,
  )


def _append(
  state: AblationState,
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  scored: Float[Array, "B S K D"],
  positions: Int[Array, "B S"],
  rope: Rope,
  layer: int | Array,
) -> AblationState:
  cache = dense.DenseCache(
    dense.append(state.cache.k, rotate(k, positions, rope), positions, layer),
    dense.append(state.cache.v, v, positions, layer),
  )
  return dataclasses.replace(
    state, cache=cache, scored=dense.append(state.scored, scored, positions, layer)
  )


def _read(
  state: AblationState,
  q: Float[Array, "B S H D"],
  chosen: Bool[Array, "B S H T"],
  near: Bool[Array, "B S T"],
  positions: Int[Array, "B S"],
  rope: Rope,
  layer: int | Array,
) -> tuple[Float[Array, "B S H D"], Stats]:
  keys, values = dense.read(state.cache.k, layer), dense.read(state.cache.v, layer)
  rotated = rotate(q, positions, rope)
  part, _, stats = selection.read_exactly(rotated, keys, values, chosen, near, positions + 1)
  return attention.finish(part).astype(q.dtype), stats


@partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["budget", "far", "window", "sinks"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Unquantised:
  """A2ATS with every key as its own codeword: what far positions alone cost.

  Attributes:
    far: where far tokens are taken to stand.
    budget, window, sinks: as in :class:`a2ats_jax.methods.a2ats_reference.A2ATSReference`.
  """

  budget: Budget
  far: FarPosition = FarPosition.constant()
  window: int = 64
  sinks: int = 8

  def __post_init__(self):
    selection.check_near(sinks=self.sinks, window=self.window)

  @property
  def name(self) -> str:
    return "unquantised"

  def init(self, geometry: Geometry) -> AblationState:
    return _init(geometry, self.far.count(self.window, geometry.new))

  def absorb(
    self, state: AblationState, prompt: PromptLayer, *, layer: int | Array
  ) -> AblationState:
    return _absorb(state, prompt, prompt.keys, layer)

  def attend(
    self,
    state: AblationState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], AblationState, Stats]:
    state = self.append(state, k, v, positions=positions, rope=rope, layer=layer)
    _, chosen, near, _ = self.select(state, q, positions=positions, rope=rope, layer=layer)
    out, stats = _read(state, q, chosen, near, positions, rope, layer)
    return out, state, stats

  def append(
    self,
    state: AblationState,
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> AblationState:
    """Store new tokens."""
    return _append(state, k, v, k, positions, rope, layer)

  def select(
    self,
    state: AblationState,
    q: Float[Array, "B S H D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> Selection:
    """Far scores, tokens chosen, tokens read in any case, eligible tokens."""
    scored = dense.read(state.scored, layer)
    slots = scored.shape[2]
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=positions.dtype)[None], (q.shape[0], slots))
    starts = self.far.starts(state.prompt, self.window, slots)
    segment = self.far.segment_of(slot, starts)
    distance = self.far.distances(positions, starts, state.segments)

    def add_segment(scores, z):
      moved = far_query(q, jnp.take(distance, z, axis=2), rope)
      mine = (segment == z)[:, None, None]
      return jnp.where(mine, attention.logits(moved, scored), scores), None

    # One segment at a time: a [segments, T] table of float scores would be large.
    empty = jnp.zeros((*q.shape[:3], slots), jnp.float32)
    scores, _ = jax.lax.scan(add_segment, empty, jnp.arange(state.segments, dtype=jnp.int32))
    return _select(self, scores, scored, positions)


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["codebook"],
  meta_fields=["budget", "window", "sinks"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrueDistance:
  """A2ATS with every codeword at its token's true distance: what the quantiser alone costs.

  Attributes:
    codebook, budget, window, sinks: as in
      :class:`a2ats_jax.methods.a2ats_reference.A2ATSReference`.
  """

  codebook: Codebook
  budget: Budget
  window: int = 64
  sinks: int = 8

  def __post_init__(self):
    selection.check_near(sinks=self.sinks, window=self.window)

  @property
  def name(self) -> str:
    return "true-distance"

  def init(self, geometry: Geometry) -> AblationState:
    return _init(geometry, 0)

  def absorb(
    self, state: AblationState, prompt: PromptLayer, *, layer: int | Array
  ) -> AblationState:
    # Unrotated until it is scored: the rotary embedding is handed in at decode time only.
    return _absorb(state, prompt, self._codeword(prompt.keys, layer), layer)

  def attend(
    self,
    state: AblationState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], AblationState, Stats]:
    state = self.append(state, k, v, positions=positions, rope=rope, layer=layer)
    _, chosen, near, _ = self.select(state, q, positions=positions, rope=rope, layer=layer)
    out, stats = _read(state, q, chosen, near, positions, rope, layer)
    return out, state, stats

  def append(
    self,
    state: AblationState,
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> AblationState:
    """Store new tokens."""
    return _append(state, k, v, self._codeword(k, layer), positions, rope, layer)

  def select(
    self,
    state: AblationState,
    q: Float[Array, "B S H D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> Selection:
    """Far scores, tokens chosen, tokens read in any case, eligible tokens."""
    scored = dense.read(state.scored, layer)
    b, _, slots, _ = scored.shape
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=positions.dtype)[None], (b, slots))
    rotated = rotate(jnp.swapaxes(scored, 1, 2), slot, rope)
    scores = attention.logits(rotate(q, positions, rope), jnp.swapaxes(rotated, 1, 2))
    return _select(self, scores, scored, positions)

  def _codeword(self, keys: Float[Array, "B T K D"], layer: int | Array) -> Float[Array, "B T K D"]:
    book = self.codebook.layer(layer)
    codes = encode(keys, book).astype(jnp.int32)
    heads = jnp.arange(keys.shape[2], dtype=jnp.int32)
    return book.codewords[heads[None, None], codes]


def _select(
  method: Unquantised | TrueDistance,
  scores: Float[Array, "B S H T"],
  scored: Float[Array, "B K T D"],
  positions: Int[Array, "B S"],
) -> Selection:
  near, far = selection.near_and_far(
    positions, scored.shape[2], sinks=method.sinks, window=method.window
  )
  no_cells = jnp.zeros(scored.shape[:3], jnp.int32)
  ranked = selection.of_budget(method.budget, scores, far, scored.shape[1])
  chosen = selection.choose(ranked, no_cells, far, positions + 1, method.budget)
  chosen = jnp.repeat(chosen, scores.shape[2] // chosen.shape[2], axis=2)
  return scores, chosen, near, far


TABLE: Table = MappingProxyType(
  {
    **METHODS,
    "unquantised": Entry(
      summary="diagnostic: A2ATS with every key as its own codeword",
      build=Unquantised,
      options=MappingProxyType({"far": Option(default="constant(2048)", read=read_far), **NEAR}),
    ),
    "true-distance": Entry(
      summary="diagnostic: A2ATS with every codeword at its token's true distance",
      build=TrueDistance,
      takes_codebook=True,
      options=MappingProxyType({**NEAR, **BOOK}),
    ),
  }
)
