"""Attention of one decode step over fetched pages."""

from types import MappingProxyType

from a2ats_jax.attention import Part
from a2ats_jax.ops import dispatch
from a2ats_jax.ops.paged_decode import gpu, reference, tpu
from a2ats_jax.typing import Array, Bool, Float

IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=tpu.paged_decode, hindrances=tpu.hindrances),
    "gpu": dispatch.Implementation(run=gpu.paged_decode, hindrances=gpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.paged_decode),
  }
)


def paged_decode(
  q: Float[Array, "B 1 H D"],
  keys: Float[Array, "B K F P D"],
  values: Float[Array, "B K F P D"],
  mask: Bool[Array, "B K F P"],
  *,
  implementation: str = dispatch.AUTO,
) -> Part:
  """Softmax attention over the tokens of the mask: output, maximum and sum, not yet normalised.

  Args:
    q: rotated, any float dtype; scaled by ``1/sqrt(D)`` here.
    keys, values: of F pages of P tokens for every row and KV head, keys rotated.
    mask: tokens that count; none at all is allowed.
    implementation: by name, or ``auto``.
  """
  table = IMPLEMENTATIONS
  return dispatch.call("paged_decode", table, implementation, q, keys, values, mask)
