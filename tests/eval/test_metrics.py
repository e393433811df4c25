"""Figures worked by hand on a vocabulary of three."""

import math

import numpy as np
import pytest

from eval.metrics import compare, log_softmax, reading, spread


def _logits(rows):
  """Logits, shifted by anything, of given probabilities."""
  return (np.log(np.array(rows)) + 3.0).astype(np.float32)


def test_kl_top1_and_likelihood_by_hand():
  full = _logits([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
  other = _logits([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
  close = compare(full, other, np.array([0, 2]))
  second = 0.2 * math.log(0.2 / 0.3) + 0.6 * math.log(0.6 / 0.5)
  np.testing.assert_allclose(close.kl, [0.25 * math.log(2), second], atol=1e-6)
  assert close.top1.tolist() == [0.0, 1.0]
  np.testing.assert_allclose(close.nll, [math.log(4), math.log(2)], atol=1e-6)
  # perplexity: the geometric mean of 4 and 2
  assert math.exp(close.nll.mean()) == pytest.approx(math.sqrt(8), rel=1e-6)


def test_full_against_itself_is_exactly_zero():
  x = np.random.default_rng(0).normal(0, 20, (5, 7)).astype(np.float32)
  close = compare(x, x, np.zeros(5, int))
  assert close.kl.tolist() == [0.0] * 5
  assert close.top1.tolist() == [1.0] * 5


def test_log_softmax_keeps_what_float32_loses():
  out = log_softmax(np.array([[1000.0, 0.0, -1000.0]], np.float32))
  np.testing.assert_array_equal(out, [[0.0, -1000.0, -2000.0]])


def test_spread_by_hand():
  assert spread([2.0]) == (2.0, None, None)
  mean, deviation, error = spread([1.0, 3.0, 5.0, 7.0])
  assert mean == 4.0
  assert deviation == pytest.approx(math.sqrt(20 / 3))
  assert error == pytest.approx(math.sqrt(20 / 3) / 2)


def test_reading_by_hand():
  # two layers, one row, one step, two KV heads, eight tokens cached
  stats = {
    "length": np.full((2, 1, 1), 8),
    "selected": np.array([[[[1, 2]]], [[[3, 0]]]]),
    "read": np.array([[[[3, 4]]], [[[5, 2]]]]),
    "tail": np.full((2, 1, 1, 2), 0.25, np.float32),
    "read_bytes": np.array([[[[300.0, 400.0]]], [[[500.0, 200.0]]]], np.float32),
    "moved": np.array([[[[64.0, 32.0]]], [[[0.0, 0.0]]]], np.float32),
  }
  figures = reading(stats, 0)
  assert figures == {
    "read": 14 / 32,
    "selected": 6 / 32,
    "tail": 0.25,
    "read_bytes": 1400.0,
    "moved_bytes": 96.0,
  }
  assert reading({"length": stats["length"]}, 0) == {}
