"""Ada-KV against a plain reading: heads of one layer that differ in size, and their attention."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods.adakv import AdaKV
from tests import cases
from tests.independent import turned
from tests.methods.test_qpruning import scores

SHAPES = {
  "pairs": dataclasses.replace(cases.PAIRS, new=8),
  "triples": dataclasses.replace(cases.PAIRS, heads=6, new=8),
}
METHOD = AdaKV(budget=Budget(tokens=9), window=4, kernel=3, safeguard=0.5)


def kept(method: AdaKV, cache, layer: int, row: int) -> list[np.ndarray]:
  """Of every KV head, the tokens that stay: its safe ones, then the best of any head."""
  score = scores(method, cache, layer, row)
  heads, length = score.shape
  allowed = min(method.budget.tokens, length)
  stays = np.zeros(score.shape, bool)
  for head in range(heads):
    stays[head, np.argsort(-score[head], kind="stable")[: int(allowed * method.safeguard)]] = True
  for place in np.argsort(-score.ravel(), kind="stable"):
    if stays.sum() < allowed * heads:
      stays[np.unravel_index(place, score.shape)] = True
  return [np.flatnonzero(row) for row in stays]


def compare(method: AdaKV, right: AdaKV, cache) -> set[int]:
  """Every step's outputs; the numbers of tokens that heads kept."""
  sizes = set()
  for layer, positions, out, _, stats, _ in cases.run_steps(method, cache, 6):
    for row, now in enumerate(positions[:, 0].tolist()):
      keys = turned(cache.k[layer, row, : now + 1], cache.rope)
      q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
      values = cache.v[layer, row, : now + 1].astype(np.float64)
      later = np.arange(int(cache.lengths[row]), now + 1)
      stay = kept(right, cache, layer, row)
      assert stats.read[row, 0].tolist() == [len(tokens) + len(later) for tokens in stay]
      sizes |= {len(tokens) for tokens in stay}
      for h, query in enumerate(q):
        head = h * keys.shape[1] // len(q)
        tokens = np.concatenate([stay[head], later])
        logit = keys[tokens, head] @ query * len(query) ** -0.5
        weight = np.exp(logit - logit.max())
        want = weight @ values[tokens, head] / weight.sum()
        np.testing.assert_allclose(out[row, 0, h], want, atol=1e-4, rtol=0)
  return sizes


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_plain_reading(shape, seed):
  """Ragged rows, one shorter than what may stay; heads of one layer keep different numbers."""
  cache = cases.draw_cache(SHAPES[shape], seed=seed, lengths=[40, 23, 5], rope="yarn")
  assert len(compare(METHOD, METHOD, cache)) > 3


@pytest.mark.parametrize(
  "wrong", [{"safeguard": 1.0}, {"window": 5}, {"kernel": 5}, {"budget": Budget(tokens=8)}], ids=str
)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(SHAPES["pairs"], seed=0, lengths=[40, 31, 12])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)


def test_all_safe_is_snapkv():
  """With every token safe heads keep as many as each other."""
  method = dataclasses.replace(METHOD, safeguard=1.0)
  cache = cases.draw_cache(SHAPES["pairs"], seed=1, lengths=[40, 23, 12])
  assert compare(method, method, cache) == {9}


@pytest.mark.parametrize("wrong", [{"safeguard": 1.5}, {"window": 0}, {"kernel": 2}], ids=str)
def test_bad_options_are_refused(wrong):
  with pytest.raises(UserError, match="adakv: "):
    dataclasses.replace(METHOD, **wrong)
