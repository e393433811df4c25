"""Prompts and decode steps of a tiny random decoder against a dense forward pass in NumPy."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from a2ats_jax import generate
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.forward import layer_over_prompt
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.sampling import Sampling, sample
from tests import tiny

TOLERANCE = 2e-4  # logits of size ten; float32 through three layers


def codebook() -> Codebook:
  rng = np.random.default_rng(0)
  words = rng.normal(size=(3, 2, 8, 16)).astype(np.float32)
  eye = np.broadcast_to(np.eye(16, dtype=np.float32), (3, 2, 16, 16))
  return make_codebook(jnp.asarray(words), jnp.asarray(eye))


def reference(budget: Budget, **options) -> A2ATSReference:
  return A2ATSReference(codebook=codebook(), budget=budget, window=4, sinks=2, **options)


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
  """Tokens ``[rows, steps]``."""
  blocks = generate.generate(decoder, method, prompts, **options)
  return np.concatenate([block.tokens for block in blocks], axis=1)


WITH_PAGES = METHODS | {
  "a2ats, in pages": A2ATS(codebook=codebook(), budget=Budget(tokens=3), window=4, sinks=2, page=4)
}
FEW = ("full", "a2ats, tail of segments")


def step_by_step(decoder, method, prompts, new):
  """Greedy tokens ``[rows, new]`` by single decode steps, and the statistics of each step."""
  logits, state, positions = prefill(decoder, method, prompts, new=new)
  made, told = [logits.argmax(-1)], []
  for i in range(new - 1):
    logits, state, stats = generate.decode_step(
      decoder,
      method,
      state,
      jnp.asarray(made[-1][:, None], jnp.int32),
      jnp.asarray(positions[:, None] + i, jnp.int32),
    )
    made.append(np.asarray(logits)[:, 0].argmax(-1))
    told.append(stats)
  return np.stack(made, axis=1), told


@pytest.mark.parametrize("name", WITH_PAGES)
@pytest.mark.usefixtures("small_chunks")
def test_blocks_equal_single_steps(name):
  """Tokens and statistics, rows of different lengths, a last block that is not full."""
  decoder, method = tiny.tiny_model(), WITH_PAGES[name]
  prompts = tiny.prompts(18, 3, 24)
  want, told = step_by_step(decoder, method, prompts, new=11)
  blocks = list(generate.generate(decoder, method, prompts, new=11, block=4))
  np.testing.assert_array_equal(np.concatenate([b.tokens for b in blocks], axis=1), want)
  assert [b.tokens.shape[1] for b in blocks] == [1, 4, 4, 2]
  assert blocks[0].stats is None
  for field in dataclasses.fields(told[0]):
    got = np.concatenate([getattr(b.stats, field.name)[: b.tokens.shape[1]] for b in blocks[1:]])
    expected = np.stack([getattr(stats, field.name) for stats in told])
    np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=field.name)


def test_greedy_is_the_argmax_of_the_dense_forward():
  decoder = tiny.tiny_model()
  (prompt,) = tiny.prompts(6)
  tokens = list(prompt)
  for _ in range(5):
    tokens.append(int(tiny.forward(decoder, tokens)[-1].argmax()))
  assert continuations(decoder, Full(), [prompt], new=5)[0].tolist() == tokens[6:]


def an_end(free) -> tuple[int, int, int]:
  """A row, a step after the first, and the token made there, which is made nowhere before it."""
  for step in range(1, free.shape[1]):
    for row, token in enumerate(free[:, step]):
      if (free == token).sum() == (free[row, step:] == token).sum():
        return row, step, int(token)
  raise AssertionError(free)


@pytest.mark.parametrize("name", WITH_PAGES)
def test_a_row_that_stops_leaves_the_others_unchanged(name):
  """It yields its stop token, then -1; the others yield what they yield without it."""
  decoder, method = tiny.tiny_model(), WITH_PAGES[name]
  prompts = tiny.prompts(13, 2, 24)
  free = continuations(decoder, method, prompts, new=9, block=4)
  row, step, stop = an_end(free)
  want = free.copy()
  want[row, step + 1 :] = -1
  got = continuations(decoder, method, prompts, new=9, stop=[stop, 97], block=4)
  np.testing.assert_array_equal(got, want)


def test_the_end_when_every_row_has_stopped():
  """No step runs after it, inside a block or in another; a first token may be the last."""
  decoder, prompts = tiny.tiny_model(), tiny.prompts(13, 2, 24)
  free = continuations(decoder, Full(), prompts, new=6)
  for steps in (1, 3):
    stop = free[:, :steps].ravel().tolist()
    blocks = list(generate.generate(decoder, Full(), prompts, new=6, stop=stop, block=4))
    tokens = np.concatenate([block.tokens for block in blocks], axis=1)
    assert tokens.shape[1] <= steps
    assert [block.live.any() for block in blocks[:-1]] == [True] * (len(blocks) - 1)
    assert not blocks[-1].live.any()


def test_statistics_of_a_row_that_is_done():
  """None for the first token, then one step's for each token; a row that is done counts zero."""
  decoder, prompts = tiny.tiny_model(), tiny.prompts(13, 2)
  free = continuations(decoder, Full(), prompts, new=4)
  stop = [int(free[1, 0])]
  assert stop[0] not in free[0]
  first, block = generate.generate(decoder, Full(), prompts, new=4, stop=stop)
  assert first.stats is None
  assert first.live.tolist() == [True, False]
  assert block.stats.length[:, 0, :, 0].tolist() == [[14, 0], [15, 0], [16, 0]] + [[0, 0]] * 13
  assert block.stats.read.shape == (16, 3, 2, 1, 2)


def test_a_limit_of_each_row():
  """A row at its limit waits, and goes on in the next block with the tokens it would have had."""
  decoder, prompts = tiny.tiny_model(), tiny.prompts(13, 2, 24)
  want = continuations(decoder, Full(), prompts, new=8)
  _, generation = generate.start(decoder, Full(), prompts, new=8)

  def block(rows, *limit):
    return generate.decode_block(
      decoder,
      Full(),
      rows,
      jnp.asarray(limit, jnp.int32),
      generation.keys,
      generation.stop,
      steps=5,
      sampling=Sampling(),
    )

  tokens, _, count, rows = block(generation.rows, 2, 0, 4)
  assert int(count) == 4
  assert tokens.tolist() == [[*want[0, 1:3], -1, -1, -1], [-1] * 5, [*want[2, 1:5], -1]]
  assert rows.live.tolist() == [True] * 3
  tokens, _, _, _ = block(rows, 1, 3, 3)
  assert tokens.tolist() == [
    [want[0, 3], -1, -1, -1, -1],
    *[[*t, -1, -1] for t in (want[1, 1:4], want[2, 5:8])],
  ]


def test_one_token():
  (block,) = generate.generate(tiny.tiny_model(), Full(), [[1, 2]], new=1)
  assert block.tokens.shape == (1, 1)


# --- room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "a2ats, in pages"])
def test_tokens_beyond_the_room_are_refused_before_the_step(name):
  """Nothing is lost: what is left of the room gives the tokens it would have given."""
  decoder, method = tiny.tiny_model(), WITH_PAGES[name]
  prompts = tiny.prompts(18, 3)
  want = continuations(decoder, method, prompts, new=9)
  first, generation = generate.start(decoder, method, prompts, new=9)
  used = jax.tree.leaves(generation.rows.state)
  made, generation = generate.advance(decoder, method, generation, new=5, block=16)
  assert all(leaf.is_deleted() for leaf in used)  # in place: never two caches
  assert generation.room == 3
  with pytest.raises(UserError, match="room for 3 more tokens a row, got 4"):
    generate.advance(decoder, method, generation, new=4, block=16)
  with pytest.raises(UserError, match="expected 1 to 2 tokens, the length of a block, got 3"):
    generate.advance(decoder, method, generation, new=3, block=2)
  last, generation = generate.advance(decoder, method, generation, new=3, block=16)
  got = np.concatenate([block.tokens for block in (first, made, last)], axis=1)
  np.testing.assert_array_equal(got, want)
  with pytest.raises(UserError, match="room for 0 more"):
    generate.advance(decoder, method, generation, new=1)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"new": 0}, "new: expected at least 1 token, got 0"),
    ({"block": 0}, "block: expected at least 1 token, got 0"),
    ({"seed": -1}, "seed: .* got -1"),
    ({"seed": 1 << 32}, "seed: .* got 4294967296"),
    ({"streams": [1, 2]}, "streams: expected one a prompt, 1, got 2"),
    ({"streams": [-1]}, r"streams: .* got \[-1\]"),
    ({"streams": [1 << 31]}, "streams: .* got"),
  ],
  ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_numbers_are_refused(options, match):
  with pytest.raises(UserError, match=match):
    next(generate.generate(tiny.tiny_model(), Full(), [[1, 2]], **({"new": 4} | options)))


# --- draws --------------------------------------------------------------------------------------

WARM = Sampling(temperature=1.5, top_k=40, top_p=0.95)


@pytest.mark.parametrize("name", FEW)
def test_a_seed_gives_the_same_tokens_whatever_the_block(name):
  decoder, method, prompts = tiny.tiny_model(), METHODS[name], tiny.prompts(18, 3, 24)
  options = {"new": 12, "sampling": WARM, "seed": 3}
  want = continuations(decoder, method, prompts, block=1, **options)
  for block in (1, 3, 16):
    got = continuations(decoder, method, prompts, block=block, **options)
    np.testing.assert_array_equal(got, want)
  other = continuations(decoder, method, prompts, **(options | {"seed": 4}))
  assert (other != want).mean() > 0.5
  greedy = continuations(decoder, method, prompts, new=12)
  assert (greedy != want).mean() > 0.5


def test_draws_equal_single_steps():
  """A draw's key is the seed with the row's stream and the token's position folded in."""
  decoder, prompts, streams = tiny.tiny_model(), tiny.prompts(18, 3), [4, 1]
  got = continuations(decoder, Full(), prompts, new=8, sampling=WARM, seed=9, streams=streams)
  logits, state, positions = prefill(decoder, Full(), prompts, new=8)
  for i in range(8):
    keys = [jax.random.fold_in(jax.random.key(9), stream) for stream in streams]
    keys = [jax.random.fold_in(key, int(n) + i) for key, n in zip(keys, positions)]
    token = sample(jnp.asarray(logits), WARM, jnp.stack(keys))
    assert token.tolist() == got[:, i].tolist()
    places = jnp.asarray(positions[:, None] + i, jnp.int32)
    logits, state, _ = generate.decode_step(decoder, Full(), state, token[:, None], places)
    logits = logits[:, 0]


def test_equal_prompts_are_drawn_apart():
  """Rows have streams of their own; told the same one, they are the same."""
  decoder, prompts = tiny.tiny_model(), tiny.prompts(12) * 3
  options = {"new": 12, "sampling": WARM}
  tokens = continuations(decoder, Full(), prompts, **options)
  for one, two in ((0, 1), (0, 2), (1, 2)):
    assert (tokens[one] != tokens[two]).mean() > 0.5
  same = continuations(decoder, Full(), prompts, streams=[2, 1, 2], **options)
  np.testing.assert_array_equal(same, tokens[[2, 1, 2]])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.usefixtures("small_chunks")
def test_a_row_alone_draws_what_it_draws_in_a_batch(name):
  """With the stream it had there, whatever the other rows are and when they stop."""
  decoder, method, prompts = tiny.tiny_model(), METHODS[name], tiny.prompts(18, 21, 24)
  options = {"new": 10, "sampling": WARM, "seed": 7}
  together = continuations(decoder, method, prompts, **options)
  for row, prompt in enumerate(prompts):
    alone = continuations(decoder, method, [prompt], streams=[row], **options)
    np.testing.assert_array_equal(alone[0], together[row])
  stop = [int(together[0, 2])]
  stopped = continuations(decoder, method, prompts, stop=stop, **options)
  for row in (1, 2):
    end = [*np.flatnonzero(together[row] == stop[0]), 9][0] + 1
    np.testing.assert_array_equal(stopped[row, :end], together[row, :end])


# --- programs and transfers ---------------------------------------------------------------------


@contextlib.contextmanager
def counted_programs():
  """How many programs were compiled so far, as a list of one number."""
  count = [0]

  def listen(event, _, **__):
    count[0] += event == "/jax/core/compile/backend_compile_duration"

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield count
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_counter_sees_a_program():
  with counted_programs() as count:
    compiled = jax.jit(lambda x: x * 3 + 1)
    compiled(jnp.zeros(17))
    once = count[0]
    compiled(jnp.zeros(17))
    assert 1 <= once == count[0]


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "drawn"])
def test_nothing_is_compiled_after_the_first_block(sampling):
  """A thousand tokens take the programs that forty take; the same shapes again take none.

  The cache's shape holds the room, so the first run of another length compiles again, as often.
  """
  decoder, prompts = tiny.tiny_model("llama", seed=1), tiny.prompts(11, 5)
  programs = []
  for new in (40, 1000):
    with counted_programs() as count:
      seen = []
      for _ in generate.generate(decoder, Full(), prompts, new=new, sampling=sampling):
        seen.append(count[0])
    assert len(seen) == 1 + -(-(new - 1) // generate.BLOCK)
    assert set(seen[1:]) == {seen[1]} == {count[0]}
    assert seen[1] == seen[0] + 1
    programs.append(count[0])
  assert programs[1] <= programs[0]
  with counted_programs() as count:
    continuations(decoder, Full(), prompts, new=40, sampling=sampling)
  assert count[0] == 0


@pytest.mark.parametrize("name", ["full", "a2ats, in pages"])
def test_any_number_of_tokens_of_one_room_takes_one_program(name):
  """How many tokens are asked for, and how many blocks, is not part of the program."""
  decoder, method, prompts = tiny.tiny_model(), WITH_PAGES[name], tiny.prompts(11, 5)
  _, generation = generate.start(decoder, method, prompts, new=60)
  _, generation = generate.advance(decoder, method, generation, new=16)
  with counted_programs() as count:
    for new in (16, 1, 7, 15):
      block, generation = generate.advance(decoder, method, generation, new=new)
      assert block.tokens.shape == (2, new)
    assert count[0] == 0


@pytest.mark.parametrize("name", ["full", "a2ats, in pages"])
@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "drawn"])
def test_blocks_move_nothing_that_is_not_asked_for(name, sampling):
  """Between prompt and end, every transfer is an explicit device_put or device_get.

  On the CPU backend the guard sees a NumPy array or Python number that a program is handed (the
  test below), and not a read of a result, which shares the host's memory there.
  """
  decoder, method, prompts = tiny.tiny_model(), WITH_PAGES[name], tiny.prompts(11, 5)
  _, generation = generate.start(
    decoder, method, prompts, new=40, sampling=sampling, stop=[96], seed=1
  )
  with jax.transfer_guard("disallow"):
    while generation.room:
      new = min(16, generation.room)
      _, generation = generate.advance(decoder, method, generation, new=new)


def test_the_guard_sees_a_number_from_the_host():
  double = jax.jit(lambda x: x * 2)
  double(np.zeros(3, np.float32))
  with jax.transfer_guard("disallow"), pytest.raises(Exception, match="host-to-device"):
    double(np.zeros(3, np.float32))


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
    return layer_over_prompt(decoder, method, state, x, lengths, layer, local=False, chunk=512)

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
