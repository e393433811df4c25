"""The op as a Mosaic GPU kernel (Hopper and newer).

A CTA walks the tokens of one row and KV head, or of one part of them, a block at a time. Blocks of
keys and values come into shared memory by asynchronous copies, several on their way at once. The
few query heads of a group give tensor cores nothing to do, and the op is bound by memory, so the
products are float32 multiply-adds in registers: rows of a block are tokens, spread over warps, and
the lanes of a warp share the head dimension. Every row of threads keeps a running softmax of its
own tokens; the rows are merged when the CTA is done, the CTAs of one head by ``attention.merge``.

A tail is where the running softmax starts: every row of threads begins at the tail's peak, one of
them at its total, and with the sums of its own codewords, which the CTAs share as they share
tokens. They are read while the first tokens are on their way, straight into registers.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.ops import mosaic_gpu
from a2ats_jax.typing import Array, Bool, Float

_WARPS, _LANES = 4, 32
_VECTOR_BYTES = 16  # of one load of a thread
_CTAS = 264  # for two rounds of a Hopper's 132 SMs
_COPY_ROWS = 256  # of one asynchronous copy
_HEAD_DIMS = (64, 128, 256)
_GROUP = 8
_LOW = -1e30  # below every logit; finite, so that a row without tokens makes no NaN
# What a test can break, to see that its comparison or the race detector notices.
_Fault = Literal[
  "last page",
  "mask",
  "scale",
  "wait",
  "fence",
  "stale",
  "last codewords",
  "tail scale",
  "no tail total",
  "tail total again",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """How the tokens of one row and KV head are cut.

  Attributes:
    steps: tokens of a block for each row of threads.
    stages: blocks in shared memory, one in use and the others on their way.
    splits: CTAs that share the tokens.
  """

  steps: int
  stages: int
  splits: int

  def __post_init__(self) -> None:
    for name, size in dataclasses.asdict(self).items():
      if size < 1:
        raise UserError(f"paged_decode: tile size {name} must be at least 1, got {size}")

  @classmethod
  def of(
    cls,
    *,
    heads: int,
    group: int,
    tokens: int,
    head_dim: int,
    itemsize: int,
    codewords: int = 0,
  ) -> "Tiles":
    """Blocks of 8 KiB, four of them at once, and CTAs for two rounds of a Hopper's 132 SMs.

    Args:
      heads: rows times KV heads.
      group: G; large ones get smaller blocks, to spare registers.
      tokens: F P, of each row and KV head.
      head_dim: D.
      itemsize: bytes of a number of the pages.
      codewords: C, of the tail; CTAs are as many as the larger of tokens and codewords asks for.
    """
    steps = 4 if group <= 4 else 2
    blocks = -(-max(tokens, codewords) // (steps * _rows(head_dim, itemsize)))
    wanted = max(1, min(_CTAS // heads, blocks // 4))
    share = -(-blocks // wanted)
    return cls(steps=steps, stages=4, splits=-(-blocks // share))

  def check(self, *, head_dim: int, itemsize: int) -> None:
    """Whether blocks of this size can be copied and held.

    Raises:
      UserError: they cannot; the message holds both numbers.
    """
    rows = _rows(head_dim, itemsize)
    size = self.steps * rows
    if size > _COPY_ROWS:
      raise UserError(f"paged_decode: a block must be at most {_COPY_ROWS} tokens, got {size}")
    blocks = 2 * self.stages * size * head_dim * itemsize
    taken = blocks + 4 * rows * (head_dim + 1)  # and where rows of threads meet
    if taken > mosaic_gpu.SHARED_BYTES:
      raise UserError(
        f"paged_decode: shared memory must be at most {mosaic_gpu.SHARED_BYTES}, got {taken}"
      )


def hindrances(backend: str, q: Array, keys: Array, values: Array, mask: Array) -> list[str]:
  """Why the kernel cannot attend to these, a sentence each; empty where it can.

  Args:
    backend: by JAX's name.
    q, keys, values, mask: as in :func:`paged_decode`.
  """
  reasons = mosaic_gpu.hindrances(backend, oldest=9.0)
  if keys.dtype not in (jnp.float32, jnp.bfloat16) or keys.dtype != values.dtype:
    reasons.append(
      f"pages must be all float32 or all bfloat16, got {keys.dtype} and {values.dtype}"
    )
  if keys.shape[-1] not in _HEAD_DIMS:
    names = ", ".join(map(str, _HEAD_DIMS))
    reasons.append(f"head size must be one of {names}, got {keys.shape[-1]}")
  group = q.shape[2] // keys.shape[1]
  if group > _GROUP:
    reasons.append(f"query heads of a KV head must be at most {_GROUP}, got {group}")
  if not mask.size:
    reasons.append("there is no page")
  return reasons


def paged_decode(
  q: Float[Array, "B 1 H D"],
  keys: Float[Array, "B K F P D"],
  values: Float[Array, "B K F P D"],
  mask: Bool[Array, "B K F P"],
  *,
  tail: attention.Tail | None = None,
  tiles: Tiles | None = None,
  interpret: Any = None,
  _fault: _Fault | None = None,
) -> attention.Part:
  """Softmax attention over the tokens of the mask, in float32 throughout.

  The reference rounds its weights to the dtype of the values first; here they stay float32.

  Args:
    tail: an estimate of other keys.
    tiles: how tokens are cut; chosen by shape if not given.
    interpret: ``InterpretGPUParams`` runs the kernel on the CPU.
  """
  b, _, h, d = q.shape
  kv_heads, group = keys.shape[1], h // keys.shape[1]
  heads, tokens, itemsize = b * kv_heads, mask.size // (b * kv_heads), keys.dtype.itemsize
  codewords = 0 if tail is None else tail.sums.shape[2]
  if tiles is None:
    tiles = Tiles.of(
      heads=heads,
      group=group,
      tokens=tokens,
      head_dim=d,
      itemsize=itemsize,
      codewords=codewords,
    )
  tiles.check(head_dim=d, itemsize=itemsize)
  rows = _rows(d, itemsize)
  size = tiles.steps * rows
  flat = [x.reshape(heads, tokens, -1) for x in (keys, values, mask.astype(jnp.int32))]
  if tokens < size:  # a block may overlap another, but not the end
    flat = [jnp.pad(x, ((0, 0), (0, size - tokens), (0, 0))) for x in flat]
    tokens = size
  k, v, counts = flat
  more = [] if tail is None else _tail_operands(tail, heads, rows, size, _fault)
  if more:
    codewords = more[1].shape[1]
  splits = min(tiles.splits, -(-max(tokens, codewords) // size))
  used = tokens - (mask.shape[3] if _fault == "last page" else 0)
  run = plgpu.kernel(
    functools.partial(
      _body,
      tiles=tiles,
      rows=rows,
      splits=splits,
      tokens=used,
      codewords=codewords,
      fault=_fault,
    ),
    out_type=(
      jax.ShapeDtypeStruct((heads, splits, group, d), jnp.float32),
      jax.ShapeDtypeStruct((heads, splits, group, rows), jnp.float32),
      jax.ShapeDtypeStruct((heads, splits, group, rows), jnp.float32),
    ),
    grid=(splits, heads),
    grid_names=("split", "head"),
    scratch_types=(
      plgpu.SMEM((tiles.stages, size, d), keys.dtype),
      plgpu.SMEM((tiles.stages, size, d), keys.dtype),
      plgpu.SMEM((rows, d), jnp.float32),
      plgpu.SMEM((rows,), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    ),
    kernel_name="paged_decode",
    compiler_params=mosaic_gpu.LANES,
    interpret=interpret,
  )
  scaled = q.astype(jnp.float32).reshape(heads, group, d)
  if _fault != "scale":
    scaled = scaled * d**-0.5
  out, peak, total = run(scaled, k, v, counts[..., 0], *more)
  # Rows of threads first: their outputs are merged already, towards the largest of their peaks.
  top = jnp.max(peak, axis=-1)
  total = jnp.sum(total * jnp.exp(peak - top[..., None]), axis=-1)
  peak = jnp.where(top > _LOW, top, -jnp.inf)
  return attention.merge(
    [
      attention.Part(
        out[:, i].reshape(b, 1, h, d), peak[:, i].reshape(b, 1, h), total[:, i].reshape(b, 1, h)
      )
      for i in range(splits)
    ]
  )


def _tail_operands(
  tail: attention.Tail, heads: int, rows: int, size: int, fault: _Fault | None
) -> list[Array]:
  """Weights, sums, and the peak and total that every row of threads starts with.

  Args:
    tail: as in :func:`paged_decode`.
    heads: rows times KV heads. rows: of threads.
    size: of a block of codewords, which may overlap another, but not the end.
    fault: what to do wrong.
  """
  group, count = tail.peak.shape[2] * tail.peak.shape[0] // heads, tail.sums.shape[2]
  weights = tail.weights.reshape(heads, group, count)
  sums = tail.sums.reshape(heads, count, -1)
  if count < size:
    more = ((0, 0), (0, 0), (0, size - count))
    weights = jnp.pad(weights, more)
    sums = jnp.pad(sums, (more[0], more[2], more[1]))
  peak, total = (x.reshape(heads, group, 1) for x in (tail.peak, tail.total))
  peak = jnp.broadcast_to(jnp.maximum(peak, _LOW), (heads, group, rows))
  total = jnp.pad(total, ((0, 0), (0, 0), (0, rows - 1)))  # of one row of threads
  return [weights, sums, peak, jnp.zeros_like(total) if fault == "no tail total" else total]


def _lanes(head_dim: int, itemsize: int) -> int:
  """Lanes that share a token, each with vectors of 16 bytes."""
  return min(_LANES, head_dim * itemsize // _VECTOR_BYTES)


def _rows(head_dim: int, itemsize: int) -> int:
  """Tokens that a warpgroup holds at once."""
  return _WARPS * _LANES // _lanes(head_dim, itemsize)


def _layout(head_dim: int, itemsize: int) -> Any:
  """[rows, D]: rows over warps and lanes, the head dimension over the other lanes and vectors."""
  lanes, vector = _lanes(head_dim, itemsize), _VECTOR_BYTES // itemsize
  inside, across = _LANES // lanes, lanes * vector
  if inside == 1:
    tiling = plgpu.Tiling(((_WARPS, across), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
  tiling = plgpu.Tiling(((_WARPS * inside, across), (inside, across), (vector,)))
  return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _body(
  *refs: Any,
  tiles: Tiles,
  rows: int,
  splits: int,
  tokens: int,
  codewords: int,
  fault: _Fault | None,
) -> None:
  """One CTA: some of the tokens of one row and KV head, and some codewords of the tail."""
  q, k, v, mask, *tail, out, peaks, totals, keys, values, parts, tops, ready = refs
  split, head = jax.lax.axis_index("split"), jax.lax.axis_index("head")
  group, d = q.shape[1:]
  stages, size = tiles.stages, tiles.steps * rows
  blocks = -(-tokens // size)
  share = -(-blocks // splits)
  first = split * share
  count = jnp.minimum(blocks - first, share)
  layout = _layout(d, keys.dtype.itemsize)
  by_row, by_dim = layout.reduce(1), layout.reduce(0)
  row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=by_row)

  def start(block):
    """Where a block lies: the last one reaches back, so that none passes the end."""
    return jnp.minimum((first + block) * size, tokens - size)

  def ask(block):
    @pl.when(block < count)
    def _():
      slot = jax.lax.rem(block, stages)
      here = pl.ds(start(block), size)
      plgpu.copy_gmem_to_smem(k.at[head, here], keys.at[slot], ready.at[slot])
      plgpu.copy_gmem_to_smem(v.at[head, here], values.at[slot], ready.at[slot])

  for block in range(stages):
    ask(jnp.int32(block))

  def wide(x, axis=0):
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (rows, d), (axis,)), layout)

  queries = [
    wide(plgpu.load(q.at[head, g], layout=by_dim, optimized=False), 1) for g in range(group)
  ]

  def step(block, carry):
    slot, base = jax.lax.rem(block, stages), start(block)
    known = (first + block) * size - base  # tokens of the block before
    seen = []
    for i in range(tiles.steps):
      here = mask.at[head, pl.ds(base + i * rows, rows)]
      counted = plgpu.load(here, layout=by_row, optimized=False)
      seen.append((counted != 0) & (row + i * rows >= known + int(fault == "mask")))
    if fault != "wait":
      plgpu.barrier_wait(ready.at[slot])

    logits = [[] for _ in range(group)]
    for i in range(tiles.steps):
      key = plgpu.load(keys.at[slot, pl.ds(i * rows, rows)], layout=layout, optimized=False)
      key = key.astype(jnp.float32)
      for g in range(group):
        product = jnp.sum(key * queries[g], axis=1)
        logits[g].append(jnp.where(seen[i], product, _LOW))
    peak, total, acc = (list(x) for x in carry)
    weights = [[] for _ in range(group)]
    for g in range(group):
      new = functools.reduce(jnp.maximum, logits[g], peak[g])
      shrink = jnp.exp(peak[g] - new)
      if fault == "tail scale":
        shrink = jnp.where(block == 0, jnp.ones_like(shrink), shrink)
      for i in range(tiles.steps):
        weights[g].append(jnp.where(seen[i], jnp.exp(logits[g][i] - new), 0.0))
      peak[g], total[g] = new, functools.reduce(jnp.add, weights[g], total[g] * shrink)
      if fault != "stale":
        acc[g] = acc[g] * wide(shrink)
    for i in range(tiles.steps):
      value = plgpu.load(values.at[slot, pl.ds(i * rows, rows)], layout=layout, optimized=False)
      value = value.astype(jnp.float32)
      for g in range(group):
        acc[g] = acc[g] + wide(weights[g][i]) * value
    if fault != "fence":
      plgpu.commit_smem()  # reads of this slot come before the copy that fills it anew
    ask(block + stages)
    return tuple(peak), tuple(total), tuple(acc)

  def full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  peak = tuple(full((rows,), _LOW, by_row) for _ in range(group))
  total = tuple(full((rows,), 0.0, by_row) for _ in range(group))
  acc = tuple(full((rows, d), 0.0, layout) for _ in range(group))
  if tail:
    weights, sums, begins, totals_of_tail = tail
    along = -(-codewords // size)
    portion = -(-along // splits)
    begin = split * portion
    mine = jnp.minimum(along - int(fault == "last codewords") - begin, portion)

    def add(block, acc):
      at = jnp.minimum((begin + block) * size, codewords - size)
      known = (begin + block) * size - at  # codewords of the block before
      acc = list(acc)
      for i in range(tiles.steps):
        here = pl.ds(at + i * rows, rows)
        line = plgpu.load(sums.at[head, here], layout=layout, optimized=False)
        for g in range(group):
          weight = plgpu.load(weights.at[head, g, here], layout=by_row, optimized=False)
          weight = jnp.where(row + i * rows >= known, weight, 0.0)
          acc[g] = acc[g] + wide(weight) * line
      return tuple(acc)

    acc = jax.lax.fori_loop(0, mine, add, acc)
    once = jnp.where((split == 0) | (fault == "tail total again"), 1.0, 0.0)
    peak, total = (
      tuple(plgpu.load(x.at[head, g], layout=by_row, optimized=False) for g in range(group))
      for x in (begins, totals_of_tail)
    )
    total = tuple(x * once for x in total)
  carry = peak, total, acc
  peak, total, acc = jax.lax.fori_loop(0, count, step, carry)
  for g in range(group):
    # Rows of threads meet in shared memory: outputs towards the largest of their peaks.
    mosaic_gpu.store(tops, peak[g])
    top = functools.reduce(jnp.maximum, [tops[r] for r in range(rows)])
    mosaic_gpu.store(parts, acc[g] * wide(jnp.exp(peak[g] - top)))
    lines = [plgpu.load(parts.at[r], layout=by_dim, optimized=False) for r in range(rows)]
    mosaic_gpu.store(out.at[head, split, g], functools.reduce(jnp.add, lines))
    mosaic_gpu.store(peaks.at[head, split, g], peak[g])
    mosaic_gpu.store(totals.at[head, split, g], total[g])
