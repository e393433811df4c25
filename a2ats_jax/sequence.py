"""A method's cache over the devices of a mesh: one context that no single device or host can hold.

Only the cache is split. Queries, keys and values come whole to every device, and the exact
attention of a prompt is computed on each.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from a2ats_jax.errors import UserError
from a2ats_jax.methods.base import Geometry, Method, PromptLayer, Splittable, State
from a2ats_jax.rope import Rope
from a2ats_jax.split import Split
from a2ats_jax.typing import Array, Float, Int

AXIS = "sequence"
_SAME, _OWN = PartitionSpec(), PartitionSpec(None, None, None, AXIS)


@partial(jax.tree_util.register_dataclass, data_fields=["method"], meta_fields=["mesh"])
@dataclasses.dataclass(frozen=True)
class OverSequence:
  """A method whose cache is split along the mesh axis ``sequence``; a method like any other.

  Its state holds the arrays of all devices: those of which each device has its own part are split
  along their fourth axis, all others are the same everywhere. Statistics are of all devices
  together.

  Attributes:
    method: :class:`a2ats_jax.methods.base.Splittable`: full attention or A2ATS.
    mesh: of one axis, ``sequence``.
  """

  method: Method
  mesh: Mesh

  def __post_init__(self):
    if not isinstance(self.method, Splittable):
      raise UserError(
        f"sequence: expected full attention or A2ATS to split over devices, got {self.method.name}"
      )
    if self.mesh.axis_names != (AXIS,):
      raise UserError(
        f"sequence: expected a mesh of one axis, {AXIS!r}, got {', '.join(self.mesh.axis_names)}"
      )

  @property
  def name(self) -> str:
    return self.method.name

  def init(self, geometry: Geometry) -> State:
    return _init(self, geometry)

  def absorb(self, state: State, prompt: PromptLayer, *, layer: int | Array) -> State:
    leaves, tree, specs = _taken_apart(self.method, state)

    def absorb(method: Any, leaves: list[Array], prompt: Any, layer: Array) -> list[Array]:
      state = jax.tree.unflatten(tree, leaves)
      return jax.tree.leaves(self._part(method).absorb(state, prompt, layer=layer))

    absorb = self._map(absorb, (_SAME, specs, _SAME, _SAME), specs)
    leaves = absorb(self.method, leaves, prompt, jnp.asarray(layer, jnp.int32))
    return jax.tree.unflatten(tree, leaves)

  def attend(
    self,
    state: State,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], State, Any]:
    leaves, tree, specs = _taken_apart(self.method, state)

    def attend(method: Any, leaves: list[Array], q, k, v, positions, rope, layer):
      state = jax.tree.unflatten(tree, leaves)
      options = {"positions": positions, "rope": rope, "layer": layer}
      out, state, stats = self._part(method).attend(state, q, k, v, **options)
      return out, jax.tree.leaves(state), stats

    attend = self._map(attend, (_SAME, specs, *(_SAME,) * 6), (_SAME, specs, _SAME))
    layer = jnp.asarray(layer, jnp.int32)
    out, leaves, stats = attend(self.method, leaves, q, k, v, positions, rope, layer)
    return out, jax.tree.unflatten(tree, leaves), stats

  def _part(self, method: Any) -> Any:
    """The method as it runs on one device."""
    return dataclasses.replace(method, split=Split(AXIS, self.mesh.shape[AXIS]))

  def _map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
    # Unchecked: else every loop of a method would have to say what of its state differs by device.
    return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.jit, static_argnames="geometry")
def _init(over: OverSequence, geometry: Geometry) -> State:
  found: list[Any] = []

  def look(method: Any) -> None:
    found.append(_taken_apart(method, over._part(method).init(geometry))[1:])

  def init(method: Any) -> list[Array]:
    return jax.tree.leaves(over._part(method).init(geometry))

  jax.eval_shape(look, over.method)
  ((tree, specs),) = found
  return jax.tree.unflatten(tree, over._map(init, (_SAME,), specs)(over.method))


def _taken_apart(method: Any, state: State) -> tuple[list[Array], Any, list[Any]]:
  """A state's arrays, its structure, and how each array lies on the mesh."""
  leaves, tree = jax.tree.flatten(state)
  own = {id(x) for x in method.own(state)}
  return leaves, tree, [_OWN if id(x) in own else _SAME for x in leaves]
