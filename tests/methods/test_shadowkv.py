"""ShadowKV against a plain reading of it in float64: SVD, landmarks, outliers, chunks."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.methods.shadowkv import ShadowKV
from tests import cases
from tests.independent import turned

METHOD = ShadowKV(budget=Budget(ratio=0.4), rank=5, chunk=4, outliers=2, local=3)
SHAPES = {
  "pairs": dataclasses.replace(cases.PAIRS, new=8),
  "triple": dataclasses.replace(cases.TRIPLE, prompt=38, new=8),
}


def expected(method: ShadowKV, cache: cases.Cache, layer: int, row: int, position: int):
  """Output ``[H, D]``, tokens read of every KV head, and how close the choice was."""
  p, length = method.chunk, int(cache.lengths[row])
  chunks = max(length - method.local, 0) // p
  k, v = cache.k[layer, row, : position + 1], cache.v[layer, row, : position + 1]
  exact = turned(k, cache.rope)
  flat = k[: chunks * p].astype(np.float64).reshape(chunks * p, k.shape[1] * k.shape[2])
  u, s, vt = np.linalg.svd(flat, full_matrices=False)
  r = method.rank
  rebuilt = ((u[:, :r] * s[:r]) @ vt[:r]).reshape(chunks * p, *k.shape[1:])
  rebuilt = turned(rebuilt, cache.rope)
  q = turned(cache.q[layer, row, position][None], cache.rope, position)[0]
  heads, kv_heads = q.shape[0], k.shape[1]
  out, read, gap = np.zeros(q.shape), [], np.inf
  for g in range(kv_heads):
    pieces = exact[: chunks * p, g].reshape(chunks, p, k.shape[2])
    marks = pieces.mean(axis=1)
    norms = np.linalg.norm(pieces, axis=-1) * np.linalg.norm(marks, axis=-1)[:, None]
    like = ((pieces * marks[:, None]).sum(axis=-1) / norms).min(axis=1)
    special = sorted(range(chunks), key=lambda c: like[c])[: method.outliers]
    others = [c for c in range(chunks) if c not in special]
    group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
    scores = np.zeros(chunks)
    for h in group:
      logit = marks @ q[h] * q.shape[1] ** -0.5
      weight = np.exp(logit - logit.max(initial=0.0))
      scores = np.maximum(scores, weight / max(weight[others].sum(), 1e-300))
    granted = int(method.budget.ratio * (position + 1)) // p
    ranked = sorted(others, key=lambda c: -scores[c])
    picked = ranked[:granted]
    if 0 < granted < len(ranked):
      gap = min(gap, scores[ranked[granted - 1]] - scores[ranked[granted]])
    tokens = [c * p + i for c in special for i in range(p)]
    tokens += list(range(chunks * p, position + 1))
    far = [c * p + i for c in picked for i in range(p)]
    keys = np.concatenate([exact[tokens, g], rebuilt[far, g]])
    values = np.concatenate([v[tokens, g], v[far, g]]).astype(np.float64)
    read.append(len(tokens) + len(far))
    for h in group:
      logit = keys @ q[h] * q.shape[1] ** -0.5
      weight = np.exp(logit - logit.max())
      out[h] = weight @ values / weight.sum()
  return out, read, gap


def compare(method: ShadowKV, right: ShadowKV, cache: cases.Cache) -> None:
  for layer, positions, out, _, stats, _ in cases.run_steps(method, cache, 6):
    for row, position in enumerate(positions[:, 0].tolist()):
      want, read, gap = expected(right, cache, layer, row, position)
      if gap > 1e-5:
        np.testing.assert_allclose(out[row, 0], want, atol=2e-4, rtol=0)
        assert stats.read[row, 0].tolist() == read


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_plain_reading(shape, seed):
  lengths = [SHAPES[shape].prompt, 21, 2][: SHAPES[shape].batch]
  cache = cases.draw_cache(SHAPES[shape], seed=seed, lengths=lengths, rope="yarn")
  method = METHOD if shape == "pairs" else dataclasses.replace(METHOD, rank=2)
  compare(method, method, cache)


@pytest.mark.parametrize(
  "wrong", [{"rank": 4}, {"outliers": 1}, {"local": 7}, {"budget": Budget(ratio=0.2)}], ids=str
)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(SHAPES["pairs"], seed=0, lengths=[40, 35, 31])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)
