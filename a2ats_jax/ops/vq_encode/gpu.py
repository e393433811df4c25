"""The op as a Mosaic GPU kernel (Hopper and newer).

Scores are float32 products on tensor cores that take bfloat16: a float32 number is the sum of three
bfloat16 numbers, exactly to 24 bits, and the six products of leading parts leave out less than one
part in 2**24. Keys are whitened and split before the kernel, codewords split beside them. A CTA
holds 64 keys and walks the codewords block by block with a running arg-max.
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
from a2ats_jax.typing import Array, Float, Int, UInt16

_KEYS = 64  # rows of one tensor core product of a warpgroup
_SWIZZLE = 128  # bytes
_LINE = 64  # bfloat16 numbers of a swizzled line: the head dimension is padded to whole ones
_PIECES = 3
_HEAD_DIM = 256
# (piece of the keys, piece of the codewords), small products first
_PRODUCTS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))
_HIGHEST = jax.lax.Precision.HIGHEST
# What a test can break, to see that its comparison or the race detector notices.
_Fault = Literal["last block", "neighbour", "offset", "rounded", "wait", "stale"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """How keys and codewords are cut.

  Attributes:
    codewords: of a block, a multiple of 8 up to 256.
    stages: blocks in shared memory, one in use and the others on their way.
    keys: whitened and split at once, in memory of 10 bytes a number.
  """

  codewords: int
  stages: int
  keys: int = 4096

  def __post_init__(self) -> None:
    if self.codewords % 8 or not 8 <= self.codewords <= 256:
      raise UserError(
        f"vq_encode: tile size codewords must be a multiple of 8 up to 256, got {self.codewords}"
      )
    if self.stages < 1:
      raise UserError(f"vq_encode: tile size stages must be at least 1, got {self.stages}")
    if self.keys < 1 or self.keys % _KEYS:
      raise UserError(f"vq_encode: tile size keys must be a multiple of {_KEYS}, got {self.keys}")

  @classmethod
  def of(cls, *, codewords: int, head_dim: int) -> "Tiles":
    """The widest block of at most 64 codewords that fits beside the keys, twice.

    Args:
      codewords: C.
      head_dim: D.
    """
    wanted = min(64, -(-codewords // 8) * 8)
    while wanted > 8 and cls(codewords=wanted, stages=2)._taken(head_dim) > mosaic_gpu.SHARED_BYTES:
      wanted = wanted // 16 * 8
    return cls(codewords=wanted, stages=2)

  def check(self, *, head_dim: int) -> None:
    """Whether blocks of this size fit beside the keys.

    Raises:
      UserError: they do not; the message holds both numbers.
    """
    taken, given = self._taken(head_dim), mosaic_gpu.SHARED_BYTES
    if taken > given:
      raise UserError(f"vq_encode: shared memory must be at most {given}, got {taken}")

  def _taken(self, head_dim: int) -> int:
    """Shared memory of a CTA for its keys and its blocks of codewords."""
    return 2 * _PIECES * _padded(head_dim) * (_KEYS + self.stages * self.codewords)


def hindrances(
  backend: str, keys: Array, whitener: Array, whitened: Array, offsets: Array
) -> list[str]:
  """Why the kernel cannot encode these, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    keys, whitener, whitened, offsets: as in :func:`vq_encode`.
  """
  reasons = mosaic_gpu.hindrances(backend, oldest=9.0, newest=9.9)  # WGMMA is Hopper's alone
  dtypes = [x.dtype for x in (whitener, whitened, offsets)]
  if any(dtype != jnp.float32 for dtype in dtypes):
    reasons.append(f"codebooks must be float32, got {', '.join(map(str, dtypes))}")
  if keys.shape[-1] > _HEAD_DIM:
    reasons.append(f"head size must be at most {_HEAD_DIM}, got {keys.shape[-1]}")
  if keys.shape[0] < _KEYS:
    reasons.append(f"a tile is {_KEYS} keys, and {keys.shape[0]} are quicker without one")
  return reasons


def vq_encode(
  keys: Float[Array, "n K D"],
  whitener: Float[Array, "K D D"],
  whitened: Float[Array, "K C D"],
  offsets: Float[Array, "K C"],
  *,
  tiles: Tiles | None = None,
  interpret: Any = None,
  _fault: _Fault | None = None,
) -> UInt16[Array, "n K"]:
  """``argmax_c (k L) . (c L) - ||c L||^2 / 2`` in float32, ties to the lowest.

  Two scores closer than float32 rounding may swap, as they may between any two orders of summation.

  Args:
    tiles: how keys and codewords are cut; chosen by shape if not given.
    interpret: ``InterpretGPUParams`` runs the kernel on the CPU.
  """
  n, kv_heads, dim = keys.shape
  size = whitened.shape[1]
  tiles = tiles or Tiles.of(codewords=size, head_dim=dim)
  tiles.check(head_dim=dim)
  width, count = _padded(dim), -(-size // tiles.codewords) * tiles.codewords
  if _fault == "offset":
    offsets = jnp.zeros_like(offsets)
  # A codeword that only fills a block up is worse than every other.
  offsets = jnp.pad(offsets, ((0, 0), (0, count - size)), constant_values=jnp.inf)
  book = _split(jnp.pad(whitened, ((0, 0), (0, count - size), (0, width - dim))))

  def nearest(block: Array) -> Array:
    z = jnp.einsum("nkd,kde->kne", block.astype(jnp.float32), whitener, precision=_HIGHEST)
    short = -block.shape[0] % _KEYS
    z = _split(jnp.pad(z, ((0, 0), (0, short), (0, width - dim))))
    codes = _kernel(z, book, offsets, tiles, interpret, _fault)
    return codes[:, : block.shape[0]].T.astype(jnp.uint16)

  whole = n // tiles.keys * tiles.keys
  parts = []
  if whole:
    blocks = keys[:whole].reshape(-1, tiles.keys, kv_heads, dim)
    parts.append(jax.lax.map(nearest, blocks).reshape(whole, kv_heads))
  if whole < n:
    parts.append(nearest(keys[whole:]))
  return jnp.concatenate(parts)


def _padded(head_dim: int) -> int:
  return -(-head_dim // _LINE) * _LINE


def _split(x: Float[Array, "K n D"]) -> Float[Array, "3 K n D"]:
  """Three bfloat16 numbers whose sum is the float32 one, the largest first.

  A cast to bfloat16 and back is one that a compiler may drop, ``reduce_precision`` is not.
  """
  pieces = []
  for _ in range(_PIECES):
    piece = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    pieces.append(piece.astype(jnp.bfloat16))
    x = x - piece
  return jnp.stack(pieces)


def _kernel(
  z: Float[Array, "3 K n W"],
  book: Float[Array, "3 K C W"],
  offsets: Float[Array, "K C"],
  tiles: Tiles,
  interpret: Any,
  fault: _Fault | None,
) -> Int[Array, "K n"]:
  """Codes of whitened keys: whole tiles of keys, whole blocks of codewords, whole lines."""
  _, kv_heads, rows, width = z.shape
  transforms = (plgpu.TilingTransform((8, _LINE)), plgpu.SwizzleTransform(_SWIZZLE))
  words = (tiles.stages, _PIECES, tiles.codewords, width)
  run = plgpu.kernel(
    functools.partial(_body, tiles=tiles, fault=fault),
    out_type=jax.ShapeDtypeStruct((kv_heads, rows), jnp.int32),
    grid=(rows // _KEYS, kv_heads),
    grid_names=("keys", "head"),
    scratch_types=(
      plgpu.SMEM((_PIECES, _KEYS, width), jnp.bfloat16, transforms=transforms),
      plgpu.SMEM(words, jnp.bfloat16, transforms=transforms),
      plgpu.Barrier(num_arrivals=_PIECES),
      plgpu.Barrier(num_arrivals=_PIECES, num_barriers=tiles.stages),
    ),
    kernel_name="vq_encode",
    compiler_params=mosaic_gpu.LANES,
    interpret=interpret,
  )
  return run(z, book, offsets)


def _body(*refs: Any, tiles: Tiles, fault: _Fault | None) -> None:
  """One CTA: 64 keys of one KV head against all codewords."""
  z, book, offsets, codes, keys, words, keys_ready, ready = refs
  tile, head = jax.lax.axis_index("keys"), jax.lax.axis_index("head")
  size, stages = tiles.codewords, tiles.stages
  blocks = book.shape[2] // size - int(fault == "last block")
  here = pl.ds(tile * _KEYS, _KEYS)
  layout = plgpu.Layout.WGMMA
  by_key, by_word = layout.reduce(1), layout.reduce(0)

  def ask(block):
    @pl.when(block < blocks)
    def _():
      slot = jax.lax.rem(block, stages)
      for i in range(_PIECES):
        source = book.at[i, head, pl.ds(block * size, size)]
        plgpu.copy_gmem_to_smem(source, words.at[slot, i], ready.at[slot])

  for i in range(_PIECES):
    plgpu.copy_gmem_to_smem(z.at[i, head, here], keys.at[i], keys_ready)
  for block in range(stages):
    ask(jnp.int32(block))
  word = plgpu.broadcasted_iota(jnp.int32, (_KEYS, size), 1, layout=layout)
  plgpu.barrier_wait(keys_ready)

  def step(block, carry):
    top, code = carry
    slot = jax.lax.rem(block, stages)
    half = offsets.at[head, pl.ds(block * size, size)]
    half = plgpu.load(half, layout=by_word, optimized=False)
    if fault != "wait":
      plgpu.barrier_wait(ready.at[slot])

    def products(acc):
      for i, j in _PRODUCTS[-1:] if fault == "rounded" else _PRODUCTS:
        plgpu.wgmma(acc, keys.at[i], words.at[slot, j].T)
      return acc[...]

    score = pl.run_scoped(products, plgpu.ACC((_KEYS, size), jnp.float32))
    ask(block + stages)
    half = plgpu.layout_cast(jax.lax.broadcast_in_dim(half, score.shape, (1,)), layout)
    score = score - half
    best = jnp.max(score, axis=1)
    wide = plgpu.layout_cast(jax.lax.broadcast_in_dim(best, score.shape, (0,)), layout)
    first = jnp.min(jnp.where(score == wide, word, size), axis=1)
    first = first + block * size + int(fault == "neighbour")
    better = best > top
    code = jnp.where(better, first, code)
    if fault != "stale":
      top = jnp.where(better, best, top)
    return top, code

  def full(value, dtype):
    return plgpu.layout_cast(jnp.full((_KEYS,), value, dtype), by_key)

  carry = (full(-jnp.inf, jnp.float32), full(0, jnp.int32))
  _, code = jax.lax.fori_loop(0, blocks, step, carry)
  mosaic_gpu.store(codes.at[head, here], code)
