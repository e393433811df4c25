"""What Quest and ClusterKV read, against brute force over all keys in float64."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.methods.clusterkv import ClusterKV
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.quest import Quest
from tests import cases
from tests.independent import turned

SHAPE = dataclasses.replace(cases.PAIRS, new=12)
QUEST = Quest(budget=Budget(tokens=9), page=4)
CLUSTER = ClusterKV(
  budget=Budget(tokens=11), clusters=4, sinks=2, every=100, fresh=2, page=4, placement="device"
)


def quest_reads(method, cache, keys, q, row) -> list[set[int]]:
  """Tokens that each query head reads: its best pages by the corner of their box, and the last."""
  p, now, out = method.page, len(keys) - 1, []
  for h, query in enumerate(q):
    of = keys[:, h // 2]
    pages = [of[start : start + p] for start in range(0, now // p * p, p)]
    bounds = [np.maximum(query * x.min(axis=0), query * x.max(axis=0)).sum() for x in pages]
    best = np.argsort(-np.array(bounds), kind="stable")[: method.budget.tokens // p]
    last = range(now // p * p, now + 1)
    out.append({int(c) * p + i for c in best for i in range(p)} | set(last))
  return out


def clusters_of(keys: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
  """Centroids and labels after 20 rounds from evenly spaced keys."""
  n = len(keys)
  centroids = keys[np.arange(c) * n // c].copy()

  def labels() -> np.ndarray:
    size = np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-30)
    return np.argmax(keys @ (centroids / size).T, axis=1)

  for _ in range(20):
    label = labels()
    for j in range(c):
      if np.any(label == j):
        centroids[j] = keys[label == j].mean(axis=0)
  return centroids, labels()


def cluster_reads(method, cache, keys, q, row) -> list[set[int]]:
  """Tokens that each query head reads: its best clusters until the budget is full, the sinks, and
  later tokens that are not clustered yet. Later ones are, ``every`` at a time."""
  length, out, last = int(cache.lengths[row]), [], len(keys) - 1
  fresh = length + (last - length) // method.every * method.every
  always = set(range(min(method.sinks, length))) | set(range(fresh, last + 1))
  groups = [(method.sinks, length, method.clusters)]
  groups += [(t, t + method.every, method.fresh) for t in range(length, fresh, method.every)]
  for h, query in enumerate(q):
    clusters: list[tuple[float, list[int]]] = []
    for start, end, count in groups:
      if start < end:
        centroids, label = clusters_of(keys[start:end, h // 2], count)
        members = [(start + np.flatnonzero(label == j)).tolist() for j in range(count)]
        clusters += zip((-(centroids @ query)).tolist(), members, strict=True)
    chosen = [token for _, tokens in sorted(clusters, key=lambda c: c[0]) for token in tokens]
    out.append(always | set(chosen[: method.budget.tokens - method.sinks]))
  return out


def compare(method, right, reads, cache, *, shared: bool, steps: int = 10) -> None:
  for layer, positions, out, _, stats, _ in cases.run_steps(method, cache, steps):
    for row, now in enumerate(positions[:, 0].tolist()):
      keys = turned(cache.k[layer, row, : now + 1], cache.rope)
      q = turned(cache.q[layer, row, now][None], cache.rope, now)[0]
      values = cache.v[layer, row, : now + 1].astype(np.float64)
      own = reads(right, cache, keys, q, row)
      unions = [own[2 * g] | own[2 * g + 1] for g in range(2)]
      assert stats.read[row, 0].tolist() == [len(union) for union in unions]
      for h, query in enumerate(q):
        tokens = sorted(unions[h // 2] if shared else own[h])
        logit = keys[tokens, h // 2] @ query * len(query) ** -0.5
        weight = np.exp(logit - logit.max())
        want = weight @ values[tokens, h // 2] / weight.sum()
        np.testing.assert_allclose(out[row, 0, h], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quest_reads_the_best_pages(seed):
  cache = cases.draw_cache(SHAPE, seed=seed, lengths=[40, 17, 3], rope="yarn")
  compare(QUEST, QUEST, quest_reads, cache, shared=False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusterkv_reads_the_best_clusters(seed):
  cache = cases.draw_cache(SHAPE, seed=seed, lengths=[40, 23, 1], rope="yarn")
  compare(CLUSTER, CLUSTER, cluster_reads, cache, shared=True)


def test_clusterkv_reads_what_each_query_head_takes_whoever_the_budget_names():
  """More pages of a KV head than tokens granted: its query heads look elsewhere."""
  few = dataclasses.replace(CLUSTER, sinks=0, budget=Budget(tokens=2), page=1)
  other = dataclasses.replace(few, budget=Budget(tokens=2, per="kv_head"))
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[40, 23, 3], rope="yarn")
  steps = zip(cases.run_steps(few, cache, 3), cases.run_steps(other, cache, 3), strict=True)
  for want, got in steps:
    assert np.max(np.asarray(want.stats.selected)) > 2
    np.testing.assert_array_equal(got.stats.selected, want.stats.selected)
    np.testing.assert_allclose(got.out, want.out, atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_clusterkv_finds_later_tokens_by_their_own_clusters(seed):
  """Three times four later tokens become two clusters, whose tokens are then chosen or left."""
  method = dataclasses.replace(CLUSTER, every=4)
  cache = cases.draw_cache(SHAPE, seed=seed, lengths=[40, 23, 3], rope="yarn")
  compare(method, method, cluster_reads, cache, shared=True, steps=12)
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(method, fresh=3), method, cluster_reads, cache, shared=True)


def test_clusterkv_leaves_nothing_out_where_a_prompt_is_shorter_than_the_sinks():
  """Budget 1, across the step that clusters later tokens: four sinks, prompts of 1 and 2 tokens."""
  method = ClusterKV(
    budget=Budget(ratio=1.0), clusters=4, sinks=4, every=4, fresh=2, page=4, placement="device"
  )
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[1, 2, 40])
  steps = zip(cases.run_steps(method, cache, 10), cases.run_steps(Full(), cache, 10), strict=True)
  for got, want in steps:
    np.testing.assert_allclose(got.out, want.out, atol=cases.TOLERANCE, rtol=0)
    np.testing.assert_array_equal(got.stats.read, want.stats.read)


@pytest.mark.parametrize(
  ("method", "reads", "shared", "wrong"),
  [
    (QUEST, quest_reads, False, {"page": 5}),
    (QUEST, quest_reads, False, {"budget": Budget(tokens=12)}),
    (CLUSTER, cluster_reads, True, {"budget": Budget(tokens=12)}),
    (CLUSTER, cluster_reads, True, {"clusters": 3}),
    (CLUSTER, cluster_reads, True, {"sinks": 3}),
  ],
  ids=["quest-page", "quest-budget", "clusterkv-budget", "clusterkv-clusters", "clusterkv-sinks"],
)
def test_wrong_options_are_caught(method, reads, shared, wrong):
  cache = cases.draw_cache(SHAPE, seed=0, lengths=[40, 35, 31])
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(method, **wrong), method, reads, cache, shared=shared)
