"""The diagnostic methods against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.base import Geometry, PromptLayer
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.rope import RopeConfig, make_rope, rotate
from eval.ablation import TrueDistance, Unquantised

B, H, K, D, PROMPT, NEW, WINDOW, SINKS = 2, 4, 2, 8, 40, 3, 6, 2
LENGTHS = (40, 23)
GEOMETRY = Geometry(batch=B, layers=1, heads=H, kv_heads=K, head_dim=D, prompt=PROMPT, new=NEW)
ROPE = make_rope(RopeConfig(head_dim=D, theta=50.0))
RNG = np.random.default_rng(5)
KEYS, VALUES = RNG.normal(size=(2, B, PROMPT + NEW, K, D)).astype(np.float32)
QUERIES = RNG.normal(0, 2, size=(B, PROMPT + NEW, H, D)).astype(np.float32)


def turn(x, position):
  """One vector by one position, float64."""
  angle = position * np.asarray(ROPE.inv_freq, np.float64)
  a, b = np.split(np.asarray(x, np.float64), 2)
  return np.concatenate(
    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
  )


def brute(row, position, k, score):
  """Output ``[H, D]`` and chosen tokens of each KV head, one token at a time.

  Args:
    score: (query, token, KV head) to far score.
  """
  far = [t for t in range(SINKS, position + 1) if position - t >= WINDOW]
  chosen = [set() for _ in range(K)]
  for h in range(H):
    g = h // (H // K)
    ranked = sorted(far, key=lambda t: (-score(QUERIES[row, position, h], t, g), t))
    chosen[g] |= set(ranked[:k])
  out = np.zeros((H, D))
  for h in range(H):
    g = h // (H // K)
    read = [t for t in range(position + 1) if t not in far or t in chosen[g]]
    q = turn(QUERIES[row, position, h], position)
    logits = np.array([q @ turn(KEYS[row, t, g], t) for t in read]) / np.sqrt(D)
    weight = np.exp(logits - logits.max())
    out[h] = weight @ VALUES[row, read, g].astype(np.float64) / weight.sum()
  return out, chosen


def run(method):
  """Outputs ``[B, NEW, H, D]`` and statistics after the prompt, all new tokens at once."""
  positions = jnp.broadcast_to(jnp.arange(PROMPT, dtype=jnp.int32), (B, PROMPT))
  keys = jnp.asarray(KEYS[:, :PROMPT])
  lengths = jnp.asarray(LENGTHS, jnp.int32)
  prompt = PromptLayer(
    keys, rotate(keys, positions, ROPE), jnp.asarray(VALUES[:, :PROMPT]), lengths
  )
  state = method.absorb(method.init(GEOMETRY), prompt, layer=0)
  where = np.array(LENGTHS)[:, None] + np.arange(NEW)
  rows = np.arange(B)[:, None]
  q, k, v = (jnp.asarray(x[rows, where]) for x in (QUERIES, KEYS, VALUES))
  attend = jax.jit(
    lambda state, q, k, v, p: method.attend(state, q, k, v, positions=p, rope=ROPE, layer=0)
  )
  out, _, stats = attend(state, q, k, v, jnp.asarray(where, jnp.int32))
  return np.asarray(out), stats, where


def check(method, score_of):
  out, stats, where = run(method)
  for row in range(B):
    for step in range(NEW):
      position = int(where[row, step])
      k = int(method.budget.resolve(position + 1)[position + 1])
      expected, chosen = brute(row, position, k, score_of(row, position))
      np.testing.assert_allclose(out[row, step], expected, atol=2e-5)
      assert stats.selected[row, step].tolist() == [len(c) for c in chosen]


def test_unquantised_at_one_constant_distance():
  def score_of(row, position):
    return lambda q, t, g: turn(q, 11) @ KEYS[row, t, g].astype(np.float64)

  budget, far = Budget(ratio=0.15), FarPosition.constant(11)
  check(Unquantised(budget=budget, far=far, window=WINDOW, sinks=SINKS), score_of)


def test_unquantised_with_segments():
  far = FarPosition.segments(3, 2)

  def score_of(row, position):
    length = LENGTHS[row]
    edge = [round(WINDOW * (length / WINDOW) ** (i / 3)) for i in (3, 2, 1, 0)]
    edge[0] = length
    starts = [length - e for e in edge]  # of the prompt's segments, and where the last one ends

    def middle(t):
      for a, b in itertools.pairwise(starts):
        if a <= t < b:
          return (a + b - 1) // 2
      return starts[-1] + (t - starts[-1]) // 2 * 2  # spans of two, the lower middle

    return lambda q, t, g: turn(q, position - middle(t)) @ KEYS[row, t, g].astype(np.float64)

  check(Unquantised(budget=Budget(tokens=5), far=far, window=WINDOW, sinks=SINKS), score_of)


def _book(size):
  codewords = np.random.default_rng(9).normal(size=(1, K, size, D)).astype(np.float32)
  eye = jnp.broadcast_to(jnp.eye(D), (1, K, D, D))
  return make_codebook(jnp.asarray(codewords), eye)


def test_codewords_at_their_true_distance():
  book = _book(7)
  codewords = np.asarray(book.codewords[0], np.float64)

  def score_of(row, position):
    def score(q, t, g):
      nearest = np.argmin(((KEYS[row, t, g] - codewords[g]) ** 2).sum(-1))
      return turn(q, position) @ turn(codewords[g, nearest], t)

    return score

  method = TrueDistance(codebook=book, budget=Budget(ratio=0.15), window=WINDOW, sinks=SINKS)
  check(method, score_of)


def test_a_codeword_for_every_key_at_its_true_distance_is_the_oracle():
  size = B * (PROMPT + NEW)
  codewords = jnp.asarray(KEYS.reshape(size, K, D).swapaxes(0, 1)[None])
  book = make_codebook(codewords, jnp.broadcast_to(jnp.eye(D), (1, K, D, D)))
  options = {"budget": Budget(tokens=4), "window": WINDOW, "sinks": SINKS}
  ours, stats, _ = run(TrueDistance(codebook=book, **options))
  theirs, other, _ = run(Oracle(**options))
  np.testing.assert_allclose(ours, theirs, atol=1e-6)
  np.testing.assert_array_equal(stats.selected, other.selected)


@pytest.mark.parametrize("kind", ["unquantised", "true-distance"])
def test_the_whole_budget_is_exact_attention(kind):
  options = {"budget": Budget(ratio=1.0), "window": WINDOW, "sinks": SINKS}
  method = (
    Unquantised(**options) if kind == "unquantised" else TrueDistance(codebook=_book(7), **options)
  )
  out, _, where = run(method)
  for row in range(B):
    expected, _ = brute(row, int(where[row, 0]), PROMPT, lambda q, t, g: 0.0)
    np.testing.assert_allclose(out[row, 0], expected, atol=2e-5)
