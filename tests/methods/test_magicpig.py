"""MagicPIG against a plain reading in float64, and its estimates against what they estimate."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.methods import magicpig
from a2ats_jax.methods.base import Geometry, PromptLayer
from a2ats_jax.methods.magicpig import MagicPIG
from tests import cases
from tests.independent import turned

PAIRS = dataclasses.replace(cases.PAIRS, new=25)
TRIPLE = dataclasses.replace(cases.TRIPLE, new=25)
METHOD = MagicPIG(tables=7, bits=3, sinks=2, window=6, page=4, seed=1, placement="device")


def inclusion(cosine: np.ndarray, tables: int, bits: int) -> np.ndarray:
  """The chance of two tables or more, term by term of the binomial distribution."""
  a = (1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi) ** bits
  return sum(math.comb(tables, j) * a**j * (1 - a) ** (tables - j) for j in range(2, tables + 1))


def expected(
  method: MagicPIG, cache, layer: int, row: int, now: int
) -> tuple[np.ndarray, list[list[int]]]:
  """A step's output of every query head, and the tokens that each sampled."""
  keys = turned(cache.k[layer, row, : now + 1], cache.rope)
  q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
  values = cache.v[layer, row, : now + 1].astype(np.float64)
  group = len(q) // keys.shape[1]
  size = {"tables": method.tables, "bits": method.bits}
  drawn = magicpig.projections(method.seed, **size, dim=q.shape[1])
  drawn = np.asarray(drawn, np.float64)
  out, samples = np.empty(q.shape), []
  for h, query in enumerate(q):
    k, v = keys[:, h // group], values[:, h // group]
    centred = k - k[: cache.lengths[row]].mean(axis=0)
    weight, sample = np.zeros(now + 1), []
    for t in range(now + 1):
      logit = math.exp(k[t] @ query * len(query) ** -0.5)
      if t < method.sinks or t > now - method.window:
        weight[t] = logit
        continue
      agree = (drawn @ centred[t] > 0) == (drawn @ query > 0)
      if np.all(agree, axis=1).sum() >= 2:
        sample.append(t)
        cosine = centred[t] @ query / np.linalg.norm(centred[t]) / np.linalg.norm(query)
        weight[t] = logit / inclusion(cosine, **size)
    out[h] = weight @ v / weight.sum()
    samples.append(sample)
  return out, samples


def compare(method: MagicPIG, right: MagicPIG, cache, *, step=cases.attend) -> None:
  sampled = left = 0
  kv_heads = cache.shape.kv_heads
  for layer, positions, out, _, stats, _ in cases.run_steps(method, cache, 23, step=step):
    for row, now in enumerate(positions[:, 0].tolist()):
      want, samples = expected(right, cache, layer, row, now)
      np.testing.assert_allclose(out[row, 0], want, atol=1e-4, rtol=0)
      group = len(samples) // kv_heads
      heads = [samples[i * group : (i + 1) * group] for i in range(kv_heads)]
      union = [len(set().union(*each)) for each in heads]
      assert stats.selected[row, 0].tolist() == union
      near = min(right.sinks, max(now + 1 - right.window, 0)) + min(right.window, now + 1)
      assert stats.read[row, 0].tolist() == [n + near for n in union]
      sampled += sum(map(len, samples))
      left += len(samples) * (now + 1 - near) - sum(map(len, samples))
  assert min(sampled, left) > 200  # neither all nor none


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_a_plain_reading_of_pairs(seed):
  """Prompts shorter and longer than sinks and window, none of whole pages, across later pages."""
  cache = cases.draw_cache(PAIRS, seed=seed, lengths=[39, 13, 1], rope="yarn")
  compare(METHOD, METHOD, cache)


@pytest.mark.parametrize("window", [4, 7])
def test_equals_a_plain_reading_of_triples(window):
  """Three query heads to a KV head; a window of one page, and one that is no multiple."""
  method = dataclasses.replace(METHOD, window=window, bits=2, seed=2)
  cache = cases.draw_cache(TRIPLE, seed=window, lengths=[17, 6])
  compare(method, method, cache)


def test_equals_a_plain_reading_in_many_stages_and_blocks(monkeypatch):
  """A page fetched at a time, and prompts hashed in blocks that they do not fill."""
  monkeypatch.setattr(magicpig, "STAGE_BYTES", 1)
  monkeypatch.setattr(magicpig, "_BLOCK", 9)
  method = dataclasses.replace(METHOD, seed=9)  # no other test has compiled it
  cache = cases.draw_cache(PAIRS, seed=3, lengths=[40, 22, 5])
  compare(method, method, cache)


def test_slots_after_a_prompt_may_hold_anything():
  """Its sinks are still to come, and so is the rest of its last page."""
  cache = cases.draw_cache(PAIRS, seed=0, lengths=[39, 13, 1])
  k, v = cache.k.copy(), cache.v.copy()
  for row, length in enumerate(cache.lengths):
    k[:, row, length : PAIRS.prompt] = v[:, row, length : PAIRS.prompt] = 50.0
  filled = dataclasses.replace(cache, k=k, v=v)
  states = [cases.prefilled(METHOD, x) for x in (cache, filled)]
  for i in range(12):
    positions = cases.step_positions(cache, i)
    tokens, outs = cases.tokens_at(cache, 1, positions), []
    for which, state in enumerate(states):
      out, states[which], _, _ = cases.attend(
        METHOD, state, *tokens, jnp.asarray(positions), cache.rope, jnp.asarray(1, jnp.int32)
      )
      outs.append(out)
    np.testing.assert_allclose(*outs, atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize(
  "wrong",
  [{"bits": 4}, {"tables": 8}, {"sinks": 1}, {"window": 7}, {"seed": 2}],
  ids=str,
)
def test_wrong_options_are_caught(wrong):
  cache = cases.draw_cache(PAIRS, seed=0, lengths=[39, 30, 22])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)


def one_layer(method: MagicPIG, keys: np.ndarray, values: np.ndarray, directions):
  """The state of one row and KV head after a prompt of rotated keys, hashed as told."""
  tokens, dim = keys.shape
  state = method.init(
    Geometry(batch=1, layers=1, heads=2, kv_heads=1, head_dim=dim, prompt=tokens, new=0)
  )
  k, v = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (keys, values))
  prompt = PromptLayer(k, k, v, jnp.asarray([tokens], jnp.int32))
  state = dataclasses.replace(state, projections=directions)
  return method.absorb(state, prompt, layer=0)


def test_a_worked_example():
  """Four keys around their mean (1, 1); two tables of one bit, with directions (1, 1) and (1, -1).

  Less the mean, the keys are (1, 0), (0, 1), (-1, 0) and (0, -1): their signs are ++, +-, -- and
  -+. The query (sqrt(3), 1) has ++ and meets the first key in both tables, at 30 degrees, where a
  sign agrees with probability 5/6 and both with 25/36. The query (sqrt(3), -1) meets it likewise;
  (0, 0) has -- and no angle: its signs agree by half.
  """
  method = MagicPIG(tables=2, bits=1, sinks=0, window=1, page=1, placement="device")
  keys = np.array([[2, 1], [1, 2], [0, 1], [1, 0]], np.float64)
  values = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float64)
  directions = jnp.asarray([[[1, 1]], [[1, -1]]], jnp.float32)
  state = one_layer(method, keys, values, directions)
  np.testing.assert_array_equal(state.codes[0, 0, 0], [[1, 1, 0, 0], [1, 0, 0, 1]])
  root, now = math.sqrt(3), jnp.asarray([3], jnp.int32)
  q = jnp.asarray([[[[root, 1], [root, -1]]]], jnp.float32)
  part, selected, _ = method.sample(state, q, now, 0)
  assert selected.tolist() == [[1]]
  whole = np.asarray(part.total * jnp.exp(part.peak))[0, 0]
  logits = np.array([2 * root + 1, 2 * root - 1]) / math.sqrt(2)
  np.testing.assert_allclose(whole, 36 / 25 * np.exp(logits), rtol=1e-5)
  np.testing.assert_allclose(part.out[0, 0] / part.total[0, 0, :, None], [[1, 2]] * 2, rtol=1e-5)
  q = jnp.asarray([[[[0, 0], [root, -1]]]], jnp.float32)
  part, selected, _ = method.sample(state, q, now, 0)
  assert selected.tolist() == [[2]]  # one of each query head
  np.testing.assert_allclose(part.total[0, 0, 0] * jnp.exp(part.peak[0, 0, 0]), 4, rtol=1e-5)
  np.testing.assert_allclose(part.out[0, 0, 0] / part.total[0, 0, 0], [5, 6], rtol=1e-5)


def test_codes_are_signs_in_binary():
  """A product of zero is not positive; the 16th bit is there."""
  directions = jnp.asarray([[[1, 0], [0, 1], [-1, 0]], [[0, -1], [1, 1], [1, -1]]], jnp.float32)
  codes = magicpig.codes_of(jnp.asarray([[2.0, 1.0], [-1.0, 0.0], [0.0, -3.0]]), directions)
  np.testing.assert_array_equal(codes, [[0b011, 0b110], [0b100, 0b000], [0b000, 0b101]])
  many = magicpig.codes_of(jnp.ones(1), jnp.ones((2, 16, 1)))
  np.testing.assert_array_equal(many, [2**16 - 1] * 2)


@pytest.mark.parametrize(("tables", "bits"), [(2, 1), (2, 16), (3, 4), (150, 10), (300, 11)])
def test_inclusion_is_the_binomial_tail(tables, bits):
  """From vectors that almost never meet, where one minus the rest is nothing in float32, on."""
  cosine = np.concatenate([np.linspace(-0.98, 0.98, 99), [1.0]]).astype(np.float32)
  got = magicpig.log_inclusion(jnp.asarray(cosine), tables=tables, bits=bits)
  want = np.log(inclusion(cosine.astype(np.float64), tables, bits))
  np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)
  np.testing.assert_allclose(np.asarray(got)[want > -5], want[want > -5], atol=1e-4, rtol=0)


def test_inclusion_is_finite_where_no_code_can_agree():
  low = float(magicpig.log_inclusion(jnp.asarray(-1.0), tables=150, bits=10))
  assert -250 < low < -150


TRIALS = 3000
SAMPLER = MagicPIG(tables=8, bits=2, sinks=1, window=4, page=4, placement="device")


@cache
def draws() -> jax.Array:
  """As many sets of directions, out of one draw: all are independent."""
  many = magicpig.projections(0, tables=TRIALS * SAMPLER.tables, bits=SAMPLER.bits, dim=4)
  return many.reshape(TRIALS, SAMPLER.tables, SAMPLER.bits, 4)


def estimates(method: MagicPIG, *, centred: bool = True):
  """Numerator and denominator of two query heads for many sets of directions, and the truth."""
  rng = np.random.default_rng(5)
  keys, values = rng.normal(size=(14, 4)) + 1.0, rng.normal(size=(14, 4))  # with a mean
  q = rng.normal(size=(2, 4))

  def trial(directions):
    state = one_layer(SAMPLER, keys, values, directions)
    if not centred:
      state = dataclasses.replace(state, mean=jnp.zeros_like(state.mean))
    query, now = jnp.asarray(q, jnp.float32)[None, None], jnp.asarray([13], jnp.int32)
    part, *_ = method.sample(state, query, now, 0)
    scale = jnp.exp(part.peak)
    return jnp.concatenate([part.out * scale[..., None], (part.total * scale)[..., None]], axis=-1)

  got = np.asarray(jax.jit(lambda x: jax.lax.map(trial, x))(draws()), np.float64)[:, 0, 0]
  far = slice(SAMPLER.sinks, 14 - SAMPLER.window)
  weight = np.exp(q @ keys[far].T * 4**-0.5)
  return got, np.concatenate([weight @ values[far], weight.sum(axis=1, keepdims=True)], axis=1)


def assert_unbiased(got: np.ndarray, want: np.ndarray) -> None:
  """Means within four standard errors, which are below 2 % of the denominator."""
  error = got.std(axis=0) / math.sqrt(len(got))
  assert np.all(error < 0.02 * want[:, -1:])
  assert np.all(np.abs(got.mean(axis=0) - want) < 4 * error)


def test_numerator_and_denominator_are_unbiased():
  """Over 3000 sets of directions."""
  assert_unbiased(*estimates(SAMPLER))


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 3}, {"tables": 7}, {"tables": 9}], ids=str)
def test_weights_of_another_probability_are_biased(wrong):
  """The sample is right, its weights are those of other tables."""
  with pytest.raises(AssertionError):
    assert_unbiased(*estimates(dataclasses.replace(SAMPLER, **wrong)))


def test_weights_by_the_raw_key_are_biased():
  """A key is hashed less the mean: its own cosine says something else."""
  with pytest.raises(AssertionError):
    assert_unbiased(*estimates(SAMPLER, centred=False))


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"tables": 1}, "2 tables or more and 0 to 16 bits, got 1 and 10"),
    ({"bits": 17}, "2 tables or more and 0 to 16 bits, got 150 and 17"),
    ({"bits": -1}, "0 to 16 bits, got 150 and -1"),
    ({"page": 0}, "page of at least 1 token"),
    ({"sinks": -1}, "0 sinks or more"),
    ({"seed": -1}, "seed of 31 bits, got 16, 4 and -1"),
    ({"seed": 1 << 31}, "seed of 31 bits"),
    ({"window": 15}, "window of at least a page, 16 tokens, got 15"),
  ],
  ids=str,
)
def test_options_that_cannot_be_are_refused(options, said):
  with pytest.raises(UserError, match=said):
    MagicPIG(**options)
