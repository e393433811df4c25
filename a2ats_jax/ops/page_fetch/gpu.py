"""The op as a Mosaic GPU kernel (Hopper and newer).

Pages may lie in pinned host memory. An asynchronous copy into shared memory refuses a host
reference, plain loads take one, so every CTA moves one piece of a page through its registers: its
keys and its values are asked for before either is stored, and the many CTAs of the grid keep the
bus full.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from a2ats_jax.errors import UserError
from a2ats_jax.ops import mosaic_gpu
from a2ats_jax.typing import Array, Int, Shaped

_PIECE_BYTES = 4096
_THREADS = 128  # of a warpgroup; a vector load takes a multiple of this
# What a test can break, to see that its comparison notices.
_Fault = Literal["last page", "neighbour", "swapped halves"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """How a page is cut.

  Attributes:
    piece: numbers of keys, and as many of values, that one CTA moves: a multiple of 128.
  """

  piece: int

  def __post_init__(self) -> None:
    if self.piece <= 0 or self.piece % _THREADS:
      raise UserError(
        f"page_fetch: tile size piece must be a multiple of {_THREADS}, got {self.piece}"
      )

  @classmethod
  def of(cls, *, width: int, itemsize: int) -> "Tiles":
    """The largest piece of a half page that holds at most 4 KiB.

    That is 32 bytes a thread from each half: few registers, and a page of 16 tokens of 128 bfloat16
    numbers is one CTA's work.

    Args:
      width: W, numbers of half a page.
      itemsize: bytes of one.
    """
    most = max(_PIECE_BYTES // itemsize // _THREADS, 1)
    units = width // _THREADS
    return cls(piece=_THREADS * max(n for n in range(1, most + 1) if units % n == 0))


def hindrances(backend: str, pages: Array, ids: Array) -> list[str]:
  """Why the kernel cannot fetch these, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    pages, ids: as in :func:`page_fetch`.
  """
  reasons = mosaic_gpu.hindrances(backend, oldest=9.0)
  if pages.dtype not in (jnp.float32, jnp.bfloat16):
    reasons.append(f"pages must be float32 or bfloat16, got {pages.dtype}")
  if pages.ndim != 3 or pages.shape[1] != 2 or pages.shape[2] % _THREADS:
    reasons.append(f"pages must be [N, 2, a multiple of {_THREADS}], got {list(pages.shape)}")
  if not ids.size:
    reasons.append("no page is asked for")
  return reasons


def page_fetch(
  pages: Shaped[Array, "N 2 W"],
  ids: Int[Array, "n"],
  *,
  tiles: Tiles | None = None,
  interpret: Any = None,
  _fault: _Fault | None = None,
) -> tuple[Shaped[Array, "n W"], Shaped[Array, "n W"]]:
  """The two halves of every page named, in device memory.

  Args:
    pages: in device memory or pinned host memory.
    ids: 0 .. N - 1, each read once, by the CTAs of its page.
    tiles: how pages are cut; chosen by shape if not given.
    interpret: ``InterpretGPUParams`` runs the kernel on the CPU.
  """
  count, width = ids.shape[0], pages.shape[2]
  tiles = tiles or Tiles.of(width=width, itemsize=pages.dtype.itemsize)
  if width % tiles.piece:
    raise UserError(f"page_fetch: tile size piece must divide {width}, got {tiles.piece}")
  shape = jax.ShapeDtypeStruct((count, width), pages.dtype)
  pieces = width // tiles.piece
  run = plgpu.kernel(
    functools.partial(_body, piece=tiles.piece, pieces=pieces, fault=_fault),
    out_type=(shape, shape),
    grid=((count - int(_fault == "last page")) * pieces,),
    grid_names=("cta",),
    compiler_params=mosaic_gpu.LANES,
    kernel_name="page_fetch",
    interpret=interpret,
  )
  return run(ids, pages)


def _body(ids, pages, keys, values, *, piece: int, pieces: int, fault: _Fault | None) -> None:
  cta = jax.lax.axis_index("cta")
  index = cta // pieces
  here = pl.ds((cta % pieces) * piece, piece)
  page = ids[index]
  if fault == "neighbour":
    page = jnp.maximum(page - 1, 0)
  first, second = (1, 0) if fault == "swapped halves" else (0, 1)
  key, value = pages[page, first, here], pages[page, second, here]
  keys[index, here] = key
  values[index, here] = value
