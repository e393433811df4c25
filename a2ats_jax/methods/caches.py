"""The cache of a whole model: a method's, and a window for each layer that sees no more."""

import dataclasses
from functools import partial

import jax

from a2ats_jax.methods.base import Geometry, Method, State
from a2ats_jax.methods.dense import DenseCache
from a2ats_jax.methods.sliding import Sliding


@partial(jax.tree_util.register_dataclass, data_fields=["far", "near"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Caches:
  """Of a model that has local layers; one that has none keeps the method's state alone.

  Attributes:
    far: the method's, of the global layers, numbered from 0 among themselves.
    near: windows of the local layers, numbered from 0 as well; on the device.
  """

  far: State
  near: DenseCache


def init(method: Method, geometry: Geometry) -> State:
  """An empty cache for all layers of a model."""
  far = method.init(geometry)
  if not geometry.local_layers:
    return far
  local = dataclasses.replace(geometry, layers=geometry.local_layers)
  return Caches(far, Sliding(window=geometry.window).init(local))


def split(state: State) -> tuple[State, DenseCache | None]:
  """The method's state, and the windows of local layers where there are any."""
  return (state.far, state.near) if isinstance(state, Caches) else (state, None)


def join(far: State, near: DenseCache | None) -> State:
  """What :func:`split` took apart."""
  return far if near is None else Caches(far, near)
