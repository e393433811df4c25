"""The op as a Pallas TPU kernel: a running arg-max over blocks of codewords.

One KV head and block of keys after the other: the keys are whitened once, then scored against a
block of codewords at a time. Codewords lie along the rows of a block of scores and keys along its
lanes, so the maximum over codewords runs down rows and codes leave as whole rows of lanes.
"""

import enum
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from a2ats_jax.ops.tiles import SUBLANES, EncodeTiles
from a2ats_jax.typing import Array, Float, UInt16

_HIGHEST = jax.lax.Precision.HIGHEST
_MOST_DIM = 512


class _Mutation(enum.Enum):
  """Ways to be wrong, which the tests must see."""

  LAST_BLOCK = "the last block of codewords is left out"
  HIGHEST_TIE = "ties go to the highest codeword"
  NO_NORM = "codewords' norms are not subtracted"
  STALE = "a block of keys starts with the best scores of the one before"
  OFF_BY_ONE = "codes are numbered from one"


def hindrances(
  backend: str, keys: Array, whitener: Array, whitened: Array, offsets: Array
) -> list[str]:
  """Why the kernel cannot encode these, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    keys, whitener, whitened, offsets: as in the op.
  """
  reasons = [] if backend == "tpu" else [f"it needs a TPU, and the backend is {backend}"]
  dim = keys.shape[2]
  if dim % SUBLANES or dim > _MOST_DIM:
    reasons.append(f"head size must be a multiple of {SUBLANES} up to {_MOST_DIM}, got {dim}")
  return reasons


def vq_encode(
  keys: Float[Array, "n K D"],
  whitener: Float[Array, "K D D"],
  whitened: Float[Array, "K C D"],
  *,
  tiles: EncodeTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> UInt16[Array, "n K"]:
  """``argmax_c (k L) . (c L) - ||c L||^2 / 2`` in float32, ties to the lowest.

  Args:
    keys: n of them, before rotary embedding.
    whitener: L.
    whitened: codewords times L.
    tiles: keys and codewords at a time, chosen by shape where None.
    interpret: run it on a CPU.
  """
  return _encode(keys, whitener, whitened, tiles, interpret)


def _encode(
  keys: Array,
  whitener: Array,
  whitened: Array,
  tiles: EncodeTiles | None,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None = None,
) -> Array:
  n, kv_heads, dim = keys.shape
  size = whitened.shape[1]
  if not n:
    return jnp.zeros((0, kv_heads), jnp.uint16)
  tiles = tiles or EncodeTiles.of(keys=n, codewords=size)
  tiles.check(keys=n, codewords=size)
  by_head = jnp.swapaxes(keys, 0, 1)
  # Left to choose where the codewords lie, XLA may copy them all to VMEM before the kernel starts.
  whitened = pltpu.with_memory_space_constraint(whitened, pltpu.HBM)
  codes = _build(n, kv_heads, dim, size, tiles, interpret, mutation)(by_head, whitener, whitened)
  return codes[:, 0].T.astype(jnp.uint16)


def _build(
  n: int,
  kv_heads: int,
  dim: int,
  size: int,
  tiles: EncodeTiles,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None,
):
  blocks = -(-size // tiles.codewords)
  return pl.pallas_call(
    partial(_kernel, size=size, mutation=mutation),
    grid=(kv_heads, -(-n // tiles.keys), blocks),
    in_specs=[
      pl.BlockSpec((1, tiles.keys, dim), lambda k, i, j: (k, i, 0)),
      pl.BlockSpec((1, dim, dim), lambda k, i, j: (k, 0, 0)),
      pl.BlockSpec((1, tiles.codewords, dim), lambda k, i, j: (k, j, 0)),
    ],
    out_specs=pl.BlockSpec((1, 1, tiles.keys), lambda k, i, j: (k, 0, i)),
    out_shape=jax.ShapeDtypeStruct((kv_heads, 1, n), jnp.int32),
    scratch_shapes=[
      pltpu.VMEM((tiles.keys, dim), jnp.float32),
      pltpu.VMEM((1, tiles.keys), jnp.float32),
      pltpu.VMEM((1, tiles.keys), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=2 * n * kv_heads * dim * (dim + size),
      bytes_accessed=4 * kv_heads * (n * (dim + 1) + dim * dim + size * dim),
      transcendentals=0,
    ),
    name="vq_encode",
    interpret=interpret,
  )


def _against(a: Array, b: Array, axis: int) -> Array:
  return jax.lax.dot_general(
    a, b, (((1,), (axis,)), ((), ())), precision=_HIGHEST, preferred_element_type=jnp.float32
  )


def _kernel(
  keys_ref,
  whitener_ref,
  words_ref,
  codes_ref,
  z,
  best,
  winner,
  *,
  size: int,
  mutation: _Mutation | None,
):
  rows, block = pl.program_id(1), pl.program_id(2)
  first = block == 0

  @pl.when(first)
  def _():
    z[...] = _against(keys_ref[0].astype(jnp.float32), whitener_ref[0], 0)

  @pl.when(first & (rows == 0) if mutation is _Mutation.STALE else first)
  def _():
    best[...] = jnp.full_like(best, -jnp.inf)
    winner[...] = jnp.full_like(winner, size - 1)

  words = words_ref[0]
  count = words.shape[0]
  scores = _against(words, z[...], 1)
  if mutation is not _Mutation.NO_NORM:
    scores = scores - 0.5 * jnp.sum(jnp.square(words), axis=1, keepdims=True)
  number = block * count + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  last = size // count * count if mutation is _Mutation.LAST_BLOCK else size
  if mutation is _Mutation.LAST_BLOCK and last == size:
    last = size - count
  if last % count or last < size:
    scores = jnp.where(number < last, scores, -jnp.inf)  # what lies after the last codeword
  top = jnp.max(scores, axis=0, keepdims=True)
  if mutation is _Mutation.HIGHEST_TIE:
    lowest = jnp.max(jnp.where(scores == top, number, -1), axis=0, keepdims=True)
    better = top >= best[...]
  else:
    lowest = jnp.min(jnp.where(scores == top, number, size - 1), axis=0, keepdims=True)
    better = top > best[...]  # a later block must be better: ties stay with the lowest
  winner[...] = jnp.where(better, lowest, winner[...])
  best[...] = jnp.maximum(best[...], top)

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    codes_ref[0] = winner[...] + (1 if mutation is _Mutation.OFF_BY_ONE else 0)
