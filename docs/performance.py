"""Print the figures of performance.md: small parts of a decode step on this machine's CPU.

  python docs/performance.py

Variants of one part run interleaved in one process; a figure is the median of nine, in ms.
"""

import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention, index

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
  """From a table of cells to slots: 8 segments of 1024 codewords, codes drawn by Zipf's law."""
  rng = np.random.default_rng(0)
  words, segments, page = 1024, 8, 16
  share = 1 / np.arange(1, words + 1)
  cells = np.concatenate(
    [
      segment * words + rng.choice(words, (1, kv_heads, tokens // segments), p=share / share.sum())
      for segment in range(segments)
    ],
    axis=-1,
  ).astype(np.int32)
  count = segments * words
  built, _ = jax.jit(
    lambda c: index.build(c, jnp.ones((1, tokens), bool), count=count, slots=tokens)
  )(jnp.asarray(cells))
  table = jnp.asarray(rng.normal(size=(1, kv_heads * group, count)), jnp.float32)
  granted = jnp.asarray([512], jnp.int32)
  counts = jnp.repeat(built.counts, group, axis=1)
  taken = jax.jit(index.select)(built, table, granted)
  chosen = jax.jit(index.selected)(built, taken)
  variants = {
    "cut by bisection (`index.cut`)": (index.cut, (table, counts, granted)),
    "argsort of the cells instead": (lambda t: jnp.argsort(-t, axis=-1), (table,)),
    "selected slots": (index.selected, (built, taken)),
    "pages that hold one": (lambda c: index.pages_of(c, page), (chosen,)),
  }
  measure(f"selection, {tokens} tokens, K={kv_heads}, G={group}, 8 x 1024 cells", variants)
  held = int(jax.jit(lambda c: index.pages_of(c, page))(chosen).sum())
  print(f"\n{int(chosen.sum())} tokens in {held} pages of {page}")


def main() -> None:
  print(f"jax {jax.__version__}, {os.cpu_count()} CPUs, backend {jax.default_backend()}")
  values(8192, 3, 3, 64)
  values(32768, 8, 4, 128)
  nearest()
  selection()


if __name__ == "__main__":
  main()
