"""ThinK's outputs with channels dropped, against a plain reading in float64."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.methods.think import ThinK
from tests import cases
from tests.independent import turned

SHAPES = {
  "pairs": dataclasses.replace(cases.PAIRS, new=12),
  "triple": dataclasses.replace(cases.TRIPLE, prompt=30, new=12, head_dim=8),
}
METHOD = ThinK(prune=0.4, window=6)


def expected(method: ThinK, cache, layer: int, row: int, now: int) -> np.ndarray:
  """``[H, D]``: keys before the window lose the channels of the least product of mean squares."""
  keys = turned(cache.k[layer, row, : now + 1], cache.rope)
  queries = turned(cache.q[layer, row, : now + 1], cache.rope)
  values, length = cache.v[layer, row, : now + 1].astype(np.float64), int(cache.lengths[row])
  kv_heads, d = keys.shape[1:]
  heads, begin = queries.shape[1], max(length - method.window, 0)
  out = np.empty((heads, d))
  for g in range(kv_heads):
    group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
    asked = np.mean([np.mean(queries[begin:length, h] ** 2, axis=0) for h in group], axis=0)
    score = asked * np.mean(keys[:length, g] ** 2, axis=0)
    thin = keys[:, g].copy()
    thin[:begin, np.argsort(score)[: int(method.prune * d)]] = 0
    for h in group:
      logit = thin @ queries[now, h] * d**-0.5
      weight = np.exp(logit - logit.max())
      out[h] = weight @ values[:, g] / weight.sum()
  return out


def compare(method: ThinK, right: ThinK, cache) -> None:
  for layer, positions, out, _, _, _ in cases.run_steps(method, cache, 10):
    for row, now in enumerate(positions[:, 0].tolist()):
      want = expected(right, cache, layer, row, now)
      np.testing.assert_allclose(out[row, 0], want, atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_plain_reading(shape, seed):
  """Groups of two and three; a prompt no longer than the window stays whole."""
  lengths = [30, 17, 4][: SHAPES[shape].batch]
  cache = cases.draw_cache(SHAPES[shape], seed=seed, lengths=lengths, rope="yarn")
  compare(METHOD, METHOD, cache)


@pytest.mark.parametrize("wrong", [{"prune": 0.2}, {"window": 7}], ids=str)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(SHAPES["pairs"], seed=0, lengths=[30, 17, 4])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)
