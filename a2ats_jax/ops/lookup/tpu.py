"""The op as a Pallas TPU kernel: gathers along lanes, from the rows of a table that are needed.

A table lies in VMEM as rows of 128 numbers. A TPU picks any of 128 numbers for every lane in one
instruction, so a tile of places takes one gather for each row from the lowest to the highest that
it names, and every place keeps what it finds in its own row. Places that rise look at each row
about once altogether; cells of sorted pages rise in eight runs, and look at each about eight times.
"""

import enum
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from a2ats_jax.ops.tiles import LANES, SUBLANES, LookupTiles
from a2ats_jax.typing import Array, Int

_TILE = SUBLANES * LANES
_SHIFT = LANES.bit_length() - 1
_MOST = 1 << 20  # numbers of a table, of which two lie in VMEM, 4 MiB each


class _Mutation(enum.Enum):
  """Ways to be wrong, which the tests must see."""

  LAST_ROWS = "the highest rows that a tile of places names are left out"
  OFF_BY_ONE = "the lane is that of the number before"
  ANY_ROW = "what the last row looked at holds is kept, whichever row was meant"
  FIRST_TABLE = "every place is looked up in the first table"


def hindrances(backend: str, tables: Array, places: Array) -> list[str]:
  """Why the kernel cannot look these up, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    tables, places: as in :func:`lookup`.
  """
  reasons = [] if backend == "tpu" else [f"it needs a TPU, and the backend is {backend}"]
  if tables.dtype != jnp.int32 or places.dtype != jnp.int32:
    reasons.append(f"tables and places must be int32, got {tables.dtype} and {places.dtype}")
  if tables.shape[-1] > _MOST:
    reasons.append(f"a table may have {_MOST} numbers at most, got {tables.shape[-1]}")
  return reasons


def lookup(
  tables: Int[Array, "*lead n"],
  places: Int[Array, "*lead m"],
  *,
  tiles: LookupTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Int[Array, "*lead m"]:
  """``tables[..., places]``.

  Args:
    tables, places: as in the op.
    tiles: rows looked at together, chosen by shape where None.
    interpret: run it on a CPU.
  """
  return _lookup(tables, places, tiles, interpret)


def _lookup(
  tables: Array,
  places: Array,
  tiles: LookupTiles | None,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None = None,
) -> Array:
  *lead, n = tables.shape
  m = places.shape[-1]
  if not places.size:
    return jnp.zeros(places.shape, jnp.int32)
  tiles = tiles or LookupTiles.of(numbers=n)
  table, place = tables.reshape(-1, n), places.reshape(-1, m)
  table = jnp.pad(table, ((0, 0), (0, -n % (tiles.rows * LANES))))
  place = jnp.pad(place, ((0, 0), (0, -m % _TILE)), mode="edge")
  rows, blocks = table.shape[1] // LANES, place.shape[1] // _TILE
  table = table.reshape(-1, rows, LANES)
  place = place.reshape(-1, blocks * SUBLANES, LANES)
  one = 0 if mutation is _Mutation.FIRST_TABLE else 1
  found = pl.pallas_call(
    partial(_kernel, together=tiles.rows, mutation=mutation),
    grid=(table.shape[0], blocks),
    in_specs=[
      pl.BlockSpec((1, rows, LANES), lambda i, j: (i * one, 0, 0)),
      pl.BlockSpec((1, SUBLANES, LANES), lambda i, j: (i, j, 0)),
    ],
    out_specs=pl.BlockSpec((1, SUBLANES, LANES), lambda i, j: (i, j, 0)),
    out_shape=jax.ShapeDtypeStruct(place.shape, jnp.int32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    # Every row once and a tile's ends twice, as where places rise in one run.
    cost_estimate=pl.CostEstimate(
      flops=3 * _TILE * table.shape[0] * (rows + 2 * blocks),
      bytes_accessed=4 * (table.size + 2 * place.size),
      transcendentals=0,
    ),
    name="lookup",
    interpret=interpret,
  )(table, place)
  return found.reshape(-1, blocks * _TILE)[:, :m].reshape(*lead, m)


def _kernel(table_ref, place_ref, out_ref, *, together: int, mutation: _Mutation | None):
  place = place_ref[0]
  # Shifts: to divide vectors, Pallas would want to know which TPU it is.
  row, lane = place >> _SHIFT, place & (LANES - 1)
  if mutation is _Mutation.OFF_BY_ONE:
    lane = (lane + LANES - 1) & (LANES - 1)

  def look(step, found):
    for i in range(together):
      number = step * together + i
      here = jnp.broadcast_to(table_ref[0, pl.ds(number, 1), :], place.shape)
      here = jnp.take_along_axis(here, lane, axis=1, mode="promise_in_bounds")
      found = here if mutation is _Mutation.ANY_ROW else jnp.where(row == number, here, found)
    return found

  first, last = (jax.lax.div(x, together) for x in (jnp.min(row), jnp.max(row)))
  if mutation is not _Mutation.LAST_ROWS:
    last += 1
  out_ref[0] = jax.lax.fori_loop(first, last, look, jnp.zeros_like(place))
