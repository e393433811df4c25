"""Copy chosen pages out of a store's memory."""

from types import MappingProxyType

from a2ats_jax.ops import dispatch
from a2ats_jax.ops.page_fetch import gpu, reference
from a2ats_jax.typing import Array, Int, Shaped

IMPLEMENTATIONS = MappingProxyType(
  {
    "gpu": dispatch.Implementation(run=gpu.page_fetch, hindrances=gpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.page_fetch),
  }
)


def page_fetch(
  pages: Shaped[Array, "N 2 W"], ids: Int[Array, "n"], *, implementation: str = dispatch.AUTO
) -> tuple[Shaped[Array, "n W"], Shaped[Array, "n W"]]:
  """The two halves of every page named, keys and values.

  Temporary memory is that of the pages fetched, whatever ``pages`` holds.

  Args:
    pages: W numbers of keys and W of values a page.
    ids: 0 .. N - 1, in the memory that holds the pages.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("page_fetch", IMPLEMENTATIONS, implementation, pages, ids)
