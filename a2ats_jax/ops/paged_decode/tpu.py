"""The op as a Pallas TPU kernel: a running softmax over blocks of fetched pages.

One row and KV head after the other, a block of its pages at a time: the block's bytes are
reinterpreted in VMEM, so what a store holds as ``int8`` rows becomes keys and values without a pass
of its own. The query heads of the KV head are the rows of both products, padded to whole tiles.
"""

import enum
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int8

from a2ats_jax import attention
from a2ats_jax.ops.tiles import LANES, SUBLANES, DecodeTiles, PageFormat
from a2ats_jax.typing import Array, Bool, Float


class _Mutation(enum.Enum):
  """Ways to be wrong, which the tests must see."""

  LAST_PAGE = "the last page is left out"
  MASK_OFF_BY_ONE = "the mask is that of the token before"
  NO_SCALE = "logits are not divided by sqrt(D)"
  STALE = "a KV head starts with the sums of the one before"
  NO_RESCALE = "sums keep the scale of the peak before"


def backend_hindrances(backend: str) -> list[str]:
  """Why neither form of the kernel can run on this backend; empty where both can."""
  return [] if backend == "tpu" else [f"it needs a TPU, and the backend is {backend}"]


def hindrances(backend: str, q: Array, keys: Array, values: Array, mask: Array) -> list[str]:
  """Why :func:`paged_decode` cannot attend to these, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    q, keys, values, mask: as in :func:`paged_decode`.
  """
  reasons = backend_hindrances(backend)
  if values.dtype != keys.dtype:
    reasons.append(f"keys and values must have one dtype, got {keys.dtype} and {values.dtype}")
  page, dim = keys.shape[3:]
  return reasons + PageFormat.hindrances(page=page, dim=dim, dtype=keys.dtype)


def paged_decode(
  q: Float[Array, "B 1 H D"],
  keys: Float[Array, "B K F P D"],
  values: Float[Array, "B K F P D"],
  mask: Bool[Array, "B K F P"],
  *,
  tiles: DecodeTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> attention.Part:
  """Attention over keys and values that lie apart.

  Args:
    q: rotated, any float dtype; scaled by ``1/sqrt(D)`` here.
    keys, values: F pages of every row and KV head.
    mask: tokens that count; none at all is allowed. The others' keys and values must be finite.
    tiles: pages at a time, chosen by shape where None.
    interpret: run it on a CPU.
  """
  b, kv_heads, f, page, dim = keys.shape
  operands = [x.reshape(b * kv_heads, f, page, dim) for x in (keys, values)]
  return _decode(q, operands, mask, None, tiles, interpret)


def packed_decode(
  q: Float[Array, "B 1 H D"],
  pages: Int8[Array, "B K F R 128"],
  mask: Bool[Array, "B K F P"],
  *,
  form: PageFormat,
  tiles: DecodeTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> attention.Part:
  """Attention over pages of bytes, as :func:`a2ats_jax.ops.page_fetch.tpu.page_fetch` brings them.

  Equals :func:`paged_decode` over ``form.unpack(pages)``.

  Args:
    q: rotated, any float dtype; scaled by ``1/sqrt(D)`` here.
    pages: F pages of every row and KV head.
    mask: tokens that count; none at all is allowed. The others' keys and values must be finite.
    form: what the bytes of a page are.
    tiles: pages at a time, chosen by shape where None.
    interpret: run it on a CPU.
  """
  b, kv_heads, f, rows, lanes = pages.shape
  operands = [pages.reshape(b * kv_heads, f, rows, lanes)]
  return _decode(q, operands, mask, form, tiles, interpret)


def _decode(
  q: Array,
  operands: list[Array],
  mask: Array,
  form: PageFormat | None,
  tiles: DecodeTiles | None,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None = None,
) -> attention.Part:
  b, _, heads, dim = q.shape
  kv_heads, f, page = mask.shape[1:]
  if not f:
    none = jnp.zeros(q.shape[:3], jnp.float32)
    return attention.Part(jnp.zeros(q.shape, jnp.float32), none - jnp.inf, none)
  group, lead = heads // kv_heads, b * kv_heads
  page_bytes = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in operands)
  tiles = tiles or DecodeTiles.of(pages=f, page_bytes=page_bytes)
  dtype = form.dtype if form else operands[0].dtype
  rows = -(-group // SUBLANES) * SUBLANES
  width = max(dim, LANES) if form else dim
  # Same dtypes multiply as they are, with float32 sums: exact products. Others as float32.
  x = q.reshape(lead, group, dim).astype(dtype if q.dtype == dtype else jnp.float32)
  x = jnp.pad(x, ((0, 0), (0, rows - group), (0, width - dim)))
  size = min(tiles.pages, f)
  blocks = -(-f // size)
  # The last block ends with the last page: it may take pages again that the one before has taken.
  again = blocks * size - f
  seen = mask.reshape(lead, f, page).astype(jnp.int32)
  if again:
    whole, last = seen[:, : f - f % size], seen[:, f - size :].at[:, :again].set(0)
    seen = jnp.concatenate([whole, last], axis=1)
  seen = seen.reshape(lead, blocks, 1, size * page)
  if mutation is _Mutation.LAST_PAGE:
    seen = seen.at[..., -1, 0, -page:].set(0)
  # Left to choose where the pages lie, XLA may copy them all to VMEM before the kernel starts.
  out, peak, total = _build(
    lead=lead,
    rows=rows,
    width=width,
    q_dtype=x.dtype,
    shapes=[x.shape[2:] for x in operands],
    dtypes=[x.dtype for x in operands],
    pages=f,
    page=page,
    size=size,
    scale=1.0 if mutation is _Mutation.NO_SCALE else dim**-0.5,
    load=partial(_packed, form=form) if form else _apart,
    interpret=interpret,
    mutation=mutation,
  )(x, *(pltpu.with_memory_space_constraint(pages, pltpu.HBM) for pages in operands), seen)
  out = out[:, :group, width - dim :].reshape(b, 1, heads, dim)
  peak, total = (y[:, :group, 0].reshape(b, 1, heads) for y in (peak, total))
  return attention.Part(out, peak, total)


def _build(
  *,
  lead: int,
  rows: int,
  width: int,
  q_dtype,
  shapes: list[tuple[int, ...]],
  dtypes: list,
  pages: int,
  page: int,
  size: int,
  scale: float,
  load: Callable[..., tuple[list[Array], list[Array]]],
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None,
):
  blocks = -(-pages // size)

  def here(i, j):
    return i, 0, 0

  def block_of(shape):
    exact = tuple(pl.Element(n) for n in (1, size, *shape))
    return pl.BlockSpec(exact, lambda i, j: (i, jnp.minimum(j * size, pages - size), 0, 0))

  tokens = lead * pages * page
  read = sum(lead * pages * math.prod(s) * jnp.dtype(d).itemsize for s, d in zip(shapes, dtypes))
  return pl.pallas_call(
    partial(_kernel, scale=scale, load=load, mutation=mutation),
    grid=(lead, blocks),
    in_specs=[
      pl.BlockSpec((1, rows, width), here),
      *(block_of(shape) for shape in shapes),
      pl.BlockSpec((1, 1, 1, size * page), lambda i, j: (i, j, 0, 0)),
    ],
    out_specs=[
      pl.BlockSpec((1, rows, width), here),
      pl.BlockSpec((1, rows, LANES), here),
      pl.BlockSpec((1, rows, LANES), here),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((lead, rows, width), jnp.float32),
      jax.ShapeDtypeStruct((lead, rows, LANES), jnp.float32),
      jax.ShapeDtypeStruct((lead, rows, LANES), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, width), jnp.float32),
      pltpu.VMEM((rows, LANES), jnp.float32),
      pltpu.VMEM((rows, LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=4 * tokens * rows * width,
      bytes_accessed=read + 4 * tokens + 3 * 4 * lead * rows * (width + LANES),
      transcendentals=tokens * rows,
    ),
    name="paged_decode",
    interpret=interpret,
  )


def _packed(refs, *, form: PageFormat) -> tuple[list[Array], list[Array]]:
  """Keys and values of a block of byte pages, in parts of 128 dimensions."""
  x = pltpu.bitcast(refs[0][0], form.dtype)
  page, width = form.page, form.width

  def part(i):
    return x[:, i * page : (i + 1) * page].reshape(-1, LANES)

  if form.dim < LANES:
    both = part(0)  # keys beside values: the query is zero where the values lie
    return [both], [both]
  return [part(i) for i in range(width)], [part(width + i) for i in range(width)]


def _apart(refs) -> tuple[list[Array], list[Array]]:
  """Keys and values of a block that lie apart, in one part each."""
  keys, values = (ref[0].reshape(-1, ref.shape[-1]) for ref in refs)
  return [keys], [values]


def _product(a: Array, b: Array, axis: int) -> Array:
  """``a`` times ``b`` over the last axis of a and an axis of b, as exact as float32 is."""
  if a.dtype != b.dtype:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (axis,)), ((), ())),
    precision=exact,
    preferred_element_type=jnp.float32,
  )


def _kernel(
  q_ref, *refs, scale: float, load: Callable[..., tuple[list[Array], list[Array]]], mutation
):
  *kv_refs, mask_ref, out_ref, peak_ref, total_ref, acc, top, mass = refs
  row, block = pl.program_id(0), pl.program_id(1)
  first = (block == 0) & (row == 0) if mutation is _Mutation.STALE else block == 0

  @pl.when(first)
  def _():
    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, -jnp.inf)
    mass[...] = jnp.zeros_like(mass)

  keys, values = load(kv_refs)
  q, step = q_ref[0], keys[0].shape[1]
  scores = _product(q[:, :step], keys[0], 1)
  for i, k in enumerate(keys[1:], 1):
    scores += _product(q[:, i * step : (i + 1) * step], k, 1)
  seen = mask_ref[0, 0]
  if mutation is _Mutation.MASK_OFF_BY_ONE:
    seen = jnp.roll(seen, 1, axis=1)
  seen = jnp.broadcast_to(seen, scores.shape) != 0
  scores = jnp.where(seen, scores * scale, -jnp.inf)
  old = top[...]
  new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
  base = jnp.where(new == -jnp.inf, 0.0, new)
  shrink = jnp.exp(old - base)
  if mutation is _Mutation.NO_RESCALE:
    shrink = jnp.ones_like(shrink)
  p = jnp.exp(scores - base[:, :1])
  top[...] = new
  mass[...] = mass[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
  weights = p.astype(values[0].dtype)
  for i, v in enumerate(values):
    at = slice(i * v.shape[1], (i + 1) * v.shape[1])
    acc[:, at] = acc[:, at] * shrink[:, :1] + _product(weights, v, 0)

  @pl.when(block == pl.num_programs(1) - 1)
  def _():
    out_ref[0] = acc[...]
    peak_ref[0] = top[...]
    total_ref[0] = mass[...]
