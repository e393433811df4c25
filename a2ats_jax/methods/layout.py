"""The arrays of a model's cache: what there are before one exists, and one row's made many."""

import dataclasses
from typing import Any

import jax
import numpy as np

from a2ats_jax import store
from a2ats_jax.methods import caches
from a2ats_jax.methods.base import Geometry, Method, State
from a2ats_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array of a state.

  Attributes:
    name: the path to it. shape. dtype.
    host: whether it lies in host memory.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  host: bool


def layout(method: Method, geometry: Geometry) -> tuple[list[Leaf], Any]:
  """The arrays of a state in the order of its leaves, and its structure; nothing is allocated."""
  seen: list[Any] = []

  def init() -> list[Array]:
    state = caches.init(method, geometry)
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    seen.extend((names, store.on_host(state), structure))
    return [leaf for _, leaf in paths]

  shapes = jax.eval_shape(init)
  names, hosts, structure = seen
  leaves = [
    Leaf(name, tuple(x.shape), np.dtype(x.dtype), host)
    for name, x, host in zip(names, shapes, hosts, strict=True)
  ]
  return leaves, structure


def fork(method: Method, state: State, geometry: Geometry, *, rows: int) -> State:
  """The state of a batch whose rows are all the one row of ``state``, each array where it was.

  Everything is copied: ``state`` stays whole when the fork is given away.

  Args:
    geometry: that ``state`` was made with, of one row.
    rows: B of the new state, at least 1.
  """
  one, _ = layout(method, geometry)
  two, _ = layout(method, dataclasses.replace(geometry, batch=2))
  leaves, structure = jax.tree.flatten(state)
  forked = []
  for old, alone, pair in zip(leaves, one, two, strict=True):
    axes = [axis for axis, (a, b) in enumerate(zip(alone.shape, pair.shape)) if a != b]
    x = np.asarray(old)
    forked.append(jax.device_put(np.repeat(x, rows, axes[0]) if axes else x.copy(), old.sharding))
  return jax.tree.unflatten(structure, forked)
