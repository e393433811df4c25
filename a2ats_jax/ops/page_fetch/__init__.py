"""Copy chosen pages out of a store's memory."""

from types import MappingProxyType

import jax

from a2ats_jax.ops import dispatch, stored_tiles
from a2ats_jax.ops.page_fetch import gpu, reference, tpu
from a2ats_jax.ops.tiles import FetchTiles
from a2ats_jax.typing import Array, Int, Shaped


def shape_of(pages: Array, ids: Array) -> stored_tiles.Shape:
  """What stored tiles are looked up by."""
  return {
    "fetched": ids.size,
    "page": pages.shape[1] * pages.shape[2],
    "dtype": str(pages.dtype),
    "host": jax.typeof(pages).memory_space == jax.memory.Space.Host,
  }


def _on_tpu(pages: Array, ids: Array) -> tuple[Array, ...]:
  tiles = stored_tiles.find("page_fetch", FetchTiles, shape_of(pages, ids))
  return (tpu.page_fetch(pages, ids, tiles=tiles),)


def _on_gpu(pages: Array, ids: Array) -> tuple[Array, ...]:
  tiles = stored_tiles.find("page_fetch", gpu.Tiles, shape_of(pages, ids))
  return gpu.page_fetch(pages, ids, tiles=tiles)


IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=_on_tpu, hindrances=tpu.hindrances),
    "gpu": dispatch.Implementation(run=_on_gpu, hindrances=gpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.page_fetch),
  }
)


def page_fetch(
  pages: Shaped[Array, "N rows W"], ids: Int[Array, "n"], *, implementation: str = dispatch.AUTO
) -> tuple[Shaped[Array, "n *part"], ...]:
  """The pages named, on the device.

  Temporary memory is that of the pages fetched, whatever ``pages`` holds.

  Args:
    pages: floats, a row of keys and one of values a page, or int8, rows of 128 bytes
      (:class:`a2ats_jax.ops.tiles.PageFormat`).
    ids: 0 .. N - 1, in any memory.
    implementation: by name, or ``auto``.

  Returns:
    Of floats, keys [n, W] and values [n, W]; of bytes, one array of whole pages.
  """
  return dispatch.call("page_fetch", IMPLEMENTATIONS, implementation, pages, ids)
