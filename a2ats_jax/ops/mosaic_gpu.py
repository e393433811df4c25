"""What the Mosaic GPU kernels share, and where releases of jax differ."""

import re
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Of a CTA on Hopper, 227 KiB, less what barriers and reductions across warps take.
SHARED_BYTES = 223 * 1024

# Kernels give the layouts of their registers: for paged_decode the compiler's search took minutes
# and found none.
LANES = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def store(ref: Any, value: jax.Array) -> None:
  """Write an array of any layout, also where rows of a warp do not fill whole memory sectors.

  jax 0.12 refuses such a plain assignment and has a function for it; 0.11 has no function.
  """
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def hindrances(backend: str, *, oldest: float, newest: float | None = None) -> list[str]:
  """Why no kernel runs on this backend, a sentence each; empty where one can.

  Args:
    backend: by JAX's name.
    oldest, newest: compute capabilities that the kernel's instructions are for.
  """
  if backend != "gpu":
    return [f"it needs an NVIDIA GPU, and the backend is {backend}"]
  capability = getattr(jax.devices()[0], "compute_capability", str(oldest))
  if not re.fullmatch(r"\d+\.\d+", capability):
    return [f"it needs an NVIDIA GPU, got {capability}"]
  if float(capability) < oldest or (newest is not None and float(capability) > newest):
    span = f"{oldest} or newer" if newest is None else f"{oldest} to {newest}"
    return [f"it needs compute capability {span}, got {capability}"]
  return []
