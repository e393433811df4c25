"""Any KV method with its rows and KV heads cut over a mesh of devices.

Each device runs the method on its own rows and heads, as on a smaller cache, and knows nothing of
the others: there is no communication in here, and every kernel runs as it does on one device.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from a2ats_jax import store
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.methods.base import (
  AcrossHeads,
  Geometry,
  Method,
  Needs,
  PromptLayer,
  State,
  needs_of,
)
from a2ats_jax.methods.layout import layout
from a2ats_jax.rope import Rope
from a2ats_jax.sharding import BATCH, HEADS
from a2ats_jax.typing import Array, Float, Int

_TOKENS = P(BATCH, None, HEADS)  # [B, S, heads, D], and statistics [B, S, heads]
_PROMPT = MappingProxyType(
  {
    "keys": _TOKENS,
    "rotated": _TOKENS,
    "values": _TOKENS,
    "lengths": P(BATCH),
    "queries": _TOKENS,
    "sums": P(BATCH, HEADS),
  }
)


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["specs"])
@dataclasses.dataclass(frozen=True)
class ShardedState:
  """A method's state of the whole batch, every leaf one array over the mesh.

  Attributes:
    state: the method's.
    specs: how each of its leaves is cut.
  """

  state: State
  specs: tuple[P, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["method"], meta_fields=["mesh"])
@dataclasses.dataclass(frozen=True)
class Sharded:
  """A method over a mesh: from :func:`shard_method`.

  Attributes:
    method: that every device runs on its part.
    mesh: with the axes of :func:`a2ats_jax.sharding.make_mesh`.
  """

  method: Method
  mesh: Mesh

  @property
  def name(self) -> str:
    return self.method.name

  @property
  def needs(self) -> Needs:
    return needs_of(self.method)

  def init(self, geometry: Geometry) -> ShardedState:
    """An empty cache, each part made on its device.

    Raises:
      UserError: rows or KV heads that the mesh does not divide, or an array that cannot be cut.
    """
    specs = self.specs(geometry)
    rows, heads = self.mesh.shape[BATCH], self.mesh.shape[HEADS]
    part = dataclasses.replace(
      geometry,
      batch=geometry.batch // rows,
      heads=geometry.heads // heads,
      kv_heads=geometry.kv_heads // heads,
    )
    _, structure = layout(self.method, part)

    def init() -> list[Array]:
      return jax.tree.leaves(self.method.init(part))

    # Compiled: memory spaces cannot be named in a shard_map that runs op by op.
    leaves = jax.jit(self._map(init, (), list(specs)))()
    return ShardedState(jax.tree.unflatten(structure, leaves), specs)

  def absorb(self, state: ShardedState, prompt: PromptLayer, *, layer: int | Array) -> ShardedState:
    leaves, structure = jax.tree.flatten(state.state)
    given = {name: x for name in _PROMPT if (x := getattr(prompt, name)) is not None}
    own, method = jax.tree.flatten(self.method)

    def absorb(own, leaves, given, layer):
      here: Method = jax.tree.unflatten(method, own)
      old = jax.tree.unflatten(structure, leaves)
      return jax.tree.leaves(here.absorb(old, PromptLayer(**given), layer=layer))

    specs = list(state.specs)
    into = (method_specs(self.method), specs, {name: _PROMPT[name] for name in given}, P())
    run = self._map(absorb, into, specs)
    leaves = run(own, leaves, given, jnp.asarray(layer, jnp.int32))
    return ShardedState(jax.tree.unflatten(structure, leaves), state.specs)

  def attend(
    self,
    state: ShardedState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ShardedState, Any]:
    leaves, structure = jax.tree.flatten(state.state)
    own, method = jax.tree.flatten(self.method)
    seen = []  # the form of the statistics, which are [B, S] or [B, S, heads] each

    def attend(own, leaves, q, k, v, positions, rope, layer):
      here: Method = jax.tree.unflatten(method, own)
      old = jax.tree.unflatten(structure, leaves)
      out, new, stats = here.attend(old, q, k, v, positions=positions, rope=rope, layer=layer)
      figures, form = jax.tree.flatten(stats)
      seen.append(([x.ndim for x in figures], form))
      by_rank = tuple([x for x in figures if x.ndim == rank] for rank in (2, 3))
      return out, jax.tree.leaves(new), *by_rank

    specs = list(state.specs)
    tokens = (_TOKENS, _TOKENS, _TOKENS, P(BATCH))
    run = self._map(
      attend,
      (method_specs(self.method), specs, *tokens, P(), P()),
      (_TOKENS, specs, P(BATCH), _TOKENS),
    )
    layer = jnp.asarray(layer, jnp.int32)
    out, leaves, *by_rank = run(own, leaves, q, k, v, positions, rope, layer)
    ranks, form = seen[-1]
    figures = dict(zip((2, 3), map(iter, by_rank)))
    stats = jax.tree.unflatten(form, [next(figures[rank]) for rank in ranks])
    return out, ShardedState(jax.tree.unflatten(structure, leaves), state.specs), stats

  def specs(self, geometry: Geometry) -> tuple[P, ...]:
    """How each leaf of a state is cut: along the axes that grow with its rows and its KV heads.

    Raises:
      UserError: as :meth:`init`.
    """
    g, mesh = geometry, self.mesh.shape
    if g.local_layers:
      raise UserError("mesh: models with local layers cannot be cut over a mesh yet")
    for what, size, axis in (("rows", g.batch, BATCH), ("KV heads", g.kv_heads, HEADS)):
      if size % mesh[axis]:
        raise UserError(f"mesh: {size} {what} cannot be cut into {mesh[axis]} equal parts")
    twice = {
      BATCH: dataclasses.replace(g, batch=2 * g.batch),
      HEADS: dataclasses.replace(g, heads=2 * g.heads, kv_heads=2 * g.kv_heads),
    }
    one, _ = layout(self.method, g)
    cuts: list[list[str | None]] = [[None] * len(leaf.shape) for leaf in one]
    for name in (name for name in twice if mesh[name] > 1):
      grown, _ = layout(self.method, twice[name])
      for cut, leaf, other in zip(cuts, one, grown, strict=True):
        for axis, (old, new) in enumerate(zip(leaf.shape, other.shape, strict=True)):
          if new not in (old, 2 * old) or (new != old and cut[axis]):
            raise UserError(f"mesh: {self.name} cannot be cut over {name}: {leaf.name} is mixed")
          cut[axis] = name if new != old else cut[axis]
    return tuple(_spec(cut) for cut in cuts)

  def place(self, geometry: Geometry, leaves: Sequence[np.ndarray]) -> ShardedState:
    """A state over the mesh, each array in the memory that it belongs in.

    Args:
      geometry: of the state. leaves: of the method's own state, whole.

    Raises:
      UserError: as :meth:`init`.
    """
    specs = self.specs(geometry)
    form, structure = layout(self.method, geometry)
    placed = [
      jax.device_put(x, NamedSharding(self.mesh, spec, memory_kind=store.memory_kind(leaf.host)))
      for x, spec, leaf in zip(leaves, specs, form, strict=True)
    ]
    return ShardedState(jax.tree.unflatten(structure, placed), specs)

  def _map(self, function, in_specs, out_specs):
    # Not checked: what a method keeps of no row and no head, every device computes alike.
    return jax.shard_map(
      function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _spec(cut: Sequence[str | None]) -> P:
  """As programs write it that return such arrays, or they are compiled once more."""
  last = max((axis for axis, name in enumerate(cut) if name), default=-1)
  return P(*cut[: last + 1])


def method_specs(method: Method) -> list[P]:
  """How each of a method's own arrays is cut: codebooks over KV heads, others not at all."""
  nodes = jax.tree.leaves(method, is_leaf=lambda node: isinstance(node, Codebook))
  specs: list[P] = []
  for node in nodes:
    book = isinstance(node, Codebook)
    specs += [P(None, HEADS)] * len(jax.tree.leaves(node)) if book else [P()]
  return specs


def shard_method(method: Method, mesh: Mesh) -> Sharded:
  """A method that keeps and reads its cache over a mesh, its codebooks put there.

  Raises:
    UserError: the method lies over a mesh already; or KV heads are to be cut, and the method's know
      of each other, or its codebooks have a number of them that the mesh does not divide.
  """
  parts = mesh.shape[HEADS]
  if hasattr(method, "mesh"):
    raise UserError(f"mesh: expected a method on one device, got {method.name} over a mesh already")
  if parts > 1 and isinstance(method, AcrossHeads):
    raise UserError(
      f"mesh: {method.name} cannot be cut over KV heads: {method.across_heads}; cut the batch only"
    )
  leaves, structure = jax.tree.flatten(method)
  specs = method_specs(method)
  for x, spec in zip(leaves, specs):
    if HEADS in spec and x.shape[1] % parts:
      raise UserError(f"mesh: codebooks of {x.shape[1]} KV heads cannot be cut into {parts} parts")
  placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)]
  return Sharded(jax.tree.unflatten(structure, placed), mesh)


def unsharded(method: Method) -> Method:
  """The method itself, without the mesh that it may lie over."""
  return method.method if isinstance(method, Sharded) else method
