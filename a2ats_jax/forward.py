"""Through the layers of a decoder: global ones under a KV method, local ones over their window."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from a2ats_jax.methods import caches
from a2ats_jax.methods.base import Geometry, Method, State
from a2ats_jax.methods.dense import DenseCache
from a2ats_jax.methods.sliding import Sliding
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.prompt import prefill_by_chunks
from a2ats_jax.rope import Rope, make_rope
from a2ats_jax.typing import Array, Float, Int


def geometry_of(config: ModelConfig, *, batch: int, prompt: int, new: int) -> Geometry:
  """The shape of a cache for a model."""
  return Geometry(
    batch=batch,
    layers=config.global_layers,
    heads=config.heads,
    kv_heads=config.kv_heads,
    head_dim=config.head_dim,
    prompt=prompt,
    new=new,
    local_layers=config.local_layers,
    window=0 if config.local is None else config.local.window,
  )


def _way(
  config: ModelConfig, method: Method, layer: Array, local: bool
) -> tuple[Method, Rope, Array]:
  """Of a layer: what keeps its cache, its rotary embedding, and its number among its kind."""
  if not local:
    return method, make_rope(config.rope), layer // config.period
  assert config.local is not None
  return (
    Sliding(window=config.local.window),
    make_rope(config.local.rope),
    layer - layer // config.period,
  )


@partial(jax.jit, static_argnames=("local", "chunk"), donate_argnames=("state", "x"))
def layer_over_prompt(
  decoder: Decoder,
  method: Method,
  state: State,
  x: Float[Array, "B T E"],
  lengths: Int[Array, "B"],
  layer: Int[Array, ""],
  *,
  local: bool,
  chunk: int,
) -> tuple[Float[Array, "B T E"], State]:
  """One layer over a whole prompt: exact attention by chunks, then its cache absorbs it.

  Args:
    state: of the method, or for a local layer the windows.
  """
  block = decoder.layer(layer)
  keeper, rope, number = _way(decoder.config, method, layer, local)
  return prefill_by_chunks(
    keeper,
    state,
    x,
    project=block.project,
    finish=block.finish,
    lengths=lengths,
    rope=rope,
    layer=number,
    chunk=chunk,
  )


def hidden_step(
  decoder: Decoder,
  method: Method,
  state: State,
  tokens: Int[Array, "B S"],
  positions: Int[Array, "B S"],
) -> tuple[Float[Array, "B S E"], State, Any]:
  """:func:`a2ats_jax.generate.decode_step` up to the final hidden states, inside a program.

  A loop over periods of layers, in each of them a loop over the local ones: two or three compiled
  layers whatever the depth, and one where all are global.
  """
  config, period = decoder.config, decoder.config.period

  def step(x: Array, state: State, layer: Array, local: bool) -> tuple[Array, State, Any]:
    block = decoder.layer(layer)
    keeper, rope, number = _way(config, method, layer, local)
    q, k, v = block.project(x)
    out, state, stats = keeper.attend(state, q, k, v, positions=positions, rope=rope, layer=number)
    return block.finish(x, out), state, stats

  def local_layers(
    x: Array, near: DenseCache | None, first: int | Array, count: int
  ) -> tuple[Array, DenseCache | None]:
    def one(carry, layer):
      x, near = carry
      x, near, _ = step(x, near, layer, True)
      return (x, near), None

    layers = first + jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(one, (x, near), layers)[0] if count else (x, near)

  def one_period(carry, first):
    x, far, near = carry
    x, near = local_layers(x, near, first, period - 1)
    x, far, stats = step(x, far, first + period - 1, False)
    return (x, far, near), stats

  firsts = jnp.arange(0, config.layers - period + 1, period, dtype=jnp.int32)
  (x, far, near), stats = jax.lax.scan(
    one_period, (decoder.embed(tokens), *caches.split(state)), firsts
  )
  left = config.layers % period
  x, near = local_layers(x, near, config.layers - left, left)
  return x, caches.join(far, near), stats
