"""The op as Pallas TPU kernels: pages by a list of numbers, host or device memory to HBM and back.

Every page is one copy, issued by the scalar core from a number in SMEM; a ring of semaphores keeps
many under way. Nothing passes through VMEM: a TPU has no path from host memory to VMEM, and the
numbers of a page are used later, by :mod:`a2ats_jax.ops.paged_decode.tpu`.

Pages have to be written by :func:`page_write`: XLA's ``dynamic_update_slice`` on host memory wants
bytes in tiles of 8 rows, a kernel in tiles of 32, so XLA moves the whole store to the device and
back between the two (twice its size in temporary memory, libtpu 0.0.52), though the order in
memory is the same.
"""

import enum
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int8

from a2ats_jax.ops.tiles import BYTE_ROWS, LANES, FetchTiles
from a2ats_jax.typing import Array, Int

_MOST = 1 << 16  # numbers of pages that scalar memory holds beside what the compiler needs

_BLANK_BYTES = 4 << 20  # zeros written at once


def _calls(count: int) -> list[slice]:
  """Which pages each call moves."""
  return [slice(i, min(i + _MOST, count)) for i in range(0, count, _MOST)]


class _Mutation(enum.Enum):
  """Ways to be wrong, which the tests must see."""

  LAST_PAGE = "the last page is not copied"
  NEXT_PAGE = "the page after the one asked for is copied"
  NO_WAIT = "the kernel ends with copies under way"


def backend_hindrances(backend: str) -> list[str]:
  """Why none of these kernels can run on this backend; empty where they can."""
  return [] if backend == "tpu" else [f"it needs a TPU, and the backend is {backend}"]


def hindrances(backend: str, pages: Array, ids: Array) -> list[str]:
  """Why the kernel cannot fetch these, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    pages, ids: as in :func:`page_fetch`.
  """
  reasons = backend_hindrances(backend)
  if pages.dtype != jnp.int8 or pages.ndim != 3:
    reasons.append(f"pages must be int8 [N, R, 128], got {pages.dtype} {list(pages.shape)}")
  elif pages.shape[1] % BYTE_ROWS or pages.shape[2] != LANES:
    reasons.append(
      f"a page must be int8 [a multiple of {BYTE_ROWS}, {LANES}], got {list(pages.shape[1:])}"
    )
  return reasons


def page_fetch(
  pages: Int8[Array, "N R 128"],
  ids: Int[Array, "n"],
  *,
  tiles: FetchTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Int8[Array, "n R 128"]:
  """The pages named, in device memory.

  Temporary memory is that of the pages fetched: none up to 65,536 of them, which one call brings,
  and once their bytes beyond, where calls are joined. The memory that ``pages`` lies in is part of
  its type; the ids are moved to device memory where they are not there.

  Args:
    pages: bytes, whole tiles a page (:class:`a2ats_jax.ops.tiles.PageFormat`).
    ids: 0 .. N - 1; another number reads memory that is not a page.
    tiles: copies under way, chosen by shape where None.
    interpret: run it on a CPU.
  """
  if not ids.size:
    return jnp.zeros((0, *pages.shape[1:]), pages.dtype)
  host = jax.typeof(pages).memory_space == jax.memory.Space.Host
  if tiles is None:
    page_bytes = pages.shape[1] * pages.shape[2]
    tiles = FetchTiles.of(pages=ids.size, page_bytes=page_bytes, host=host)
  ids = jax.device_put(ids.astype(jnp.int32), jax.memory.Space.Device)
  parts = [
    _build(ids[now].size, pages.shape, host, tiles, interpret)(ids[now], pages)
    for now in _calls(ids.size)
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _build(
  n: int,
  shape: tuple[int, ...],
  host: bool,
  tiles: FetchTiles,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None = None,
):
  moved = n * shape[1] * shape[2]
  return pl.pallas_call(
    partial(_kernel, n=n, depth=min(tiles.depth, n), mutation=mutation),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(),
      in_specs=[pl.BlockSpec(memory_space=pl.HOST if host else pl.ANY)],
      out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
      scratch_shapes=[pltpu.SemaphoreType.DMA((min(tiles.depth, n),))],
    ),
    # Pinned: left to choose, XLA may put the buffer in VMEM, which host memory has no path to.
    out_shape=pltpu.HBM((n, *shape[1:]), jnp.int8),
    cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * moved, transcendentals=0),
    name="page_fetch",
    interpret=interpret,
  )


def page_write(
  pages: Int8[Array, "N R 128"],
  ids: Int[Array, "n"],
  new: Int8[Array, "n R 128"],
  *,
  tiles: FetchTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Int8[Array, "N R 128"]:
  """Write pages in place: where ``pages`` is donated or carried by a loop, nothing else is copied.

  Args:
    pages: bytes, whole tiles a page, in host or device memory; the result lies there too.
    ids: which pages, distinct, 0 .. N - 1; -1 leaves one out.
    new: their bytes, in device memory.
    tiles: copies under way, chosen by shape where None.
    interpret: run it on a CPU.
  """
  if not ids.size:
    return pages
  host = jax.typeof(pages).memory_space == jax.memory.Space.Host
  if tiles is None:
    page_bytes = pages.shape[1] * pages.shape[2]
    tiles = FetchTiles.of(pages=ids.size, page_bytes=page_bytes, host=host)
  ids = jax.device_put(ids.astype(jnp.int32), jax.memory.Space.Device)
  for now in _calls(ids.size):
    block = pltpu.with_memory_space_constraint(new[now], pltpu.HBM)
    pages = _build_write(ids[now].size, pages.shape, host, tiles, interpret)(ids[now], block, pages)
    pages = jax.device_put(pages, jax.memory.Space.Host) if host else pages  # it is in its type
  return pages


def _build_write(
  n: int,
  shape: tuple[int, ...],
  host: bool,
  tiles: FetchTiles,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None = None,
):
  moved = n * shape[1] * shape[2]
  space = pl.HOST if host else pl.ANY
  return pl.pallas_call(
    partial(_write_kernel, n=n, depth=min(tiles.depth, n), mutation=mutation),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(),
      in_specs=[pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=space)],
      out_specs=pl.BlockSpec(memory_space=space),
      scratch_shapes=[pltpu.SemaphoreType.DMA((min(tiles.depth, n),))],
    ),
    out_shape=_result(shape, host),
    input_output_aliases={2: 0},
    cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * moved, transcendentals=0),
    name="page_write",
    interpret=interpret,
  )


def page_zeros(
  count: int, rows: int, host: bool, *, interpret: bool | pltpu.InterpretParams = False
) -> Int8[Array, "N R 128"]:
  """Pages of zeros, in host memory without passing through as much device memory.

  XLA makes an array of zeros on the device and moves it: of a store that would not fit.

  Args:
    count: N. rows: R.
    host: whether they are to lie in host memory.
    interpret: run it on a CPU.
  """
  size = max(1, min(count, _BLANK_BYTES // (rows * LANES)))
  blank = pltpu.with_memory_space_constraint(jnp.zeros((size, rows, LANES), jnp.int8), pltpu.HBM)
  shape = (count, rows, LANES)
  out = pl.pallas_call(
    partial(_zeros_kernel, count=count, size=size),
    in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
    out_specs=pl.BlockSpec(memory_space=pl.HOST if host else pl.ANY),
    scratch_shapes=[pltpu.SemaphoreType.DMA((1,))],
    out_shape=_result(shape, host),
    name="page_zeros",
    interpret=interpret,
  )(blank)
  return jax.device_put(out, jax.memory.Space.Host) if host else out


def _zeros_kernel(blank, pages, done, *, count: int, size: int):
  def fill(i):
    here = pages.at[pl.ds(jnp.minimum(i * size, count - size), size)]
    copy = pltpu.make_async_copy(blank, here, done.at[0])
    copy.start()
    copy.wait()

  _each(0, -(-count // size), fill)


def _result(shape: tuple[int, ...], host: bool):
  if host:
    return pl.MemoryRef(jax.core.ShapedArray(shape, jnp.dtype(jnp.int8)), pl.HOST)
  return jax.ShapeDtypeStruct(shape, jnp.int8)


def _each(start, stop, act):
  jax.lax.fori_loop(start, stop, lambda i, carry: (act(i), carry)[1], 0)


def _run_ring(last: int, depth: int, start, wait, mutation: _Mutation | None):
  """Start copies 0 .. ``last`` - 1, never more than ``depth`` under way, and wait for all."""

  def replace(i):
    wait(i - depth)
    start(i)

  _each(0, min(depth, last), start)
  _each(depth, last, replace)
  if mutation is not _Mutation.NO_WAIT:
    _each(max(last - depth, 0), last, wait)


def _kernel(ids, pages, out, ring, *, n: int, depth: int, mutation: _Mutation | None):
  skip = 1 if mutation is _Mutation.NEXT_PAGE else 0

  def copy(i):
    page = pages.at[(ids[i] + skip) % pages.shape[0] if skip else ids[i]]
    return pltpu.make_async_copy(page, out.at[i], ring.at[jax.lax.rem(i, depth)])

  last = n - 1 if mutation is _Mutation.LAST_PAGE else n
  _run_ring(last, depth, lambda i: copy(i).start(), lambda i: copy(i).wait(), mutation)


def _write_kernel(ids, new, _, pages, ring, *, n: int, depth: int, mutation: _Mutation | None):
  skip = 1 if mutation is _Mutation.NEXT_PAGE else 0

  def unless_left_out(act):
    def maybe(i):
      @pl.when(ids[i] >= 0)
      def _():
        page = pages.at[(ids[i] + skip) % pages.shape[0] if skip else ids[i]]
        act(pltpu.make_async_copy(new.at[i], page, ring.at[jax.lax.rem(i, depth)]))

    return maybe

  start, wait = (unless_left_out(act) for act in (lambda c: c.start(), lambda c: c.wait()))
  last = n - 1 if mutation is _Mutation.LAST_PAGE else n
  _run_ring(last, depth, start, wait, mutation)
