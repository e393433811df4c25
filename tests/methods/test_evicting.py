"""What the evicting methods hold, against lists in plain Python, step by step."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import kept
from a2ats_jax.methods.adakv import AdaKV
from a2ats_jax.methods.corm import CORM
from a2ats_jax.methods.h2o import H2O
from a2ats_jax.methods.l2norm import L2Norm
from a2ats_jax.methods.layer_budget import curves_of, load_profile, save_profile, shares_of
from a2ats_jax.methods.prefixkv import PrefixKV
from a2ats_jax.methods.qpruning import QPruningKV
from a2ats_jax.methods.snapkv import SnapKV
from a2ats_jax.methods.streaming import Streaming
from tests import cases
from tests.independent import turned

SHAPE = dataclasses.replace(cases.PAIRS, new=40)
STEPS = 36
BUDGET = Budget(ratio=0.3)


class Row:
  """One KV head of one row and layer: its two queries and its key of every position, rotated."""

  def __init__(self, cache, layer: int, row: int, head: int):
    tokens = SHAPE.prompt + SHAPE.new
    self.q = turned(cache.q[layer, row, :tokens], cache.rope)
    self.k = turned(cache.k[layer, row, :tokens], cache.rope)
    self.head, self.length = head, int(cache.lengths[row])

  def weights(self, now: int, held: list[int], heads: range) -> np.ndarray:
    """``[heads, held]`` attention of the query at a position."""
    logit = np.stack([self.k[held, h // 2] @ self.q[now, h] for h in heads]) * 8**-0.5
    weight = np.exp(logit - logit.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)

  def sums(self, heads: range) -> np.ndarray:
    """Attention that each prompt token receives, ``[heads, length]``."""
    out = np.zeros((len(heads), self.length))
    for now in range(self.length):
      out[:, : now + 1] += self.weights(now, list(range(now + 1)), heads)
    return out


def granted(method, tokens: int) -> int:
  return int(method.budget.ratio * tokens)


def streaming(method, row: Row, steps: int):
  def limit(tokens: int) -> int:
    return max(granted(method, tokens), method.sinks + 1)

  recent = limit(row.length) - method.sinks
  held = {p for p in range(row.length) if p < method.sinks or p >= row.length - recent}
  for now in range(row.length, row.length + steps):
    held.add(now)
    while len(held) > limit(now + 1):
      held.remove(min(p for p in held if p >= method.sinks))
    yield set(held)


def h2o(method, row: Row, steps: int):
  group = range(2 * row.head, 2 * row.head + 2)
  sums = row.sums(group).sum(axis=0)
  allowed = max(granted(method, row.length), 2)
  recent = [p for p in range(row.length) if p >= row.length - allowed // 2]
  others = sorted((p for p in range(row.length) if p not in recent), key=lambda p: -sums[p])
  scores = {p: sums[p] for p in [*recent, *others[: allowed - len(recent)]]}
  for now in range(row.length, row.length + steps):
    allowed = max(granted(method, now + 1), 2)
    if len(scores) >= allowed:
      old = [p for p in scores if p <= now - allowed // 2]
      del scores[min(old, key=lambda p: scores[p])]
    scores[now] = 0.0
    held = sorted(scores)
    for p, gained in zip(held, row.weights(now, held, group).sum(axis=0), strict=True):
      scores[p] += gained
    yield set(held)


def corm(method, row: Row, steps: int):
  group, w = range(2 * row.head, 2 * row.head + 2), method.window
  votes: dict[int, set[int]] = {p: set() for p in range(row.length)}
  for now in range(max(row.length - w, 0), row.length):
    weight = row.weights(now, list(range(now + 1)), group)
    for p in range(now + 1):
      if np.any(weight[:, p] >= 1 / (now + 1)):
        votes[p].add(now)
  size = max(granted(method, SHAPE.prompt + SHAPE.new), 2)
  recent = min(method.recent, size // 2)
  votes = {p: v for p, v in votes.items() if v or p >= row.length - recent}

  def drop(late: int) -> None:
    while len(votes) > size:
      del votes[min((p for p in votes if p < late), key=lambda p: (len(votes[p]), p))]

  drop(row.length - recent)
  for now in range(row.length, row.length + steps):
    for p in votes:
      votes[p].discard(now - w - 1)
    if len(votes) >= size:
      old = [p for p in votes if p <= now - recent]
      del votes[min(old, key=lambda p: (len(votes[p]), p))]
    votes[now] = set()
    for p in votes:
      votes[p].discard(now - w)
    held = sorted(votes)
    weight = row.weights(now, held, group)
    for i, p in enumerate(held):
      if np.any(weight[:, i] >= 1 / len(held)):
        votes[p].add(now)
    yield set(held)
    for p in held:
      if not votes[p] and p <= now - recent:
        del votes[p]


def prefixkv(method, row: Row, steps: int):
  importance = row.sums(range(4)).mean(axis=0)

  def allowed(tokens: int) -> int:
    return max(min(round(granted(method, tokens)), tokens), method.start + 2)

  order = sorted(range(row.length), key=lambda p: -importance[p])
  always = [p for p in order if p < method.start or p == row.length - 1]
  held = [*always, *(p for p in order if p not in always)][: allowed(row.length)]
  for now in range(row.length, row.length + steps):
    held = sorted(held)
    if len(held) >= allowed(now + 1):
      count = len(held) + 1
      del held[max(count - 25 if count > 25 else count // 2, method.start)]
    held.append(now)
    yield set(held)


METHODS = {
  "streaming": (Streaming(budget=BUDGET, sinks=2), streaming, {"sinks": 3}),
  "h2o": (H2O(budget=BUDGET), h2o, {"budget": Budget(ratio=0.25)}),
  "corm": (CORM(budget=BUDGET, window=8, recent=5), corm, {"window": 16}),
  "corm, few slots": (CORM(budget=BUDGET, window=16, recent=60), corm, {"recent": 11}),
  "prefixkv": (PrefixKV(budget=BUDGET, start=1), prefixkv, {"start": 2}),
  "prefixkv, four first": (
    PrefixKV(budget=Budget(ratio=0.34), start=4),
    prefixkv,
    {"start": 1},
  ),
  "prefixkv, many": (
    PrefixKV(budget=Budget(ratio=0.6)),
    prefixkv,
    {"budget": Budget(ratio=0.55)},
  ),
}


def compare(method, right, told, cache) -> None:
  rows = {
    (layer, row, head): told(right, Row(cache, layer, row, head), STEPS)
    for layer in range(2)
    for row in range(3)
    for head in range(2)
  }
  for layer, positions, _, state, _, _ in cases.run_steps(method, cache, STEPS):
    holder = state if isinstance(state, kept.KeptCache) else state.cache
    held = np.asarray(kept.read(holder, layer).positions)
    for row, now in enumerate(positions[:, 0].tolist()):
      for head in range(2):
        want = next(rows[layer, row, head])
        got = held[row, head]
        got = set(got[got >= 0].tolist())
        if isinstance(method, CORM):  # which has dropped by now what this query did not want
          assert got <= want
          assert now in got
        else:
          assert got == want, (layer, row, head, now)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_holds_what_a_list_holds(name, seed):
  method, told, _ = METHODS[name]
  cache = cases.draw_cache(SHAPE, seed=seed, lengths=[40, 31, 12], rope="yarn")
  compare(method, method, told, cache)


@pytest.mark.parametrize("name", METHODS)
def test_wrong_options_are_caught(name):
  method, told, wrong = METHODS[name]
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[40, 31, 12])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(method, **wrong), method, told, cache)


def test_corm_reads_what_a_list_holds():
  """Statistics of every step, since what is held after it has lost what nobody wanted."""
  method, told, _ = METHODS["corm"]
  cache = cases.draw_cache(SHAPE, seed=3, lengths=[40, 31, 12], rope="yarn")
  rows = {
    (layer, row, head): told(method, Row(cache, layer, row, head), STEPS)
    for layer in range(2)
    for row in range(3)
    for head in range(2)
  }
  for layer, _, _, _, stats, _ in cases.run_steps(method, cache, STEPS):
    for row in range(3):
      want = [len(next(rows[layer, row, head])) for head in range(2)]
      assert stats.read[row, 0].tolist() == want


def test_a_pyramid_keeps_less_with_depth():
  """PyramidKV's arithmetic at 100 tokens of budget, window 20, 4 layers."""
  method = SnapKV(budget=Budget(tokens=100), window=20, layers="pyramid")
  assert method.granted(200, 4)[:, 200].tolist() == [176, 126, 76, 26]
  assert method.granted(30, 4)[:, 30].tolist() == [30, 30, 28, 22]


def test_l2norm_leaves_its_first_layers_alone():
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[40, 31, 12])
  state = cases.prefilled(L2Norm(budget=BUDGET, skip=1), cache)
  assert np.asarray(state.filled)[0].tolist() == [[40, 40], [31, 31], [12, 12]]
  norms = np.linalg.norm(cache.k[1, 0, :40], axis=-1)
  held = np.asarray(kept.read(state, 1).positions)[0]
  for head in range(2):
    want = np.sort(np.argsort(norms[:, head])[:12]).tolist()
    assert held[head][held[head] >= 0].tolist() == want


def test_a_profile_gives_layers_what_they_need(tmp_path):
  """A layer whose attention lies on few tokens keeps fewer; all carry the same share of it."""
  few, even = np.zeros((1, 1, 400)), np.ones((1, 1, 400))
  few[..., :20] = 1.0
  few += 1e-4
  curves = curves_of(np.concatenate([few, even]))
  shares = shares_of(curves, 0.3)
  assert np.mean(shares) == pytest.approx(1.0)
  carried = [np.interp(0.3 * s, np.linspace(0, 1, len(c)), c) for s, c in zip(shares, curves)]
  assert carried[0] == pytest.approx(carried[1], abs=0.01)
  assert shares[0] < 0.3 < shares[1]
  save_profile(tmp_path / "p.json", curves)
  assert load_profile(str(tmp_path / "p.json")) == curves
  for wrong in ("{}", '{"curves": [[NaN, 1]]}', '{"curves": [[0, 1]]}'):
    (tmp_path / "wrong.json").write_text(wrong)
    with pytest.raises(UserError, match="profile"):
      load_profile(str(tmp_path / "wrong.json"))
  sizes = kept.empty(
    cases.PAIRS.geometry,
    PrefixKV(budget=Budget(ratio=0.3), profile=curves).granted(46, 2).max(axis=1).tolist(),
  ).sizes
  assert sizes[0] < sizes[1]
  assert sum(sizes) == pytest.approx(2 * 0.3 * 46, abs=3)


def lopsided(layers: int = 2):
  """Curves of a first layer whose attention lies on few tokens and of others where it is even."""
  sums = np.ones((layers, 1, 400))
  sums[0] = 1e-4
  sums[0, :, :20] = 1.0
  return curves_of(sums)


@pytest.mark.parametrize(
  "method",
  [
    Streaming(budget=BUDGET, profile=lopsided()),
    L2Norm(budget=BUDGET, skip=0, profile=lopsided()),
    SnapKV(budget=BUDGET, window=4, profile=lopsided()),
    H2O(budget=BUDGET, profile=lopsided()),
    PrefixKV(budget=BUDGET, profile=lopsided()),
    CORM(budget=BUDGET, window=8, recent=2, profile=lopsided()),
  ],
  ids=lambda method: method.name,
)
def test_every_evicting_method_takes_a_profile(method):
  """Layers hold what the profile grants them, as many together as without one, also later."""
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[40, 31, 12])
  plain = dataclasses.replace(method, profile=())
  want = cases.prefilled(plain, cache)
  got = cases.prefilled(method, cache)
  sizes, even = ((x.cache if hasattr(x, "cache") else x).sizes for x in (got, want))
  assert sizes[0] < even[0] < sizes[1]
  if method.name not in ("l2norm", "snapkv"):  # these have a slot for every later token as well
    assert abs(sum(sizes) - sum(even)) <= 2 * 3
  for ran in cases.run_steps(method, cache, 6):
    held = kept.read(ran.state.cache if hasattr(ran.state, "cache") else ran.state, ran.layer)
    assert np.all(np.sum(np.asarray(held.positions) >= 0, axis=-1) <= sizes[ran.layer])
    assert np.all(np.asarray(ran.stats.read) >= 1)
  assert np.max(np.asarray(held.positions)) >= 44  # the last token is there
  with pytest.raises(UserError, match="curves of 2 layers, got 3"):
    dataclasses.replace(method, profile=lopsided(3)).init(SHAPE.geometry)


@pytest.mark.parametrize(
  "method",
  [
    QPruningKV(budget=Budget(tokens=6), bits=8, group=8, profile=lopsided()),
    AdaKV(budget=Budget(tokens=12), window=4, profile=lopsided()),
  ],
  ids=lambda method: method.name,
)
def test_methods_with_slots_of_the_largest_layer_take_a_profile(method):
  """Layers hold what the profile grants them: 24 tokens together, of the longest row."""
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[40, 31, 12])
  state = cases.prefilled(method, cache)
  if isinstance(method, AdaKV):
    held = np.sum(np.asarray(state.owner) >= 0, axis=-1)[:, 0] / SHAPE.kv_heads
  else:
    held = np.sum(np.asarray(state.positions) >= 0, axis=-1)[:, 0, 0]
  assert held[0] < 12 < held[1]
  assert held.sum() == pytest.approx(24, abs=2)
  with pytest.raises(UserError, match="curves of 2 layers, got 3"):
    dataclasses.replace(method, profile=lopsided(3)).init(SHAPE.geometry)


def test_a_pyramid_and_a_profile_exclude_each_other():
  with pytest.raises(UserError, match="layers=uniform with a profile"):
    SnapKV(budget=BUDGET, layers="pyramid", profile=lopsided())


def test_best_gives_ties_to_the_earlier_token():
  scores = jnp.asarray([[[1.0, 2.0, 2.0, 2.0, 9.0]]])
  eligible = jnp.asarray([[True, True, True, True, False]])
  chosen = kept.best(scores, jnp.asarray([2], jnp.int32), eligible)
  assert chosen[0, 0].tolist() == [False, True, True, False, False]
