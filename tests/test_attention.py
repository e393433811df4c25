"""Parts of a cache merge to one softmax; blocks of a prompt equal naive causal attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax import attention
from tests import cases, independent

B, S, H, K, T, D = 2, 3, 4, 2, 11, 6


def draw(seed: int):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, S, H, D)).astype(np.float32)
  k = rng.normal(size=(B, K, T, D)).astype(np.float32)
  v = rng.normal(size=(B, K, T, D)).astype(np.float32)
  return q, k, v


@jax.jit
def part_of(q, k, v, mask):
  return attention.from_logits(attention.logits(q, k), v, mask)


merge = jax.jit(attention.merge)


@jax.jit
def merge_across(q, k, v, masks):
  """The merged part's arrays on every device, each of which attends to the tokens of its mask."""

  def on_device(mask):
    return jax.tree.leaves(attention.merge_across(part_of(q, k, v, mask), "devices"))

  return jax.vmap(on_device, axis_name="devices")(masks)


def softmax(q, k, v, mask) -> np.ndarray:
  """One softmax in float64 over the tokens of a mask ``[B, S, H, T]``; zeros without a token."""
  out = np.zeros((B, S, H, D))
  for b, s, h in np.ndindex(B, S, H):
    held = np.flatnonzero(mask[b, s, h])
    if held.size == 0:
      continue
    logits = k[b, h // (H // K), held].astype(np.float64) @ q[b, s, h] / np.sqrt(D)
    weights = np.exp(logits - logits.max())
    out[b, s, h] = weights @ v[b, h // (H // K), held] / weights.sum()
  return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), owners=st.lists(st.integers(0, 3), min_size=T, max_size=T))
def test_parts_merge_to_one_softmax(seed, owners):
  """However tokens are dealt to three parts (or to none), in any order, empty parts included."""
  q, k, v = draw(seed)
  owner = np.broadcast_to(owners, (B, S, H, T)).copy()
  owner[1] = np.roll(owner[1], seed % T, axis=-1)  # rows split differently
  parts = [part_of(q, k, v, jnp.asarray(owner == i)) for i in range(3)]
  want = softmax(q, k, v, owner < 3)
  for order in ([0, 1, 2], [2, 0, 1]):
    got = attention.finish(merge([parts[i] for i in order]))
    np.testing.assert_allclose(got, want, atol=2e-6)
  # Merging is associative: a merged part is a part.
  nested = attention.finish(merge([merge([parts[0], parts[1]]), parts[2]]))
  np.testing.assert_allclose(nested, want, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), owners=st.lists(st.integers(0, 3), min_size=T, max_size=T))
def test_parts_of_devices_merge_like_any_parts(seed, owners):
  """Every device gets what :func:`merge` gives; some hold nothing, peaks differ by hundreds."""
  q, k, v = draw(seed)
  k[:, :, ::3] *= 100
  owner = np.broadcast_to(owners, (B, S, H, T)).copy()
  owner[1] = np.roll(owner[1], seed % T, axis=-1)
  parts = [part_of(q, k, v, jnp.asarray(owner == i)) for i in range(3)]
  want = merge(parts)
  masks = jnp.stack([jnp.asarray(owner == i) for i in range(3)])
  for got, one in zip(merge_across(q, k, v, masks), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(got, np.broadcast_to(one, got.shape), rtol=1e-5, atol=1e-5)


def test_logits_far_apart_do_not_overflow():
  """Parts whose peaks differ by hundreds merge to finite numbers."""
  q, k, v = draw(0)
  k[:, :, :5] *= 300
  mask = np.ones((B, S, H, T), bool)
  first = mask & (np.arange(T) < 5)
  merged = merge([part_of(q, k, v, first), part_of(q, k, v, mask & ~first)])
  np.testing.assert_allclose(attention.finish(merged), softmax(q, k, v, mask), atol=1e-4)


def test_no_key_gives_zero_and_an_empty_part():
  q, k, v = draw(1)
  part = part_of(q, k, v, jnp.zeros((B, S, 1, T), bool))
  assert np.all(np.asarray(part.peak) == -np.inf)
  assert not np.any(part.total)
  assert not np.any(attention.finish(part))
  assert not np.any(attention.finish(merge([part, part])))


def test_mask_head_axis_may_be_one():
  q, k, v = draw(2)
  mask = np.random.default_rng(0).random((B, S, 1, T)) < 0.5
  one = part_of(q, k, v, jnp.asarray(mask))
  every = part_of(q, k, v, jnp.asarray(np.broadcast_to(mask, (B, S, H, T))))
  np.testing.assert_array_equal(one.out, every.out)


@pytest.mark.parametrize("tokens", [1, 127, 128, 130, 384, 512, 1024])
def test_weigh_sums_every_token(tokens):
  """At odd lengths and even ones, against NumPy."""
  rng = np.random.default_rng(tokens)
  p = rng.random((B, S, H, tokens)).astype(np.float32)
  values = rng.normal(size=(B, K, tokens, D)).astype(np.float32)
  want = np.zeros((B, S, H, D))
  for b, s, h in np.ndindex(B, S, H):
    want[b, s, h] = p[b, s, h].astype(np.float64) @ values[b, h // (H // K)]
  got = attention.weigh(jnp.asarray(p), jnp.asarray(values))
  np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_broken_row_stays_alone(where):
  """NaN in one row of the batch leaves the other row as it was."""
  arrays = dict(zip("qkv", draw(4), strict=True))
  mask = jnp.ones((B, S, 1, T), bool)
  want = attention.finish(part_of(*arrays.values(), mask))
  arrays[where][0] = np.nan
  got = attention.finish(part_of(*arrays.values(), mask))
  assert np.all(np.isnan(got[0]))
  np.testing.assert_array_equal(got[1], want[1])


def test_masked_garbage_is_not_attended():
  """Huge numbers in masked slots change nothing."""
  q, k, v = draw(5)
  mask = np.ones((B, S, 1, T), bool)
  mask[..., 4:7] = False
  want = part_of(q, k, v, jnp.asarray(mask))
  k[:, :, 4:7], v[:, :, 4:7] = 1e18, -1e30
  got = part_of(q, k, v, jnp.asarray(mask))
  cases.assert_close(got, want)


def test_query_head_belongs_to_its_group():
  """Heads 0 and 1 read KV head 0, heads 2 and 3 KV head 1; masks of KV heads repeat likewise."""
  q, k, v = draw(6)
  v[:, 0], v[:, 1] = 1.0, 2.0
  out = attention.finish(part_of(q, k, v, jnp.ones((B, S, 1, T), bool)))
  np.testing.assert_allclose(out[0, 0, :, 0], [1, 1, 2, 2], rtol=1e-6)
  mask = jnp.asarray([[[[True], [False]]]])
  assert attention.per_query_head(mask, 2)[0, 0, :, 0].tolist() == [True, True, False, False]


# --- prompts in chunks --------------------------------------------------------------------------

CHUNK = 8
chunk_of = jax.jit(attention.causal_chunk)


def by_chunks(q, k, v, length: int):
  """All queries of a prompt padded to a multiple of the chunk, the first ``length`` of them."""
  slots = k.shape[2]
  outs = [
    chunk_of(q[:, start : start + CHUNK], k, v, jnp.asarray(start, jnp.int32))
    for start in range(0, slots, CHUNK)
  ]
  return np.asarray(jnp.concatenate(outs, axis=1))[:, :length]


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_chunks_equal_naive_causal_attention(length, seed):
  """Odd lengths too: padding after the prompt is garbage and is never attended."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(1, 24, H, D)).astype(np.float32)
  k = rng.normal(size=(1, K, 24, D)).astype(np.float32)
  v = rng.normal(size=(1, K, 24, D)).astype(np.float32)
  k[:, :, length:], v[:, :, length:] = 1e6, -1e6
  still = np.zeros(D // 2)  # already rotated: no rotation in the naive form
  want = independent.causal_attention(
    q[0, :length], k[0].swapaxes(0, 1)[:length], v[0].swapaxes(0, 1)[:length], still
  )
  np.testing.assert_allclose(by_chunks(q, k, v, length)[0], want, atol=3e-6)


def test_chunk_keeps_rows_apart():
  """A row of NaN does not reach the other."""
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 16, H, D)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, K, 16, D)).astype(np.float32)
  want = by_chunks(q, k, v, 16)
  v[1] = np.nan
  got = by_chunks(q, k, v, 16)
  np.testing.assert_array_equal(got[0], want[0])
  assert np.all(np.isnan(got[1]))


def test_chunk_never_reads_later_blocks():
  """NaN after the chunk is not touched, not even with weight zero."""
  rng = np.random.default_rng(0)
  q = rng.normal(size=(1, CHUNK, H, D)).astype(np.float32)
  k, v = rng.normal(size=(2, 1, K, 24, D)).astype(np.float32)
  k[:, :, 16:], v[:, :, 16:] = np.nan, np.nan
  assert np.all(np.isfinite(chunk_of(q, k, v, jnp.asarray(8, jnp.int32))))


def test_chunk_in_bfloat16():
  """Half precision in, float32 sums: close to the same numbers in float32."""
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(1, 16, H, D)), jnp.bfloat16)
  k, v = jnp.asarray(rng.normal(size=(2, 1, K, 16, D)), jnp.bfloat16)
  wide = [np.asarray(x, np.float32) for x in (q, k, v)]
  got = by_chunks(q, k, v, 16)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, by_chunks(*wide, 16), atol=3e-2)


# --- what a prompt's attention adds up to --------------------------------------------------------

sums_of = jax.jit(attention.column_sums)
weights_of = jax.jit(attention.window_weights)


def naive_weights(q, k, length: int) -> np.ndarray:
  """Causal attention weights of one row, ``[H, length, length]`` float64."""
  keys = np.repeat(k[:, :length], H // K, axis=0).astype(np.float64)
  logits = np.einsum("shd,htd->hst", q[:length].astype(np.float64), keys) * D**-0.5
  logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
  weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weight / weight.sum(axis=-1, keepdims=True)


@settings(max_examples=15, deadline=None)
@given(lengths=st.tuples(st.integers(1, 24), st.integers(1, 24)), seed=st.integers(0, 10**6))
def test_column_sums_equal_the_naive_matrix(lengths, seed):
  """Summed over chunks, ragged rows; queries and keys of the padding give and get nothing."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(2, 24, H, D)).astype(np.float32)
  k = rng.normal(size=(2, K, 24, D)).astype(np.float32)
  for row, length in enumerate(lengths):
    q[row, length:], k[row, :, length:] = 1e3, 1e3
  rows, keys = jnp.asarray(lengths, jnp.int32), jnp.asarray(k)
  got = sum(
    sums_of(jnp.asarray(q[:, at : at + CHUNK]), keys, jnp.asarray(at, jnp.int32), rows)
    for at in range(0, 24, CHUNK)
  )
  for row, length in enumerate(lengths):
    want = naive_weights(q[row], k[row], length).sum(axis=1)
    np.testing.assert_allclose(got[row, :, :length], want, atol=1e-5)
    assert not np.any(got[row, :, length:])


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 24), window=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_window_weights_are_the_last_rows_of_the_naive_matrix(length, window, seed):
  """A row shorter than the window has zeros for the queries that it has not got."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(1, 24, H, D)).astype(np.float32)
  k = rng.normal(size=(1, K, 24, D)).astype(np.float32)
  place = np.arange(length - window, length)
  last = np.where((place >= 0)[:, None, None], q[0, np.maximum(place, 0)], 0)[None]
  got = weights_of(jnp.asarray(last), jnp.asarray(k), jnp.asarray([length], jnp.int32))[0]
  want = naive_weights(q[0], k[0], length)
  for i, position in enumerate(place):
    expected = np.zeros((H, 24))
    if position >= 0:
      expected[:, :length] = want[:, position]
    np.testing.assert_allclose(got[i], expected, atol=1e-5)
