"""The TPU kernels of page_fetch in interpret mode: every page, and every way to miss one."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from a2ats_jax.ops.page_fetch import tpu
from a2ats_jax.ops.tiles import FetchTiles, PageFormat

# Races between copies are found; memory that nothing was copied to holds the largest number; a
# copy is made when it is waited for, and not before.
STRICT = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
MODES = {"interpret": True, "strict": STRICT}


class Case(NamedTuple):
  """Pages held, rows of 128 bytes a page, pages fetched, copies under way."""

  held: int
  rows: int
  fetched: int
  depth: int


CASES = {
  "one of one": Case(1, 32, 1, 1),
  "llama page, one at a time": Case(12, 64, 5, 1),
  "prime": Case(11, 32, 13, 3),
  "ring as long as the list": Case(5, 32, 4, 4),
  "ring longer than the list": Case(5, 96, 3, 16),
}


@pytest.fixture(autouse=True)
def _no_race(capsys):
  """jax 0.12 raises where it finds a race, 0.11 prints."""
  yield
  pltpu.reset_tpu_interpret_mode_state()
  assert "RACE DETECTED" not in capsys.readouterr().out


def _data(case: Case) -> tuple[jax.Array, jax.Array]:
  rng = np.random.default_rng(case)
  # 127 is what memory holds before anything is written to it.
  pages = rng.integers(-128, 127, (case.held, case.rows, 128), dtype=np.int8)
  return jnp.asarray(pages), jnp.asarray(rng.integers(0, case.held, case.fetched), jnp.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_from_device_memory(name, mode):
  case = CASES[name]
  pages, ids = _data(case)
  got = tpu.page_fetch(pages, ids, tiles=FetchTiles(depth=case.depth), interpret=MODES[mode])
  np.testing.assert_array_equal(got, np.asarray(pages)[np.asarray(ids)])


@pytest.mark.parametrize("ids_in_host", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_from_host_memory(name, ids_in_host):
  pages, ids = _data(CASES[name])

  def fetch(pages, ids):
    pages = jax.device_put(pages, jax.memory.Space.Host)
    if ids_in_host:
      ids = jax.device_put(ids, jax.memory.Space.Host)
    out = tpu.page_fetch(pages, ids, interpret=True)
    assert jax.typeof(out).memory_space == jax.memory.Space.Device
    return out

  got = jax.jit(fetch)(jax.device_put(pages, jax.memory.Space.Host), ids)
  np.testing.assert_array_equal(got, np.asarray(pages)[np.asarray(ids)])


def test_host_memory_outside_jit():
  pages, ids = _data(CASES["prime"])
  got = tpu.page_fetch(jax.device_put(pages, jax.memory.Space.Host), ids, interpret=True)
  np.testing.assert_array_equal(got, np.asarray(pages)[np.asarray(ids)])


def test_keys_and_values_of_a_store():
  """Packed, fetched and unpacked, they are those that were written."""
  form = PageFormat(page=16, dim=64, dtype=jnp.dtype(jnp.bfloat16))
  rng = np.random.default_rng(0)
  k, v = (jnp.asarray(rng.normal(size=(6, 16, 64)), jnp.bfloat16) for _ in range(2))
  ids = jnp.asarray([5, 0, 0, 3], jnp.int32)
  got = form.unpack(tpu.page_fetch(form.pack(k, v), ids, interpret=True))
  for x, want in zip(got, (k, v)):
    np.testing.assert_array_equal(x, want[np.asarray(ids)])


@pytest.mark.parametrize("most", [1, 4, 6, 13])
def test_long_lists_are_moved_in_parts(monkeypatch, most):
  """As 65,537 pages are, at sizes that take no time."""
  monkeypatch.setattr(tpu, "_MOST", most)
  pages, ids = _data(CASES["prime"])
  got = tpu.page_fetch(pages, ids, interpret=True)
  np.testing.assert_array_equal(got, np.asarray(pages)[np.asarray(ids)])
  pages, ids, new, want = _writes()
  np.testing.assert_array_equal(tpu.page_write(pages, ids, new, interpret=True), want)


def test_no_page():
  pages, _ = _data(CASES["prime"])
  assert tpu.page_fetch(pages, jnp.zeros(0, jnp.int32)).shape == (0, 32, 128)


def test_a_page_that_is_not_there_is_noticed():
  """The strict interpreter reads nothing outside: the other tests passed within bounds."""
  pages, ids = _data(CASES["prime"])
  with pytest.raises(Exception, match=r"[Oo]ut-of-bounds"):
    jax.block_until_ready(tpu.page_fetch(pages, ids.at[2].set(11), interpret=STRICT))


# Without the last waits the plain interpreter, which copies at once, sees nothing wrong.
SEEN_BY = {
  tpu._Mutation.LAST_PAGE: ("interpret", "strict"),
  tpu._Mutation.NEXT_PAGE: ("interpret", "strict"),
  tpu._Mutation.NO_WAIT: ("strict",),
}


@pytest.mark.parametrize(
  ("mutation", "mode"), [(m, mode) for m in tpu._Mutation for mode in SEEN_BY[m]]
)
def test_a_wrong_kernel_is_seen(mutation, mode):
  case = CASES["prime"]
  pages, ids = _data(case)
  build = partial(tpu._build, case.fetched, pages.shape, False, FetchTiles(depth=case.depth))
  want = np.asarray(pages)[np.asarray(ids)]
  np.testing.assert_array_equal(build(MODES[mode])(ids, pages), want)
  wrong = build(MODES[mode], mutation)(ids, pages)
  with pytest.raises(AssertionError):
    np.testing.assert_array_equal(wrong, want)


def test_a_wait_left_out_is_a_race(capsys):
  """With copies made at once the pages are right, and the race detector is what sees it."""
  case = CASES["prime"]
  pages, ids = _data(case)
  at_once = dataclasses.replace(STRICT, dma_execution_mode="eager")
  build = partial(tpu._build, case.fetched, pages.shape, False, FetchTiles(depth=case.depth))
  np.testing.assert_array_equal(build(at_once)(ids, pages), np.asarray(pages)[np.asarray(ids)])
  said = ""
  try:
    jax.block_until_ready(build(at_once, tpu._Mutation.NO_WAIT)(ids, pages))
  except jax.errors.JaxRuntimeError as error:
    said = str(error)
  assert "RACE DETECTED" in said + capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("mode", MODES)
def test_zeros(monkeypatch, mode, count):
  """Two pages at a time. Memory that nothing was written to holds 127 in strict mode."""
  monkeypatch.setattr(tpu, "_BLANK_BYTES", 2 * 32 * 128)
  got = tpu.page_zeros(count, 32, False, interpret=MODES[mode])
  np.testing.assert_array_equal(got, np.zeros((count, 32, 128), np.int8))


def test_zeros_in_host_memory():
  got = jax.jit(lambda: tpu.page_zeros(5, 32, True, interpret=True))()
  assert got.sharding.memory_kind == "pinned_host"
  np.testing.assert_array_equal(got, np.zeros((5, 32, 128), np.int8))


def test_pages_that_are_left_out_are_not_zero(monkeypatch):
  """The strict interpreter shows what nothing was written to."""
  monkeypatch.setattr(tpu, "_each", lambda start, stop, act: act(0))
  monkeypatch.setattr(tpu, "_BLANK_BYTES", 2 * 32 * 128)
  assert np.any(tpu.page_zeros(5, 32, False, interpret=STRICT))


def _writes() -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
  """Pages, which to write (two are left out), what, and the result."""
  rng = np.random.default_rng(3)
  pages = rng.integers(-128, 127, (11, 32, 128), dtype=np.int8)
  new = rng.integers(-128, 127, (7, 32, 128), dtype=np.int8)
  ids = np.array([4, -1, 0, 10, -1, 7, 5], np.int32)
  want = pages.copy()
  want[ids[ids >= 0]] = new[ids >= 0]
  return jnp.asarray(pages), jnp.asarray(ids), jnp.asarray(new), want


@pytest.mark.parametrize("depth", [1, 3, 16])
@pytest.mark.parametrize("mode", MODES)
def test_write_to_device_memory(mode, depth):
  pages, ids, new, want = _writes()
  got = tpu.page_write(pages, ids, new, tiles=FetchTiles(depth=depth), interpret=MODES[mode])
  np.testing.assert_array_equal(got, want)


def test_write_to_host_memory():
  """In a loop, which shows that the result is of the type that went in."""
  pages, ids, new, want = _writes()

  def write(pages, ids, new):
    pages = jax.device_put(pages, jax.memory.Space.Host)
    return jax.lax.fori_loop(
      0, 2, lambda i, pages: tpu.page_write(pages, ids, new, interpret=True), pages
    )

  got = jax.jit(write)(jax.device_put(pages, jax.memory.Space.Host), ids, new)
  np.testing.assert_array_equal(jax.device_put(got, jax.memory.Space.Device), want)


def test_write_no_page():
  pages, ids, new, _ = _writes()
  assert tpu.page_write(pages, ids[:0], new[:0]) is pages


@pytest.mark.parametrize(
  ("mutation", "mode"), [(m, mode) for m in tpu._Mutation for mode in SEEN_BY[m]]
)
def test_a_wrong_write_is_seen(mutation, mode):
  pages, ids, new, want = _writes()
  build = partial(tpu._build_write, 7, pages.shape, False, FetchTiles(depth=3), MODES[mode])
  np.testing.assert_array_equal(build()(ids, new, pages), want)
  wrong = build(mutation)(ids, new, pages)
  with pytest.raises(AssertionError):
    np.testing.assert_array_equal(wrong, want)


@pytest.mark.parametrize(
  ("shape", "dtype", "n", "message"),
  [
    ((4, 2, 512), jnp.bfloat16, 3, "pages must be int8 [N, R, 128], got bfloat16 [4, 2, 512]"),
    ((4, 16, 128), jnp.int8, 3, "a page must be int8 [a multiple of 32, 128], got [16, 128]"),
  ],
)
def test_what_hinders_it(shape, dtype, n, message):
  pages, ids = jnp.zeros(shape, dtype), jnp.zeros(n, jnp.int32)
  assert tpu.hindrances("tpu", pages, ids) == [message]


def test_nothing_hinders_pages_of_bytes_on_a_tpu():
  data = _data(CASES["prime"])
  assert tpu.hindrances("tpu", *data) == []
  assert tpu.hindrances("cpu", *data) == ["it needs a TPU, and the backend is cpu"]
