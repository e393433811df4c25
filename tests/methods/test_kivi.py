"""KIVI against a plain reading: which numbers are coarse at which step, and what they stand for."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.methods.kivi import KIVI
from tests import cases
from tests.methods.test_evicting import turned

SHAPE = dataclasses.replace(cases.PAIRS, new=30)
METHOD = KIVI(bits=4, group=4, residual=8)


def coarse(x: np.ndarray, bits: int, group: int) -> np.ndarray:
  """Groups along the first axis, one scale and floor each, as float16."""
  out = np.empty_like(x)
  for start in range(0, len(x), group):
    part = x[start : start + group]
    low = part.min(axis=0).astype(np.float16).astype(np.float64)
    step = np.maximum(part.max(axis=0) - low, 0) / (2**bits - 1)
    step = step.astype(np.float16).astype(np.float64)
    code = np.clip(np.rint((part - low) / np.where(step > 0, step, 1)), 0, 2**bits - 1)
    out[start : start + group] = code * step + low
  return out


def expected(method: KIVI, cache, layer: int, row: int, now: int) -> np.ndarray:
  keys = turned(cache.k[layer, row, : now + 1], cache.rope)
  q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
  values = cache.v[layer, row, : now + 1].astype(np.float64)
  base, old = now - now % method.residual, max(now + 1 - method.residual, 0)
  out = np.empty(q.shape)
  for h, query in enumerate(q):
    k, v = keys[:, h // 2].copy(), values[:, h // 2].copy()
    k[:base] = coarse(k[:base], method.bits, method.group)
    v[:old] = coarse(v[:old].T, method.bits, method.group).T
    logit = k @ query * len(query) ** -0.5
    weight = np.exp(logit - logit.max())
    out[h] = weight @ v / weight.sum()
  return out


def compare(method: KIVI, right: KIVI, cache) -> None:
  for layer, positions, out, _, _, _ in cases.run_steps(method, cache, 26):
    for row, now in enumerate(positions[:, 0].tolist()):
      want = expected(right, cache, layer, row, now)
      # A number on the edge of two codes may fall either way: rarely, and by one step.
      assert np.mean(np.abs(np.asarray(out[row, 0]) - want)) < 2e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_a_plain_reading(bits):
  """Rows that flush at different steps, through every boundary."""
  method = dataclasses.replace(METHOD, bits=bits)
  cache = cases.draw_cache(SHAPE, seed=bits, lengths=[40, 13, 1], rope="yarn")
  compare(method, method, cache)


@pytest.mark.parametrize("wrong", [{"bits": 2}, {"residual": 4}, {"group": 8}], ids=str)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(SHAPE, seed=4, lengths=[40, 13, 1])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)
