"""The TPU kernel of paged_decode in interpret mode against the reference."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from a2ats_jax import attention
from a2ats_jax.ops.paged_decode import reference, tpu
from a2ats_jax.ops.tiles import DecodeTiles, PageFormat
from tests.ops import tails

STRICT = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

# Two float32 sums in different order: of logits of size one over at most 256 products, and of
# weights over at most 200 tokens.
EXACT = 1e-5
# Weights are rounded to bfloat16 against the running peak here and the last one there: twice
# 2^-9 of each weight.
ROUNDED = 2.0**-8


class Case(NamedTuple):
  """Sizes by the glossary; ``tile`` is pages at a time."""

  b: int
  kv_heads: int
  group: int
  f: int
  page: int
  dim: int
  dtype: np.dtype
  tile: int


CASES = {
  "one of everything": Case(1, 1, 1, 1, 16, 64, BF16, 1),
  "llama": Case(1, 2, 4, 6, 16, 128, BF16, 2),
  "smollm, last block overlaps": Case(2, 2, 3, 5, 16, 64, BF16, 2),
  "gemma": Case(1, 2, 2, 3, 16, 256, BF16, 2),
  "prime": Case(1, 3, 7, 7, 24, 64, F32, 3),
  "float32": Case(2, 1, 8, 2, 8, 128, F32, 1),
  "wide float32": Case(1, 2, 5, 3, 8, 256, F32, 2),
  "group of more than a tile": Case(1, 1, 11, 3, 8, 64, F32, 3),
  "half a tile of keys": Case(1, 2, 2, 5, 8, 128, BF16, 3),
  "four tokens": Case(1, 1, 3, 3, 4, 128, F32, 2),
  "tile larger than all": Case(1, 2, 1, 2, 32, 128, BF16, 9),
}
TINY = ("one of everything", "smollm, last block overlaps", "wide float32")


class Inputs(NamedTuple):
  q: jax.Array
  keys: jax.Array
  values: jax.Array
  mask: jax.Array


@pytest.fixture(autouse=True)
def _no_race(capsys):
  """jax 0.12 raises where it finds a race, 0.11 prints."""
  yield
  pltpu.reset_tpu_interpret_mode_state()
  assert "RACE DETECTED" not in capsys.readouterr().out


def _inputs(case: Case, seed: int = 0) -> Inputs:
  """Random; the first KV head reads nothing unless it is the only one, the last page is read."""
  rng = np.random.default_rng(seed)
  shape = (case.b, case.kv_heads, case.f, case.page)
  q = rng.normal(size=(case.b, 1, case.kv_heads * case.group, case.dim))
  k, v = rng.normal(size=(2, *shape, case.dim))
  mask = rng.random(shape) < 0.4
  if case.b * case.kv_heads > 1:
    mask[0, 0] = False
  mask[-1, -1, -1, -2:] = (True, False)
  return Inputs(*(jnp.asarray(x, case.dtype) for x in (q, k, v)), jnp.asarray(mask))


def _packed(x: Inputs, case: Case, interpret, **kwargs) -> attention.Part:
  form = PageFormat(page=case.page, dim=case.dim, dtype=case.dtype)
  pages = form.pack(x.keys, x.values)
  tiles = DecodeTiles(pages=case.tile)
  return tpu.packed_decode(
    x.q, pages, x.mask, form=form, tiles=tiles, interpret=interpret, **kwargs
  )


def _apart(x: Inputs, case: Case, interpret, **kwargs) -> attention.Part:
  tiles = DecodeTiles(pages=case.tile)
  return tpu.paged_decode(*x, tiles=tiles, interpret=interpret, **kwargs)


def _assert_equal(
  got: attention.Part, x: Inputs, rounding: float, tail: attention.Tail | None = None
) -> None:
  """Equal to the reference: each output within the rounding of the terms of its sum."""
  want, positive = reference.paged_decode(*x, tail=tail), tail
  if tail is not None:
    positive = dataclasses.replace(tail, sums=jnp.abs(tail.sums))
  terms = reference.paged_decode(x.q, x.keys, jnp.abs(x.values), x.mask, tail=positive).out
  for name in ("out", "peak", "total"):
    assert getattr(got, name).dtype == jnp.float32
    assert getattr(got, name).shape == getattr(want, name).shape
  none = np.isneginf(np.asarray(want.peak))
  np.testing.assert_array_equal(np.isneginf(np.asarray(got.peak)), none)
  seen = ~none
  peak, total, out = (np.asarray(y) for y in (got.peak, got.total, got.out))
  np.testing.assert_allclose(peak[seen], np.asarray(want.peak)[seen], rtol=EXACT, atol=EXACT)
  np.testing.assert_allclose(total, want.total, rtol=2 * EXACT)
  np.testing.assert_array_equal(total[none], 0.0)
  np.testing.assert_array_equal(out[none], 0.0)
  excess = np.abs(out - np.asarray(want.out)) - (rounding + 2 * EXACT) * np.asarray(terms)
  assert np.max(excess) <= 0.0, f"above the bound by {np.max(excess)}"


def _rounding(case: Case) -> float:
  return ROUNDED if case.dtype == BF16 else 0.0


@pytest.mark.parametrize("name", CASES)
def test_pages_of_bytes(name):
  case = CASES[name]
  x = _inputs(case)
  _assert_equal(_packed(x, case, True), x, _rounding(case))


@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_apart(name):
  case = CASES[name]
  x = _inputs(case)
  _assert_equal(_apart(x, case, True), x, _rounding(case))


@pytest.mark.parametrize("name", TINY)
def test_strictly(name):
  """No race, nothing read outside an array or before it is written."""
  case = CASES[name]
  x = _inputs(case)
  _assert_equal(_packed(x, case, STRICT), x, _rounding(case))


def test_no_token_at_all():
  case = CASES["float32"]
  x = _inputs(case)
  x = x._replace(mask=jnp.zeros_like(x.mask))
  part = _packed(x, case, True)
  np.testing.assert_array_equal(part.out, 0.0)
  np.testing.assert_array_equal(part.peak, -np.inf)
  np.testing.assert_array_equal(part.total, 0.0)
  np.testing.assert_array_equal(attention.finish(part), 0.0)


def test_no_page_at_all():
  case = CASES["float32"]._replace(f=0)
  x = Inputs(
    jnp.ones((2, 1, 8, 128)),
    jnp.zeros((2, 1, 0, 8, 128)),
    jnp.zeros((2, 1, 0, 8, 128)),
    jnp.zeros((2, 1, 0, 8), bool),
  )
  part = _apart(x, case, False)
  np.testing.assert_array_equal(part.out, 0.0)
  np.testing.assert_array_equal(part.peak, -np.inf)
  np.testing.assert_array_equal(part.total, 0.0)


def test_every_token():
  case = CASES["prime"]
  x = _inputs(case)
  x = x._replace(mask=jnp.ones_like(x.mask))
  _assert_equal(_packed(x, case, True), x, 0.0)


def test_a_query_of_another_dtype():
  """Counts as float32, as do the keys; weights are rounded to the values' dtype all the same."""
  case = CASES["llama"]
  x = _inputs(case)
  x = x._replace(q=x.q.astype(F32) * 1.001)
  wide = x._replace(keys=x.keys.astype(F32), values=x.values.astype(F32))
  _assert_equal(_packed(x, case, True), wide, ROUNDED)


def test_large_logits():
  """The running peak moves by hundreds between blocks."""
  case = CASES["prime"]
  x = _inputs(case)
  grow = jnp.arange(case.f, dtype=F32)[None, None, :, None, None] * 40.0
  x = x._replace(keys=x.keys * grow)
  part, want = _packed(x, case, True), reference.paged_decode(*x)
  # Logits of size 10^3 in float32 move weights by 10^-4.
  np.testing.assert_allclose(part.peak, want.peak, rtol=EXACT)
  np.testing.assert_allclose(attention.finish(part), attention.finish(want), atol=1e-3)


def _tail(case: Case, codewords: int, level: float = 0.0) -> attention.Tail:
  return tails.draw(
    np.random.default_rng(codewords),
    batch=case.b,
    kv_heads=case.kv_heads,
    group=case.group,
    dim=case.dim,
    codewords=codewords,
    level=level,
  )


def _blocks_of_128(
  x: Inputs, case: Case, tail: attention.Tail, packed: bool, **how: Any
) -> attention.Part:
  """Either form of the kernel, with blocks of as few codewords as a TPU allows."""
  form, heads = None, case.b * case.kv_heads
  operands = [y.reshape(heads, case.f, case.page, case.dim) for y in (x.keys, x.values)]
  if packed:
    form = PageFormat(page=case.page, dim=case.dim, dtype=case.dtype)
    operands = [form.pack(*operands)]
  tiles = DecodeTiles(pages=case.tile)
  return tpu._decode(x.q, operands, x.mask, form, tail, tiles, codewords=128, **how)


@settings(max_examples=8, deadline=None)
@given(
  group=st.sampled_from([1, 3, 4]),
  dim=st.sampled_from([64, 128, 256]),
  dtype=st.sampled_from([BF16, F32]),
  codewords=st.sampled_from([1, 7, 128, 129, 300]),
  level=st.sampled_from([-300.0, -2.0, 3.0, 300.0]),
  packed=st.booleans(),
  seen=st.booleans(),
)
def test_a_tail(group, dim, dtype, codewords, level, packed, seen):
  """Also in front of pages without a token."""
  case = Case(1, 2, group, 3, 16, dim, dtype, 2)
  x, tail = _inputs(case), _tail(case, codewords, level)
  x = x._replace(mask=x.mask & seen)
  got = _blocks_of_128(x, case, tail, packed, interpret=True)
  _assert_equal(got, x, _rounding(case), tail)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tail_strictly(packed):
  """Nothing is taken from beyond the last codeword, nor before it is written."""
  case = CASES["smollm, last block overlaps"]
  x, tail = _inputs(case), _tail(case, 130)
  got = _blocks_of_128(x, case, tail, packed, interpret=STRICT)
  _assert_equal(got, x, _rounding(case), tail)


def test_a_row_of_nan_leaves_the_others_alone():
  case = CASES["float32"]
  x, tail = _inputs(case), _tail(case, 130)
  bad = dataclasses.replace(tail, sums=tail.sums.at[0].set(jnp.nan))
  got = _blocks_of_128(
    x._replace(values=x.values.at[0].set(jnp.nan)), case, bad, False, interpret=True
  )
  assert np.all(np.isnan(got.out[0, 0, 1:]))
  second = Inputs(*(y[1:] for y in x))
  _assert_equal(
    jax.tree.map(lambda y: y[1:], got), second, 0.0, jax.tree.map(lambda y: y[1:], tail)
  )


def test_no_page_but_a_tail():
  case = CASES["float32"]._replace(f=0)
  q, pages = jnp.ones((2, 1, 8, 128)), jnp.zeros((2, 1, 0, 8, 128))
  tail = _tail(case, 5)
  part = _apart(Inputs(q, pages, pages, jnp.zeros((2, 1, 0, 8), bool)), case, False, tail=tail)
  np.testing.assert_array_equal(part.total, tail.total)
  np.testing.assert_array_equal(part.peak, tail.peak)
  np.testing.assert_array_equal(part.out, attention.weigh(tail.weights, tail.sums))


@pytest.mark.parametrize(
  ("count", "dim", "size"),
  [
    (1024, 128, 1024),
    (1024, 256, 512),
    (1024, 64, 1024),
    (1100, 128, 640),
    (1, 128, 1),
    (9, 64, 9),
  ],
)
def test_codewords_at_a_time(count, dim, size):
  """Half a megabyte in VMEM, where 64 dimensions take the room of 128."""
  assert tpu._codewords(count, dim) == size


def _of_tail(mutation: tpu._Mutation) -> bool:
  return "TAIL" in mutation.name or "CODEWORDS" in mutation.name


@pytest.mark.parametrize("mutation", [x for x in tpu._Mutation if not _of_tail(x)])
def test_a_wrong_kernel_is_seen(mutation):
  case = CASES["smollm, last block overlaps"]
  x = _inputs(case)
  form = PageFormat(page=case.page, dim=case.dim, dtype=case.dtype)
  pages = form.pack(x.keys, x.values).reshape(4, case.f, form.rows, 128)
  tiles = DecodeTiles(pages=case.tile)
  wrong = tpu._decode(x.q, [pages], x.mask, form, None, tiles, True, mutation)
  with pytest.raises(AssertionError):
    _assert_equal(wrong, x, _rounding(case))


@pytest.mark.parametrize("mutation", tpu._Mutation)
def test_a_wrong_kernel_is_seen_with_a_tail(mutation):
  """The peak of the pages is above that of the tail for some heads, and below for others."""
  case = CASES["smollm, last block overlaps"]
  x, tail = _inputs(case), _tail(case, 300)
  wrong = _blocks_of_128(x, case, tail, False, interpret=True, mutation=mutation)
  with pytest.raises(AssertionError):
    _assert_equal(wrong, x, _rounding(case), tail)


@pytest.mark.parametrize(
  ("page", "dim", "dtype", "reasons"),
  [
    (16, 128, BF16, []),
    (
      12,
      128,
      BF16,
      ["tokens a page must be a multiple of 8 for bfloat16 and head size 128, got 12"],
    ),
    (16, 96, F32, ["head size must be one of 64, 128, 256, got 96"]),
  ],
)
def test_what_hinders_it(page, dim, dtype, reasons):
  q, mask = jnp.zeros((1, 1, 4, dim), dtype), jnp.zeros((1, 2, 200, page), bool)
  keys = jnp.zeros((1, 2, 200, page, dim), dtype)
  assert tpu.hindrances("tpu", q, keys, keys, mask) == reasons
  cpu = "it needs a TPU, and the backend is cpu"
  assert tpu.hindrances("cpu", q, keys, keys, mask) == [cpu, *reasons]
  few = keys[:, :, :3]  # one block, whatever its pages are
  dims = [reason for reason in reasons if "head size must" in reason]
  assert tpu.hindrances("tpu", q, few, few, mask[:, :, :3]) == dims


def test_keys_and_values_of_two_dtypes_hinder_it():
  x = _inputs(CASES["llama"])
  x = x._replace(values=x.values.astype(F32))
  reason = "keys and values must have one dtype, got bfloat16 and float32"
  assert tpu.hindrances("tpu", *x) == [reason]
