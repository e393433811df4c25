"""Shapes and random caches shared by the tests of the methods, and how a method runs over them."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.base import Geometry, Needs, PromptLayer, needs_of
from a2ats_jax.rope import Rope, RopeConfig, make_rope, rotate
from tests import independent

# Outputs are means of values of size one, computed in float32 by one side and float64 by the other.
TOLERANCE = 2e-5
# Scores of size ten in float32: cells closer than this at the cut may swap.
SAFE_GAP = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of a cache, in the letters of the glossary; ``prompt`` and ``new`` as in Geometry."""

  batch: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  codewords: int
  prompt: int
  new: int

  @property
  def geometry(self) -> Geometry:
    sizes = dataclasses.asdict(self)
    del sizes["codewords"]
    return Geometry(**sizes)


PAIRS = Shape(batch=3, layers=2, heads=4, kv_heads=2, head_dim=8, codewords=6, prompt=40, new=6)
TRIPLE = Shape(batch=2, layers=1, heads=3, kv_heads=1, head_dim=4, codewords=3, prompt=17, new=6)
SINGLES = Shape(batch=1, layers=2, heads=2, kv_heads=2, head_dim=6, codewords=9, prompt=29, new=6)
SHAPES = {"pairs": PAIRS, "triple": TRIPLE, "singles": SINGLES}

STYLES = ("spread", "skewed", "constant", "no query")


def rope_named(name: str, head_dim: int) -> Rope:
  """Plain, or with a multiplier (yarn), or with changed frequencies (llama3)."""
  scaling = {
    "plain": {},
    "yarn": {"scaling": "yarn", "factor": 4.0, "original_context": 32, "attention_factor": 1.2},
    "llama3": {"scaling": "llama3", "factor": 8.0, "original_context": 64},
  }[name]
  return make_rope(RopeConfig(head_dim=head_dim, theta=100.0, **scaling))


def books(shape: Shape, seed: int = 0) -> Codebook:
  """A codebook for every layer and head, each with a metric of its own."""
  rng = np.random.default_rng([seed, 7])
  lead, size = (shape.layers, shape.kv_heads), shape.head_dim
  codewords = rng.normal(size=(*lead, shape.codewords, size))
  whitener = np.tril(rng.normal(size=(*lead, size, size)))
  diagonal = np.arange(size)
  whitener[..., diagonal, diagonal] = 0.5 + np.abs(whitener[..., diagonal, diagonal])
  return make_codebook(jnp.asarray(codewords, jnp.float32), jnp.asarray(whitener, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Cache:
  """Queries, keys and values of every position before rotary embedding, prompt and later.

  Attributes:
    q, k, v: ``[L, B, T, heads, D]`` float32, by position.
    codes: of the keys, ``[L, B, T, K]``, encoded independently.
    lengths: of the prompts.
    rope: what they are rotated with.
    book: the codebooks.
    made: how it was drawn, which is all that a report of a failure shows.
  """

  made: str
  shape: Shape
  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  codes: np.ndarray
  lengths: np.ndarray
  rope: Rope
  book: Codebook

  def __repr__(self) -> str:
    return self.made


def encode_rows(keys: np.ndarray, book: Codebook) -> tuple[np.ndarray, np.ndarray]:
  """Codes and margins ``[L, B, T, K]`` of keys ``[L, B, T, K, D]``, encoded independently."""
  codes, margins = np.empty(keys.shape[:-1], np.int64), np.empty(keys.shape[:-1])
  for layer in range(keys.shape[0]):
    for row in range(keys.shape[1]):
      for head in range(keys.shape[3]):
        whitener = np.asarray(book.whitener[layer, head], np.float64)
        place = (layer, row, slice(None), head)
        codes[place], margins[place] = independent.encode(
          keys[place], book.codewords[layer, head], whitener @ whitener.T
        )
  return codes, margins


def draw_cache(
  shape: Shape, *, seed: int, lengths: list[int], style: str = "spread", rope: str = "plain"
) -> Cache:
  """A random cache.

  Args:
    lengths: of each row's prompt, 1 to ``shape.prompt``.
    style: keys ``spread`` at random, ``skewed`` to few codewords, all near one codeword
      (``constant``), or all scores equal (``no query``).
  """
  rng = np.random.default_rng(seed)
  book = books(shape, seed)
  tokens = shape.prompt + shape.new
  lead = (shape.layers, shape.batch, tokens)
  q = rng.normal(size=(*lead, shape.heads, shape.head_dim))
  k = rng.normal(size=(*lead, shape.kv_heads, shape.head_dim))
  v = rng.normal(size=(*lead, shape.kv_heads, shape.head_dim))
  if style == "no query":
    q[:] = 0
  if style in ("skewed", "constant"):
    which = rng.geometric(0.6, size=(*lead, shape.kv_heads)) - 1
    which = np.minimum(which, 0 if style == "constant" else shape.codewords - 1)
    chosen = np.take_along_axis(
      np.asarray(book.codewords)[:, None, None], which[..., None, None], axis=4
    )
    k = chosen[..., 0, :] + 0.01 * k
  # Keys that are as near to one codeword as to another would be a coin toss: move them onto one.
  codes, margins = encode_rows(k.astype(np.float32), book)
  nearest = np.take_along_axis(
    np.asarray(book.codewords)[:, None, None], codes[..., None, None], axis=4
  )
  k = np.where((margins < SAFE_GAP)[..., None], nearest[..., 0, :], k)
  return Cache(
    made=f"draw_cache({shape}, {seed=}, {lengths=}, {style=}, {rope=})",
    shape=shape,
    q=q.astype(np.float32),
    k=k.astype(np.float32),
    codes=codes,
    v=v.astype(np.float32),
    lengths=np.asarray(lengths, np.int32),
    rope=rope_named(rope, shape.head_dim),
    book=book,
  )


@jax.jit
def absorb(method, state, prompt, layer):
  """:meth:`Method.absorb`, compiled once for each method's options."""
  return method.absorb(state, prompt, layer=layer)


@jax.jit
def attend(method, state, q, k, v, positions, rope, layer):
  """:meth:`Method.attend`, compiled once for each method's options.

  Returns:
    The output, the state, the statistics, and what ``select`` of the new state says if the method
    has one.
  """
  options = {"positions": positions, "rope": rope, "layer": layer}
  out, state, stats = method.attend(state, q, k, v, **options)
  picked = method.select(state, q, **options) if hasattr(method, "select") else None
  return out, state, stats, picked


def prefilled(method, cache: Cache):
  """The state after every layer of the prompts was absorbed; padding slots hold numbers."""
  state, needs = method.init(cache.shape.geometry), needs_of(method)
  if type(method) is A2ATSReference:  # absorbing depends on few options: fewer compilations
    method = dataclasses.replace(method, budget=Budget(tokens=0), tail="none")
  for layer in range(cache.shape.layers):
    piece = prompt_layer(cache, layer, needs)
    state = absorb(method, state, piece, jnp.asarray(layer, jnp.int32))
  return state


def prompt_layer(cache: Cache, layer: int, needs: Needs) -> PromptLayer:
  """What a prefill hands over of one layer; the attention it sums is the naive causal one."""
  prompt, batch = cache.shape.prompt, cache.shape.batch
  positions = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), (batch, prompt))
  keys = jnp.asarray(cache.k[layer, :, :prompt])
  queries, sums = None, None
  if needs.queries:
    place = cache.lengths[:, None] - needs.queries + np.arange(needs.queries)
    last = cache.q[layer][np.arange(batch)[:, None], np.maximum(place, 0)]
    last = rotate(jnp.asarray(last), jnp.asarray(place, jnp.int32), cache.rope)
    queries = jnp.where(jnp.asarray(place >= 0)[..., None, None], last, 0)
  if needs.sums:
    every = rotate(jnp.asarray(cache.q[layer, :, :prompt]), positions, cache.rope)
    sums = np.zeros((batch, cache.shape.heads, prompt), np.float32)
    rotated = np.asarray(rotate(keys, positions, cache.rope), np.float64)
    for row, length in enumerate(cache.lengths):
      for head in range(cache.shape.heads):
        key = rotated[row, :length, head * cache.shape.kv_heads // cache.shape.heads]
        logits = np.asarray(every, np.float64)[row, :length, head] @ key.T
        logits = np.where(np.tri(length, dtype=bool), logits * key.shape[1] ** -0.5, -np.inf)
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        sums[row, head, :length] = (weight / weight.sum(axis=1, keepdims=True)).sum(axis=0)
    sums = jnp.asarray(sums)
  return PromptLayer(
    keys=keys,
    rotated=rotate(keys, positions, cache.rope),
    values=jnp.asarray(cache.v[layer, :, :prompt]),
    lengths=jnp.asarray(cache.lengths),
    queries=queries,
    sums=sums,
  )


def tokens_at(cache: Cache, layer: int, positions: np.ndarray):
  """q, k and v at ``[B, S]`` positions; anything for padding (-1)."""
  rows = np.arange(len(positions))[:, None]
  return tuple(jnp.asarray(x[layer][rows, positions]) for x in (cache.q, cache.k, cache.v))


def step_positions(cache: Cache, step: int, count: int = 1) -> np.ndarray:
  """Positions of ``count`` tokens from a decode step on, ``[B, count]``."""
  return (cache.lengths[:, None] + step + np.arange(count)).astype(np.int32)


class Ran(NamedTuple):
  """One layer of one decode step; ``positions [B, 1]``, the rest from :func:`attend`."""

  layer: int
  positions: np.ndarray
  out: jax.Array
  state: Any
  stats: Any
  picked: Any


def run_steps(method, cache: Cache, steps: int, *, step=attend) -> Iterator[Ran]:
  """Decode ``steps`` tokens of every row, layer by layer."""
  state = prefilled(method, cache)
  for i in range(steps):
    positions = step_positions(cache, i)
    for layer in range(cache.shape.layers):
      out, state, stats, picked = step(
        method,
        state,
        *tokens_at(cache, layer, positions),
        jnp.asarray(positions),
        cache.rope,
        jnp.asarray(layer, jnp.int32),
      )
      yield Ran(layer, positions, out, state, stats, picked)


def expected_step(
  method, cache: Cache, layer: int, row: int, position: int, **changes
) -> independent.Step:
  """What the independent step says of one row, for the options of an A2ATS or oracle method."""
  tokens = position + 1
  budget: Budget = method.budget
  far = getattr(method, "far", FarPosition.constant())
  segments = None
  if far.distance is None:
    segments = independent.Segments(far.prompt_segments, far.span)
  options = {
    "k": independent.granted(tokens, budget.ratio, budget.tokens),
    "scale": float(cache.rope.scale),
    "window": method.window,
    "sinks": method.sinks,
    "distance": far.distance,
    "segments": segments,
    "prompt": int(cache.lengths[row]),
    "tail": getattr(method, "tail", "none") == "centroid",
    "exact_scores": method.name == "oracle",
    "shared": budget.per == "kv_head",
  } | changes
  return independent.decode_step(
    cache.q[layer, row, position],
    cache.k[layer, row, :tokens],
    cache.v[layer, row, :tokens],
    cache.codes[layer, row, :tokens],
    np.asarray(cache.book.codewords[layer]),
    np.asarray(cache.rope.inv_freq, np.float64),
    **options,
  )


def assert_close(got, want, atol: float = 0.0) -> None:
  """Two pytrees hold the same numbers, up to ``atol`` absolute."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, two, atol=atol, rtol=0)
