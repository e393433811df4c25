"""Numbers of small tables, at many places at once."""

from types import MappingProxyType

from a2ats_jax.ops import dispatch, stored_tiles
from a2ats_jax.ops.lookup import reference, tpu
from a2ats_jax.ops.tiles import LookupTiles
from a2ats_jax.typing import Array, Int


def shape_of(tables: Array, places: Array) -> stored_tiles.Shape:
  """What stored tiles are looked up by."""
  numbers = tables.shape[-1]
  return {"tables": tables.size // numbers, "numbers": numbers, "places": places.shape[-1]}


def _on_tpu(tables: Array, places: Array) -> Array:
  tiles = stored_tiles.find("lookup", LookupTiles, shape_of(tables, places))
  return tpu.lookup(tables, places, tiles=tiles)


IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=_on_tpu, hindrances=tpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.lookup),
  }
)


def lookup(
  tables: Int[Array, "*lead n"],
  places: Int[Array, "*lead m"],
  *,
  implementation: str = dispatch.AUTO,
) -> Int[Array, "*lead m"]:
  """``tables[..., places]``: every leading index has a table and places of its own.

  There is no kernel for a GPU, whose compiler gathers such numbers well. XLA's gather on a TPU
  takes a tile of 4 KiB for each of them.

  Args:
    tables: n numbers each; on a TPU kept in fast memory whole.
    places: 0 .. n - 1, in any order; on a TPU, the nearer to sorted the faster.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("lookup", IMPLEMENTATIONS, implementation, tables, places)
