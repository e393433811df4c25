"""Copy chosen pages out of a store's memory."""

from types import MappingProxyType

from a2ats_jax.ops import dispatch
from a2ats_jax.ops.page_fetch import gpu, reference, tpu
from a2ats_jax.typing import Array, Int, Shaped

IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(
      run=lambda pages, ids: (tpu.page_fetch(pages, ids),), hindrances=tpu.hindrances
    ),
    "gpu": dispatch.Implementation(run=gpu.page_fetch, hindrances=gpu.hindrances),
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
