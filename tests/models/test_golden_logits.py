"""A real checkpoint against numbers another implementation computed from the same file."""

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import generate
from a2ats_jax.forward import layer_over_prompt
from a2ats_jax.methods.full import Full
from a2ats_jax.models.model import Model, load_model

TOLERANCE = 2e-3
CLEAR = 1e-2  # where the first two logits differ by more than this, the first must agree


@pytest.fixture(scope="module")
def model() -> Model:
  """The checkpoint the golden numbers were computed from."""
  return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def logits(model, golden) -> np.ndarray:
  """Logits after every position: the first token as a prompt, the rest in one step."""
  ids = golden["prompt_ids"]
  tokens, lengths = generate.pad_prompts([ids[:1]], model.config, new=len(ids) - 1)
  first, state = generate.prefill(model.decoder, Full(), tokens, lengths, new=len(ids) - 1)
  rest, _, _ = generate.decode_step(
    model.decoder,
    Full(),
    state,
    jnp.asarray([ids[1:]], jnp.int32),
    jnp.arange(1, len(ids), dtype=jnp.int32)[None],
  )
  return np.concatenate([np.asarray(first), np.asarray(rest[0])])


def test_prefill_logits(model, golden, golden_arrays):
  """The last logits of the whole prompt, prefilled in chunks."""
  tokens, lengths = generate.pad_prompts([golden["prompt_ids"]], model.config, new=1)
  got, _ = generate.prefill(model.decoder, Full(), tokens, lengths, new=1)
  np.testing.assert_allclose(got[0], golden_arrays["last_logits"], atol=TOLERANCE, rtol=0)


def test_last_logits(logits, golden_arrays):
  np.testing.assert_allclose(logits[-1], golden_arrays["last_logits"], atol=TOLERANCE, rtol=0)


def test_top_logits(logits, golden):
  for position, ids, values in zip(
    golden["logit_positions"], golden["top20_ids"], golden["top20_logits"], strict=True
  ):
    np.testing.assert_allclose(logits[position, ids], values, atol=TOLERANCE, rtol=0)
    best = np.sort(logits[position])[-20]
    assert best <= min(values) + TOLERANCE


def test_every_position(logits, golden):
  """The normaliser everywhere, and the best token wherever it is clear."""
  wide = logits.astype(np.float64)
  got = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
  np.testing.assert_allclose(got, golden["logsumexp_all_positions"], atol=TOLERANCE, rtol=0)
  top = np.sort(logits, axis=-1)
  clear = top[:, -1] - top[:, -2] > CLEAR
  assert clear.mean() > 0.9
  want = np.asarray(golden["argmax_all_positions"])
  np.testing.assert_array_equal(logits.argmax(-1)[clear], want[clear])


def test_greedy(model, golden):
  want = golden["greedy_from_first_64"]
  blocks = generate.generate(model.decoder, Full(), [golden["prompt_ids"][:64]], new=len(want))
  assert np.concatenate([block.tokens for block in blocks], axis=1)[0].tolist() == want


@pytest.mark.parametrize("index", [0, 29])
def test_key_projections(model, golden, golden_arrays, index):
  """Keys before rotary embedding of the first and the last layer: head order and layout."""
  assert model.config.layers == 30
  decoder, ids = model.decoder, golden["prompt_ids"][:16]
  x = decoder.embed(jnp.asarray([ids], jnp.int32))
  state = Full().init(generate.geometry_of(model.config, batch=1, prompt=16, new=0))
  for layer in range(index):
    number, lengths = jnp.asarray(layer, jnp.int32), jnp.asarray([16], jnp.int32)
    x, state = layer_over_prompt(decoder, Full(), state, x, lengths, number, local=False, chunk=16)
  _, keys, _ = decoder.layer(index).project(x)
  got = np.asarray(keys).reshape(16, -1)
  np.testing.assert_allclose(got, golden_arrays[f"k_proj_{index}"], atol=TOLERANCE, rtol=0)
