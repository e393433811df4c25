"""Rotations, frequencies against formulas written out here, and windowed rotary embedding."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax.errors import UserError
from a2ats_jax.rope import Rope, RopeConfig, far_query, make_rope, rotate, windowed_logits
from tests import independent

CONFIGS = {
  "plain": RopeConfig(head_dim=16, theta=10000.0),
  "linear": RopeConfig(head_dim=16, theta=10000.0, scaling="linear", factor=4.0),
  "llama3": RopeConfig(
    head_dim=16, theta=500000.0, scaling="llama3", factor=8.0, original_context=8192
  ),
  "yarn": RopeConfig(
    head_dim=16, theta=1000000.0, scaling="yarn", factor=4.0, original_context=32768
  ),
  "yarn, own factor": RopeConfig(
    head_dim=16,
    theta=10000.0,
    scaling="yarn",
    factor=4.0,
    original_context=4096,
    attention_factor=1.3,
  ),
}
ROPES = {name: make_rope(config) for name, config in CONFIGS.items()}
positions = st.integers(0, 5000)
ropes = st.sampled_from(list(ROPES))


def vectors(seed: int) -> tuple[np.ndarray, np.ndarray]:
  q, k = np.random.default_rng(seed).normal(size=(2, 1, 3, 16)).astype(np.float32)
  return q, k


def at(position: int) -> jnp.ndarray:
  return jnp.asarray([position], jnp.int32)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), position=st.integers(-3000, 3000), rope=ropes)
def test_rotate_equals_the_planes_written_out(seed, position, rope):
  """Dimension j turns with dimension j + D/2."""
  x, _ = vectors(seed)
  got = rotate(jnp.asarray(x), at(position), ROPES[rope])
  for head in range(3):
    want = independent.rotate(
      x[0, head], position, np.asarray(ROPES[rope].inv_freq), float(ROPES[rope].scale)
    )
    np.testing.assert_allclose(got[0, head], want, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), one=st.integers(0, 500), two=st.integers(-500, 500))
def test_rotations_add_up(seed, one, two):
  x, _ = vectors(seed)
  twice = rotate(rotate(jnp.asarray(x), at(one), ROPES["plain"]), at(two), ROPES["plain"])
  once = rotate(jnp.asarray(x), at(one + two), ROPES["plain"])
  np.testing.assert_allclose(twice, once, atol=5e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), i=positions, j=positions, rope=ropes)
def test_far_query_carries_the_whole_rotation(seed, i, j, rope):
  """``far_query(q, i - j) . k == rotate(q, i) . rotate(k, j)``, multiplier included."""
  q, k = (jnp.asarray(x) for x in vectors(seed))
  far = jnp.sum(far_query(q, at(i - j), ROPES[rope]) * k, axis=-1)
  exact = jnp.sum(rotate(q, at(i), ROPES[rope]) * rotate(k, at(j), ROPES[rope]), axis=-1)
  np.testing.assert_allclose(far, exact, atol=1e-2)


def test_rotate_keeps_dtype_and_rotates_in_float32():
  x = jnp.ones((1, 1, 16), jnp.bfloat16)
  got = rotate(x, at(4001), ROPES["plain"])
  assert got.dtype == jnp.bfloat16
  want = independent.rotate(np.ones(16), 4001, np.asarray(ROPES["plain"].inv_freq))
  np.testing.assert_allclose(np.asarray(got[0, 0], np.float32), want, atol=8e-3)


def test_plain_and_linear_frequencies():
  want = np.array([10000.0 ** (-2 * j / 16) for j in range(8)])
  np.testing.assert_allclose(ROPES["plain"].inv_freq, want, rtol=1e-6)
  np.testing.assert_allclose(ROPES["linear"].inv_freq, want / 4, rtol=1e-6)
  assert float(ROPES["plain"].scale) == float(ROPES["linear"].scale) == 1.0


def test_llama3_frequencies():
  """By wavelength: short ones stay, long ones stretch, the band between is a blend."""
  config, kinds = CONFIGS["llama3"], set()
  longest, shortest = 8192 / 1.0, 8192 / 4.0
  for j, got in enumerate(np.asarray(ROPES["llama3"].inv_freq)):
    inv = config.theta ** (-2 * j / 16)
    wavelength = 2 * math.pi / inv
    if wavelength < shortest:
      want, kind = inv, "short"
    elif wavelength > longest:
      want, kind = inv / 8, "long"
    else:
      smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
      want, kind = (1 - smooth) * inv / 8 + smooth * inv, "blend"
    kinds.add(kind)
    np.testing.assert_allclose(got, want, rtol=1e-6)
  assert kinds == {"short", "long", "blend"}


@pytest.mark.parametrize(("name", "scale"), [("yarn", None), ("yarn, own factor", 1.3)])
def test_yarn_frequencies(name, scale):
  """Planes that turn often stay, planes that turn less than once stretch, a linear ramp between."""
  config = CONFIGS[name]

  def plane(turns):
    return (16 * math.log(config.original_context / (turns * 2 * math.pi))) / (
      2 * math.log(config.theta)
    )

  low, high = max(math.floor(plane(32)), 0), min(math.ceil(plane(1)), 15)
  assert 0 < low < high
  for j, got in enumerate(np.asarray(ROPES[name].inv_freq)):
    period = config.theta ** (2 * j / 16)
    stretched = min(max((j - low) / (high - low), 0), 1)
    want = (1 / period) * (1 - stretched) + (1 / (4.0 * period)) * stretched
    np.testing.assert_allclose(got, want, rtol=1e-6)
  want = scale if scale is not None else 0.1 * math.log(4.0) + 1
  assert float(ROPES[name].scale) == pytest.approx(want)


def test_yarn_that_does_not_stretch_has_no_multiplier():
  config = RopeConfig(head_dim=8, scaling="yarn", factor=1.0, original_context=512)
  assert float(make_rope(config).scale) == 1.0


@pytest.mark.parametrize(
  "wrong",
  [
    {"head_dim": 7},
    {"head_dim": 0},
    {"theta": 1.0},
    {"scaling": "llama3", "factor": 8.0},
    {"scaling": "yarn", "factor": 8.0},
    {"scaling": "linear", "factor": 0.0},
    {"theta": math.nan},
  ],
  ids=str,
)
def test_impossible_ropes_are_refused(wrong):
  with pytest.raises(UserError, match="rope"):
    RopeConfig(**({"head_dim": 16} | wrong))


# --- windowed -----------------------------------------------------------------------------------


def windowed(window: int, constant: int, rope: Rope) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(12, 16)).astype(np.float32), rng.normal(size=(12, 16)).astype(np.float32)
  got = windowed_logits(
    jnp.asarray(q),
    jnp.asarray(k),
    jnp.arange(12, dtype=jnp.int32),
    jnp.arange(12, dtype=jnp.int32),
    rope,
    window=window,
    constant=constant,
  )
  return q, k, np.asarray(got)


@pytest.mark.parametrize("rope", ["plain", "yarn"])
@pytest.mark.parametrize(("window", "constant"), [(4, 2048), (4, 3), (1, 2048), (12, 5), (4, 4)])
def test_near_and_far_switch_exactly_at_the_window(rope, window, constant):
  """Distances 0 .. w-1 are exact, from w on every key stands at b, whatever w."""
  turn = ROPES[rope]
  inv_freq, scale = np.asarray(turn.inv_freq, np.float64), float(turn.scale)
  q, k, got = windowed(window, constant, turn)
  far = 0
  for i in range(12):
    for j in range(i + 1):
      away = i - j if i - j < window else constant
      want = scale * scale * (independent.rotate(q[i], away, inv_freq) @ k[j])
      np.testing.assert_allclose(got[i, j], want, atol=2e-3)
      far += i - j >= window
  assert (far > 0) == (window < 12)


def test_window_and_constant_are_independent():
  """Changing b moves the far entries only, changing w the entries between the two windows only."""
  distance = np.arange(12)[:, None] - np.arange(12)[None, :]
  base = windowed(4, 2048, ROPES["plain"])[2]
  other_constant = windowed(4, 100, ROPES["plain"])[2]
  other_window = windowed(6, 2048, ROPES["plain"])[2]
  np.testing.assert_array_equal(base != other_constant, distance >= 4)
  np.testing.assert_array_equal(base != other_window, (distance >= 4) & (distance < 6))
