"""Replaying a recorded prompt leaves what a prefill under the method leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import pad_prompts, prefill
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.rope import make_rope
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


def test_a_recorder_does_not_decode():
  model = tiny.model()
  tokens, lengths = pad_prompts([[1, 2, 3]], model.config, new=0)
  state = record(model.decoder, tokens, lengths).prompt
  x = state.keys[0, :, :1]
  with pytest.raises(NotImplementedError, match="replay"):
    Recorder().attend(
      state,
      x,
      x,
      x,
      positions=jnp.zeros((1, 1), jnp.int32),
      rope=make_rope(model.config.rope),
      layer=0,
    )
