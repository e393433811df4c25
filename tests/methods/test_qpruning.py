"""QPruningKV against a plain reading: which tokens stay, and what their packed numbers are."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods.qpruning import QPruningKV
from tests import cases
from tests.independent import turned
from tests.methods.test_kivi import coarse

SHAPES = {
  "pairs": dataclasses.replace(cases.PAIRS, new=12),
  "triple": dataclasses.replace(cases.TRIPLE, prompt=40, head_dim=8, new=12),
}
METHOD = QPruningKV(budget=Budget(tokens=4), bits=4, group=4, window=5, kernel=3)


def scores(method, cache, layer: int, row: int) -> np.ndarray:
  """``[K, length]``: what the last queries of each KV head's group give to every token, pooled with
  its neighbours; the window's own tokens before all others, the latest first."""
  length = int(cache.lengths[row])
  keys = turned(cache.k[layer, row, :length], cache.rope)
  queries = turned(cache.q[layer, row, :length], cache.rope)
  group = queries.shape[1] // keys.shape[1]
  first, half = max(length - method.window, 0), method.kernel // 2
  out = np.zeros((keys.shape[1], length))
  for h in range(queries.shape[1]):
    head, votes = h // group, np.zeros(length)
    for now in range(first, length):
      logit = keys[: now + 1, head] @ queries[now, h] * keys.shape[2] ** -0.5
      weight = np.exp(logit - logit.max())
      votes[: now + 1] += weight / weight.sum()
    votes[first:] = 0
    for p in range(length):
      out[head, p] += votes[max(p - half, 0) : p + half + 1].max() / method.window / group
  out[:, first:] = 1e6 + np.arange(first, length)
  return out


def kept(method: QPruningKV, cache, layer: int, row: int) -> list[np.ndarray]:
  """Of every KV head, the prompt tokens that stay, by position."""
  allowed = min(method.budget.tokens * 16 // method.bits, int(cache.lengths[row]))
  every = scores(method, cache, layer, row)
  return [np.sort(np.argsort(-score, kind="stable")[:allowed]) for score in every]


def quantised(x: np.ndarray, method: QPruningKV, by_channel: bool) -> np.ndarray:
  """Groups of channels of a token, or of tokens of a channel, which are filled up with the last."""
  if not by_channel:
    return coarse(x.T, method.bits, method.group).T
  filled = np.concatenate([x, np.repeat(x[-1:], -len(x) % method.group, axis=0)])
  return coarse(filled, method.bits, method.group)[: len(x)]


def expected(method: QPruningKV, cache, layer: int, row: int, now: int) -> np.ndarray:
  length = int(cache.lengths[row])
  keys = turned(cache.k[layer, row, : now + 1], cache.rope)
  values = cache.v[layer, row, : now + 1].astype(np.float64)
  q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
  group, stay, out = len(q) // keys.shape[1], kept(method, cache, layer, row), np.empty(q.shape)
  for h, query in enumerate(q):
    mine = stay[h // group]
    k, v = keys[:, h // group], values[:, h // group]
    old_k = quantised(k[mine], method, method.by_channel == "keys")
    old_v = quantised(v[mine], method, method.by_channel == "values")
    k, v = np.concatenate([old_k, k[length:]]), np.concatenate([old_v, v[length:]])
    logit = k @ query * len(query) ** -0.5
    weight = np.exp(logit - logit.max())
    out[h] = weight @ v / weight.sum()
  return out


def compare(method: QPruningKV, right: QPruningKV, cache) -> None:
  count = np.zeros((cache.shape.heads, cache.shape.head_dim))
  for layer, positions, out, state, _, _ in cases.run_steps(method, cache, 10):
    for row, now in enumerate(positions[:, 0].tolist()):
      held = np.asarray(state.positions)[layer, row]
      for head, want in enumerate(kept(right, cache, layer, row)):
        assert held[head][held[head] >= 0].tolist() == want.tolist()
      off = np.abs(np.asarray(out[row, 0]) - expected(right, cache, layer, row, now))
      assert np.mean(off) < 2e-3
      count += off > 1e-3
  # A number on the edge of two codes may fall either way, so a few outputs of a channel may differ.
  assert np.max(count) <= 10


@pytest.mark.parametrize("by_channel", ["values", "keys"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_plain_reading(shape, bits, by_channel):
  """Groups of two and three; a prompt no longer than what may stay, and one of a single token."""
  method = dataclasses.replace(METHOD, bits=bits, by_channel=by_channel)
  lengths = [40, 7, 1][: SHAPES[shape].batch]
  compare(method, method, cases.draw_cache(SHAPES[shape], seed=bits, lengths=lengths, rope="yarn"))


@pytest.mark.parametrize(
  "wrong",
  [{"bits": 8}, {"group": 8}, {"by_channel": "keys"}, {"window": 6}, {"kernel": 5}],
  ids=str,
)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(SHAPES["pairs"], seed=1, lengths=[40, 31, 12])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)


def test_the_budget_is_of_sixteen_bits():
  """Room of 4 tokens holds 4, 8, 16 or 32 of them, no more than the prompt has."""
  for bits, tokens in ((16, 4), (8, 8), (4, 16), (2, 32)):
    method = dataclasses.replace(METHOD, bits=bits)
    assert method.granted(40, 2)[:, -1].tolist() == [tokens, tokens]
    assert method.granted(40, 2)[:, 3].tolist() == [3, 3]


@pytest.mark.parametrize(
  "wrong", [{"bits": 3}, {"group": 0}, {"window": 0}, {"kernel": 2}], ids=str
)
def test_bad_options_are_refused(wrong):
  with pytest.raises(UserError):
    dataclasses.replace(METHOD, **wrong)
