"""The reference against the independent NumPy step: equal sets, equal outputs, and wrong variants
of either that must be told apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods import selection
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from tests import cases, independent

# One compilation each; lengths, contents, ropes and codes are drawn.
OPTIONS = {
  "published": {"budget": Budget(ratio=0.15), "window": 4, "sinks": 2},
  "nothing": {"budget": Budget(ratio=0.0), "window": 3, "sinks": 1},
  "everything": {"budget": Budget(ratio=1.0), "window": 4, "sinks": 2},
  "one token": {"budget": Budget(tokens=1), "window": 1, "sinks": 0},
  "tokens": {"budget": Budget(tokens=4), "window": 4, "sinks": 2},
  "all near": {"budget": Budget(ratio=0.5), "window": 64, "sinks": 8},
  "at zero": {"budget": Budget(ratio=0.1), "far": FarPosition.constant(0), "window": 5, "sinks": 0},
  "segments": {
    "budget": Budget(ratio=0.2),
    "far": FarPosition.segments(3, span=3),
    "window": 4,
    "sinks": 2,
  },
  "one segment": {
    "budget": Budget(tokens=3),
    "far": FarPosition.segments(1, span=64),
    "window": 2,
    "sinks": 1,
  },
  "tail": {"budget": Budget(tokens=4), "tail": "centroid", "window": 4, "sinks": 2},
  "only tail": {
    "budget": Budget(tokens=0),
    "far": FarPosition.segments(4, span=2),
    "tail": "centroid",
    "window": 3,
    "sinks": 1,
  },
  "tail of segments": {
    "budget": Budget(ratio=0.2),
    "far": FarPosition.segments(3, span=3),
    "tail": "centroid",
    "window": 4,
    "sinks": 2,
  },
  "shared": {"budget": Budget(tokens=6, per="kv_head"), "window": 4, "sinks": 2},
  "shared, tail of segments": {
    "budget": Budget(ratio=0.25, per="kv_head"),
    "far": FarPosition.segments(3, span=3),
    "tail": "centroid",
    "window": 4,
    "sinks": 2,
  },
}
COMBINATIONS = [
  *(("pairs", options) for options in OPTIONS),
  ("triple", "tail of segments"),
  ("singles", "segments"),
]


def method_of(options: str, book: Codebook) -> A2ATSReference:
  return A2ATSReference(codebook=book, **OPTIONS[options])


@st.composite
def caches(draw, shape: cases.Shape) -> cases.Cache:
  """Ragged prompts of random contents."""
  lengths = draw(st.lists(st.integers(1, shape.prompt), min_size=shape.batch, max_size=shape.batch))
  return cases.draw_cache(
    shape,
    seed=draw(st.integers(0, 2**31)),
    lengths=lengths,
    style=draw(st.sampled_from(cases.STYLES)),
    rope=draw(st.sampled_from(["plain", "yarn", "llama3"])),
  )


def positions_in(mask) -> set[int]:
  return set(np.flatnonzero(np.asarray(mask)).tolist())


@pytest.mark.parametrize(("shape", "options"), COMBINATIONS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_equals_the_independent_step(shape, options, data):
  """Several steps of ragged rows: the sets are equal, and so are outputs and statistics."""
  cache = data.draw(caches(cases.SHAPES[shape]))
  method = method_of(options, cache.book)
  for layer, positions, out, _, stats, picked in cases.run_steps(method, cache, 3):
    _, chosen, near, far = picked
    for row, position in enumerate(positions[:, 0]):
      want = cases.expected_step(method, cache, layer, row, int(position))
      assume(want.gap > cases.SAFE_GAP)
      assert positions_in(far[row, 0]) == set(want.eligible)
      assert positions_in(near[row, 0]) == set(range(position + 1)) - set(want.eligible)
      assert [positions_in(head) for head in chosen[row, 0]] == want.chosen
      np.testing.assert_allclose(out[row, 0], want.out, atol=cases.TOLERANCE, rtol=0)
      assert int(stats.length[row, 0]) == position + 1
      assert stats.selected[row, 0].tolist() == [len(u) for u in want.union]
      assert stats.read[row, 0].tolist() == [len(r) for r in want.read]
      np.testing.assert_allclose(stats.tail[row, 0], want.tail, atol=cases.TOLERANCE, rtol=0)


@settings(max_examples=8, deadline=None)
@given(cache=caches(cases.PAIRS))
def test_tokens_at_once_equal_one_by_one(cache):
  """Three tokens in one call give what three calls give, state included."""
  method, layer = method_of("tail of segments", cache.book), jnp.asarray(1, jnp.int32)
  start = cases.prefilled(method, cache)
  positions = cases.step_positions(cache, 0, 3)
  tokens = cases.tokens_at(cache, 1, positions)
  at_once = cases.attend(method, start, *tokens, jnp.asarray(positions), cache.rope, layer)
  state, outs, stats = start, [], []
  for i in range(3):
    one = [x[:, i : i + 1] for x in tokens]
    out, state, stat, _ = cases.attend(
      method, state, *one, jnp.asarray(positions[:, i : i + 1]), cache.rope, layer
    )
    outs.append(out)
    stats.append(stat)
  np.testing.assert_allclose(
    at_once[0], jnp.concatenate(outs, axis=1), atol=cases.TOLERANCE, rtol=0
  )
  joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *stats)
  cases.assert_close(at_once[2], joined, cases.TOLERANCE)
  cases.assert_close(at_once[1], state, 1e-6)


@settings(max_examples=8, deadline=None)
@given(cache=caches(cases.PAIRS), options=st.sampled_from(["published", "tail of segments"]))
def test_padding_is_neither_stored_nor_attended(cache, options):
  """A row at position -1 keeps its state bit for bit, gives zeros, and changes no other row."""
  method, layer = method_of(options, cache.book), jnp.asarray(0, jnp.int32)
  start = cases.prefilled(method, cache)
  positions = cases.step_positions(cache, 0)
  tokens = cases.tokens_at(cache, 0, positions)
  whole = cases.attend(method, start, *tokens, jnp.asarray(positions), cache.rope, layer)
  positions[1] = -1
  out, state, stats, _ = cases.attend(
    method, start, *tokens, jnp.asarray(positions), cache.rope, layer
  )
  assert not np.any(out[1])
  assert not any(np.any(leaf[1]) for leaf in jax.tree.leaves(stats))
  for before, after in (
    (start.cache.k, state.cache.k),
    (start.cache.v, state.cache.v),
    (start.codes, state.codes),
  ):
    np.testing.assert_array_equal(before[:, 1], after[:, 1])
  others = np.array([0, 2])
  np.testing.assert_array_equal(out[others], whole[0][others])
  for got, want in zip(jax.tree.leaves(stats), jax.tree.leaves(whole[2]), strict=True):
    np.testing.assert_array_equal(got[others], want[others])


@settings(max_examples=8, deadline=None)
@given(cache=caches(cases.PAIRS))
def test_padding_among_tokens_at_once(cache):
  """A call of (token, padding, token) equals the two tokens alone."""
  method, layer = method_of("tail of segments", cache.book), jnp.asarray(0, jnp.int32)
  start = cases.prefilled(method, cache)
  positions = cases.step_positions(cache, 0, 3)
  q, k, v = cases.tokens_at(cache, 0, positions)
  order = np.array([0, 2, 1])  # the second token comes last, the third is padding in between
  moved = positions[:, order]
  moved[:, 1] = -1
  out, _, stats, _ = cases.attend(
    method, start, q[:, order], k[:, order], v[:, order], jnp.asarray(moved), cache.rope, layer
  )
  want, _, want_stats, _ = cases.attend(
    method, start, q, k, v, jnp.asarray(positions), cache.rope, layer
  )
  assert not np.any(out[:, 1])
  np.testing.assert_allclose(out[:, 0], want[:, 0], atol=cases.TOLERANCE, rtol=0)
  np.testing.assert_allclose(out[:, 2], want[:, 1], atol=cases.TOLERANCE, rtol=0)
  np.testing.assert_array_equal(stats.read[:, [0, 2]], want_stats.read[:, :2])
  assert not np.any(stats.read[:, 1])


EVERYTHING = [
  {},
  {"tail": "centroid"},
  {"far": FarPosition.segments(2, span=5), "tail": "centroid"},
]


@pytest.mark.parametrize("extra", EVERYTHING, ids=str)
def test_budget_one_is_full_attention(extra):
  """With the whole context granted, positions and tail change nothing."""
  for seed, lengths in enumerate(([40, 1, 23], [9, 33, 8])):
    cache = cases.draw_cache(cases.PAIRS, seed=seed, lengths=lengths, rope="yarn")
    method = dataclasses.replace(method_of("everything", cache.book), **extra)
    for got, want in zip(
      cases.run_steps(method, cache, 2), cases.run_steps(Full(), cache, 2), strict=True
    ):
      np.testing.assert_allclose(got.out, want.out, atol=cases.TOLERANCE, rtol=0)
      np.testing.assert_array_equal(got.stats.read, want.stats.read)
      assert not np.any(got.stats.tail)


def test_tail_is_nearer_to_full_attention_than_no_tail():
  """Where few tokens are read and a codeword's keys are alike, the estimate helps."""
  cache = cases.draw_cache(cases.PAIRS, seed=5, lengths=[40, 38, 36], style="skewed")
  want = [ran.out for ran in cases.run_steps(Full(), cache, 2)]
  error = {}
  for name in ("segments", "tail of segments"):
    outs = [ran.out for ran in cases.run_steps(method_of(name, cache.book), cache, 2)]
    error[name] = np.mean([np.abs(a - b).mean() for a, b in zip(outs, want, strict=True)])
  assert error["tail of segments"] < 0.8 * error["segments"]


def test_tokens_leave_the_window_as_the_decode_position_moves():
  """Written while decoding, then far: eligible exactly when w tokens have come after."""
  cache = cases.draw_cache(cases.PAIRS, seed=3, lengths=[20, 10, 5])
  method = method_of("published", cache.book)
  became_far = 0
  for _, positions, _, _, _, (_, _, _, far) in cases.run_steps(method, cache, 6):
    for row, position in enumerate(positions[:, 0].tolist()):
      assert positions_in(far[row, 0]) == set(range(2, position - 3))
      became_far += sum(t >= cache.lengths[row] for t in positions_in(far[row, 0]))
  assert became_far > 0


# --- the three published mis-ports -------------------------------------------------------------


def long_case() -> cases.Cache:
  return cases.draw_cache(cases.PAIRS, seed=11, lengths=[40, 37, 33])


def selections(method, cache: cases.Cache, **changes) -> tuple[list, list]:
  """Sets chosen over five steps: ours, and the independent step's with the changes."""
  ours, theirs = [], []
  for layer, positions, _, _, _, (_, chosen, _, _) in cases.run_steps(method, cache, 5):
    for row, position in enumerate(positions[:, 0].tolist()):
      ours.append([positions_in(head) for head in chosen[row, 0]])
      made = {
        name: change(row, position) if callable(change) else change
        for name, change in changes.items()
      }
      want = cases.expected_step(method, cache, layer, row, position, **made)
      theirs.append(want.chosen)
  return ours, theirs


def test_misport_far_keys_rotated():
  """Far keys stay unrotated; rotating them to their positions chooses other tokens."""
  cache = long_case()
  method = method_of("published", cache.book)
  ours, right = selections(method, cache)
  inv_freq = np.asarray(cache.rope.inv_freq, np.float64)

  def rotated(query, codeword, token):
    return independent.rotate(query, 2048, inv_freq) @ independent.rotate(codeword, token, inv_freq)

  assert ours == right
  assert ours != selections(method, cache, score=lambda row, position: rotated)[1]


def test_misport_window_used_as_constant():
  """The far distance is b; putting far tokens at w chooses other tokens."""
  cache = long_case()
  method = method_of("published", cache.book)
  ours, right = selections(method, cache)
  assert ours == right
  assert ours != selections(method, cache, distance=method.window)[1]


def test_misport_near_far_frozen_at_write_time():
  """A token that was near when written becomes far later; never letting it chooses others."""
  cache = long_case()
  method = method_of("published", cache.book)
  ours, right = selections(method, cache)

  def frozen(row, position):
    return independent.eligible_tokens(int(cache.lengths[row]), method.window, method.sinks)

  assert ours == right
  assert ours != selections(method, cache, eligible=frozen)[1]


# --- wrong implementations, which the comparison has to catch -----------------------------------


class KeysRotated(A2ATSReference):
  """Codes the rotated keys of the prompt."""

  def absorb(self, state, prompt, *, layer):
    wrong = dataclasses.replace(prompt, keys=prompt.rotated)
    right = super().absorb(state, prompt, layer=layer)
    return dataclasses.replace(right, codes=super().absorb(state, wrong, layer=layer).codes)


class OtherLayersCodes(A2ATSReference):
  """Selects by the codes of the layer before."""

  def select(self, state, q, **options):
    return super().select(
      dataclasses.replace(state, codes=jnp.roll(state.codes, 1, axis=0)), q, **options
    )


class UnscaledTail(A2ATSReference):
  """Forgets ``1/sqrt(D)`` in the tail."""

  def _tail(self, state, scores, *rest):
    return super()._tail(state, scores * state.cache.k.shape[-1] ** 0.5, *rest)


class SegmentOff(FarPosition):
  """Scores every segment at its neighbour's distance."""

  def distances(self, *args, **options):
    return jnp.roll(super().distances(*args, **options), 1, axis=-1)


for _kind in (KeysRotated, OtherLayersCodes, UnscaledTail):
  jax.tree_util.register_dataclass(
    _kind, data_fields=["codebook"], meta_fields=["budget", "far", "tail", "window", "sinks"]
  )


def other_heads_metric(book: Codebook) -> Codebook:
  return make_codebook(book.codewords, book.whitener[:, ::-1])


def fields(method: A2ATSReference) -> dict:
  return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


WRONG = {
  "far keys rotated": lambda m: KeysRotated(**fields(m)),
  "window for constant": lambda m: dataclasses.replace(m, far=FarPosition.constant(m.window)),
  "metric of another head": lambda m: dataclasses.replace(
    m, codebook=other_heads_metric(m.codebook)
  ),
  "codes of another layer": lambda m: OtherLayersCodes(**fields(m)),
  "segment off by one": lambda m: dataclasses.replace(
    m, far=SegmentOff(**dataclasses.asdict(m.far))
  ),
  "no sinks": lambda m: dataclasses.replace(m, sinks=0),
  "window one more": lambda m: dataclasses.replace(m, window=m.window + 1),
  "window one less": lambda m: dataclasses.replace(m, window=m.window - 1),
  "tail without scale": lambda m: UnscaledTail(**fields(m)),
  "k one less": lambda m: dataclasses.replace(m, budget=Budget(tokens=m.budget.tokens - 1)),
}


def wrong_case(kind: str) -> tuple[A2ATSReference, cases.Cache]:
  cache = long_case()
  options = kind.split()[0] if kind.startswith(("segment", "tail")) else "tokens"
  return method_of({"segment": "segments"}.get(options, options), cache.book), cache


def compare_outputs(method, right, cache: cases.Cache, attend=cases.attend) -> None:
  """Outputs alone: what a faster implementation without selected sets is compared by."""
  for layer, positions, out, *_ in cases.run_steps(method, cache, 2, step=attend):
    for row, position in enumerate(positions[:, 0].tolist()):
      want = cases.expected_step(right, cache, layer, row, position)
      assert want.gap > cases.SAFE_GAP
      np.testing.assert_allclose(out[row, 0], want.out, atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_implementation_is_caught(kind):
  """The right one passes the comparison of outputs, the wrong one does not."""
  method, cache = wrong_case(kind)
  compare_outputs(method, method, cache)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    compare_outputs(WRONG[kind](method), method, cache)


def patched_attend():
  """The step compiled anew, so that a patched function is really used."""
  return jax.jit(lambda *arguments: cases.attend.__wrapped__(*arguments))


def test_intersection_instead_of_union_is_caught(monkeypatch):
  """Tokens any head of the group chose are read, not only those all heads chose."""
  method, cache = wrong_case("union")

  def intersection(chosen, kv_heads):
    b, s, h, t = chosen.shape
    return jnp.all(chosen.reshape(b, s, kv_heads, h // kv_heads, t), axis=3)

  compare_outputs(method, method, cache)
  monkeypatch.setattr(selection, "union", intersection)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    compare_outputs(method, method, cache, patched_attend())


def test_query_scale_missing_is_caught(monkeypatch):
  """A far score carries the rotary multiplier twice; the tail's weights show it."""
  method, cache = wrong_case("tail")
  cache = dataclasses.replace(cache, rope=cases.rope_named("yarn", cache.shape.head_dim))
  right = selection.far_query
  compare_outputs(method, method, cache)
  monkeypatch.setattr(
    selection, "far_query", lambda q, distance, rope: right(q, distance, rope) / rope.scale
  )
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    compare_outputs(method, method, cache, patched_attend())


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"window": 0}, {"sinks": -1}])
def test_impossible_options_are_refused(options):
  with pytest.raises(UserError, match="window must be"):
    A2ATSReference(codebook=cases.books(cases.TRIPLE), budget=Budget(ratio=0.1), **options)
