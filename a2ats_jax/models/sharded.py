"""A decoder's weights over a mesh of devices."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from a2ats_jax.errors import UserError
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.sharding import HEADS

_COLUMNS = ("q", "k", "v", "gate", "up")  # of what they make, each device a part
_ROWS = ("o", "down")  # of what they read; their results are added up over devices
_HEADED = ("q", "k", "v", "o")


def decoder_specs(decoder: Decoder, mesh: Mesh) -> dict[tuple[Any, ...], P]:
  """How each weight is cut, by its path.

  Over the axis of heads: projections of queries, keys and values and the MLP's first half by
  columns, the output projection and the MLP's second half by rows, embedding and output head by
  vocabulary. An MLP or a vocabulary that the axis does not divide is whole everywhere, as norms
  are. Over the axis of rows nothing is cut.

  Raises:
    UserError: KV heads that the axis does not divide.
  """
  parts, kv_heads = mesh.shape[HEADS], decoder.config.kv_heads
  if kv_heads % parts:
    raise UserError(f"mesh: {kv_heads} KV heads cannot be cut into {parts} equal parts")
  specs = {}
  for path, leaf in nnx.to_flat_state(nnx.split(decoder)[1]):
    spec, owner = P(), path[-2] if len(path) > 1 else None
    if path[-1] in ("embedding", "head"):
      spec = P(HEADS)
    elif owner in _COLUMNS:
      spec = P(*(None,) * (leaf.ndim - 1), HEADS)
    elif owner in _ROWS and path[-1] == "kernel":
      spec = P(None, HEADS)
    divided = all(n % parts == 0 for n, axis in zip(leaf.shape, spec) if axis)
    specs[path] = spec if divided or owner in _HEADED else P()
  return specs


def shard_decoder(decoder: Decoder, mesh: Mesh) -> Decoder:
  """A decoder whose weights lie over a mesh, for a method from
  :func:`a2ats_jax.methods.sharded.shard_method` on the same mesh.

  Raises:
    UserError: as :func:`decoder_specs`.
  """
  specs = decoder_specs(decoder, mesh)
  graph, state = nnx.split(decoder)
  placed = {
    path: leaf.replace(jax.device_put(leaf[...], NamedSharding(mesh, specs[path])))
    for path, leaf in nnx.to_flat_state(state)
  }
  return nnx.merge(graph, nnx.from_flat_state(placed))
