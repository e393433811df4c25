"""A mesh of devices, rows of a batch along one axis and KV heads along the other.

A KV head's cache, its query heads and the weights that make them lie on one device, host pages
beside it; so attention under any method is local, and devices speak twice a layer: where the output
projection and the MLP add up what each has of a hidden state.
"""

from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from a2ats_jax.errors import UserError

BATCH, HEADS = "batch", "heads"  # the axes of a mesh


def make_mesh(
  *, batch: int = 1, heads: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The first ``batch * heads`` devices as a mesh.

  Args:
    batch: parts that the rows of a batch are cut into. heads: parts of the KV heads.
    devices: all of them, those of other processes too, unless given.

  Raises:
    UserError: fewer devices than that.
  """
  devices = jax.devices() if devices is None else devices
  if batch < 1 or heads < 1 or batch * heads > len(devices):
    raise UserError(
      f"mesh: {batch} x {heads} (batch x heads) needs at least one device each way, "
      f"{batch * heads} together; there are {len(devices)}"
    )
  return jax.make_mesh(
    (batch, heads),
    (BATCH, HEADS),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[: batch * heads],
  )


def committed[X](tree: X) -> X:
  """Arrays bound to the memory they are in; nothing is copied.

  Where some lie over a mesh, the others are put there, cut by their rows if rows are cut.

  A program with one argument that is bound to a memory space binds all that it returns. Bound from
  the start, its results go into the same program again.
  """
  leaves, structure = jax.tree.flatten(tree)
  where = [x.sharding for x in leaves]
  mesh = next((s.mesh for s in where if isinstance(s, NamedSharding)), None)
  if mesh is not None:
    rows = PartitionSpec(BATCH) if BATCH in mesh.axis_names else PartitionSpec()
    where = [s if isinstance(s, NamedSharding) else NamedSharding(mesh, rows) for s in where]
  return jax.tree.unflatten(structure, jax.device_put(leaves, where))


def device_get[X](tree: X) -> X:
  """Arrays as NumPy's, gathered first where other processes hold a part."""

  def get(x: jax.Array):
    if x.is_fully_addressable or x.is_fully_replicated:
      return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(get, tree)
