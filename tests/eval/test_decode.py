"""Teacher-forced blocks equal single steps; greedy decoding equals the library's own."""

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import generate, pad_prompts
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from eval.decode import block_of, greedy_from, teacher_forced
from eval.record import record, replay
from tests.eval import tiny


def _a2ats(**options):
  return A2ATSReference(codebook=tiny.codebook(), budget=Budget(ratio=0.1), window=8, **options)


@pytest.mark.parametrize(
  "method",
  [
    lambda: _a2ats(),
    lambda: _a2ats(far=FarPosition.segments(3, 4), tail="centroid"),
    lambda: Oracle(budget=Budget(tokens=4), window=8, sinks=2),
  ],
  ids=["a2ats", "a2ats-plus", "oracle"],
)
def test_a_block_equals_single_steps(method):
  model, method, new = tiny.model(), method(), 11
  rng = np.random.default_rng(2)
  prompts = [rng.integers(0, 128, n).tolist() for n in (60, 37)]
  tokens, lengths = pad_prompts(prompts, model.config, new=new)
  recording = record(model.decoder, tokens, lengths)
  inputs = rng.integers(0, 128, (2, new)).astype(np.int32)

  def run(block):
    state = replay(model.config, recording, method, new=new)
    return teacher_forced(model.decoder, method, state, inputs, lengths, block=block)

  single, single_stats = run(1)
  assert single.shape == (2, new, 128)
  for block in (4, new):  # 4 leaves a padded last block
    logits, stats = run(block)
    np.testing.assert_allclose(logits, single, atol=2e-5)
    for name in ("length", "selected", "read"):
      np.testing.assert_array_equal(stats[name], single_stats[name])
    np.testing.assert_allclose(stats["tail"], single_stats["tail"], atol=1e-5)
  assert (single_stats["selected"] < single_stats["length"][..., None] - 8).all()


def test_greedy_from_a_replayed_state_is_the_librarys_greedy():
  model, method = tiny.model(), Full()
  rng = np.random.default_rng(3)
  prompts = [rng.integers(0, 128, n).tolist() for n in (50, 33)]
  expected = np.concatenate(
    [block.tokens for block in generate(model.decoder, method, prompts, new=9)], axis=1
  )
  stop = (int(expected[0, 5]),)  # ends the first row early
  blocks = list(generate(model.decoder, method, prompts, new=9, stop=stop))
  stopped = np.concatenate([block.tokens for block in blocks], axis=1)
  tokens, lengths = pad_prompts([p[:-1] for p in prompts], model.config, new=9)
  recording = record(model.decoder, tokens, lengths)
  state = replay(model.config, recording, method, new=9)
  rows, stats = greedy_from(
    model.decoder, method, state, [p[-1] for p in prompts], lengths, new=9, stop=stop
  )
  for row, tokens_of_row in enumerate(rows):
    theirs = [token for token in stopped[row].tolist() if token >= 0 and token not in stop]
    assert tokens_of_row == theirs
  assert len(stats) == stopped.shape[1]
  assert [s["length"][0, :, 0].tolist() for s in stats[4:7]] == [[54, 37], [55, 38], [0, 39]]


def test_blocks_shrink_with_the_cache():
  config = tiny.model().config
  assert block_of(config, batch=1, slots=100, new=64) == 32
  assert block_of(config, batch=1, slots=100, new=5) == 5
  assert block_of(config, batch=2, slots=1 << 20, new=32) == 4
  assert block_of(config, batch=1, slots=1 << 30, new=32) == 1
