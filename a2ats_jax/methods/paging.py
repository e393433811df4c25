"""Attention over chosen tokens of a store's pages, fetched a stage at a time.

KV heads need different numbers of pages. So the pages of each row and KV head are cut into blocks,
and a stage fetches and attends to the next blocks, whosever they are: few pages are moved in vain.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax import store as paged
from a2ats_jax.budget import Per
from a2ats_jax.ops.paged_decode import paged_decode
from a2ats_jax.ops.pages import Pages
from a2ats_jax.typing import Array, Bool, Float, Int

STAGE_BYTES = 8 << 20
"""At most, of the buffer that pages are fetched to. Chosen on a CPU, where one of twice the size is
fresh memory at every step, up to a quarter of its time (docs/performance.md)."""
_BLOCK = 16  # pages of a block at most
_STAGES = 3  # that a step's pages are about to take
_PARTS = 4  # of a stage, fetched one at a time where less than a stage is left


class Stage(NamedTuple):
  """The buffer that pages are fetched to.

  Attributes:
    blocks: W, fetched at once, each of one row and KV head.
    size: F, pages of a block.
  """

  blocks: int
  size: int

  @property
  def part(self) -> int:
    """Blocks that are fetched at once where fewer than W are left."""
    return max(1, self.blocks // _PARTS)

  def moved(self, blocks: int) -> int:
    """Pages fetched where so many blocks are needed."""
    left = blocks % self.blocks
    return (blocks - left + -(-left // self.part) * self.part) * self.size


class Blocks(NamedTuple):
  """What is fetched at once.

  Attributes:
    heads: of every block, ``row * K + KV head``.
    ids: its pages.
    used: which of these count.
  """

  heads: Int[Array, "W"]
  ids: Int[Array, "W F"]
  used: Bool[Array, "W F"]


def needed(granted: int, per: Per, *, page: int) -> int:
  """Pages that a KV head is expected to need.

  Chosen tokens lie in about one and a half times the pages that they would fill, and those of a
  group whose query heads have budgets of their own in three to four times as many
  (docs/performance.md).

  Args:
    granted: tokens at most.
    per: whose tokens these are.
    page: P.
  """
  filled = -(-granted // page)
  return 3 * filled if per == "query_head" else -(-3 * filled // 2)


def stage_of(need: int, *, heads: int, pages: int, most: int) -> Stage:
  """About a third of what is needed, in blocks of eight to sixteen pages if there are as many.

  Args:
    need: pages of each KV head, see :func:`needed`.
    heads: rows times KV heads.
    pages: that each has, N.
    most: pages in the buffer.
  """
  block = max(1, min(max(need // _STAGES, _BLOCK // 2), _BLOCK, pages, most))
  blocks = -(-heads * min(need, pages) // (_STAGES * block))
  return Stage(max(1, min(blocks, most // block)), block)


def attend_pages(
  store: paged.KVStore,
  q: Float[Array, "B 1 H D"],
  ids: Int[Array, "B K listed"],
  count: Int[Array, "B K"],
  chosen: Callable[[Blocks], Bool[Array, "W 1 F P"]],
  *,
  stage: Stage,
  layer: int | Array,
  start: attention.Part | None = None,
) -> tuple[attention.Part, Float[Array, "B K"]]:
  """One query's attention over the chosen tokens of the first ``count`` pages, and bytes moved.

  Args:
    q: rotated.
    ids, count, stage, start: as in :func:`in_stages`.
    chosen: which tokens of some pages to attend to.
  """

  def decode(q: Array, pages: Pages, blocks: Blocks) -> attention.Part:
    return paged_decode(q, pages, chosen(blocks) & blocks.used[:, None, :, None])

  return in_stages(store, q, ids, count, decode, stage=stage, layer=layer, start=start)


def in_stages(
  store: paged.KVStore,
  q: Float[Array, "B 1 H D"],
  ids: Int[Array, "B K listed"],
  count: Int[Array, "B K"],
  decode: Callable[[Float[Array, "W 1 G D"], Pages, Blocks], attention.Part],
  *,
  stage: Stage,
  layer: int | Array,
  start: attention.Part | None = None,
) -> tuple[attention.Part, Float[Array, "B K"]]:
  """What ``decode`` makes of the first ``count`` pages, merged over stages, and bytes moved.

  The buffer holds a stage. Where less than a stage is left, a quarter is fetched at a time. What
  the last quarter holds beyond the blocks needed is fetched too, and its bytes are shared out among
  rows and KV heads. Which blocks meet in a stage depends on all rows, so that sums of a row may
  round otherwise beside other rows.

  Args:
    ids: page numbers; places from ``count`` on hold any page.
    decode: attention over pages fetched together, given as those of one KV head in each of W rows,
      as the queries are: the queries of each block's KV head, its pages, and which these are.
    stage: its size.
    start: attention to other tokens, which the stages are merged into; nothing if not given.
  """
  size = stage.size
  b, kv_heads, _ = ids.shape
  heads = b * kv_heads
  rows = q.reshape(heads, 1, -1, q.shape[3])
  held = count.reshape(heads)
  ids = jnp.pad(ids.reshape(heads, -1), ((0, 0), (0, -ids.shape[2] % size)))
  ids = ids.reshape(heads, -1, size)
  needs = (held + size - 1) // size
  upto = jnp.cumsum(needs)
  stages = upto[-1] // stage.blocks
  whole = stages * stage.blocks
  parts = (upto[-1] - whole + stage.part - 1) // stage.part

  def blocks_of(first: Array, many: int) -> Blocks:
    number = first + jnp.arange(many, dtype=jnp.int32)
    head = jnp.sum(number[:, None] >= upto[None], axis=1, dtype=jnp.int32)
    head = jnp.minimum(head, heads - 1)  # past the last block
    block = jnp.minimum(number - (upto - needs)[head], ids.shape[1] - 1)
    place = block[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    used = (place < held[head][:, None]) & (number < upto[-1])[:, None]
    return Blocks(head, ids[head, block], used)

  def add(part: attention.Part, blocks: Blocks) -> attention.Part:
    pages = paged.fetch_blocks(store, blocks.heads, blocks.ids, layer=layer)
    new = decode(rows[blocks.heads], pages, blocks)
    return attention.merge_rows(part, new, blocks.heads)

  if start is None:
    none = jnp.zeros((heads, 1, rows.shape[2]))
    start = attention.Part(jnp.zeros(rows.shape, jnp.float32), none - jnp.inf, none)
  part = jax.tree.map(lambda x: x.reshape(heads, 1, rows.shape[2], *x.shape[3:]), start)
  part = jax.lax.fori_loop(
    0, stages, lambda i, x: add(x, blocks_of(i * stage.blocks, stage.blocks)), part
  )
  part = jax.lax.fori_loop(
    0, parts, lambda i, x: add(x, blocks_of(whole + i * stage.part, stage.part)), part
  )
  part = jax.tree.map(lambda x: x.reshape(b, 1, q.shape[2], *x.shape[3:]), part)
  spare = (whole + parts * stage.part - upto[-1]).astype(jnp.float32) / heads
  moved = (needs.astype(jnp.float32) + spare) * float(size * store.page_bytes)
  return part, moved.reshape(b, kv_heads)
