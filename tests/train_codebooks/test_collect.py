"""What is captured is the decoder's own, of the right head and of no padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.rope import far_query, make_rope, rotate
from tests.train_codebooks.cases import random_corpus, tiny_model
from train_codebooks import Corpus, Metric
from train_codebooks.collect import collect
from train_codebooks.metric import query_moment

_LENGTHS = (48, 31, 48, 7, 20)


@pytest.fixture(scope="module")
def corpus():
  return random_corpus(3, _LENGTHS)


@pytest.fixture(scope="module")
def direct(corpus):
  """Queries and keys of every layer, one document at a time, attention as one masked softmax."""
  decoder = tiny_model().decoder
  rope = make_rope(decoder.config.rope)
  queries, keys = [[], []], [[], []]
  for document in corpus.documents:
    x = decoder.embed(jnp.asarray(document)[None])
    n = len(document)
    positions = jnp.arange(n, dtype=jnp.int32)[None]
    causal = jnp.tril(jnp.ones((n, n), bool))[None, :, None, :]
    for layer in range(2):
      block = decoder.layer(layer)
      q, k, v = block.project(x)
      queries[layer].append(np.asarray(q[0]))
      keys[layer].append(np.asarray(k[0]))
      scores = attention.logits(
        rotate(q, positions, rope), jnp.swapaxes(rotate(k, positions, rope), 1, 2)
      )
      part = attention.from_logits(scores, jnp.swapaxes(v, 1, 2), causal)
      x = block.finish(x, attention.finish(part))
  return [np.concatenate(q) for q in queries], [np.concatenate(k) for k in keys]


@pytest.fixture(scope="module")
def collected(corpus, tmp_path_factory):
  return collect(tiny_model().decoder, corpus, tmp_path_factory.mktemp("collect"))


def test_keys_are_the_decoders_own(collected, direct):
  for layer in range(2):
    expected = direct[1][layer].swapaxes(0, 1)
    assert collected.keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      collected.keys[layer].astype(np.float32), expected, rtol=5e-3, atol=1e-5
    )


def test_moments_are_of_each_heads_own_queries(collected, direct):
  for layer in range(2):
    for head in range(2):
      group = direct[0][layer][:, 2 * head : 2 * head + 2].reshape(-1, 8).astype(np.float64)
      np.testing.assert_allclose(
        collected.query_square[layer, head], group.T @ group, rtol=1e-4, atol=1e-3
      )
      np.testing.assert_allclose(
        collected.query_sum[layer, head], group.sum(axis=0), rtol=1e-4, atol=1e-3
      )
      other = direct[0][layer][:, [0, 2]].reshape(-1, 8).astype(np.float64)
      assert np.abs(collected.query_square[layer, head] - other.T @ other).max() > 0.1
      key = direct[1][layer][:, head].astype(np.float64)
      np.testing.assert_allclose(
        collected.key_square[layer, head], key.T @ key, rtol=1e-4, atol=1e-3
      )
      np.testing.assert_allclose(
        collected.key_sum[layer, head], key.sum(axis=0), rtol=1e-4, atol=1e-3
      )
  assert collected.tokens == sum(_LENGTHS)
  assert collected.group == 2


def test_metric_equals_that_of_queries_the_model_would_score_with(collected, direct):
  rope = make_rope(tiny_model().config.rope)
  q = jnp.asarray(direct[0][1])
  turned = far_query(q, jnp.full(len(q), 40, jnp.int32), rope)
  for head in range(2):
    rows = np.asarray(turned[:, 2 * head : 2 * head + 2]).reshape(-1, 8)
    ours = query_moment(
      Metric(distances=(40,)),
      collected.query_square[1, head],
      collected.query_sum[1, head],
      2 * sum(_LENGTHS),
      np.asarray(rope.inv_freq),
    )
    np.testing.assert_allclose(ours, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)


def test_batching_and_padding_change_nothing(corpus, collected, tmp_path, monkeypatch):
  """Documents one by one, or all in one batch with the longest."""
  monkeypatch.setattr("train_codebooks.collect._BATCH", 1)
  alone = collect(tiny_model().decoder, corpus, tmp_path)
  np.testing.assert_allclose(
    alone.keys.astype(np.float32), collected.keys.astype(np.float32), rtol=1e-2, atol=1e-5
  )
  np.testing.assert_allclose(alone.query_square, collected.query_square, rtol=1e-4, atol=1e-3)


def test_documents_do_not_see_each_other(corpus, collected, tmp_path):
  last = Corpus(documents=corpus.documents[-1:])
  alone = collect(tiny_model().decoder, last, tmp_path)
  np.testing.assert_allclose(
    alone.keys.astype(np.float32),
    collected.keys[:, :, -_LENGTHS[-1] :].astype(np.float32),
    rtol=1e-2,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ("documents", "message"),
  [
    ((np.full(5, 260, np.int32),), r"\[0, 260\), got 260"),
    ((np.full(129, 1, np.int32),), "129 tokens, the model's context is 128"),
    ((np.zeros(0, np.int32),), "at least one token"),
    ((), "at least one token"),
  ],
  ids=["vocabulary", "context", "empty", "none"],
)
def test_documents_that_cannot_be_run(documents, message, tmp_path):
  with pytest.raises(UserError, match=message):
    collect(tiny_model().decoder, Corpus(documents=documents), tmp_path)


def test_float64_keeps_a_small_eigenvalue(collected):
  """A sum in float32 would lose what is six orders of magnitude below the largest."""
  assert collected.query_square.dtype == np.float64
  assert np.linalg.eigvalsh(collected.query_square).min() > 0
