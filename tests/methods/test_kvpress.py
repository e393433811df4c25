"""Choices of l2norm, snapkv and think against NVIDIA/kvpress 0.5.5, run on the same tensors.

``tests/data/kvpress.npz`` holds rotated queries and keys and what KnormPress, SnapKVPress (window
16, kernels 5 and 7) and ThinKPress (ratio 0.4, window 32) kept of them; no code of theirs is here.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.methods.base import Geometry, PromptLayer
from a2ats_jax.methods.l2norm import L2Norm
from a2ats_jax.methods.snapkv import SnapKV
from a2ats_jax.methods.think import ThinK

DATA = np.load(Path(__file__).parents[1] / "data" / "kvpress.npz")
T = DATA["k"].shape[2]


def absorbed(method, window: int):
  q, k = DATA["q"], np.swapaxes(DATA["k"], 1, 2)
  heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
  geometry = Geometry(
    batch=1, layers=1, heads=heads, kv_heads=kv_heads, head_dim=dim, prompt=T, new=1
  )
  prompt = PromptLayer(
    jnp.asarray(k),
    jnp.asarray(k),
    jnp.asarray(k),
    jnp.asarray([T], jnp.int32),
    queries=jnp.asarray(q[:, T - window :]),
  )
  return method.absorb(method.init(geometry), prompt, layer=0)


def positions(state) -> np.ndarray:
  """Of the tokens kept, ``[K, n]``."""
  held = np.asarray(state.positions)[0]
  return np.stack([row[row >= 0] for row in held])


def test_l2norm_keeps_what_knorm_keeps():
  state = absorbed(L2Norm(budget=Budget(tokens=40), skip=0), 1)
  np.testing.assert_array_equal(positions(state), DATA["knorm_40"][0])


@pytest.mark.parametrize("kernel", [5, 7])
def test_snapkv_keeps_what_snapkv_press_keeps(kernel):
  method = SnapKV(budget=Budget(tokens=48), window=16, kernel=kernel, pool="mean")
  want = DATA[f"snapkv_w16_k{kernel}_48"][0]
  np.testing.assert_array_equal(positions(absorbed(method, 16)), want)
  other = SnapKV(budget=Budget(tokens=48), window=16, kernel=kernel + 4, pool="mean")
  assert np.any(positions(absorbed(other, 16)) != want)


def test_think_keeps_the_channels_that_think_press_keeps():
  state = absorbed(ThinK(prune=0.4, window=32), 32)
  np.testing.assert_array_equal(state.channels[0, 0], DATA["think_04_kept"])
  few = absorbed(ThinK(prune=0.4, window=4), 4)
  assert np.any(np.asarray(few.channels[0, 0]) != DATA["think_04_kept"])
