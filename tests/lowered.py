"""A decode step over a mesh, lowered from shapes alone, and what its devices say to each other."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from a2ats_jax import store
from a2ats_jax.generate import decode_step
from a2ats_jax.methods.base import Geometry, Method
from a2ats_jax.methods.layout import layout
from a2ats_jax.methods.sharded import Sharded, ShardedState, method_specs
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.sharded import decoder_specs
from a2ats_jax.sharding import BATCH, HEADS


def lower_step(
  config: ModelConfig, method: Method, geometry: Geometry, mesh: Mesh, *, dtype: Any
) -> tuple[jax.stages.Lowered, int]:
  """A step of one token a row; nothing is allocated.

  Args:
    method: to be cut over the mesh. dtype: of weights.

  Returns:
    The step, its state donated, and the bytes of its host pages on one device.
  """
  decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  specs = decoder_specs(decoder, mesh)
  weights = [_shape(leaf, dtype, mesh, specs[path]) for path, leaf in _paths(decoder)]
  own = [
    _shape(x, x.dtype, mesh, spec) for x, spec in zip(jax.tree.leaves(method), method_specs(method))
  ]
  sharded = Sharded(method, mesh)
  leaves, structure = layout(method, geometry)
  cuts = sharded.specs(geometry)
  kinds = [store.memory_kind(leaf.host) for leaf in leaves]
  places = [NamedSharding(mesh, spec, memory_kind=kind) for spec, kind in zip(cuts, kinds)]
  state = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    for leaf, place in zip(leaves, places)
  ]
  token = jax.ShapeDtypeStruct(
    (geometry.batch, 1), jnp.int32, sharding=NamedSharding(mesh, P(BATCH))
  )
  trees = [jax.tree.structure(decoder), jax.tree.structure(method)]

  def step(weights, own, state, tokens, positions):  # lists: no type check looks into them
    whole, inner = (jax.tree.unflatten(tree, x) for tree, x in zip(trees, (weights, own)))
    # A shape with a host sharding does not carry the space in its type; this does.
    state = [
      jax.device_put(x, jax.memory.Space.Host) if kind else x for x, kind in zip(state, kinds)
    ]
    state = ShardedState(jax.tree.unflatten(structure, state), cuts)
    logits, state, _ = decode_step(whole, Sharded(inner, mesh), state, tokens, positions)
    return logits, jax.tree.leaves(state)

  vocab = HEADS if specs[("embedding",)] == P(HEADS) else None
  out = (NamedSharding(mesh, P(BATCH, None, vocab)), places)
  run = jax.jit(step, donate_argnums=2, out_shardings=out)
  host = sum(
    math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, place in zip(leaves, places)
    if leaf.host
  )
  return run.lower(weights, own, state, token, token), host


def _paths(decoder: Decoder):
  return nnx.to_flat_state(nnx.split(decoder)[1])


def _shape(x: Any, dtype: Any, mesh: Mesh, spec: P) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))


_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(text: str, *, layers: int) -> dict[str, int]:
  """Bytes of what a device gets from others in a step, by the kind of operation.

  Args:
    text: of the compiled step, whose one loop with such operations is that over the layers.
  """
  found: dict[str, int] = {}
  times = 1
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      times = 1 if line.startswith("ENTRY") else layers
    if match := re.search(rf" = (.*?) ({_KINDS})(?:-done)?\(", line):
      size = sum(
        _ITEM_BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
      )
      found[match[2]] = found.get(match[2], 0) + times * size
  return found
