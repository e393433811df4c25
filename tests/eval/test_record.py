"""Replaying a recorded prompt leaves what a prefill under the method leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import pad_prompts, prefill
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.base import Needs
from a2ats_jax.methods.full import Full
from a2ats_jax.rope import make_rope, rotate
from eval.ablation import TrueDistance, Unquantised
from eval.record import Recorder, record, replay
from tests.eval import tiny

BUDGET = Budget(tokens=5)


def _methods():
  book = tiny.codebook()
  far = FarPosition.segments(3, 4)
  return {
    "full": Full(),
    "a2ats": A2ATSReference(codebook=book, budget=BUDGET, far=far, window=8),
    "unquantised": Unquantised(budget=BUDGET, far=far, window=8),
    "true-distance": TrueDistance(codebook=book, budget=BUDGET, window=8),
  }


@pytest.mark.parametrize("name", ["full", "a2ats", "unquantised", "true-distance"])
def test_a_replayed_state_is_the_prefilled_one_to_the_bit(name):
  model, method = tiny.model(), _methods()[name]
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 128, n).tolist() for n in (600, 45)]  # two chunks, and padding
  tokens, lengths = pad_prompts(prompts, model.config, new=6)
  logits, direct = prefill(model.decoder, method, tokens, lengths, new=6)
  recording = record(model.decoder, tokens, lengths)
  replayed = replay(model.config, recording, method, new=6)
  np.testing.assert_array_equal(recording.logits, logits)
  assert jax.tree.structure(replayed) == jax.tree.structure(direct)
  for ours, theirs in zip(jax.tree.leaves(replayed), jax.tree.leaves(direct)):
    np.testing.assert_array_equal(ours, theirs)


@dataclasses.dataclass(frozen=True)
class Observing(Full):
  """Full attention that asks for everything."""

  needs = Needs(queries=700, sums=True)


def test_a_prompt_hands_over_queries_and_sums():
  """Two chunks and a short row: attention of the recorded queries, added up, is the sums."""
  model = tiny.model()
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 128, n).tolist() for n in (600, 45)]
  tokens, lengths = pad_prompts(prompts, model.config, new=0)
  got = record(model.decoder, tokens, lengths, methods=[Full(), Observing()]).prompt
  assert got.queries is not None
  assert got.sums is not None
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  for layer in range(model.config.layers):
    keys = rotate(got.keys[layer], jnp.asarray(positions), make_rope(model.config.rope))
    weights = attention.window_weights(
      got.queries[layer], jnp.swapaxes(keys, 1, 2), jnp.asarray(lengths)
    )
    np.testing.assert_allclose(got.sums[layer], np.sum(weights, axis=1), atol=2e-4)
  np.testing.assert_allclose(np.sum(got.sums, axis=-1)[0, :, 0], lengths, rtol=1e-4)
  assert not np.any(np.asarray(got.queries)[:, 1, : 700 - 45])
  assert np.all(np.any(np.asarray(got.queries)[:, 1, 700 - 45 :], axis=(-1, -2)))
  few = record(model.decoder, tokens, lengths, methods=[Full()]).prompt
  assert few.queries is None
  assert few.sums is None


def test_a_recorder_does_not_decode():
  model = tiny.model()
  tokens, lengths = pad_prompts([[1, 2, 3]], model.config, new=0)
  state = record(model.decoder, tokens, lengths).prompt
  x = state.keys[0, :, :1]
  with pytest.raises(NotImplementedError, match="replay"):
    Recorder(Needs()).attend(
      state,
      x,
      x,
      x,
      positions=jnp.zeros((1, 1), jnp.int32),
      rope=make_rope(model.config.rope),
      layer=0,
    )
