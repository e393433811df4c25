"""The heads of all layers as one axis, cut over devices.

Training never mixes heads, so an array with a leading head axis may be cut over any number of
devices, and every device runs the same function on its own heads. Within a device they are walked
one after the other on a CPU, where a block of distances should stay in cache, and several at a time
elsewhere.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a2ats_jax.typing import Array

_ACCELERATOR_BYTES = 1 << 29  # to work in at once, off the CPU


@dataclasses.dataclass(frozen=True)
class Heads:
  """Puts arrays with a leading head axis on the devices, and maps functions over it.

  Attributes:
    count: M, heads of all layers.
    devices: to cut the heads over; M is padded with zeros to a multiple of their number.
  """

  count: int
  devices: tuple[jax.Device, ...]

  @classmethod
  def over(cls, count: int, devices: Sequence[jax.Device] | None = None) -> "Heads":
    """M heads over some devices, by default all local ones, but no more than there are heads."""
    return cls(count, tuple(devices or jax.local_devices())[:count])

  @property
  def padded(self) -> int:
    """M with padding."""
    return len(self.devices) * -(-self.count // len(self.devices))

  @property
  def _mesh(self) -> Mesh:
    return Mesh(np.array(self.devices), ("heads",))

  def put(self, x: np.ndarray, axis: int = 0) -> Array:
    """An array onto the devices, cut along ``axis``."""
    if self.padded != self.count:
      extra = [(0, 0)] * x.ndim
      extra[axis] = (0, self.padded - self.count)
      x = np.pad(x, extra)
    return jax.device_put(x, NamedSharding(self._mesh, _spec(x.ndim, axis)))

  def get(self, x: Array) -> np.ndarray:
    """An array with heads first off the devices, without padding."""
    return np.asarray(x)[: self.count]

  def put_tree(self, tree: Any) -> Any:
    """Every leaf with a head axis, which is the first; scalars on all devices."""
    scalar = NamedSharding(self._mesh, PartitionSpec())
    return jax.tree.map(lambda x: self.put(x) if x.ndim else jax.device_put(x, scalar), tree)

  def get_tree(self, tree: Any) -> Any:
    """The inverse of :meth:`put_tree`."""
    return jax.tree.map(lambda x: self.get(x) if x.ndim else np.asarray(x), tree)

  def at_once(self, size: int) -> int:
    """Heads to handle together on one device, where each needs ``size`` bytes to work in."""
    return 1 if self.devices[0].platform == "cpu" else max(1, _ACCELERATOR_BYTES // size)

  def run(self, function: Callable, args: Sequence[Any], axes: Sequence[int | None]) -> Any:
    """Call a function of per-head arrays on every device with its own heads; inside a jit.

    Args:
      axes: of each argument, its head axis, or None where it is the same for all heads. Every
        result has its heads first, except scalars.
    """
    specs = tuple(
      jax.tree.map(lambda x, axis=axis: _spec(x.ndim, axis), arg) for arg, axis in zip(args, axes)
    )
    out = jax.tree.map(lambda x: _spec(x.ndim, 0), jax.eval_shape(function, *args))
    return jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=out)(*args)


def _spec(rank: int, axis: int | None) -> PartitionSpec:
  return PartitionSpec(*("heads" if i == axis else None for i in range(rank)))
