"""Draws against a plain reading of the distribution in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.sampling import Sampling, sample

DRAWS = 20000


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
  """Probabilities ``[V]`` of one row: rank, cut, normalise, token after token."""
  weight = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
  order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
  order = order[: sampling.top_k or len(logits)]
  kept, reached = [], 0.0
  for token in order:
    kept.append(token)
    reached += weight[token] / weight[order].sum()
    if reached >= sampling.top_p:
      break
  out = np.zeros(len(logits))
  out[kept] = weight[kept] / weight[kept].sum()
  return out


def draws(logits, sampling: Sampling, *, count: int = DRAWS, seed: int = 0) -> np.ndarray:
  """Tokens drawn from one row of logits with as many keys."""
  keys = jax.random.split(jax.random.key(seed), count)
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
  return np.asarray(jax.jit(sample, static_argnums=1)(rows, sampling, keys))


LOGITS = np.random.default_rng(0).normal(size=23).astype(np.float32) * 2

SETTINGS = {
  "all": Sampling(temperature=1.0),
  "warm": Sampling(temperature=1.7),
  "cool": Sampling(temperature=0.6),
  "top-k": Sampling(temperature=1.0, top_k=5),
  "top-k of more than there are": Sampling(temperature=1.0, top_k=99),
  "top-p": Sampling(temperature=1.0, top_p=0.8),
  "warm, top-p": Sampling(temperature=1.7, top_p=0.8),
  "top-k and top-p": Sampling(temperature=1.3, top_k=6, top_p=0.7),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_support_and_frequencies(name):
  """No token outside the support, every token of it, and a chi-square that chance would give."""
  want = distribution(LOGITS, SETTINGS[name])
  got = np.bincount(draws(LOGITS, SETTINGS[name]), minlength=len(LOGITS))
  kept = want > 0
  assert not got[~kept].any()
  likely = want * DRAWS > 10
  assert got[likely].all()
  expected = np.append(want[likely] * DRAWS, want[~likely].sum() * DRAWS)
  seen = np.append(got[likely], got[~likely].sum())
  expected, seen = expected[expected > 0], seen[expected > 0]
  freedom = len(expected) - 1
  chi = ((seen - expected) ** 2 / expected).sum()
  assert chi < freedom + 4 * np.sqrt(2 * freedom)


def test_the_settings_differ():
  """The check above tells any two of the settings apart, but for the top-k that keeps all."""
  shares = [distribution(LOGITS, s) for name, s in SETTINGS.items() if "more" not in name]
  for i, one in enumerate(shares):
    for two in shares[i + 1 :]:
      kept = two > 0
      chi = (DRAWS * (one - two)[kept] ** 2 / two[kept]).sum()
      assert (one[~kept] > 0).any() or chi > 10 * kept.sum()


@pytest.mark.parametrize(
  ("shares", "options", "support"),
  [
    ([1, 1, 1, 1], {"top_k": 2}, {0, 1}),
    ([1, 1, 1, 1], {"top_p": 0.25}, {0}),
    ([1, 1, 1, 1], {"top_p": 0.5}, {0, 1}),
    ([1, 1, 1, 1], {"top_p": 0.51}, {0, 1, 2}),
    ([1, 1, 1, 1], {"top_p": 0.76}, {0, 1, 2, 3}),
    ([1, 4, 1, 2], {"top_k": 3}, {0, 1, 3}),
    ([1, 4, 1, 2], {"top_p": 0.45}, {1}),
    ([1, 4, 1, 2], {"top_p": 0.55}, {1, 3}),
    ([1, 4, 1, 2], {"top_p": 0.8}, {0, 1, 3}),
    ([1, 4, 1, 2], {"top_p": 0.9}, {0, 1, 2, 3}),
    ([4, 3, 2, 1], {"top_p": 0.5}, {0, 1}),
    ([4, 3, 2, 1], {"top_p": 0.5, "top_k": 2}, {0}),  # 4/7 of what top_k leaves
    ([4, 3, 2, 1], {"top_p": 0.6, "top_k": 2}, {0, 1}),
    ([4, 3, 2, 1], {"top_p": 0.5, "temperature": 0.5}, {0}),  # 16/30
    ([7], {"top_k": 3, "top_p": 0.1}, {0}),
  ],
)
def test_the_support_is_exact(shares, options, support):
  """Worked by hand: ties go to the lower id, and a set ends where it reaches top_p."""
  sampling = Sampling(**({"temperature": 1.0} | options))
  assert set(draws(np.log(shares), sampling, count=1000).tolist()) == support


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(),
    Sampling(temperature=1e-6),
    Sampling(temperature=2.0, top_k=1),
    Sampling(temperature=2.0, top_p=1e-9),
  ],
  ids=["greedy", "cold", "top-k of one", "no probability"],
)
def test_what_is_greedy(sampling):
  assert set(draws(LOGITS, sampling, count=1000).tolist()) == {int(LOGITS.argmax())}
  assert set(draws(LOGITS * 1e30, sampling, count=1000).tolist()) == {int(LOGITS.argmax())}


def test_ties_of_the_likeliest():
  """Greedy and top-k of one take the lowest id; a low temperature draws among them evenly."""
  logits = [1.0, 3.0, 2.0, 3.0]
  for sampling in (Sampling(), Sampling(temperature=1.0, top_k=1)):
    assert set(draws(logits, sampling, count=500).tolist()) == {1}
  counts = np.bincount(draws(logits, Sampling(temperature=1e-6)), minlength=4)
  assert counts[[0, 2]].tolist() == [0, 0]
  assert abs(counts[1] - DRAWS / 2) < 4 * np.sqrt(DRAWS / 4)


@pytest.mark.parametrize("name", ["all", "top-k and top-p"])
def test_a_row_depends_on_its_own_logits_and_key(name):
  """Other rows may come, go and change; equal rows with keys of their own differ."""
  rng, keys = np.random.default_rng(1), jax.random.split(jax.random.key(5), 64)
  logits = jnp.asarray(rng.normal(size=(64, 23)), jnp.float32)
  together = np.asarray(sample(logits, SETTINGS[name], keys))
  pieces = [sample(logits[i : i + 8], SETTINGS[name], keys[i : i + 8]) for i in range(0, 64, 8)]
  np.testing.assert_array_equal(np.concatenate(pieces), together)
  backwards = sample(logits[::-1], SETTINGS[name], keys[::-1])
  np.testing.assert_array_equal(backwards[::-1], together)
  assert len(set(draws(LOGITS, SETTINGS[name], count=64).tolist())) > 3


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"temperature": -0.1}, ("temperature", "-0.1")),
    ({"temperature": 1e-7}, ("temperature", "1e-06", "1e-07")),
    ({"temperature": float("inf")}, ("temperature", "inf")),
    ({"temperature": float("nan")}, ("temperature", "nan")),
    ({"temperature": 1.0, "top_k": -1}, ("top_k", "-1")),
    ({"temperature": 1.0, "top_p": 0.0}, ("top_p", "0.0")),
    ({"temperature": 1.0, "top_p": 1.1}, ("top_p", "1.1")),
    ({"temperature": 1.0, "top_p": float("nan")}, ("top_p", "nan")),
    ({"top_k": 3}, ("temperature", "no effect", "top_k 3")),
    ({"top_p": 0.5}, ("temperature", "no effect", "top_p 0.5")),
  ],
  ids=str,
)
def test_refusals(options, words):
  with pytest.raises(UserError) as caught:
    Sampling(**options)
  assert "\n" not in str(caught.value)
  for word in words:
    assert word in str(caught.value)
