"""A2ATS over pages of bytes, as a TPU's store keeps them, against A2ATS over pages of floats."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import store as paged
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.ops import dispatch, lookup, page_fetch, page_write, paged_decode, slot_fetch
from a2ats_jax.ops.lookup import tpu as tables
from a2ats_jax.ops.page_fetch import tpu as copies
from a2ats_jax.ops.paged_decode import tpu as decode
from a2ats_jax.ops.pages import FloatPages
from a2ats_jax.ops.slot_fetch import tpu as slots
from a2ats_jax.ops.tiles import PageFormat
from tests import cases
from tests.methods.test_a2ats_reference import OPTIONS

# Pages of 8 tokens are one tile of 4096 bytes; three of them fill up after the prompt.
SHAPE = cases.Shape(
  batch=3, layers=2, heads=4, kv_heads=2, head_dim=64, codewords=6, prompt=40, new=30
)
STEPS = 26


def as_bytes(*, page, dim, dtype) -> PageFormat:
  return PageFormat(page=page, dim=dim, dtype=jnp.dtype(dtype))


def outputs(cache, options) -> tuple[np.ndarray, object]:
  """Of layer 1, every step; and the last state."""
  method, layer = A2ATS(codebook=cache.book, page=8, **options), jnp.asarray(1, jnp.int32)
  state, found = cases.prefilled(method, cache), []
  for i in range(STEPS):
    positions = cases.step_positions(cache, i)
    out, state, _, _ = cases.attend(
      method,
      state,
      *cases.tokens_at(cache, 1, positions),
      jnp.asarray(positions),
      cache.rope,
      layer,
    )
    found.append(np.asarray(out))
  return np.stack(found), state


@pytest.fixture(scope="module", params=["everything", "tail of segments"])
def floats(request):
  cache = cases.draw_cache(SHAPE, seed=21, lengths=[40, 23, 9], style="skewed")
  want, state = outputs(cache, OPTIONS[request.param])
  assert state.store.form is None
  return cache, OPTIONS[request.param], want


def test_equals_floats_bit_for_bit(floats, monkeypatch):
  """The same keys and values reach the same attention."""
  cache, options, want = floats
  monkeypatch.setattr(paged, "page_format", as_bytes)
  got, state = outputs(cache, options)
  assert state.store.pages.dtype == jnp.int8
  np.testing.assert_array_equal(got, want)


def _kernels(patch: pytest.MonkeyPatch) -> None:
  """All ops on pages and on the index run the kernels of a TPU, interpreted."""

  def only(module, run):
    patch.setattr(module, "IMPLEMENTATIONS", {"tpu": dispatch.Implementation(run=run)})

  only(page_fetch, lambda pages, ids: (copies.page_fetch(pages, ids, interpret=True),))
  only(page_write, partial(copies.page_write, interpret=True))
  zeros = dispatch.Implementation(run=partial(copies.page_zeros, interpret=True))
  patch.setattr(page_write, "ZEROS", {"tpu": zeros})

  def attend(q, pages, mask, tail):
    if isinstance(pages, FloatPages):  # near tokens
      return decode.paged_decode(q, *pages, mask, tail=tail, interpret=True)
    return decode.packed_decode(q, pages.data, mask, form=pages.form, tail=tail, interpret=True)

  only(paged_decode, attend)
  only(lookup, partial(tables.lookup, interpret=True))
  only(slot_fetch, slots.slot_fetch)


@pytest.fixture
def _anew():
  """Programs are compiled with what a test has put in place, and forgotten after it."""
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.usefixtures("_anew")
def test_kernels_equal_floats(floats, monkeypatch):
  cache, options, want = floats
  monkeypatch.setattr(paged, "page_format", as_bytes)
  _kernels(monkeypatch)
  got, _ = outputs(cache, options)
  np.testing.assert_allclose(got, want, atol=cases.TOLERANCE, rtol=0)


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("wrong", ["fetch", "write"])
def test_a_wrong_page_is_caught(floats, monkeypatch, wrong):
  """A neighbour is fetched; a page is written over the one before."""
  cache, options, want = floats
  monkeypatch.setattr(paged, "page_format", as_bytes)
  op = getattr(paged, f"page_{wrong}")

  def moved(pages, ids, *rest):
    return op(pages, jnp.maximum(ids - 1, jnp.minimum(ids, 0)), *rest)

  monkeypatch.setattr(paged, f"page_{wrong}", moved)
  got, _ = outputs(cache, options)
  with pytest.raises(AssertionError):
    np.testing.assert_allclose(got, want, atol=cases.TOLERANCE, rtol=0)
