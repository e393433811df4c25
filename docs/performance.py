"""Print the figures of performance.md: small parts of a decode step on this machine's CPU.

  python docs/performance.py

Variants of one part run interleaved in one process; a figure is the median of nine, in ms.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention, index, store
from a2ats_jax.ops.paged_decode import paged_decode
from a2ats_jax.ops.pages import FloatPages

ROUNDS = 9
HIGHEST = jax.lax.Precision.HIGHEST


def measure(title: str, variants: dict[str, tuple[Callable, tuple]]) -> None:
  """Compile every variant, then time them in turn."""
  compiled = {name: (jax.jit(f), args) for name, (f, args) in variants.items()}
  times: dict[str, list[float]] = {name: [] for name in variants}
  for f, args in compiled.values():
    jax.block_until_ready(f(*args))
  for _ in range(ROUNDS):
    for name, (f, args) in compiled.items():
      began = time.perf_counter()
      jax.block_until_ready(f(*args))
      times[name].append(1e3 * (time.perf_counter() - began))
  print(f"\n| {title} | ms |\n|---|---|")
  for name, taken in times.items():
    print(f"| {name} | {statistics.median(taken):.2f} |")


def values(tokens: int, kv_heads: int, group: int, dim: int) -> None:
  """Weights times values for one query row."""
  rng = np.random.default_rng(0)
  v = jnp.asarray(rng.normal(size=(1, kv_heads, tokens, dim)), jnp.float32)
  p = jnp.asarray(rng.random((1, 1, kv_heads * group, tokens)), jnp.float32)

  def einsum(order: str) -> Callable:
    def weigh(p, v):
      split = p.reshape(1, 1, kv_heads, group, tokens)
      return jnp.einsum(f"bskgt,bktd->{order}", split, v, precision=HIGHEST)

    return weigh

  variants = {
    "einsum to `bskgd`, queries before KV heads": (einsum("bskgd"), (p, v)),
    "einsum to `bksgd`, KV heads before queries": (einsum("bksgd"), (p, v)),
    "`attention.weigh`": (attention.weigh, (p, v)),
  }
  measure(f"values, {tokens} tokens, K={kv_heads}, G={group}, D={dim}, float32", variants)


def nearest() -> None:
  """Index of the largest of 1024 scores."""
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(512, 3, 64)), jnp.float32)
  words = jnp.asarray(rng.normal(size=(3, 1024, 64)), jnp.float32)

  def first(z, words):
    score = jnp.einsum("nkd,kcd->knc", z, words)
    best = score == jnp.max(score, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, jnp.arange(1024)[None, None], 1023), axis=-1)

  variants = {
    "argmax": (lambda z, w: jnp.argmax(jnp.einsum("nkd,kcd->knc", z, w), axis=-1), (z, words)),
    "maximum, comparison, minimum of indices": (first, (z, words)),
  }
  measure("nearest of 1024 codewords, 512 tokens, 3 heads of 64", variants)


def selection(tokens: int = 131072, kv_heads: int = 8, group: int = 4) -> None:
  """From a table of cells to page numbers: 8 segments of 1024 codewords, codes by a power law."""
  rng = np.random.default_rng(0)
  words, segments, page = 1024, 8, 16
  share = np.arange(1, words + 1) ** -0.44
  cells = np.concatenate(
    [
      segment * words + rng.choice(words, (1, kv_heads, tokens // segments), p=share / share.sum())
      for segment in range(segments)
    ],
    axis=-1,
  ).astype(np.int32)
  count = segments * words

  def build(cells):
    every = jnp.ones((1, tokens), bool)
    built, _ = index.build(cells, every, count=count, slots=tokens, page=page)
    layers = jax.tree.map(lambda x: x[None], built)
    return built, index.page_cells(layers, layer=0)

  built, pages = jax.jit(build)(jnp.asarray(cells))
  table = jnp.asarray(rng.normal(size=(1, kv_heads * group, count)), jnp.float32)
  granted = jnp.asarray([tokens * 3 // 100], jnp.int32)
  shared = jax.jit(index.kv_head_scores)(table[:, None], built.counts[:, None])[:, 0]
  taken = jax.jit(index.select)(built.counts, table, granted)
  numbers = partial(index.page_numbers, most=tokens)
  _, many = jax.jit(numbers)(pages, taken)
  slots = (built.cells.reshape(1, kv_heads, -1), built.ranks.reshape(1, kv_heads, -1), taken)
  variants = {
    "cut for every query head (`index.select`)": (index.select, (built.counts, table, granted)),
    "cut for every KV head": (index.select, (built.counts, shared, granted)),
    "scores of KV heads (`index.kv_head_scores`)": (
      lambda t, c: index.kv_head_scores(t[:, None], c[:, None]),
      (table, built.counts),
    ),
    "argsort of the cells instead of a cut": (lambda t: jnp.argsort(-t, axis=-1), (table,)),
    "the 512 best cells by `lax.top_k` instead": (lambda t: jax.lax.top_k(t, 512), (table,)),
    "page numbers (`index.page_numbers`)": (numbers, (pages, taken)),
    "marks of pages by every slot alone": (
      lambda *x: index.selected(*x).reshape(1, kv_heads, -1, page).any(axis=-1),
      slots,
    ),
  }
  measure(f"selection, {tokens} tokens, K={kv_heads}, G={group}, 8 x 1024 cells", variants)
  print(f"\n{int(taken.sum())} tokens in {int(many.sum())} pages of {page}")


def fetching(tokens: int = 131072, kv_heads: int = 8, group: int = 4, dim: int = 128) -> None:
  """Pages of 16 tokens out of a long store, and attention over them, a stage at a time."""
  rng, page = np.random.default_rng(0), 16
  some = rng.normal(size=(1, 1, kv_heads, 64, 2 * page * dim)).astype(np.float32)
  pages = jnp.tile(jnp.asarray(some), (1, 1, 1, tokens // page // 64, 1))
  q = jnp.asarray(rng.normal(size=(1, 1, kv_heads * group, dim)), jnp.float32)
  chosen = np.stack([np.sort(rng.choice(tokens // page, 512, False)) for _ in range(kv_heads)])
  ids = jnp.asarray(chosen[None].astype(np.int32))
  every = jnp.ones((1, kv_heads, 512, page), bool)

  def staged(stage: int, together: bool) -> Callable:
    def run(pages, ids, q):
      kept = store.KVStore(pages, page, False)
      table = pages.reshape(-1, 2 * page * dim)
      start = (jnp.arange(kv_heads, dtype=jnp.int32) * (tokens // page))[None, :, None]

      def fetch(here):
        if not together:
          return store.fetch(kept, here, layer=0)
        got = table.at[(here + start).reshape(-1)].get(mode="promise_in_bounds")
        got = got.reshape(1, kv_heads, stage, 2, page, dim)
        return FloatPages(got[:, :, :, 0], got[:, :, :, 1])

      def step(i, part):
        here = jax.lax.dynamic_slice_in_dim(ids, i * stage, stage, axis=2)
        new = paged_decode(q, fetch(here), every[:, :, :stage])
        return attention.merge([part, new])

      shape = q.shape[:3]
      nothing = attention.Part(jnp.zeros(q.shape), jnp.full(shape, -jnp.inf), jnp.zeros(shape))
      return attention.finish(jax.lax.fori_loop(0, 512 // stage, step, nothing))

    return run

  variants = {
    f"{stage} pages a stage, keys and values by {how}": (staged(stage, together), (pages, ids, q))
    for stage in (16, 64, 128, 512)
    for how, together in (("two gathers", False), ("one gather and two slices", True))
  }
  measure(f"512 pages of {tokens // page} for each of {kv_heads} KV heads, float32", variants)


def main() -> None:
  print(f"jax {jax.__version__}, {os.cpu_count()} CPUs, backend {jax.default_backend()}")
  values(8192, 3, 3, 64)
  values(32768, 8, 4, 128)
  nearest()
  selection()
  fetching()


if __name__ == "__main__":
  main()
