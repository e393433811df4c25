"""A model with local layers: their windows, and a method's cache of the global ones alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import attention, footprint, generate, plan
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.forward import geometry_of
from a2ats_jax.methods import caches
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.prefix import continue_prefix, read_prefix
from a2ats_jax.prefix_file import load_prefix, save_prefix
from eval.record import record, replay
from tests import tiny
from train_codebooks import Corpus
from train_codebooks.collect import collect

TOLERANCE = 5e-4  # logits of size twenty; float32 through seven layers
CONFIG = tiny.tiny_config("gemma3")
LENGTHS = (21, 3, 17)  # the window is 5

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def codebook():
  """Of two global layers and one KV head."""
  words = np.random.default_rng(0).normal(size=(2, 1, 8, 16)).astype(np.float32)
  return make_codebook(jnp.asarray(words), jnp.broadcast_to(jnp.eye(16), (2, 1, 16, 16)))


def paged(budget: Budget) -> A2ATS:
  far = FarPosition.segments(2, 8)
  return A2ATS(codebook=codebook(), budget=budget, far=far, window=4, sinks=2, page=4)


METHODS = {"full": Full(), "a2ats, all read": paged(Budget(ratio=1.0))}


@pytest.fixture
def decoder():
  return tiny.tiny_model("gemma3")


@pytest.fixture
def small_chunks(monkeypatch):
  """Prompts are attended eight tokens at a time."""
  monkeypatch.setattr(generate, "CHUNK", 8)


def fed(decoder, method, rows, lengths, sizes):
  """Logits after the prompts, and after each token fed in pieces of these sizes."""
  prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
  tokens, lengths = generate.pad_prompts(prompts, decoder.config, new=sum(sizes))
  logits, state = generate.prefill(decoder, method, tokens, lengths, new=sum(sizes))
  made, told, at = [np.asarray(logits)[:, None]], [], 0
  for size in sizes:
    piece = [row[n + at : n + at + size] for row, n in zip(rows, lengths, strict=True)]
    positions = lengths[:, None] + at + np.arange(size, dtype=np.int32)
    logits, state, stats = generate.decode_step(
      decoder, method, state, jnp.asarray(piece, jnp.int32), jnp.asarray(positions)
    )
    made.append(np.asarray(logits))
    told.append(stats)
    at += size
  return np.concatenate(made, axis=1), told


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("small_chunks")
def test_prompts_and_steps_equal_the_dense_forward(decoder, name):
  """Rows of different lengths, one shorter than the window; pieces shorter and longer than it."""
  sizes = (1, 1, 7, 1, 7)
  rows = tiny.prompts(*(n + sum(sizes) for n in LENGTHS))
  got, told = fed(decoder, METHODS[name], rows, LENGTHS, sizes)
  for row, tokens, length in zip(got, rows, LENGTHS, strict=True):
    want = tiny.forward(decoder, tokens)[length - 1 :]
    np.testing.assert_allclose(row, want, atol=TOLERANCE)
  assert told[0].read.shape == (2, 3, 1, 1)  # two global layers of seven


@pytest.mark.usefixtures("small_chunks")
def test_a_small_budget_equals_the_reference(decoder):
  """And reads less: the far tokens of global layers are chosen, the local windows are whole."""
  budget, sizes = Budget(tokens=3), (7, 7)
  rows = tiny.prompts(*(n + sum(sizes) for n in LENGTHS))
  got, told = fed(decoder, paged(budget), rows, LENGTHS, sizes)
  want, _ = fed(decoder, paged(budget).reference, rows, LENGTHS, sizes)
  np.testing.assert_allclose(got, want, atol=TOLERANCE)
  assert isinstance(paged(budget).reference, A2ATSReference)
  assert int(told[-1].read.max()) < int(told[-1].length.max())
  assert np.abs(got[0, -1] - tiny.forward(decoder, rows[0])[-1]).max() > 10 * TOLERANCE


@pytest.mark.usefixtures("small_chunks")
def test_generation_in_blocks_is_the_argmax_of_the_dense_forward(decoder):
  """Past the window twice over, one row stopping: its padding moves no window."""
  prompts = tiny.prompts(9, 2, seed=3)
  free = [list(p) for p in prompts]
  for row in free:
    for _ in range(12):
      row.append(int(tiny.forward(decoder, row)[-1].argmax()))
  want = np.asarray([row[-12:] for row in free])
  blocks = generate.generate(decoder, Full(), prompts, new=12, block=4)
  np.testing.assert_array_equal(np.concatenate([b.tokens for b in blocks], axis=1), want)


def test_keys_before_the_window_are_not_touched():
  """Not even a block of theirs: what is not a number would show."""
  rng, s, t = np.random.default_rng(0), 8, 40
  q, k, v = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((1, s, 2, 4), (1, 1, t, 4), (1, 1, t, 4))
  )
  # Queries 24 to 31 and a window of 5: the first key seen is 20, in the block from 16 on.
  hidden = jnp.arange(t) < 16
  holes = [jnp.where(hidden[:, None], jnp.nan, x) for x in (k, v)]
  got = attention.causal_chunk(q, *holes, jnp.int32(24), window=5)
  position, key = np.arange(24, 32)[:, None], np.arange(t)
  scores = np.einsum("shd,td->hst", q[0], k[0, 0]) / 2
  scores[:, (key > position) | (key <= position - 5)] = -np.inf
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  np.testing.assert_allclose(got[0], np.einsum("hst,td->shd", weights, v[0, 0]), atol=1e-5)


def test_windows_do_not_grow():
  """Of any prompt they are 2 x 5 layers x 5 tokens x 16 numbers a row, and global layers are 2."""
  for length in (8, 4096):
    geometry = geometry_of(CONFIG, batch=2, prompt=length, new=3)
    state = jax.eval_shape(lambda g=geometry: jax.tree.leaves(caches.init(Full(), g)))
    assert [x.shape for x in state[2:]] == [(5, 2, 1, 5, 16)] * 2
    assert [x.shape for x in state[:2]] == [(2, 2, 1, length + 3, 16)] * 2


def test_a_document_is_saved_loaded_and_forked(decoder, tmp_path):
  document, *questions = tiny.prompts(23, 3, 9, seed=5)
  method = METHODS["a2ats, all read"]
  save_prefix(
    tmp_path / "document", read_prefix(decoder, method, document, new=17), fingerprint="tiny"
  )
  loaded = load_prefix(tmp_path / "document", method, fingerprint="tiny")
  blocks = continue_prefix(decoder, loaded, questions, new=8)
  got = np.concatenate([b.tokens for b in blocks], axis=1)
  whole = [document + question for question in questions]
  blocks = generate.generate(decoder, Full(), whole, new=8)
  np.testing.assert_array_equal(got, np.concatenate([b.tokens for b in blocks], axis=1))


def test_a_recording_is_replayed_to_the_bit_and_not_used_up(decoder):
  method = METHODS["a2ats, all read"]
  tokens, lengths = generate.pad_prompts(tiny.prompts(*LENGTHS), CONFIG, new=4)
  logits, direct = generate.prefill(decoder, method, tokens, lengths, new=4)
  recording = record(decoder, tokens, lengths)
  np.testing.assert_array_equal(recording.logits, logits)
  for _ in range(2):
    replayed = replay(CONFIG, recording, method, new=4)
    assert jax.tree.structure(replayed) == jax.tree.structure(direct)
    for ours, theirs in zip(jax.tree.leaves(replayed), jax.tree.leaves(direct), strict=True):
      np.testing.assert_array_equal(ours, theirs)
    for x in jax.tree.leaves(replayed):
      x.delete()


def test_codebooks_are_trained_on_the_keys_of_global_layers(decoder, tmp_path):
  documents = tuple(np.asarray(p, np.int32) for p in tiny.prompts(24, 11))
  collected = collect(decoder, Corpus(documents=documents), tmp_path)
  assert collected.keys.shape == (2, 1, 35, 16)
  tokens, lengths = generate.pad_prompts(tiny.prompts(24, 11), CONFIG, new=0)
  keys = np.asarray(record(decoder, tokens, lengths).prompt.keys)
  for layer in range(2):
    want = np.concatenate([keys[layer, row, :n, 0] for row, n in enumerate((24, 11))])
    np.testing.assert_allclose(
      collected.keys[layer, 0].astype(np.float32), want, rtol=1e-2, atol=1e-4
    )


def test_windows_are_counted(decoder):
  """By the plan to the byte, and by the list of methods as bytes that no token adds to."""
  case = plan.Case(config=CONFIG, batch=3, prompt=40, new=4, cache_dtype="float32")
  geometry = geometry_of(CONFIG, batch=3, prompt=40, new=4)
  want, _ = footprint.state_bytes(
    jax.eval_shape(lambda: jax.tree.leaves(caches.init(Full(), geometry)))
  )
  assert sum(plan.full_state(case).values()) == want
  m = plan.Paged(
    budget=Budget(tokens=3), codewords=8, far=FarPosition.segments(2, 8), tail="none", page=4
  )
  assert plan.paged_state(case, m)[plan.WINDOWS] == 3 * 2 * 5 * 5 * 16 * 4
  spec = footprint.registry.parse_method("full")
  options = {"budget": Budget(ratio=1.0), "codewords": 8, "dtype": jnp.float32}
  cost = footprint.cost_of(spec, CONFIG, **options)
  assert (cost.device, cost.fixed) == (2 * 2 * 16 * 4, 2 * 5 * 5 * 16 * 4)
  alone = dataclasses.replace(CONFIG, local=None)
  assert footprint.cost_of(spec, alone, **options).device == 7 * 2 * 16 * 4
