"""ActQKV-style against a plain reading in float64: probes, entropies, grants, blocks read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods.actqkv_style import ActQKVStyle, entropy_of, probe_of, share
from a2ats_jax.rope import rotate
from tests import cases
from tests.independent import turned

METHOD = ActQKVStyle(
  budget=Budget(ratio=0.25), block=3, repr=2, sinks=2, local=4, window=6, most=3, placement="device"
)
SHAPES = {
  "pairs": dataclasses.replace(cases.PAIRS, layers=3, prompt=41, new=24),
  "triple": dataclasses.replace(cases.TRIPLE, layers=4, prompt=38, new=24),
}
SHARPER = (0.5, 12.0, 4.0, 1.0)  # queries of each layer are so much longer: entropies differ


def draw(shape: str, seed: int, lengths: list[int]) -> cases.Cache:
  cache = cases.draw_cache(SHAPES[shape], seed=seed, lengths=lengths, rope="yarn")
  sharper = np.asarray(SHARPER[: cache.shape.layers], np.float32)
  return dataclasses.replace(cache, q=cache.q * sharper[:, None, None, None, None])


def softmax(x: np.ndarray) -> np.ndarray:
  weight = np.exp(x - x.max())
  return weight / weight.sum()


class Row:
  """One layer of one row's prompt: its blocks, what represents them, and the probe's entropy."""

  def __init__(self, method: ActQKVStyle, cache: cases.Cache, layer: int, row: int):
    n, shape, p = int(cache.lengths[row]), cache.shape, method.block
    self.group = shape.heads // shape.kv_heads
    q = turned(cache.q[layer, row, :n], cache.rope)
    k = turned(cache.k[layer, row, :n], cache.rope)
    starts = range(method.sinks, n - method.local - p + 1, p)
    self.blocks = [list(range(start, start + p)) for start in starts]
    received = np.zeros((shape.kv_heads, n))
    for now in range(n):
      for h in range(shape.heads):
        logit = k[: now + 1, h // self.group] @ q[now, h] * shape.head_dim**-0.5
        received[h // self.group, : now + 1] += softmax(logit)
    self.marks = np.zeros((shape.kv_heads, len(self.blocks), shape.head_dim))
    for g in range(shape.kv_heads):
      for j, tokens in enumerate(self.blocks):
        best = sorted(tokens, key=lambda t: -received[g, t])[: method.repr]
        self.marks[g, j] = k[best, g].mean(axis=0)
    last = q[-method.window :]
    deviation = np.sqrt(((last - last.mean(axis=0)) ** 2).mean(axis=0)) + 1e-6
    bias = (((last - last.mean(axis=0)) / deviation) ** 2).mean(axis=(1, 2))
    bias = bias if bias.sum() > 0 else np.ones(len(last))
    probe = np.einsum("i,ihc->hc", bias / bias.sum(), last)
    entropies = []
    for scores in self.scores(probe):
      weight = softmax(scores) if len(scores) else np.ones(1)
      entropies.append(-sum(w * math.log(w) for w in weight if w > 0))
    self.entropy = np.mean(entropies)

  def scores(self, q: np.ndarray) -> np.ndarray:
    """``[K, N]`` of one token's queries."""
    out = np.zeros(self.marks.shape[:2])
    for h, query in enumerate(q):
      out[h // self.group] += self.marks[h // self.group] @ query * len(query) ** -0.5
    return out


def shared_out(weight, low: float, high: float, mean: float) -> np.ndarray:
  """Clipped multiples of the weights that average ``mean``, by halving."""
  weight = np.asarray(weight, np.float64)
  least, most = 0.0, high / weight.min()
  for _ in range(200):
    middle = (least + most) / 2
    if np.clip(middle * weight, low, high).mean() < mean:
      least = middle
    else:
      most = middle
  return np.clip(most * weight, low, high)


def grants(method: ActQKVStyle, entropies, tokens: int, blocks: int) -> tuple[list[int], float]:
  """Blocks of every layer, and how near one was to a block more or less."""
  mean, every = int(method.budget.ratio * tokens), blocks * method.block
  if mean >= every:
    return [blocks] * len(entropies), math.inf
  low, high = mean / method.most, min(mean * method.most, every)
  number = shared_out(np.asarray(entropies) + 1e-6, low, high, mean) / method.block
  off = np.abs(number - np.rint(number))
  return np.floor(number + 1e-9).astype(int).tolist(), min([math.inf, *off[off > 1e-9]])


def compare(method: ActQKVStyle, right: ActQKVStyle, cache: cases.Cache) -> set[int]:
  """Every step, layer and row against the reading of ``right``.

  Returns:
    How many blocks were granted, of all steps, layers and rows.
  """
  layers, rows = range(cache.shape.layers), range(cache.shape.batch)
  read = [[Row(right, cache, layer, row) for row in rows] for layer in layers]
  choose, seen, unsafe, total = jax.jit(method.choose), set(), 0, 0
  for layer, positions, out, state, stats, _ in cases.run_steps(method, cache, 22):
    queries, _, _ = cases.tokens_at(cache, layer, positions)
    rotated = rotate(queries, jnp.asarray(positions), cache.rope)
    ids, count = choose(state, rotated, jnp.asarray(positions[:, 0]), layer)
    for row, now in enumerate(positions[:, 0].tolist()):
      of, total = read[layer][row], total + 1
      np.testing.assert_allclose(state.entropy[layer, row], of.entropy, atol=2e-4)
      entropies = [read[other][row].entropy for other in layers]
      granted, margin = grants(right, entropies, now + 1, len(of.blocks))
      if margin < 5e-3:
        unsafe += 1
        continue
      k = turned(cache.k[layer, row, : now + 1], cache.rope)
      q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
      scores = of.scores(q)
      in_block = {t for tokens in of.blocks for t in tokens}
      for g in range(cache.shape.kv_heads):
        order = sorted(range(len(of.blocks)), key=lambda j: -scores[g, j])
        picked, rest = order[: granted[layer]], order[granted[layer] :]
        if picked and rest and scores[g, picked[-1]] - scores[g, rest[0]] < 1e-3:
          unsafe += 1
          continue
        seen.add(len(picked))
        assert int(count[row, g]) == len(picked)
        assert set(ids[row, g, : len(picked)].tolist()) == set(picked)
        tokens = [t for t in range(now + 1) if t not in in_block]
        tokens += [t for j in picked for t in of.blocks[j]]
        assert int(stats.read[row, 0, g]) == len(tokens)
        assert int(stats.selected[row, 0, g]) == len(picked) * right.block
        for h in range(g * of.group, (g + 1) * of.group):
          weight = softmax(k[tokens, g] @ q[h] * q.shape[1] ** -0.5)
          want = weight @ cache.v[layer, row, tokens, g].astype(np.float64)
          np.testing.assert_allclose(out[row, 0, h], want, atol=1e-4, rtol=0)
  assert unsafe < total / 10
  return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_plain_reading(shape, seed):
  """Rows without a block, with a few and with many; grants grow as tokens come."""
  lengths = {"pairs": [41, 23, 1], "triple": [38, 9]}[shape]
  assert len(compare(METHOD, METHOD, draw(shape, seed, lengths))) > 5


@pytest.mark.parametrize(
  "wrong",
  [
    {"repr": 1},
    {"repr": 3},
    {"block": 4},
    {"sinks": 3},
    {"local": 7},
    {"window": 5},
    {"most": 1},
    {"budget": Budget(ratio=0.3)},
  ],
  ids=str,
)
def test_wrong_options_are_caught(wrong):
  cache = draw("pairs", 0, [41, 38, 35])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(METHOD, **wrong), METHOD, cache)


def of_layers(entropies: list[float], tokens: int, blocks: int, most: int) -> list[int]:
  method = dataclasses.replace(METHOD, block=4, most=most)
  column = jnp.asarray(entropies)[:, None]
  return method.grants(column, jnp.asarray([tokens]), jnp.asarray([blocks]))[:, 0].tolist()


@pytest.mark.parametrize(
  ("entropies", "tokens", "blocks", "most", "want"),
  [
    ([1, 1, 2], 8, 10, 2, [1, 1, 3]),  # 24 tokens: 6, 6 and 12
    ([1, 1, 10], 8, 10, 2, [1, 1, 4]),  # 2, 2 and 20 are out of bounds: 4, 4 and 16
    ([1, 2, 20], 16, 10, 2, [2, 2, 8]),  # 32 at most, which leaves 8 for each of the others
    ([1, 1, 10], 8, 3, 2, [1, 1, 3]),  # 12 are all there are: 6, 6 and 12
    ([1, 1, 10], 12, 3, 2, [3, 3, 3]),
    ([5.6, 3, 4.2], 4 * 59836, 59836, 2, [59836] * 3),  # float32 loses more than a hair here
    ([1, 1, 10], 8, 10, 1, [2, 2, 2]),
    ([0, 0, 0], 8, 10, 4, [2, 2, 2]),
    ([0, 0, 5], 8, 10, 4, [0, 0, 5]),  # 2, 2 and 20
    ([1, 2, 3], 0, 10, 4, [0, 0, 0]),
    ([0, 0, 0], 8, 0, 4, [0, 0, 0]),
  ],
)
def test_grants_by_hand(entropies, tokens, blocks, most, want):
  """Blocks of four tokens."""
  assert of_layers([float(x) for x in entropies], tokens, blocks, most) == want


@pytest.mark.parametrize("seed", range(5))
def test_shares_average_the_mean_within_their_bounds(seed):
  rng = np.random.default_rng(seed)
  weight = rng.gamma(0.3, size=(7, 6)) + 1e-6
  low, high = rng.uniform(0, 3, size=6), rng.uniform(5, 90, size=6)
  mean = rng.uniform(low, high)
  got = share(*(jnp.asarray(x, jnp.float32) for x in (weight, low, high, mean)))
  for row in range(6):
    want = shared_out(weight[:, row], low[row], high[row], mean[row])
    np.testing.assert_allclose(got[:, row], want, rtol=1e-4)
    np.testing.assert_allclose(np.mean(got[:, row]), mean[row], rtol=1e-5)


def test_probe_by_hand():
  """Queries 0, 0 and 3: mean 1, variance 2, biases 1/2, 1/2 and 2, weights 1/6, 1/6 and 2/3."""
  queries = jnp.asarray([[99.0, 0, 0, 3], [99, 99, 99, 7], [5, 5, 5, 5]])[:, :, None, None]
  probe = probe_of(queries, jnp.asarray([3, 1, 9]))
  np.testing.assert_allclose(probe[:, 0, 0], [2, 7, 5], rtol=1e-5)


def test_entropy_by_hand():
  """Four alike, one in three odds, one alone, none."""
  none = -math.inf
  scores = [[2, 2, 2, 2], [0, math.log(3), none, none], [7, none, none, none], [none] * 4]
  got = entropy_of(jnp.asarray(scores)[:, None])[:, 0]
  third = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
  np.testing.assert_allclose(got, [math.log(4), third, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"window": 0}, "window and most must be at least 1.*got 0, 3, 2 and 4"),
    ({"most": 0}, "window and most must be at least 1.*got 6, 0, 2 and 4"),
    ({"sinks": -1}, "sinks and local 0 or more, got 6, 3, -1 and 4"),
    ({"local": -1}, "sinks and local 0 or more, got 6, 3, 2 and -1"),
    ({"repr": 0}, "repr must be at least 1.*got 0 of 3"),
    ({"repr": 4}, "at most the tokens of a block, got 4 of 3"),
  ],
  ids=str,
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(UserError, match=f"^actqkv_style: .*{message}$"):
    dataclasses.replace(METHOD, **options)


@pytest.mark.parametrize("missing", ["queries", "sums"])
def test_a_prompt_without_what_it_needs_is_refused(missing):
  cache = draw("triple", 0, [38, 9])
  piece = dataclasses.replace(cases.prompt_layer(cache, 0, METHOD.needs), **{missing: None})
  with pytest.raises(UserError, match="queries and sums were not handed over"):
    METHOD.absorb(METHOD.init(cache.shape.geometry), piece, layer=0)
