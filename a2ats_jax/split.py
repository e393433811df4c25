"""One sequence over the devices of a mesh axis: who holds what, and what they add up.

A method that is split runs inside ``jax.shard_map``, the same lines on every device. Whole, which
is the default, everything here gives back what it was given.
"""

import dataclasses

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.typing import Array, Bool, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Split:
  """How a sequence lies on devices.

  Slots are shared out in ranges, device 0 the first; what comes later is dealt in turn.

  Attributes:
    axis: the mesh axis, by the name it has inside ``shard_map``; None where one device holds all.
    devices: along it.
  """

  axis: str | None = None
  devices: int = 1

  @property
  def number(self) -> Int[Array, ""]:
    """This device's place along the axis."""
    return jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis)

  def share(self, things: int) -> int:
    """Things that a device holds at most, of so many."""
    return -(-things // self.devices)

  def mine(self, x: Shaped[Array, "B T ..."], share: int) -> Shaped[Array, "B share ..."]:
    """This device's range of slots, zeros where it goes beyond the last; all of them if whole.

    Args:
      share: slots of a range.
    """
    if self.axis is None:
      return x
    more = self.devices * share - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))
    return jax.lax.dynamic_slice_in_dim(x, self.number * share, share, axis=1)

  def dealt(self, things: Int[Array, "*lead"]) -> Int[Array, "*lead"]:
    """Of the first so many things dealt in turn, those that this device has."""
    return (things - self.number + self.devices - 1) // self.devices

  def has(self, thing: Int[Array, "*lead"]) -> Bool[Array, "*lead"]:
    """Whether the thing of that number, dealt in turn, is this device's."""
    return thing % self.devices == self.number

  def total[X](self, x: X) -> X:
    """Sums over the devices, of every array of a pytree."""
    return x if self.axis is None else jax.lax.psum(x, self.axis)

  def before(self, x: Int[Array, "*lead"]) -> Int[Array, "*lead"]:
    """The sum over the devices in front of this one."""
    if self.axis is None:
      return jnp.zeros_like(x)
    every = jax.lax.all_gather(x, self.axis)
    earlier = jnp.arange(self.devices, dtype=jnp.int32) < self.number
    return jnp.sum(jnp.where(jnp.expand_dims(earlier, tuple(range(1, every.ndim))), every, 0), 0)

  def merge(self, part: attention.Part) -> attention.Part:
    """One part over what all devices attended to."""
    return part if self.axis is None else attention.merge_across(part, self.axis)


WHOLE = Split()
