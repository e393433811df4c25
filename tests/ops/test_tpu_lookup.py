"""The TPU kernel of lookup in interpret mode against NumPy and the reference."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from a2ats_jax.errors import UserError
from a2ats_jax.ops.lookup import lookup, reference, tpu
from a2ats_jax.ops.tiles import LookupTiles

STRICT = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


class Case(NamedTuple):
  """Leading axes, numbers of a table, places, and whether these rise."""

  lead: tuple[int, ...]
  numbers: int
  places: int
  rising: bool


CASES = {
  "one": Case((1,), 1, 1, False),
  "a row": Case((2,), 128, 5, False),
  "odd": Case((3, 2), 131, 37, False),
  "prime": Case((2,), 1031, 1031, False),
  "rising": Case((2, 1), 4096, 2000, True),
  "llama": Case((1, 2), 8 * 1024 + 320, 8192, True),
}


@pytest.fixture(autouse=True)
def _no_race(capsys):
  """jax 0.12 raises where it finds a race, 0.11 prints."""
  yield
  pltpu.reset_tpu_interpret_mode_state()
  assert "RACE DETECTED" not in capsys.readouterr().out


def _inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng((seed, case.numbers, case.places))
  tables = rng.integers(-(2**31), 2**31, (*case.lead, case.numbers), dtype=np.int32)
  places = rng.integers(0, case.numbers, (*case.lead, case.places), dtype=np.int32)
  return tables, np.sort(places, axis=-1) if case.rising else places


def _assert_equal(got, tables: np.ndarray, places: np.ndarray) -> None:
  assert got.dtype == jnp.int32
  want = np.empty(places.shape, np.int32)
  for lead in np.ndindex(places.shape[:-1]):
    want[lead] = [tables[lead][place] for place in places[lead]]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_both_against_numpy(name):
  x = _inputs(CASES[name])
  given_ = [jnp.asarray(y) for y in x]
  _assert_equal(reference.lookup(*given_), *x)
  _assert_equal(tpu.lookup(*given_, interpret=True), *x)


@pytest.mark.parametrize("name", ["one", "odd", "rising"])
def test_strictly(name):
  """No race, nothing read outside an array or before it is written."""
  x = _inputs(CASES[name])
  _assert_equal(tpu.lookup(*(jnp.asarray(y) for y in x), interpret=STRICT), *x)


@settings(max_examples=15, deadline=None)
@given(
  numbers=st.sampled_from([1, 127, 128, 129, 640]),
  places=st.sampled_from([1, 1023, 1024, 1025]),
  rows=st.integers(1, 9),
  rising=st.booleans(),
  seed=st.integers(0, 99),
)
def test_any_sizes(numbers, places, rows, rising, seed):
  x = _inputs(Case((2,), numbers, places, rising), seed)
  tiles = LookupTiles(rows=rows)
  _assert_equal(tpu.lookup(*(jnp.asarray(y) for y in x), tiles=tiles, interpret=True), *x)


def test_no_place():
  none = tpu.lookup(jnp.zeros((2, 7), jnp.int32), jnp.zeros((2, 0), jnp.int32), interpret=True)
  assert none.shape == (2, 0)


@pytest.mark.parametrize("mutation", tpu._Mutation)
@pytest.mark.parametrize("name", ["prime", "rising"])
def test_a_wrong_kernel_is_seen(mutation, name):
  x = _inputs(CASES[name])
  wrong = tpu._lookup(*(jnp.asarray(y) for y in x), None, True, mutation)
  with pytest.raises(AssertionError):
    _assert_equal(wrong, *x)


def test_what_hinders_it():
  table, place = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 3), jnp.int32)
  assert tpu.hindrances("tpu", table, place) == []
  assert tpu.hindrances("gpu", table, place) == ["it needs a TPU, and the backend is gpu"]
  floats = tpu.hindrances("tpu", jnp.zeros((1, 8)), place)
  assert floats == ["tables and places must be int32, got float32 and int32"]
  wide = tpu.hindrances("tpu", jnp.zeros((1, 2**20 + 1), jnp.int32), place)
  assert wide == ["a table may have 1048576 numbers at most, got 1048577"]
  with pytest.raises(UserError, match="'tpu' cannot run: it needs a TPU, and the backend is cpu"):
    lookup(table, place, implementation="tpu")


@pytest.mark.parametrize("rows", [0, 33])
def test_rows_that_cannot_be(rows):
  with pytest.raises(UserError, match=f"lookup: tile size rows must be .*got {rows}"):
    LookupTiles(rows=rows)


def test_the_reference_at_no_place():
  """As of an index whose pages are all sorted."""
  got = reference.lookup(jnp.zeros((2, 3, 5), jnp.int32), jnp.zeros((2, 3, 0), jnp.int32))
  assert got.shape == (2, 3, 0)
