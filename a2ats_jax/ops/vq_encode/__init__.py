"""The nearest codeword of every key."""

from types import MappingProxyType

from a2ats_jax.ops import dispatch
from a2ats_jax.ops.vq_encode import gpu, reference, tpu
from a2ats_jax.typing import Array, Float, UInt16

IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=tpu.vq_encode, hindrances=tpu.hindrances),
    "gpu": dispatch.Implementation(run=gpu.vq_encode, hindrances=gpu.hindrances),
    dispatch.REFERENCE: dispatch.Implementation(run=reference.vq_encode),
  }
)


def vq_encode(
  keys: Float[Array, "n K D"],
  whitener: Float[Array, "K D D"],
  whitened: Float[Array, "K C D"],
  *,
  implementation: str = dispatch.AUTO,
) -> UInt16[Array, "n K"]:
  """``argmin_c ||k L - c L||^2`` for every KV head, ties to the lowest; no n x C array exists.

  Args:
    keys: n of them, before rotary embedding.
    whitener: L.
    whitened: codewords times L.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("vq_encode", IMPLEMENTATIONS, implementation, keys, whitener, whitened)
