"""The numbers of some pages' slots, out of an array that has them in rows of 128."""

from types import MappingProxyType

from a2ats_jax.ops import dispatch
from a2ats_jax.ops.slot_fetch import reference, tpu
from a2ats_jax.typing import Array, Int

IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=tpu.slot_fetch, hindrances=tpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.slot_fetch),
  }
)


def slot_fetch(
  numbers: Int[Array, "*lead rows 128"],
  pages: Int[Array, "*some"],
  page: int,
  *,
  implementation: str = dispatch.AUTO,
) -> Int[Array, "*some P"]:
  """P numbers of every page named; only rows that are asked for are read.

  On a TPU an array whose rows are P numbers would be filled up to rows of 128, and viewing one of
  128 as one of P copies all of it.

  Args:
    numbers: pages one after the other, through all leading axes; whole pages altogether.
    pages: their numbers in that order.
    page: P.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("slot_fetch", IMPLEMENTATIONS, implementation, numbers, pages, page)
