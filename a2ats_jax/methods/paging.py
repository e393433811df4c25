"""Attention over chosen tokens of a store's pages, fetched a stage at a time."""

from collections.abc import Callable

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


def stage_of(granted: int, per: Per, *, page: int, most: int) -> int:
  """F, pages that each KV head fetches at once: about a third of what it needs, and at least eight.

  So that few pages are moved in vain, and there are few waits. Chosen tokens lie in about one and a
  half times the pages that they would fill, and those of a group whose query heads have budgets of
  their own in three to four times as many (docs/performance.md).

  Args:
    granted: tokens at most.
    per: whose tokens these are.
    page: P.
    most: pages that there are, or that the buffer holds.
  """
  filled = -(-granted // page)
  third = filled if per == "query_head" else -(-filled // 2)
  return max(1, min(max(third, 8), most))


def attend_pages(
  store: paged.KVStore,
  q: Float[Array, "B 1 H D"],
  ids: Int[Array, "B K N"],
  count: Int[Array, "B K"],
  chosen: Callable[[Int[Array, "B K F"]], Bool[Array, "B K F P"]],
  *,
  stage: int,
  layer: int | Array,
  start: attention.Part | None = None,
) -> tuple[attention.Part, Float[Array, "B K"]]:
  """One query's attention over the chosen tokens of the first ``count`` pages, and bytes moved.

  Args:
    q: rotated.
    ids, count, stage, start: as in :func:`in_stages`.
    chosen: which tokens of some pages to attend to.
  """

  def decode(pages: Pages, here: Array, used: Array) -> attention.Part:
    return paged_decode(q, pages, chosen(here) & used[..., None])

  return in_stages(store, q, ids, count, decode, stage=stage, layer=layer, start=start)


def in_stages(
  store: paged.KVStore,
  q: Float[Array, "B 1 H D"],
  ids: Int[Array, "B K N"],
  count: Int[Array, "B K"],
  decode: Callable[[Pages, Int[Array, "B K F"], Bool[Array, "B K F"]], attention.Part],
  *,
  stage: int,
  layer: int | Array,
  start: attention.Part | None = None,
) -> tuple[attention.Part, Float[Array, "B K"]]:
  """What ``decode`` makes of the first ``count`` pages, merged over stages, and bytes moved.

  As many stages as the KV head with the most pages needs; the buffer holds one.

  Args:
    ids: page numbers; places from ``count`` on hold any page.
    decode: attention of q over the pages of one stage: the pages, their numbers, and which of them
      count.
    stage: F, pages fetched at once.
    start: attention to other tokens, which the stages are merged into; nothing if not given.
  """
  ids = jnp.pad(ids, ((0, 0), (0, 0), (0, -ids.shape[2] % stage)))
  stages = (jnp.max(count) + stage - 1) // stage

  def step(done: Array, part: attention.Part) -> attention.Part:
    here = jax.lax.dynamic_slice_in_dim(ids, done * stage, stage, axis=2)
    place = done * stage + jnp.arange(stage, dtype=jnp.int32)
    used = place[None, None] < count[..., None]
    new = decode(paged.fetch(store, here, layer=layer), here, used)
    return attention.merge([part, new])

  if start is None:
    none = jnp.zeros(q.shape[:3])
    start = attention.Part(jnp.zeros(q.shape, jnp.float32), none - jnp.inf, none)
  part = jax.lax.fori_loop(0, stages, step, start)
  moved = (stages * (stage * store.page_bytes)).astype(jnp.float32)
  return part, jnp.broadcast_to(moved, count.shape)
