"""The op as a Pallas TPU kernel: a running softmax over blocks of fetched pages.

One row and KV head after the other, a block of its pages at a time: the block's bytes are
reinterpreted in VMEM, so what a store holds as ``int8`` rows becomes keys and values without a pass
of its own. The query heads of the KV head are the rows of both products, padded to whole tiles.

A tail is where the running softmax starts: its peak and total are those of the first step, its
output is summed a block of codewords at a time, and the pages follow.
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
from a2ats_jax.ops.tiles import BYTE_ROWS, DECODE_BYTES, LANES, SUBLANES, DecodeTiles, PageFormat
from a2ats_jax.typing import Array, Bool, Float


class _Mutation(enum.Enum):
  """Ways to be wrong, which the tests must see."""

  LAST_PAGE = "the last page is left out"
  MASK_OFF_BY_ONE = "the mask is that of the token before"
  NO_SCALE = "logits are not divided by sqrt(D)"
  STALE = "a KV head starts with the sums of the one before"
  NO_RESCALE = "sums keep the scale of the peak before"
  LAST_CODEWORDS = "the last block of codewords is left out"
  TAIL_NO_RESCALE = "what the tail summed up keeps the scale of the tail's peak"
  NO_TAIL_TOTAL = "the tail's total is left out"
  TAIL_TOTAL_AGAIN = "the tail's total counts at every block of codewords"


_TAIL_BYTES = 512 << 10  # of a block of sums, of which two are held


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
  page = BYTE_ROWS if _few(keys) else page  # few tokens are one block, however many they are
  return reasons + PageFormat.hindrances(page=page, dim=dim, dtype=keys.dtype)


def _few(keys: Array) -> bool:
  """Whether the tokens of a KV head, keys and values, are one block at most."""
  return 2 * math.prod(keys.shape[2:]) * keys.dtype.itemsize <= DECODE_BYTES


def paged_decode(
  q: Float[Array, "B 1 H D"],
  keys: Float[Array, "B K F P D"],
  values: Float[Array, "B K F P D"],
  mask: Bool[Array, "B K F P"],
  *,
  tail: attention.Tail | None = None,
  tiles: DecodeTiles | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> attention.Part:
  """Attention over keys and values that lie apart.

  Args:
    q: rotated, any float dtype; scaled by ``1/sqrt(D)`` here.
    keys, values: F pages of every row and KV head.
    mask: tokens that count; none at all is allowed. The others' keys and values must be finite.
    tail: an estimate of other keys.
    tiles: pages at a time, chosen by shape where None.
    interpret: run it on a CPU.
  """
  b, kv_heads, f, page, dim = keys.shape
  if _few(keys):
    f, page = min(f, 1), f * page
    mask = mask.reshape(b, kv_heads, f, page)
  operands = [x.reshape(b * kv_heads, f, page, dim) for x in (keys, values)]
  return _decode(q, operands, mask, None, tail, tiles, interpret)


def packed_decode(
  q: Float[Array, "B 1 H D"],
  pages: Int8[Array, "B K F R 128"],
  mask: Bool[Array, "B K F P"],
  *,
  form: PageFormat,
  tail: attention.Tail | None = None,
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
    tail: an estimate of other keys.
    tiles: pages at a time, chosen by shape where None.
    interpret: run it on a CPU.
  """
  b, kv_heads, f, rows, lanes = pages.shape
  operands = [pages.reshape(b * kv_heads, f, rows, lanes)]
  return _decode(q, operands, mask, form, tail, tiles, interpret)


def _decode(
  q: Array,
  operands: list[Array],
  mask: Array,
  form: PageFormat | None,
  tail: attention.Tail | None,
  tiles: DecodeTiles | None,
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None = None,
  codewords: int | None = None,
) -> attention.Part:
  """Both forms of the kernel.

  Args:
    q, mask, tail, tiles, interpret: as in :func:`paged_decode`.
    operands: the pages, in one array or two.
    form: of pages of bytes.
    mutation: what to do wrong.
    codewords: of a tail, at a time; a multiple of 128, chosen by shape where None.
  """
  b, _, heads, dim = q.shape
  kv_heads, f, page = mask.shape[1:]
  if not f:
    none = jnp.zeros(q.shape[:3], jnp.float32)
    nothing = attention.Part(jnp.zeros(q.shape, jnp.float32), none - jnp.inf, none)
    return nothing if tail is None else tail.part()
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
  more = []
  if tail is not None:
    weights = tail.weights.reshape(lead, group, -1)
    begin = jnp.stack([tail.peak, tail.total], axis=-1).reshape(lead, group, 2)
    unused = ((0, 0), (0, rows - group), (0, 0))
    sums = tail.sums.reshape(lead, -1, dim)
    more = [jnp.pad(weights, unused), _in_hbm(sums), jnp.pad(begin, unused)]
    codewords = codewords or _codewords(sums.shape[1], dim)
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
    tail=[x.shape[1:] for x in more],
    codewords=codewords or 0,
    scale=1.0 if mutation is _Mutation.NO_SCALE else dim**-0.5,
    load=partial(_packed, form=form) if form else _apart,
    interpret=interpret,
    mutation=mutation,
  )(x, *map(_in_hbm, operands), seen, *more)
  out = out[:, :group, width - dim :].reshape(b, 1, heads, dim)
  peak, total = (y[:, :group, 0].reshape(b, 1, heads) for y in (peak, total))
  return attention.Part(out, peak, total)


def _codewords(count: int, dim: int) -> int:
  """Codewords at a time: blocks as even as can be, none above half a megabyte.

  Args:
    count: C.
    dim: D.
  """
  most = _TAIL_BYTES // (4 * max(dim, LANES))
  blocks = -(-count // most)
  even = -(-count // blocks)
  return count if blocks == 1 else -(-even // LANES) * LANES


def _in_hbm(x: Array) -> Array:
  """Left to choose where pages lie, XLA may copy them all to VMEM before the kernel starts."""
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)


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
  tail: list[tuple[int, ...]],
  codewords: int,
  scale: float,
  load: Callable[..., tuple[list[Array], list[Array]]],
  interpret: bool | pltpu.InterpretParams,
  mutation: _Mutation | None,
):
  count = tail[1][0] if tail else 0
  before = -(-count // codewords) if tail else 0  # blocks of codewords, in front of the pages

  def here(i, j):
    return i, 0, 0

  def block(j):
    return jnp.maximum(j - before, 0) if tail else j

  def block_of(shape):
    exact = tuple(pl.Element(n) for n in (1, size, *shape))
    return pl.BlockSpec(exact, lambda i, j: (i, jnp.minimum(block(j) * size, pages - size), 0, 0))

  def of_tail(j):
    return jnp.minimum(j, before - 1)

  of_codewords = (
    [
      pl.BlockSpec((1, rows, codewords), lambda i, j: (i, 0, of_tail(j))),
      pl.BlockSpec((1, codewords, tail[1][1]), lambda i, j: (i, of_tail(j), 0)),
      pl.BlockSpec((1, rows, 2), here),
    ]
    if tail
    else []
  )
  tokens = lead * pages * page
  read = sum(lead * pages * math.prod(s) * jnp.dtype(d).itemsize for s, d in zip(shapes, dtypes))
  read += sum(4 * lead * math.prod(s) for s in tail)
  return pl.pallas_call(
    partial(_kernel, scale=scale, load=load, codewords=count, mutation=mutation),
    grid=(lead, before + -(-pages // size)),
    in_specs=[
      pl.BlockSpec((1, rows, width), here),
      *(block_of(shape) for shape in shapes),
      pl.BlockSpec((1, 1, 1, size * page), lambda i, j: (i, block(j), 0, 0)),
      *of_codewords,
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
      flops=4 * tokens * rows * width + 2 * lead * count * rows * width,
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
  q_ref,
  *refs,
  scale: float,
  load: Callable[..., tuple[list[Array], list[Array]]],
  codewords: int,
  mutation: _Mutation | None,
):
  *refs, out_ref, peak_ref, total_ref, acc, top, mass = refs
  row, step, before = pl.program_id(0), pl.program_id(1), 0
  peak, total = jnp.full((q_ref.shape[1], 1), -jnp.inf), jnp.zeros((q_ref.shape[1], 1))
  if codewords:
    *refs, weights_ref, sums_ref, begin_ref = refs
    before = -(-codewords // weights_ref.shape[2])
    peak, total = begin_ref[0, :, :1], begin_ref[0, :, 1:]
  if mutation is _Mutation.NO_TAIL_TOTAL:
    total = jnp.zeros_like(total)
  first = (step == 0) & (row == 0) if mutation is _Mutation.STALE else step == 0

  @pl.when(first)
  def _():
    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.broadcast_to(peak, top.shape)
    mass[...] = jnp.broadcast_to(total, mass.shape)

  if codewords:

    @pl.when(step < before - int(mutation is _Mutation.LAST_CODEWORDS))
    def _():
      _sum_up(acc, weights_ref[0], sums_ref[0], peak, codewords, step)
      if mutation is _Mutation.TAIL_TOTAL_AGAIN:
        mass[...] += jnp.broadcast_to(jnp.where(step > 0, total, 0.0), mass.shape)

  def attend():
    *kv_refs, mask_ref = refs
    keys, values = load(kv_refs)
    q, wide = q_ref[0], keys[0].shape[1]
    scores = _product(q[:, :wide], keys[0], 1)
    for i, k in enumerate(keys[1:], 1):
      scores += _product(q[:, i * wide : (i + 1) * wide], k, 1)
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
    if mutation is _Mutation.TAIL_NO_RESCALE:
      shrink = jnp.where(step == before, 1.0, shrink)
    p = jnp.exp(scores - base[:, :1])
    top[...] = new
    mass[...] = mass[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
    weights = p.astype(values[0].dtype)
    for i, v in enumerate(values):
      at = slice(i * v.shape[1], (i + 1) * v.shape[1])
      acc[:, at] = acc[:, at] * shrink[:, :1] + _product(weights, v, 0)

  if before:
    pl.when(step >= before)(attend)
  else:
    attend()

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    out_ref[0] = acc[...]
    peak_ref[0] = top[...]
    total_ref[0] = mass[...]


def _sum_up(acc, weights: Array, sums: Array, peak: Array, codewords: int, block: Array) -> None:
  """A block of codewords into the sums of values.

  Args:
    acc: where the values lie in the last lanes, as they do beside the keys of half a tile.
    peak: of the tail; where it is ``-inf`` nothing counts.
    codewords: in all; the last block may reach past them, to where anything lies.
  """
  rows, size = weights.shape
  counts = jnp.broadcast_to(peak > -jnp.inf, weights.shape)
  if codewords % size:
    left = codewords - block * size
    counts &= jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1) < left
    sums = jnp.where(jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) < left, sums, 0.0)
  out = _product(jnp.where(counts, weights, 0.0), sums, 0)
  beside = acc.shape[1] - sums.shape[1]
  if beside:
    out = jnp.concatenate([jnp.zeros((rows, beside), jnp.float32), out], axis=1)
  acc[...] += out
