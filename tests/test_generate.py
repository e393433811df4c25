"""Prompts and decode steps of a tiny random decoder against a dense forward pass in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from a2ats_jax import generate
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from tests import tiny

TOLERANCE = 2e-4  # logits of size ten; float32 through three layers


def reference(budget: Budget, **options) -> A2ATSReference:
  rng = np.random.default_rng(0)
  words = rng.normal(size=(3, 2, 8, 16)).astype(np.float32)
  eye = np.broadcast_to(np.eye(16, dtype=np.float32), (3, 2, 16, 16))
  book = make_codebook(jnp.asarray(words), jnp.asarray(eye))
  return A2ATSReference(codebook=book, budget=budget, window=4, sinks=2, **options)


def prefill(decoder, method, prompts, new=6):
  tokens, lengths = generate.pad_prompts(prompts, decoder.config, new=new)
  logits, state = generate.prefill(decoder, method, tokens, lengths, new=new)
  return np.asarray(logits), state, lengths


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_decoder_equals_the_dense_forward(family):
  """Every option of the families: prompt and two decode steps."""
  decoder = tiny.tiny_model(family)
  (prompt,) = tiny.prompts(9, seed=1)
  want = tiny.forward(decoder, prompt)
  got, state, _ = prefill(decoder, Full(), [prompt[:-2]])
  np.testing.assert_allclose(got[0], want[-3], atol=TOLERANCE)
  for i in (7, 8):
    logits, state, _ = generate.decode_step(
      decoder,
      Full(),
      state,
      jnp.asarray([[prompt[i]]], jnp.int32),
      jnp.asarray([[i]], jnp.int32),
    )
    np.testing.assert_allclose(logits[0, 0], want[i], atol=TOLERANCE)


def test_the_families_differ():
  """No option is ignored: each changes the logits of the NumPy form by far more than rounding."""
  (prompt,) = tiny.prompts(5)
  logits = [tiny.forward(tiny.tiny_model(family), prompt)[-1] for family in tiny.FAMILIES]
  for i, one in enumerate(logits):
    for two in logits[i + 1 :]:
      assert np.abs(one - two).max() > 20 * TOLERANCE


@pytest.fixture
def small_chunks(monkeypatch):
  """Prompts are attended eight tokens at a time."""
  monkeypatch.setattr(generate, "CHUNK", 8)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 21])
@pytest.mark.usefixtures("small_chunks")
def test_chunked_prefill_equals_the_dense_forward(length):
  """Lengths around and not a multiple of the chunk."""
  decoder = tiny.tiny_model()
  (prompt,) = tiny.prompts(length)
  tokens, _ = generate.pad_prompts([prompt], decoder.config, new=1)
  assert tokens.shape[1] % min(8, tokens.shape[1]) == 0
  got, _, _ = prefill(decoder, Full(), [prompt])
  np.testing.assert_allclose(got[0], tiny.forward(decoder, prompt)[-1], atol=TOLERANCE)


def test_prefill_longer_than_one_chunk():
  """Without shrinking the chunk: 600 tokens in two chunks equal decoding the last 88 in one."""
  decoder = tiny.tiny_model()
  (prompt,) = tiny.prompts(600)
  want, _, _ = prefill(decoder, Full(), [prompt])
  _, state, _ = prefill(decoder, Full(), [prompt[:512]], new=88)
  logits, _, _ = generate.decode_step(
    decoder,
    Full(),
    state,
    jnp.asarray([prompt[512:]], jnp.int32),
    jnp.arange(512, 600, dtype=jnp.int32)[None],
  )
  np.testing.assert_allclose(logits[0, -1], want[0], atol=5 * TOLERANCE)


METHODS = {
  "full": Full(),
  "oracle": Oracle(budget=Budget(tokens=3), window=4, sinks=2),
  "a2ats": reference(Budget(tokens=3)),
  "a2ats, tail of segments": reference(
    Budget(tokens=3), far=FarPosition.segments(2, span=3), tail="centroid"
  ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("small_chunks")
def test_rows_of_a_batch_equal_rows_alone(name):
  """Prompts of different lengths, one step each: a row never sees the others or its padding."""
  decoder, method = tiny.tiny_model(), METHODS[name]
  tokens, lengths = generate.pad_prompts(tiny.prompts(21, 3, 17), decoder.config, new=6)
  token = np.array([[5], [6], [7]], np.int32)

  def run(rows):
    logits, state = generate.prefill(decoder, method, tokens[rows], lengths[rows], new=6)
    positions = jnp.asarray(lengths[rows, None])
    return logits, *generate.decode_step(
      decoder, method, state, jnp.asarray(token[rows]), positions
    )

  logits, next_logits, _, stats = run(slice(None))
  for row in range(3):
    one, next_one, _, one_stats = run(slice(row, row + 1))
    np.testing.assert_allclose(logits[row], one[0], atol=TOLERANCE)
    np.testing.assert_allclose(next_logits[row], next_one[0], atol=TOLERANCE)
    np.testing.assert_array_equal(stats.read[:, row], one_stats.read[:, 0])


@pytest.mark.usefixtures("small_chunks")
def test_decode_equals_the_longer_prompt():
  """Full attention: appending tokens, one or several at once, equals having prompted with them."""
  decoder = tiny.tiny_model("qwen2")
  prompts = tiny.prompts(20, 12)
  want, _, _ = prefill(decoder, Full(), prompts)
  for size in (1, 3):
    _, state, lengths = prefill(decoder, Full(), [p[:-3] for p in prompts])
    for i in range(0, 3, size):
      tokens = [p[len(p) - 3 + i :][:size] for p in prompts]
      positions = lengths[:, None] + i + np.arange(size, dtype=np.int32)
      logits, state, _ = generate.decode_step(
        decoder, Full(), state, jnp.asarray(tokens, jnp.int32), jnp.asarray(positions)
      )
    np.testing.assert_allclose(logits[:, -1], want, atol=TOLERANCE)


def continuations(decoder, method, prompts, **options):
  """Greedy tokens ``[steps, rows]``."""
  return np.array([token for token, _ in generate.greedy(decoder, method, prompts, **options)])


@pytest.mark.parametrize("name", ["full", "a2ats"])
@pytest.mark.usefixtures("small_chunks")
def test_greedy_batch_equals_single_rows(name):
  decoder, method = tiny.tiny_model(), METHODS[name]
  prompts = tiny.prompts(18, 3, 24)
  together = continuations(decoder, method, prompts, new=6)
  assert together.shape == (6, 3)
  for row, prompt in enumerate(prompts):
    alone = continuations(decoder, method, [prompt], new=6)
    np.testing.assert_array_equal(together[:, row], alone[:, 0])


def test_greedy_is_the_argmax_of_the_dense_forward():
  decoder = tiny.tiny_model()
  (prompt,) = tiny.prompts(6)
  tokens = list(prompt)
  for _ in range(5):
    tokens.append(int(tiny.forward(decoder, tokens)[-1].argmax()))
  assert continuations(decoder, Full(), [prompt], new=5)[:, 0].tolist() == tokens[6:]


def test_a_row_that_stops_leaves_the_others_unchanged():
  """It yields its stop token, then -1; the loop ends when every row is done."""
  decoder = tiny.tiny_model()
  prompts = tiny.prompts(13, 2, 24)
  free = continuations(decoder, Full(), prompts, new=6)
  stop = int(free[1, 1])
  assert stop not in free[:, [0, 2]]
  assert stop != free[0, 1]
  got = continuations(decoder, Full(), prompts, new=6, stop=[stop])
  np.testing.assert_array_equal(got[:, [0, 2]], free[:, [0, 2]])
  assert got[:, 1].tolist() == [free[0, 1], stop, -1, -1, -1, -1]
  every = continuations(decoder, Full(), prompts, new=6, stop=free[:2].ravel().tolist())
  assert len(every) < 6


def test_greedy_statistics():
  """None for the first token, then one step's; a row that is done counts zero."""
  decoder = tiny.tiny_model()
  prompts = tiny.prompts(13, 2)
  free = continuations(decoder, Full(), prompts, new=4)
  stop = [int(free[0, 1])]
  assert stop[0] not in free[:, 0]
  steps = [stats for _, stats in generate.greedy(decoder, Full(), prompts, new=4, stop=stop)]
  assert steps[0] is None
  assert [s.length[0, :, 0].tolist() for s in steps[1:]] == [[14, 0], [15, 0], [16, 0]]


@pytest.mark.parametrize("new", [0, 1])
def test_greedy_of_few_tokens(new):
  assert len(list(generate.greedy(tiny.tiny_model(), Full(), [[1, 2]], new=new))) == new


def test_progress_is_told_after_every_layer():
  decoder, told = tiny.tiny_model(), []
  tokens, lengths = generate.pad_prompts([[1, 2]], decoder.config, new=1)
  generate.prefill(
    decoder, Full(), tokens, lengths, new=1, progress=lambda *done: told.append(done)
  )
  assert told == [(1, 3), (2, 3), (3, 3)]


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("prompts", "new", "match"),
  [
    ([], 1, "at least one"),
    ([[1], []], 1, "row 1 is empty"),
    ([[1] * 60], 5, "60 tokens and 5 new"),
    ([[1, 97]], 1, r"\[0, 97\)"),
    ([[1, -1]], 1, r"\[0, 97\)"),
    ([[1, 2**40]], 1, r"\[0, 97\)"),
  ],
  ids=["none", "empty", "too long", "beyond the vocabulary", "negative", "beyond int32"],
)
def test_impossible_prompts_are_refused(prompts, new, match):
  with pytest.raises(UserError, match=match):
    generate.pad_prompts(prompts, tiny.tiny_config(context=64), new=new)


def test_the_whole_context_may_be_used():
  tokens, lengths = generate.pad_prompts([[1] * 60, [2]], tiny.tiny_config(context=64), new=4)
  assert lengths.tolist() == [60, 1]
  assert tokens[1].tolist()[:2] == [2, 0]


@pytest.mark.parametrize(
  ("length", "width"), [(1, 1), (2, 2), (3, 4), (511, 512), (513, 1024), (1024, 1024)]
)
def test_width_is_whole_chunks(length, width):
  tokens, _ = generate.pad_prompts([[1] * length], tiny.tiny_config(), new=1)
  assert tokens.shape == (1, width)


# --- memory -------------------------------------------------------------------------------------


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of every intermediate of a program, inner programs included."""
  found = set()
  for equation in jaxpr.eqns:
    found |= {tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")}
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(inner, core.ClosedJaxpr):
          found |= shapes_in(inner.jaxpr)
        elif isinstance(inner, core.Jaxpr):
          found |= shapes_in(inner)
  return found


def layer_program(method, length: int):
  decoder = tiny.tiny_model()
  state = method.init(generate.geometry_of(decoder.config, batch=1, prompt=length, new=1))
  x = jnp.zeros((1, length, decoder.config.width))
  lengths, layer = jnp.asarray([length], jnp.int32), jnp.asarray(0, jnp.int32)

  def run(state, x):
    return generate._prefill_layer(decoder, method, state, x, lengths, layer, chunk=512)

  return run, state, x


@pytest.mark.parametrize("name", METHODS)
def test_prefill_builds_no_array_of_tokens_squared(name):
  """No intermediate of a layer's prefill holds T x T numbers, nor T x C distances."""
  length = 4096
  run, state, x = layer_program(METHODS[name], length)
  shapes = shapes_in(jax.make_jaxpr(run)(state, x).jaxpr)
  assert (1, 2, 1024, 512) in shapes  # scores of a chunk: inner programs were looked into
  assert max(math.prod(shape) for shape in shapes) < length * length / 4


def test_prefill_memory_grows_with_the_prompt_and_not_its_square():
  """The compiled layer's temporaries from 2048 to 8192 tokens grow about fourfold."""
  sizes = []
  for length in (2048, 8192):
    run, state, x = layer_program(Full(), length)
    compiled = jax.jit(lambda x, run=run, state=state: run(state, x)).lower(x).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[0] > 0
  assert sizes[1] < 5 * sizes[0]


def test_the_check_of_shapes_finds_squares():
  """A naive attention is seen through a scan and a jit."""

  @jax.jit
  def naive(x):
    return jax.lax.scan(lambda c, _: (c @ (c.T @ c), None), x, None, length=2)[0]

  shapes = shapes_in(jax.make_jaxpr(naive)(jnp.zeros((3, 50))).jaxpr)
  assert (50, 50) in shapes
