"""Codebooks from keys and queries that somebody else collected."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.rope import RopeConfig
from tests.train_codebooks.cases import OPTIONS
from train_codebooks import Metric, collect, train_on_arrays

ROPE = RopeConfig(head_dim=8)
PLAIN = dataclasses.replace(OPTIONS, metric=Metric(kind="plain"), codewords=4, steps=0)


@pytest.fixture(scope="module")
def arrays(model, corpus, tmp_path_factory):
  """The keys and queries of the model over the corpus, as its own run sees them."""
  seen = ([[], []], [[], []])
  absorb = collect._absorb

  def listen(state, keys, layer, q, k):
    seen[0][layer].append(k)
    seen[1][layer].append(q)
    absorb(state, keys, layer, q, k)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collect, "_absorb", listen)
    collect.collect(model.decoder, corpus, tmp_path_factory.mktemp("collected"))
  keys, queries = (np.stack([np.concatenate(layer) for layer in x]) for x in seen)
  assert keys.shape == (2, 566, 2, 8)
  assert queries.shape == (2, 566, 4, 8)
  return keys, queries


def go(directory, keys, queries, options=OPTIONS, **more):
  return train_on_arrays(
    keys,
    queries,
    options,
    directory,
    fingerprint="mine",
    rope=ROPE,
    devices=jax.local_devices()[:1],
    save_seconds=0.0,
    **more,
  )


def test_equals_training_on_the_text(arrays, finished, tmp_path):
  """The published metric: keys and queries decide all, whoever ran the model."""
  book = go(tmp_path, *arrays)
  np.testing.assert_allclose(book.whitener, finished.whitener, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(book.codewords, finished.codewords, rtol=1e-4, atol=1e-5)
  record = json.loads((tmp_path / "codebook.json").read_text())
  assert record["model_fingerprint"] == "mine"
  assert record["training"]["tokens"] == 566
  assert len(record["training"]["arrays_sha256"]) == 64


def test_two_clusters_by_hand(tmp_path):
  """Keys at 1 and 3 in one corner, -4 in the other: their means, whatever the dtype."""
  keys = np.zeros((1, 6, 1, 8), jnp.bfloat16)
  keys[0, :, 0, 0] = [1, 3, 1, 3, -4, -4]
  options = dataclasses.replace(PLAIN, codewords=2)
  book = go(tmp_path, keys, None, options)
  assert sorted(np.asarray(book.codewords[0, 0, :, 0]).tolist()) == pytest.approx([-4, 2])
  np.testing.assert_allclose(book.codewords[0, 0, :, 1:], 0, atol=1e-6)
  with pytest.raises(UserError, match=r"belongs to another run: calibration\.arrays_sha256 was"):
    go(tmp_path, -keys, None, options)


def test_a_run_that_was_cut_off_goes_on(arrays, tmp_path):
  class Stop(Exception):
    pass

  def stop(phase, done, total, /, **figures):
    if phase == "lloyd":
      raise Stop

  with pytest.raises(Stop):
    go(tmp_path / "cut", arrays[0], None, PLAIN, progress=stop)
  assert not (tmp_path / "cut" / "codebook.json").exists()
  got = go(tmp_path / "cut", arrays[0], None, PLAIN)
  want = go(tmp_path / "whole", arrays[0], None, PLAIN)
  np.testing.assert_array_equal(np.asarray(got.codewords), want.codewords)


@pytest.mark.parametrize(
  ("change", "options", "match"),
  [
    (lambda k, q: (k, None), OPTIONS, "the metric 'query' needs queries"),
    (lambda k, q: (k[..., :4], None), PLAIN, r"expected keys \[L, N, K, 8\], got \(2, 566, 2, 4\)"),
    (lambda k, q: (k[0], None), PLAIN, "expected keys"),
    (lambda k, q: (k, q[:, :5]), PLAIN, r"expected queries \[2, 566, a multiple of 2, 8\]"),
    (lambda k, q: (k, q[:, :, :3]), PLAIN, r"expected queries .* got \(2, 566, 3, 8\)"),
    (lambda k, q: (k[:, :3], None), PLAIN, "4 codewords need at least as many .* tokens, got 3"),
    (lambda k, q: (k * np.float32(np.nan), None), PLAIN, "non-finite key"),
  ],
  ids=["metric", "size", "rank", "tokens", "heads", "few", "nan"],
)
def test_arrays_that_cannot_be_used_are_refused(arrays, tmp_path, change, options, match):
  train = getattr(train_on_arrays, "__wrapped__", train_on_arrays)
  keys, queries = change(*arrays)
  with pytest.raises(UserError, match=match):
    train(keys, queries, options, tmp_path / "run", fingerprint="mine", rope=ROPE)
  assert not (tmp_path / "run" / "codebook.json").exists()
