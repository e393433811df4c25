"""Decode steps of a whole model, timed: methods beside full attention after the same prompt.

One text is run through the model. For a batch, the state after it is repeated: every row continues
the same text, which costs what different texts cost, for nothing depends on what rows have in
common.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.forward import geometry_of
from a2ats_jax.generate import decode_step
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, Method, PromptLayer, State, Stats
from a2ats_jax.methods.layout import fork
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.model import Model
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Float, Int
from eval.lanes import Lane, Program, Variant
from eval.options import Case
from eval.record import Recording, replay

BLOCKED = "blocked"
_BLOCK = 512  # tokens attended at once


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Blocked:
  """Full attention in blocks of tokens, the new token by itself and written last.

  Inside a loop over layers, attention over a whole layer makes XLA's CPU backend copy that layer
  out of the cache first. In blocks it does not: five times faster where a layer's cache is 67 MB,
  the same where it is 6 MB.
  """

  @property
  def name(self) -> str:
    return BLOCKED

  def init(self, geometry: Geometry) -> dense.DenseCache:
    return dense.init(geometry)

  def absorb(
    self, state: dense.DenseCache, prompt: PromptLayer, *, layer: int | Array
  ) -> dense.DenseCache:
    return dense.write_prompt_cache(state, prompt, layer)

  def attend(
    self,
    state: dense.DenseCache,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    *,
    positions: Int[Array, "B 1"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B 1 H D"], dense.DenseCache, Stats]:
    _, b, kv_heads, t, d = state.k.shape
    size = min(_BLOCK, t)
    rotated, key = rotate(q, positions, rope), rotate(k, positions, rope)

    def block(index: Array, part: attention.Part) -> attention.Part:
      start = jnp.minimum(index * size, t - size)
      at, shape = (layer, 0, 0, start, 0), (1, b, kv_heads, size, d)
      keys, values = (jax.lax.dynamic_slice(x, at, shape)[0] for x in (state.k, state.v))
      slot = (start + jnp.arange(size, dtype=jnp.int32))[None, None]
      mask = (slot >= index * size) & (slot < positions[:, :, None])
      return attention.merge([part, dense.attend_masked(rotated, keys, values, mask[:, :, None])])

    nothing = attention.Part(
      jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf), jnp.zeros(q.shape[:3])
    )
    old = jax.lax.fori_loop(0, jnp.max(positions) // size + 1, block, nothing)
    here = (positions >= 0)[:, :, None, None]
    new = dense.attend_masked(rotated, jnp.swapaxes(key, 1, 2), jnp.swapaxes(v, 1, 2), here)
    out = attention.finish(attention.merge([old, new])).astype(q.dtype)
    out, key, v = jax.lax.optimization_barrier((out, key, v))  # written when all is read
    state = dense.DenseCache(
      dense.append(state.k, key, positions, layer), dense.append(state.v, v, positions, layer)
    )
    return out, state, dense.dense_stats(positions, q.shape[2], kv_heads, state.k)


def variants_of(
  cases: Iterable[Case],
  model: Model,
  recording: Recording,
  tokens: Int[np.ndarray, "n"],
  *,
  T: int,
  batch: int,
) -> list[Variant]:
  """One method at several budgets, compiled for a state that they share.

  Args:
    cases: of one method and its options.
    recording: of a batch of one.
    tokens: that follow the prompt, as many as all cases make steps; every row is fed them.
    T: tokens of the prompt, the first fed one's position.
  """
  cases, config, new = list(cases), model.config, len(tokens)
  method, width = cases[0].method, recording.prompt.keys.shape[2]
  state = replay(config, recording, method, new=new)
  state = fork(method, state, geometry_of(config, batch=1, prompt=width, new=new), rows=batch)
  fed = [
    (jnp.full((batch, 1), token, jnp.int32), jnp.full((batch, 1), T + i, jnp.int32))
    for i, token in enumerate(tokens.tolist())
  ]
  lane = Lane(state, fed)
  return [_variant(case, model, lane) for case in cases]


def _variant(case: Case, model: Model, lane: Lane) -> Variant:
  step = Program(_decode, (model.decoder, case.method), lane.state, lane.token)
  return Variant(case, lane, step, parts={}, temp_bytes=step.temp_bytes)


def _decode(
  fixed: tuple[Decoder, Method], state: State, token: tuple[Array, ...]
) -> tuple[Array, State, Any]:
  return decode_step(*fixed, state, *token)
