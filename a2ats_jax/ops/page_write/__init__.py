"""Pages of bytes in a store's memory: an empty array of them, and writing to it in place."""

from types import MappingProxyType

from jaxtyping import Int8

from a2ats_jax.ops import dispatch
from a2ats_jax.ops.page_fetch import tpu
from a2ats_jax.ops.page_write import reference
from a2ats_jax.typing import Array, Int

IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(
      run=tpu.page_write,
      hindrances=lambda backend, pages, ids, new: tpu.hindrances(backend, pages, ids),
    ),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.page_write),
  }
)

ZEROS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(
      run=tpu.page_zeros,
      hindrances=lambda backend, count, rows, host: tpu.backend_hindrances(backend),
    ),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.page_zeros),
  }
)


def page_zeros(
  count: int, rows: int, host: bool, *, implementation: str = dispatch.AUTO
) -> Int8[Array, "N R 128"]:
  """Pages of zeros; on a TPU those in host memory take no such memory of the device.

  Args:
    count: N.
    rows: R, a multiple of 32.
    host: whether they are to lie in host memory.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("page_zeros", ZEROS, implementation, count, rows, host)


def page_write(
  pages: Int8[Array, "N R 128"],
  ids: Int[Array, "n"],
  new: Int8[Array, "n R 128"],
  *,
  implementation: str = dispatch.AUTO,
) -> Int8[Array, "N R 128"]:
  """Write the pages named; where ``pages`` is donated or carried by a loop, nothing else is copied.

  Args:
    pages: in host or device memory; the result lies there too.
    ids: distinct, 0 .. N - 1; -1 leaves one out.
    new: their bytes, on the device.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("page_write", IMPLEMENTATIONS, implementation, pages, ids, new)
