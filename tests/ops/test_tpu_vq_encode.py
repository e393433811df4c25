"""The TPU kernel of vq_encode in interpret mode against the reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from a2ats_jax.ops.tiles import EncodeTiles
from a2ats_jax.ops.vq_encode import IMPLEMENTATIONS, offsets_of, reference, tpu

STRICT = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
# Scores are sums of D float32 products: codewords whose float64 scores differ by less than this
# part of the scores' size may swap.
SAFE_GAP = 1e-5


class Case(NamedTuple):
  """Sizes by the glossary, then keys and codewords at a time."""

  n: int
  kv_heads: int
  dim: int
  codewords: int
  tile_keys: int
  tile_codewords: int


CASES = {
  "one": Case(1, 1, 8, 1, 1, 1),
  "tiny": Case(5, 2, 8, 6, 5, 6),
  "odd": Case(131, 2, 64, 37, 128, 16),
  "prime": Case(257, 1, 128, 101, 128, 24),
  "llama": Case(200, 2, 128, 256, 128, 128),
}
TINY = ("one", "tiny", "odd")


class Inputs(NamedTuple):
  keys: jax.Array
  whitener: jax.Array
  whitened: jax.Array


@pytest.fixture(autouse=True)
def _no_race(capsys):
  """jax 0.12 raises where it finds a race, 0.11 prints."""
  yield
  pltpu.reset_tpu_interpret_mode_state()
  assert "RACE DETECTED" not in capsys.readouterr().out


def _random(case: Case, dtype=jnp.float32) -> Inputs:
  rng = np.random.default_rng(case)
  keys = rng.normal(size=(case.n, case.kv_heads, case.dim))
  whitener = np.tril(rng.normal(size=(case.kv_heads, case.dim, case.dim)))
  whitened = 2.0 * rng.normal(size=(case.kv_heads, case.codewords, case.dim))
  return Inputs(
    jnp.asarray(keys, dtype), jnp.asarray(whitener, jnp.float32), jnp.asarray(whitened, jnp.float32)
  )


def _whole(case: Case) -> Inputs:
  """Small whole numbers, whose scores are exact, over codewords that all come many times."""
  rng = np.random.default_rng(case)
  keys = rng.integers(-2, 3, (case.n, case.kv_heads, case.dim))
  whitener = np.broadcast_to(np.eye(case.dim), (case.kv_heads, case.dim, case.dim))
  few = rng.integers(-2, 3, (case.kv_heads, 5, case.dim))
  whitened = few[:, rng.permutation(np.arange(case.codewords) % 5)]
  return Inputs(*(jnp.asarray(x, jnp.float32) for x in (keys, whitener, whitened)))


def _run(x: Inputs, case: Case, interpret=True, mutation=None) -> np.ndarray:
  tiles = EncodeTiles(keys=case.tile_keys, codewords=case.tile_codewords)
  if mutation is None:
    codes = tpu.vq_encode(*x, tiles=tiles, interpret=interpret)
  else:
    codes = tpu._encode(*x, tiles, interpret, mutation)
  assert codes.dtype == jnp.uint16
  assert codes.shape == (case.n, case.kv_heads)
  return np.asarray(codes)


def _reference(x: Inputs) -> jax.Array:
  return reference.vq_encode(*x, offsets_of(x.whitened))


def _assert_near(codes: np.ndarray, x: Inputs) -> None:
  """The reference's codes, but for keys whose two best scores are nearly the same."""
  want = np.asarray(_reference(x))
  keys, whitener, words = (np.asarray(y.astype(jnp.float32), np.float64) for y in x)
  z = np.einsum("nkd,kde->nke", keys, whitener)
  scores = np.einsum("nke,kce->nkc", z, words) - 0.5 * np.sum(words**2, axis=-1)
  assert np.all(codes < words.shape[1])
  ours, theirs = (np.take_along_axis(scores, y[..., None].astype(int), 2) for y in (codes, want))
  size = np.max(np.abs(scores), axis=-1, keepdims=True)
  assert np.all(np.abs(ours - theirs) <= SAFE_GAP * size)
  assert np.mean(codes != want) <= 0.01


@pytest.mark.parametrize("name", CASES)
def test_random(name):
  x = _random(CASES[name])
  _assert_near(_run(x, CASES[name]), x)


@pytest.mark.parametrize("name", CASES)
def test_ties_go_to_the_lowest(name):
  x = _whole(CASES[name])
  np.testing.assert_array_equal(_run(x, CASES[name]), _reference(x))


@pytest.mark.parametrize("name", TINY)
def test_strictly(name):
  """No race, nothing read outside an array or before it is written."""
  x = _whole(CASES[name])
  np.testing.assert_array_equal(_run(x, CASES[name], STRICT), _reference(x))


def test_keys_of_sixteen_bits():
  case = CASES["odd"]
  x = _random(case, jnp.bfloat16)
  _assert_near(_run(x, case), x)


def test_sizes_chosen_by_shape():
  case = CASES["odd"]
  x = _whole(case)
  got = tpu.vq_encode(*x, interpret=True)
  np.testing.assert_array_equal(got, _reference(x))


def test_the_op_hands_it_what_it_takes():
  x = _random(CASES["odd"])
  codes = jax.eval_shape(IMPLEMENTATIONS["tpu"].run, *x, offsets_of(x.whitened))
  assert (codes.shape, codes.dtype) == ((131, 2), jnp.uint16)


def test_no_key():
  x = _random(CASES["tiny"])
  assert tpu.vq_encode(x.keys[:0], *x[1:]).shape == (0, 2)


@pytest.mark.parametrize("mutation", tpu._Mutation)
def test_a_wrong_kernel_is_seen(mutation):
  case = CASES["odd"]
  if mutation is tpu._Mutation.HIGHEST_TIE:
    x = _whole(case)
    with pytest.raises(AssertionError):
      np.testing.assert_array_equal(_run(x, case, True, mutation), _reference(x))
  else:
    x = _random(case)
    wrong = _run(x, case, True, mutation)
    with pytest.raises(AssertionError):
      _assert_near(wrong, x)


def test_what_hinders_it():
  x = _random(CASES["tiny"])
  offsets = offsets_of(x.whitened)
  assert tpu.hindrances("tpu", *x, offsets) == []
  assert tpu.hindrances("gpu", *x, offsets) == ["it needs a TPU, and the backend is gpu"]
  odd = x._replace(keys=jnp.zeros((3, 2, 12)))
  assert tpu.hindrances("tpu", *odd, offsets) == [
    "head size must be a multiple of 8 up to 512, got 12"
  ]
