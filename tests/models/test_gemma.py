"""Gemma 3 checkpoints in both formats, and the real one against golden numbers."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import generate
from a2ats_jax.errors import UserError
from a2ats_jax.methods.full import Full
from a2ats_jax.models.gguf_file import read_gguf
from a2ats_jax.models.hf_dir import read_hf_dir
from a2ats_jax.models.model import Model, load_model
from a2ats_jax.plan_known import MODELS
from a2ats_jax.rope import RopeConfig
from tests import tiny
from tests.models.tiny_models import tiny_config, tiny_tensors, write_gguf, write_hf

DATA = Path(__file__).parent.parent / "data"
TOLERANCE = 2e-3
CLEAR = 1e-2  # where the first two logits differ by more than this, the first must agree


# Tiny files.


def test_both_formats_give_the_same_model(tmp_path):
  """Norms, names and every option; the formats name the architecture each in its way."""
  config = tiny_config("gemma3")
  tensors = tiny_tensors(config)
  hf = dataclasses.replace(config, architecture="gemma3_text")
  one = read_hf_dir(write_hf(tmp_path / "hf", hf, tensors))
  two = read_gguf(write_gguf(tmp_path / "m.gguf", config, tensors))
  assert (one.config, two.config) == (hf, config)
  assert set(one.tensors) == set(two.tensors) == set(tensors)
  for name, want in tensors.items():
    np.testing.assert_allclose(one.tensors[name], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(two.tensors[name], want)


def test_newer_keys_of_a_folder_say_the_same(tmp_path):
  config = tiny_config("gemma3_text")
  newer = {
    "rope_theta": None,
    "rope_scaling": None,
    "rope_local_base_freq": None,
    "sliding_window_pattern": None,
    "tie_word_embeddings": None,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
  }
  assert (
    read_hf_dir(write_hf(tmp_path, config, tiny_tensors(config), changes=newer)).config == config
  )


def test_what_gemma_files_leave_out(tmp_path):
  """The pattern of six, the local base, and for the model of 62 layers the scale of queries."""
  gone = ("attention.sliding_window_pattern", "rope.freq_base_swa")
  metadata = dict.fromkeys([f"gemma3.{key}" for key in gone]) | {"gemma3.rope.scaling.type": None}
  rope = RopeConfig(head_dim=8, theta=1e6)
  config = tiny_config("gemma3", layers=62, rope=rope)
  path = write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config), metadata=metadata)
  found = read_gguf(path).config
  assert found.local is not None
  assert (found.local.period, found.local.window, found.local.rope.theta) == (6, 16, 10000.0)
  assert found.query_scale == 1.0  # 32 / 4 is the head size
  config = tiny_config("gemma3", layers=62, rope=rope, width=64)
  path = write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config), metadata=metadata)
  assert read_gguf(path).config.query_scale == pytest.approx((8 / 16) ** 0.5)
  folder = tiny_config("gemma3_text")
  changes = {"query_pre_attn_scalar": 32, "sliding_window_pattern": None}
  folder = dataclasses.replace(folder, layers=6)
  path = write_hf(tmp_path / "hf", folder, tiny_tensors(folder), changes=changes)
  found = read_hf_dir(path).config
  assert (found.query_scale, found.period) == (0.5, 6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types must be one"),
    ({"layer_types": ["sliding_attention"] * 4}, "at least the 5 layers of a period, got 4"),
    ({"sliding_window": None}, "sliding_window is missing"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be above 0, got 0.0"),
    (
      {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
      "rope type 'yarn' of local layers",
    ),
  ],
)
def test_other_gemmas_are_refused(tmp_path, changes, message):
  config = tiny_config("gemma3_text")
  with pytest.raises(UserError, match=message):
    read_hf_dir(write_hf(tmp_path, config, tiny_tensors(config), changes=changes))


# The real one: 253 MB.


@pytest.fixture(scope="module")
def model() -> Model:
  return load_model("gemma-3-270m")


@pytest.fixture(scope="module")
def golden() -> dict:
  return json.loads((DATA / "gemma-3-270m.json").read_text("utf-8"))


@pytest.mark.slow
def test_the_known_shape_is_the_files(model):
  assert MODELS["gemma-3-270m"] == model.config


@pytest.mark.slow
def test_golden_logits(model, golden):
  """A prompt of one token, and the others fed 64 at a time; then the whole as a prompt."""
  ids, asked, made = golden["prompt_ids"], golden["logit_positions"], []
  tops = dict(
    zip(asked, zip(golden["top20_ids"], golden["top20_logits"], strict=True), strict=True)
  )
  tokens, lengths = generate.pad_prompts([ids[:1]], model.config, new=len(ids) - 1)
  logits, state = generate.prefill(model.decoder, Full(), tokens, lengths, new=len(ids) - 1)
  pieces = [(0, np.asarray(logits))]
  for start in range(1, len(ids), 64):
    positions = start + np.arange(64, dtype=np.int32)
    here = positions < len(ids)
    piece = np.where(here, np.asarray([*ids, *[0] * 64])[positions], 0).astype(np.int32)
    logits, state, _ = generate.decode_step(
      model.decoder,
      Full(),
      state,
      jnp.asarray(piece)[None],
      jnp.asarray(np.where(here, positions, -1))[None],
    )
    pieces.append((start, np.asarray(logits[0])[here]))
  tokens, lengths = generate.pad_prompts([ids], model.config, new=1)
  whole, _ = generate.prefill(model.decoder, Full(), tokens, lengths, new=1)
  pieces.append((len(ids) - 1, np.asarray(whole)))
  for start, rows in pieces:
    for position, row in enumerate(rows.astype(np.float64), start):
      normaliser = row.max() + np.log(np.exp(row - row.max()).sum())
      want = golden["logsumexp_all_positions"][position]
      assert normaliser == pytest.approx(want, abs=TOLERANCE)
      second, first = np.partition(row, -2)[-2:]
      if first - second > CLEAR:
        made.append(position)
        assert row.argmax() == golden["argmax_all_positions"][position]
      if position in tops:
        top, values = tops[position]
        np.testing.assert_allclose(row[top], values, atol=TOLERANCE, rtol=0)
        assert np.partition(row, -20)[-20] <= min(values) + TOLERANCE
  assert len(made) > 0.9 * len(ids)


@pytest.mark.slow
def test_golden_greedy(model, golden):
  want = golden["greedy_from_first_64"]
  blocks = generate.generate(model.decoder, Full(), [golden["prompt_ids"][:64]], new=len(want))
  assert np.concatenate([block.tokens for block in blocks], axis=1)[0].tolist() == want


def attention_of_a_prompt(q, k, v, inv_freq, scale, window):
  """As :func:`tests.independent.causal_attention`, with T x T scores."""
  t, heads, size = q.shape
  angle = np.arange(t)[:, None, None] * np.concatenate([inv_freq, inv_freq]).astype(np.float64)

  def turned(x):
    a, b = np.split(x, 2, axis=-1)
    return scale * (x * np.cos(angle) + np.concatenate([-b, a], axis=-1) * np.sin(angle))

  k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (turned(k), v))
  scores = np.einsum("ihd,jhd->hij", turned(q), k) / np.sqrt(size)
  back = np.arange(t)[:, None] - np.arange(t)
  scores[:, (back < 0) | (back >= (window or t))] = -np.inf
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.slow
def test_across_the_edge_of_the_window(model, golden):
  """Beyond 512 tokens: fed after a prompt, and in a longer prompt, against T x T masks."""
  ids = golden["prompt_ids"] + golden["prompt_ids"][1:65]
  x = tiny.hidden(model.decoder, ids, attention_of_a_prompt)[-96:]
  want = x.astype(np.float32) @ np.asarray(model.decoder.embedding[...]).T
  tokens, lengths = generate.pad_prompts([ids[:480]], model.config, new=96)
  _, state = generate.prefill(model.decoder, Full(), tokens, lengths, new=96)
  for start in range(480, 576, 48):
    logits, state, _ = generate.decode_step(
      model.decoder,
      Full(),
      state,
      jnp.asarray([ids[start : start + 48]], jnp.int32),
      jnp.arange(start, start + 48, dtype=jnp.int32)[None],
    )
    np.testing.assert_allclose(logits[0], want[start - 480 :][:48], atol=TOLERANCE, rtol=0)
  tokens, lengths = generate.pad_prompts([ids], model.config, new=1)
  whole, _ = generate.prefill(model.decoder, Full(), tokens, lengths, new=1)
  np.testing.assert_allclose(whole[0], want[-1], atol=TOLERANCE, rtol=0)
