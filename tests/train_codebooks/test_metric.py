"""From query moments to whiteners, on matrices that are kind and on ones that are not."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a2ats_jax.errors import UserError
from a2ats_jax.rope import RopeConfig, far_query, make_rope, rotate
from train_codebooks.metric import Metric, factor, log_spaced, query_moment, rotation, whiteners

_DIM = 8
_ROPE = make_rope(RopeConfig(head_dim=_DIM, theta=100.0))
_INV_FREQ = np.asarray(_ROPE.inv_freq)


def moments(queries):
  wide = queries.astype(np.float64)
  return wide.T @ wide, wide.sum(axis=0), len(wide)


@pytest.fixture
def queries():
  draw = np.random.default_rng(0)
  return (draw.normal(size=(200, _DIM)) @ draw.normal(size=(_DIM, _DIM)) + 1.5).astype(np.float32)


@pytest.mark.parametrize("distance", [0, 1, 40, 2048])
def test_rotation_is_the_models_own(distance):
  eye = jnp.eye(_DIM)[:, None, :]
  theirs = rotate(eye, jnp.full(_DIM, distance, jnp.int32), _ROPE)[:, 0]
  np.testing.assert_allclose(rotation(distance, _INV_FREQ), theirs, atol=1e-4 + 1e-7 * distance)


@pytest.mark.parametrize("distances", [(2048,), (64, 300, 1500)])
def test_moment_equals_that_of_rotated_queries(queries, distances):
  """One matrix before rotation gives H at every distance, without keeping a query."""
  direct = np.zeros((_DIM, _DIM))
  for d in distances:
    turned = np.asarray(
      far_query(jnp.asarray(queries)[:, None], jnp.full(len(queries), d, jnp.int32), _ROPE)
    )[:, 0].astype(np.float64)
    direct += turned.T @ turned / len(queries) / len(distances)
  ours = query_moment(Metric(distances=distances), *moments(queries), _INV_FREQ)
  np.testing.assert_allclose(ours, direct, rtol=1e-3, atol=1e-3 * np.abs(direct).max())


def test_an_attention_factor_only_scales_the_moment(queries):
  """Which is why rope.scale may be left out of H."""
  yarn = make_rope(
    RopeConfig(head_dim=_DIM, theta=100.0, scaling="yarn", factor=8.0, original_context=64)
  )
  assert float(yarn.scale) > 1
  turned = np.asarray(
    far_query(jnp.asarray(queries)[:, None], jnp.full(len(queries), 40, jnp.int32), yarn)
  )[:, 0]
  ours = query_moment(Metric(distances=(40,)), *moments(queries), np.asarray(yarn.inv_freq))
  ratio = (turned.T @ turned / len(queries)) / ours
  np.testing.assert_allclose(ratio, float(yarn.scale) ** 4, rtol=1e-2)


def test_a_wrong_distance_is_noticed(queries):
  right = query_moment(Metric(distances=(40,)), *moments(queries), _INV_FREQ)
  wrong = query_moment(Metric(distances=(41,)), *moments(queries), _INV_FREQ)
  assert np.abs(right - wrong).max() > 1e-2 * np.abs(right).max()


def test_whitening_turns_the_metric_into_a_distance(queries):
  moment = query_moment(Metric(), *moments(queries), _INV_FREQ)
  lower, repaired = factor(Metric(), moment)
  assert not repaired
  assert np.array_equal(lower, np.tril(lower))
  h = moment / np.sqrt(np.mean(moment**2)) + 1e-6 * np.eye(_DIM)
  keys, codewords = np.random.default_rng(1).normal(size=(2, 20, _DIM))
  direct = np.einsum("nd,de,ne->n", keys - codewords, h, keys - codewords)
  whitened = np.sum(np.square(keys @ lower - codewords @ lower), axis=-1)
  np.testing.assert_allclose(whitened, direct, rtol=1e-9)


def test_centred_takes_the_covariance(queries):
  ours = query_moment(Metric(centred=True, distances=(0,)), *moments(queries), _INV_FREQ)
  np.testing.assert_allclose(ours, np.cov(queries.T.astype(np.float64), bias=True), rtol=1e-6)


def test_power_and_shrinkage(queries):
  moment = query_moment(Metric(), *moments(queries), _INV_FREQ)
  h = moment / np.sqrt(np.mean(moment**2))
  lower, _ = factor(Metric(power=0.5), moment)
  np.testing.assert_allclose(
    (lower @ lower.T - 1e-6 * np.eye(_DIM)) @ (lower @ lower.T - 1e-6 * np.eye(_DIM)),
    h,
    atol=1e-8,
  )
  lower, _ = factor(Metric(shrinkage=0.3), moment)
  np.testing.assert_allclose(
    lower @ lower.T, h + (0.3 * np.trace(h) / _DIM + 1e-6) * np.eye(_DIM), atol=1e-9
  )


def _spectrum(values):
  basis = np.linalg.qr(np.random.default_rng(2).normal(size=(_DIM, _DIM)))[0]
  return (basis * np.array(values)) @ basis.T


@pytest.mark.parametrize(
  ("values", "repaired"),
  [
    ([1.0] + [0.0] * 7, False),
    ([54.0, *[1e-3] * 4, *[-1e-3] * 3], True),
    ([-1.0] * 8, True),
    ([0.0] * 8, False),
    ([1e30] + [1e-30] * 7, False),
    ([1e-30] * 8, False),
  ],
  ids=["rank-one", "indefinite", "negative", "zero", "huge", "tiny"],
)
def test_no_moment_fails(values, repaired):
  lower, was_repaired = factor(Metric(), _spectrum(values))
  assert was_repaired == repaired
  assert np.isfinite(lower).all()
  assert np.array_equal(lower, np.tril(lower))
  assert (np.diag(lower.astype(np.float32)) > 0).all(), "the whitener must have an inverse"


@settings(max_examples=60, deadline=None)
@example([0.0] * (_DIM - 1) + [8.5e-175], 0.0, 1.0)
@given(
  st.lists(st.floats(-1e6, 1e6), min_size=_DIM, max_size=_DIM),
  st.sampled_from([0.0, 0.3]),
  st.sampled_from([1.0, 0.5]),
)
def test_any_symmetric_moment_gives_an_invertible_whitener(values, shrinkage, power):
  lower, _ = factor(Metric(shrinkage=shrinkage, power=power), _spectrum(values))
  assert np.isfinite(np.linalg.inv(lower.astype(np.float32).astype(np.float64))).all()


def test_repair_keeps_what_is_positive():
  moment = _spectrum([54.0, 5.0, 1.0, 0.5, 0.1, 0.1, -1e-3, -1e-3])
  lower, repaired = factor(Metric(), moment)
  assert repaired
  scale = np.sqrt(np.mean(moment**2))
  np.testing.assert_allclose(lower @ lower.T * scale, moment, atol=3e-3)
  assert 0 < np.linalg.eigvalsh(lower @ lower.T)[0] < 1e-6, "negative ones become nearly zero"


def test_not_finite_is_said():
  with pytest.raises(UserError, match="non-finite"):
    factor(Metric(), np.full((_DIM, _DIM), np.nan))


def test_each_head_gets_its_own_and_repairs_are_reported(queries):
  good = moments(queries)
  square = np.stack([good[0], _spectrum([5.0] * 6 + [-1.0] * 2) * good[2]])
  total = np.stack([good[1], good[1]])
  out, repaired = whiteners(Metric(), square, total, good[2], _INV_FREQ)
  assert repaired == [1]
  expected, _ = factor(Metric(), query_moment(Metric(), *good, _INV_FREQ))
  np.testing.assert_allclose(out[0], expected, rtol=1e-6)
  plain, repaired = whiteners(Metric(kind="plain"), square, total, good[2], _INV_FREQ)
  assert repaired == []
  np.testing.assert_array_equal(plain, np.broadcast_to(np.eye(_DIM), (2, _DIM, _DIM)))


def test_log_spaced():
  assert log_spaced(64, 4096, 7) == (64, 128, 256, 512, 1024, 2048, 4096)
  assert log_spaced(1, 2, 9) == (1, 2)
  with pytest.raises(UserError):
    log_spaced(5, 4)


@pytest.mark.parametrize(
  "options",
  [
    {"kind": "cosine"},
    {"distances": ()},
    {"distances": (-1,)},
    {"shrinkage": -0.1},
    {"shrinkage": float("nan")},
    {"power": 0.0},
    {"power": 1.5},
  ],
)
def test_bad_options_are_refused(options):
  with pytest.raises((UserError, TypeError), match=r"metric:|kind"):
    Metric(**options)
