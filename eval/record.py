"""One prefill for many methods: record a prompt's keys and values, then replay them into a state.

A prompt's attention is exact whatever the method, so what a method absorbs is the same for all.
"""

import dataclasses
import operator
from collections.abc import Iterable
from functools import partial, reduce
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.forward import geometry_of
from a2ats_jax.generate import Progress, prefill
from a2ats_jax.methods import caches
from a2ats_jax.methods.base import Geometry, Method, Needs, PromptLayer, State, needs_of
from a2ats_jax.methods.dense import DenseCache
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.rope import Rope, make_rope, rotate
from a2ats_jax.typing import Array, Float, Int


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "values", "lengths", "queries", "sums"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Recorded:
  """Keys before rotary embedding and values of a prompt, every layer that is a method's.

  Attributes:
    lengths: tokens of each row; what lies behind them is padding.
    queries, sums: as in :class:`a2ats_jax.methods.base.PromptLayer`, or None.
  """

  keys: Float[Array, "L B T K D"]
  values: Float[Array, "L B T K D"]
  lengths: Int[Array, "B"]
  queries: Float[Array, "L B W H D"] | None = None
  sums: Float[Array, "L B H T"] | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["prompt", "near", "logits"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Recording:
  """A prompt that went through the model once.

  Attributes:
    prompt: what every method absorbs.
    near: windows of the model's local layers, None where it has none.
    logits: after each row's last token, exact for every method.
  """

  prompt: Recorded
  near: DenseCache | None
  logits: Float[Array, "B V"]


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["needs"])
@dataclasses.dataclass(frozen=True)
class Recorder:
  """A method that keeps what it is given and attends to nothing. ``2 L B T K D`` numbers.

  Attributes:
    needs: what to keep beside keys and values.
  """

  needs: Needs

  @property
  def name(self) -> str:
    return "recorder"

  def init(self, geometry: Geometry) -> Recorded:
    shape = (
      geometry.layers,
      geometry.batch,
      geometry.prompt,
      geometry.kv_heads,
      geometry.head_dim,
    )
    lead, last = shape[:2], (geometry.heads, geometry.head_dim)
    queries, sums = (*lead, self.needs.queries, *last), (*lead, geometry.heads, geometry.prompt)
    return Recorded(
      jnp.zeros(shape, geometry.dtype),
      jnp.zeros(shape, geometry.dtype),
      jnp.zeros(geometry.batch, jnp.int32),
      jnp.zeros(queries, geometry.dtype) if self.needs.queries else None,
      jnp.zeros(sums) if self.needs.sums else None,
    )

  def absorb(self, state: Recorded, prompt: PromptLayer, *, layer: int | Array) -> Recorded:

    def put(all_layers: Array, one: Array) -> Array:
      return jax.lax.dynamic_update_index_in_dim(all_layers, one.astype(all_layers.dtype), layer, 0)

    queries, sums = state.queries, state.sums
    if queries is not None and prompt.queries is not None:
      queries = put(queries, prompt.queries)
    if sums is not None and prompt.sums is not None:
      sums = put(sums, prompt.sums)
    keys, values = put(state.keys, prompt.keys), put(state.values, prompt.values)
    return Recorded(keys, values, prompt.lengths, queries, sums)

  def attend(
    self,
    state: Recorded,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> NoReturn:
    raise NotImplementedError("a recorder only takes in prompts; replay it into another method")


def record(
  decoder: Decoder,
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
  *,
  methods: Iterable[Method] = (),
  progress: Progress | None = None,
) -> Recording:
  """Run prompts through the model and keep what methods absorb.

  Args:
    tokens, lengths: from :func:`a2ats_jax.generate.pad_prompts`.
    methods: what any of them needs beside keys and values is kept too.
  """
  needs = reduce(operator.or_, map(needs_of, methods), Needs())
  logits, state = prefill(decoder, Recorder(needs), tokens, lengths, new=0, progress=progress)
  return Recording(*caches.split(state), logits)


@partial(jax.jit, static_argnames="geometry")
def _replay(prompt: Recorded, method: Method, rope: Rope, *, geometry: Geometry) -> State:
  slots = jnp.arange(geometry.prompt, dtype=jnp.int32)
  positions = jnp.broadcast_to(slots[None], (geometry.batch, geometry.prompt))

  last = needs_of(method).queries

  def absorb(state, scanned):
    keys, values, queries, sums, layer = scanned
    if queries is not None:
      queries = queries[:, queries.shape[1] - last :] if last else None
    piece = PromptLayer(keys, rotate(keys, positions, rope), values, prompt.lengths, queries, sums)
    return method.absorb(state, piece, layer=layer), None

  layers = jnp.arange(geometry.layers, dtype=jnp.int32)
  scanned = (prompt.keys, prompt.values, prompt.queries, prompt.sums, layers)
  return jax.lax.scan(absorb, method.init(geometry), scanned)[0]


def replay(config: ModelConfig, recording: Recording, method: Method, *, new: int) -> State:
  """The state a prefill under ``method`` would have left.

  Args:
    recording: made for this method, where it needs more than keys and values.
    new: tokens the state must have room for after the prompt.
  """
  _, batch, width, _, _ = recording.prompt.keys.shape
  geometry = geometry_of(config, batch=batch, prompt=width, new=new)
  state = _replay(recording.prompt, method, make_rope(config.rope), geometry=geometry)
  return caches.join(state, jax.tree.map(jnp.copy, recording.near))  # a step uses it up
