"""KIVI against a plain reading: which numbers are coarse at which step, and what they stand for."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.methods.kivi import KIVI
from tests import cases
from tests.independent import turned

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


def channels(method: KIVI, cache, layer: int, row: int) -> list[np.ndarray]:
  """Of every KV head, the channels that stay: those of most weight in the prompt, as ThinK says."""
  length = int(cache.lengths[row])
  keys = turned(cache.k[layer, row, :length], cache.rope)
  first = max(length - method.window, 0)
  q = turned(cache.q[layer, row, first:length], cache.rope, first)
  d, heads = keys.shape[2], keys.shape[1]
  stay = d - int(method.prune * d)
  out = []
  for head in range(heads):
    group = range(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
    weight = sum((q[:, h] ** 2).sum(axis=0) for h in group) * (keys[:, head] ** 2).sum(axis=0)
    out.append(np.sort(np.argsort(-weight, kind="stable")[:stay]))
  return out


def expected(method: KIVI, cache, layer: int, row: int, now: int) -> np.ndarray:
  keys = turned(cache.k[layer, row, : now + 1], cache.rope)
  q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
  values = cache.v[layer, row, : now + 1].astype(np.float64)
  base, old = now - now % method.residual, max(now + 1 - method.residual, 0)
  out, stay, group = np.empty(q.shape), channels(method, cache, layer, row), len(q) // keys.shape[1]
  for h, query in enumerate(q):
    k, v = keys[:, h // group].copy(), values[:, h // group].copy()
    k[:base] = coarse(k[:base], method.bits, method.group)
    gone = np.setdiff1d(np.arange(k.shape[1]), stay[h // group])
    k[:base, gone] = 0
    v[:old] = coarse(v[:old].T, method.bits, method.group).T
    logit = k @ query * len(query) ** -0.5
    weight = np.exp(logit - logit.max())
    out[h] = weight @ v / weight.sum()
  return out


def compare(method: KIVI, right: KIVI, cache) -> None:
  wrong = np.zeros((cache.shape.heads, cache.shape.head_dim))
  for layer, positions, out, _, _, _ in cases.run_steps(method, cache, 26):
    for row, now in enumerate(positions[:, 0].tolist()):
      want = expected(right, cache, layer, row, now)
      # A number on the edge of two codes may fall either way: rarely, and by one step. So nearly
      # all numbers agree closely, whichever channel or head they are of.
      off = np.abs(np.asarray(out[row, 0]) - want)
      assert np.mean(off) < 2e-3
      far_off = off > 1e-3
      assert np.mean(far_off) < 0.2
      wrong = wrong + far_off
  assert np.max(wrong) <= 8


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_a_plain_reading(bits):
  """Rows that flush at different steps, through every boundary."""
  method = dataclasses.replace(METHOD, bits=bits)
  cache = cases.draw_cache(SHAPE, seed=bits, lengths=[40, 13, 1], rope="yarn")
  compare(method, method, cache)


@pytest.mark.parametrize("shape", ["pairs", "triple"])
def test_thin_keys_equal_a_plain_reading(shape):
  """ThinK under KIVI: keys of five channels in eight, at G = 2 and 3."""
  shape = dataclasses.replace(cases.SHAPES[shape], prompt=40, new=30, head_dim=8)
  method = dataclasses.replace(METHOD, prune=0.4, window=6)
  cache = cases.draw_cache(shape, seed=7, lengths=[40, 13, 1][: shape.batch], rope="yarn")
  compare(method, method, cache)
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(method, window=1), method, cache)


@pytest.mark.parametrize("wrong", [{"prune": 1.0}, {"window": 0}, {"residual": 6}], ids=str)
def test_bad_options_are_refused(wrong):
  with pytest.raises(UserError, match="kivi: "):
    dataclasses.replace(METHOD, **wrong)


@pytest.mark.parametrize("wrong", [{"bits": 2}, {"residual": 4}, {"group": 8}], ids=str)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(SHAPE, seed=4, lengths=[40, 13, 1])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)
