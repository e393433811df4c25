"""What methods choose from a prompt of eight tokens, worked out on paper.

One row, one KV head under two query heads, keys of two numbers that stand as they are rotated.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.methods import kept
from a2ats_jax.methods.adakv import AdaKV
from a2ats_jax.methods.base import Geometry, PromptLayer
from a2ats_jax.methods.clusterkv import ClusterKV
from a2ats_jax.methods.corm import CORM
from a2ats_jax.methods.h2o import H2O
from a2ats_jax.methods.l2norm import L2Norm
from a2ats_jax.methods.prefixkv import PrefixKV
from a2ats_jax.methods.quest import Quest
from a2ats_jax.methods.shadowkv import ShadowKV
from a2ats_jax.methods.snapkv import SnapKV
from a2ats_jax.methods.streaming import Streaming
from a2ats_jax.methods.think import ThinK, channels_of

T = 8
HALF = Budget(tokens=4)
#        0       1       2       3       4       5       6       7
KEYS = [(3, 0), (0, 1), (2, 2), (0, 4), (1, 0), (5, 0), (0, 2), (1, 1)]
SUMS = [(2.0, 1.5, 0.1, 0.9, 0.8, 0.6, 0.3, 0.2), (1.0, 0.5, 0.1, 1.9, 0.2, 0.6, 0.3, 0.2)]


def prompt(queries: list[list[tuple[float, float]]] | None = None) -> PromptLayer:
  """The keys, which are the values too, with the last tokens' queries of both heads."""
  keys = jnp.asarray(KEYS, jnp.float32)[None, :, None]
  last = None if queries is None else jnp.asarray(queries, jnp.float32)[None]
  lengths = jnp.asarray([T], jnp.int32)
  return PromptLayer(keys, keys, keys, lengths, last, jnp.asarray(SUMS, jnp.float32)[None])


def absorbed(method, queries=None):
  shape = Geometry(batch=1, layers=1, heads=2, kv_heads=1, head_dim=2, prompt=T, new=4)
  return method.absorb(method.init(shape), prompt(queries), layer=0)


def held(state) -> list[int]:
  """Positions of the tokens that stay."""
  slots = kept.read(state.cache if hasattr(state, "cache") else state, 0).positions[0, 0]
  return [p for p in slots.tolist() if p >= 0]


def test_streaming_keeps_the_first_and_the_latest():
  assert held(absorbed(Streaming(budget=HALF, sinks=1))) == [0, 5, 6, 7]


def test_l2norm_keeps_the_smallest_keys():
  """Norms 3, 1, 2.8, 4, 1, 5, 2, 1.4."""
  assert held(absorbed(L2Norm(budget=HALF, skip=0))) == [1, 4, 6, 7]


def test_h2o_keeps_two_heavy_hitters_and_two_latest():
  """Sums over both heads 3, 2, 0.2, 2.8, 1, 1.2: 0 and 3."""
  assert held(absorbed(H2O(budget=HALF))) == [0, 3, 6, 7]


def test_prefixkv_keeps_the_most_attended_and_the_last():
  """Beside the first and the last, means over heads: 3 (1.4), then 1 (1.0)."""
  assert held(absorbed(PrefixKV(budget=HALF, start=1))) == [0, 1, 3, 7]


def test_snapkv_keeps_the_window_and_what_it_looks_at():
  """The window's one query looks along the second axis: at 3 (key 4), then at 2 and 6 (key 2).

  Pooled over three neighbours 2, 3 and 4 have the weight of 3: the earlier two stay.
  """
  looks = [[(0.0, 3.0), (0.0, 3.0)]]
  assert held(absorbed(SnapKV(budget=HALF, window=1, kernel=1), looks)) == [2, 3, 6, 7]
  assert held(absorbed(SnapKV(budget=Budget(tokens=3), window=1, kernel=3), looks)) == [2, 3, 7]


def test_adakv_gives_a_layers_slots_to_the_best_of_any_head():
  """Two KV heads, three tokens each, of which two are safe: the window, and the best other one.

  The first head's query gives nearly all to 3 and 0.014 to 2 and 6; the second's gives 1/8 to every
  token. So the two slots that are free go to the second head. With all three safe, they do not.
  """
  one = prompt([[(0.0, 3.0), (0.0, 0.0)]])
  both = {name: jnp.repeat(getattr(one, name), 2, axis=2) for name in ("keys", "rotated", "values")}
  method = AdaKV(budget=Budget(tokens=3), window=1, kernel=1, safeguard=0.67)
  chosen = method.choose(dataclasses.replace(one, **both), jnp.asarray([3], jnp.int32))[0]
  assert [np.flatnonzero(row).tolist() for row in np.asarray(chosen)] == [[3, 7], [0, 1, 2, 7]]
  even = dataclasses.replace(method, safeguard=1.0)
  chosen = even.choose(dataclasses.replace(one, **both), jnp.asarray([3], jnp.int32))[0]
  assert [np.flatnonzero(row).tolist() for row in np.asarray(chosen)] == [[2, 3, 7], [0, 1, 7]]


def test_corm_keeps_what_a_query_gave_more_than_an_even_share():
  """The last query's weights, logits 3 (0, 1, 2, 4, 0, 0, 2, 1) / sqrt 2: only 3 has over 1/8.

  With a smaller query, (0, 0.2), 2, 3 and 6 have over 1/8: exp(0.28) and exp(0.57) of 9.45.
  """
  none = [[(0.0, 0.0), (0.0, 0.0)]] * 7
  method = CORM(budget=Budget(tokens=6), window=8, recent=1)
  sharp = [[(9.0, 9.0), (9.0, 9.0)]] * 7  # votes for few; those of earlier queries
  weights = np.exp(np.array([0, 1, 2, 4, 0, 0, 2, 1]) * 0.2 / math.sqrt(2))
  assert (weights / weights.sum() >= 1 / 8).tolist() == [False] * 2 + [True] * 2 + [False] * 2 + [
    True,
    False,
  ]
  # Queries of zeros give every token they see an even share: each votes for all up to itself.
  assert held(absorbed(method, [*none, [(0.0, 0.2), (0.0, 0.2)]])) == [0, 1, 2, 3, 4, 7]
  got = held(absorbed(method, [*sharp, [(0.0, 0.2), (0.0, 0.2)]]))
  assert got == [0, 2, 3, 5, 6, 7]


def test_quest_reads_the_page_whose_corner_scores_most():
  """Pages of two. The corners for (1, 1) are (3, 1), (2, 4) and (5, 0): 4, 6 and 5.

  For (1, -1) they are 3 - 0, 2 - 2 and 5 - 0. The last page is being written: it is read anyway.
  """
  method = Quest(budget=Budget(tokens=2), page=2)
  state = absorbed(method)
  q = jnp.asarray([[[(1.0, 1.0), (1.0, -1.0)]]])
  ids, used = method.choose(state, q, jnp.asarray([7], jnp.int32), 0)
  assert ids[0].tolist() == [[1, 3], [2, 3]]
  assert bool(jnp.all(used))


def test_clusterkv_takes_the_best_cluster_first():
  """Two clusters by direction: keys along the first axis (0, 4, 5) and the others.

  A budget of four takes the three of the first for a query along it, and one of the others.
  """
  method = ClusterKV(budget=HALF, clusters=2, sinks=0, every=4, fresh=1, page=4, placement="device")
  state = absorbed(method)
  counts = np.asarray(state.index.counts)[0, 0, 0, :2]
  first = int(np.argmin(counts))
  assert sorted(counts.tolist()) == [3, 5]
  centre = np.asarray(state.centroids)[0, 0, 0, first]
  np.testing.assert_allclose(centre, (3.0, 0.0), atol=1e-6)
  q = jnp.asarray([[[(1.0, 0.0), (1.0, 0.0)]]])
  taken, _, _ = method.choose(state, q, jnp.asarray([7], jnp.int32), 0)
  assert taken[0, 0, :2].tolist() == ([3, 1] if first == 0 else [1, 3])


def test_shadowkv_reads_the_chunk_whose_mean_scores_most():
  """Chunks of two, all keys but the last two far. Means (1.5, 0.5), (1, 3), (3, 0).

  The least alike of its keys, (2, 2) and (0, 4) or (3, 0) and (0, 1), is the outlier chunk 0.
  """
  method = ShadowKV(budget=Budget(tokens=2), rank=2, chunk=2, outliers=1, local=2)
  state = absorbed(method)
  assert state.numbers[0, 0, 0].tolist() == [0]
  q = jnp.asarray([[[(1.0, 0.0), (1.0, 0.0)]]])
  ids, used = method.choose(state, q, jnp.asarray([7], jnp.int32), 0)
  assert ids[0, 0][used[0, 0]].tolist() == [2]
  q = jnp.asarray([[[(0.0, 1.0), (0.0, 1.0)]]])
  ids, used = method.choose(state, q, jnp.asarray([7], jnp.int32), 0)
  assert ids[0, 0][used[0, 0]].tolist() == [1]


@pytest.mark.parametrize(("queries", "want"), [((1.0, 1.0), 0), ((1.0, 2.0), 1)])
def test_think_keeps_the_channel_of_most_weight(queries, want):
  """Squares of keys add up to 40 and 26: the first channel stays unless queries see the second."""
  assert ThinK(prune=0.5, window=1).needs.queries == 1
  assert channels_of(prompt([[queries, queries]]), 1)[0, 0].tolist() == [want]
