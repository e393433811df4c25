"""The steps of k-means against brute force, scikit-learn and their own promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from tests.train_codebooks.cases import OPTIONS
from train_codebooks import kmeans
from train_codebooks.collect import Collected
from train_codebooks.fit import Polished, _Fit, fit, rows_of, space_of
from train_codebooks.heads import Heads
from train_codebooks.kmeans import AdamState, Space
from train_codebooks.progress import silent

_HEADS, _TOKENS, _DIM, _SIZE = 3, 700, 5, 12


def clustered(seed=0, heads=_HEADS, tokens=_TOKENS, dim=_DIM, centres=20):
  """Keys that gather around centres, each head its own."""
  draw = np.random.default_rng(seed)
  middle = draw.normal(size=(heads, centres, dim)) * 3
  pick = draw.integers(0, centres, (heads, tokens))
  noise = draw.normal(size=(heads, tokens, dim)) * 0.5
  return (np.take_along_axis(middle, pick[..., None], axis=1) + noise).astype(np.float32)


def identity(heads=_HEADS, dim=_DIM) -> Space:
  eye = np.broadcast_to(np.eye(dim, dtype=np.float32), (heads, dim, dim)).copy()
  return Space(np.zeros((heads, dim), np.float32), eye)


def phases(keys, directory, devices=1, **options) -> _Fit:
  return _Fit(
    keys,
    identity(*keys.shape[::2]),
    dataclasses.replace(OPTIONS, **{"codewords": _SIZE, "lloyd_steps": 50} | options),
    directory,
    silent,
    1e9,
    jax.local_devices()[:devices],
  )


def inertia(keys, codewords):
  """Mean squared distance per coordinate of each head, by brute force in float64."""
  d = np.sum(
    np.square(keys[:, :, None].astype(np.float64) - codewords[:, None].astype(np.float64)), axis=-1
  )
  return d.min(axis=2).mean(axis=1) / keys.shape[-1]


@pytest.mark.parametrize("tokens", [1, 37, 512, 513, 1500])
def test_nearest_is_brute_force(tokens):
  draw = np.random.default_rng(tokens)
  y, c = draw.normal(size=(tokens, 6)), draw.normal(size=(33, 6))
  expected = np.square(y[:, None] - c[None]).sum(-1).argmin(1)
  ours = kmeans.nearest(jnp.asarray(y, jnp.float32), jnp.asarray(c, jnp.float32))
  np.testing.assert_array_equal(ours, expected)


def test_nearest_breaks_ties_to_the_lowest():
  c = jnp.asarray([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
  ours = kmeans.nearest(jnp.asarray([[0.0, 0.0], [1.0, 0.0]]), c)
  np.testing.assert_array_equal(ours, [1, 0])


@pytest.mark.parametrize("by_distance", [True, False])
@pytest.mark.parametrize("size", [1, _SIZE, 300])
def test_seeds_are_distinct_keys(by_distance, size):
  keys, heads = clustered(), Heads.over(_HEADS, jax.local_devices()[:1])
  seeds = heads.get(
    kmeans.seed_codewords(
      heads,
      heads.put_tree(identity()),
      heads.put(keys),
      jax.random.key(0),
      codewords=size,
      by_distance=by_distance,
    )
  )
  assert seeds.shape == (_HEADS, size, _DIM)
  for head in range(_HEADS):
    rows = {tuple(k) for k in keys[head]}
    chosen = [tuple(s) for s in seeds[head]]
    assert set(chosen) <= rows
    assert len(set(chosen)) == size


def test_seeding_by_distance_spreads_better_than_evenly(tmp_path):
  keys = clustered()
  spread = np.mean([inertia(keys, phases(keys, tmp_path, seed=s).seed()).mean() for s in range(5)])
  even = np.mean(
    [
      inertia(keys, phases(keys, tmp_path, seed=s, seeding="sampled").seed()).mean()
      for s in range(5)
    ]
  )
  assert spread < 0.8 * even


def test_seeding_with_fewer_distinct_keys_than_codewords(tmp_path):
  keys = np.repeat(clustered(tokens=5), 10, axis=1)
  seeds = phases(keys, tmp_path, seed=1).seed()
  for head in range(_HEADS):
    assert len({tuple(s) for s in seeds[head]}) == 5


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_lloyd_is_scikit_learns(tmp_path, steps):
  keys = clustered()
  run = phases(keys, tmp_path, lloyd_steps=steps, tolerance=0.0)
  seeds = run.seed()
  ours = run.lloyd("lloyd", seeds)
  np.testing.assert_allclose(ours.losses[-1], inertia(keys, ours.codewords), rtol=1e-5)
  for head in range(_HEADS):
    theirs = KMeans(_SIZE, init=seeds[head], n_init=1, max_iter=steps, tol=0.0, algorithm="lloyd")
    theirs.fit(keys[head])
    expected = theirs.cluster_centers_
    if steps < 50:  # scikit-learn's centres are one update ahead of its labels
      np.testing.assert_allclose(ours.codewords[head], expected, rtol=1e-4, atol=1e-4)
    assert ours.losses[-1][head] <= theirs.inertia_ / _TOKENS / _DIM * (1 + 1e-5)


def test_lloyd_never_rises_and_counts_every_key(tmp_path):
  ours = phases(clustered(), tmp_path, tolerance=0.0).lloyd("lloyd", clustered(1)[:, :_SIZE])
  assert (np.diff(ours.losses, axis=0) <= 1e-6).all()
  np.testing.assert_array_equal(ours.counts.sum(axis=1), _TOKENS)


def test_lloyd_stops_when_the_gain_is_small(tmp_path):
  run = phases(clustered(), tmp_path, tolerance=0.05)
  losses = run.lloyd("lloyd", run.seed()).losses.mean(axis=1)
  gain = -np.diff(losses) / losses[:-1]
  assert (gain[:-1] > 0.05).all()
  assert gain[-1] <= 0.05


def test_lloyd_seats_unused_codewords(tmp_path):
  """All but one codeword far away: zero vectors and wasted codewords must not remain."""
  start = np.full((_HEADS, _SIZE, _DIM), 1e3, np.float32)
  start[:, 0] = 0
  ours = phases(clustered(), tmp_path, tolerance=0.0).lloyd("lloyd", start)
  assert ours.alive[0] == pytest.approx(1 / _SIZE)
  assert ours.alive[-1] == 1
  assert (np.abs(ours.codewords) < 100).all()


def test_lloyd_keeps_unused_codewords_where_there_is_no_seat(tmp_path):
  """Two distinct keys, twelve codewords: every distance is zero, and nothing moves."""
  keys = np.repeat(clustered(tokens=2), 20, axis=1)
  start = np.concatenate([keys[:, :1], keys[:, -1:], clustered(5)[:, : _SIZE - 2]], axis=1)
  ours = phases(keys, tmp_path, tolerance=0.0).lloyd("lloyd", start)
  np.testing.assert_allclose(ours.losses[-1], 0, atol=1e-10)
  np.testing.assert_array_equal(ours.codewords[:, 2:], start[:, 2:])


def test_blocks_of_a_pass_add_up(tmp_path, monkeypatch):
  """Streams of 256 tokens, the last one short, equal one of all."""
  keys = clustered()
  whole = phases(keys, tmp_path / "a", lloyd_steps=2, tolerance=0.0)
  seeds = whole.seed()
  expected = whole.lloyd("lloyd", seeds)
  monkeypatch.setattr("train_codebooks.fit._STREAM", 256)
  ours = phases(keys, tmp_path / "b", lloyd_steps=2, tolerance=0.0).lloyd("lloyd", seeds)
  np.testing.assert_allclose(ours.codewords, expected.codewords, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(ours.losses, expected.losses, rtol=1e-5)


def test_adam_lowers_the_loss(tmp_path):
  run = phases(clustered(), tmp_path, steps=60, batch=256, learning_rate=0.05)
  seeds = run.seed()
  codewords, losses = run.adam(seeds)
  assert losses.shape == (_HEADS, 60)
  assert (inertia(clustered(), codewords) < 0.95 * inertia(clustered(), seeds)).all()


def test_adam_reseats_dead_codewords(tmp_path):
  """Started far off, one step at a time: they come back to keys, with fresh moments."""
  keys, heads = clustered(), Heads.over(_HEADS, jax.local_devices()[:1])
  start = keys[:, :_SIZE].copy()
  start[:, 3:5] = 1e3
  moments = jax.tree.map(np.asarray, kmeans.adam(0.01, 200).init(start))
  state = heads.put_tree(AdamState(start, moments, np.ones((_HEADS, _SIZE), np.float32)))
  batches = heads.put(np.broadcast_to(keys, (90, *keys.shape)).copy(), axis=1)
  state, _ = kmeans.adam_steps(
    heads, state, heads.put_tree(identity()), batches, rate=0.01, steps=200
  )
  assert (np.abs(heads.get(state.codewords)) < 100).all()
  assert (heads.get(state.usage) > 0.02).all()


def test_a_reseated_codeword_has_fresh_moments():
  keys, heads = clustered(), Heads.over(_HEADS, jax.local_devices()[:1])
  start, usage = keys[:, :_SIZE].copy(), np.ones((_HEADS, _SIZE), np.float32)
  usage[:, 3:5] = 0
  start[:, 3:5] = keys[:, -2:] + 40
  blank = jax.tree.map(np.asarray, kmeans.adam(0.01, 9).init(start))
  moments = jax.tree.map(lambda m: m + np.ones_like(m) if m.ndim else m, blank)
  state = heads.put_tree(AdamState(start, moments, usage))
  state, _ = kmeans.adam_steps(
    heads, state, heads.put_tree(identity()), heads.put(keys[None], axis=1), rate=0.01, steps=9
  )
  for leaf in jax.tree.leaves(heads.get_tree(state.moments)):
    if leaf.ndim:
      assert not leaf[:, 3:5].any()
      assert (leaf[:, :3] != 0).all()
  np.testing.assert_array_equal(heads.get(state.usage)[:, 3:5], 1)
  moved = heads.get(state.codewords)[:, 3:5]
  assert all(tuple(c) in {tuple(k) for k in keys[m]} for m in range(_HEADS) for c in moved[m])


def test_minibatches_visit_every_token_once_an_epoch():
  rows = np.concatenate([rows_of(0, step, 100, 30) for step in range(10)])
  np.testing.assert_array_equal(np.bincount(rows, minlength=100), 3)
  np.testing.assert_array_equal(rows_of(0, 7, 100, 30), rows_of(0, 7, 100, 30))
  assert not np.array_equal(rows_of(0, 7, 100, 30), rows_of(1, 7, 100, 30))
  assert len(rows_of(0, 1, 100, 100)) == 100


def collected_of(keys) -> Collected:
  wide = keys.astype(np.float64)
  square = wide.swapaxes(1, 2) @ wide
  return Collected(
    keys=keys.reshape(1, *keys.shape),
    query_square=square[None],
    query_sum=wide.sum(axis=1)[None],
    key_square=square[None],
    key_sum=wide.sum(axis=1)[None],
    group=1,
  )


def test_space_is_centred_and_of_unit_variance():
  draw = np.random.default_rng(0)
  keys = clustered() + 50
  whitener = np.tril(draw.normal(size=(_HEADS, _DIM, _DIM))).astype(np.float32)
  space = space_of(collected_of(keys), whitener)
  y = np.einsum("mnd,mde->mne", keys - space.mean[:, None], space.whitener)
  np.testing.assert_allclose(y.mean(axis=1), 0, atol=1e-3)
  np.testing.assert_allclose(y.var(axis=1).mean(axis=-1), 1, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_never_above_lloyd_alone(tmp_path, seed, steps):
  """Per head, with a learning rate that ruins the optimiser phase as with a good one."""
  keys = clustered(seed)
  rate = 10.0 if seed % 2 else 0.05
  options = dataclasses.replace(
    OPTIONS, codewords=_SIZE, steps=steps, lloyd_steps=2, learning_rate=rate, seed=seed
  )
  collected = collected_of(keys)
  eye = np.broadcast_to(np.eye(_DIM, dtype=np.float32), (_HEADS, _DIM, _DIM)).copy()
  space = space_of(collected, eye)
  devices = jax.local_devices()[:1]
  ours = fit(collected, space, options, tmp_path / "a", devices=devices, save_seconds=1e9)
  alone: Polished = fit(
    collected,
    space,
    dataclasses.replace(options, steps=0),
    tmp_path / "b",
    devices=devices,
    save_seconds=1e9,
  ).lloyd
  assert (ours.loss <= alone.losses[-1] * (1 + 1e-12)).all()
  y = np.einsum("mnd,mde->mne", keys - space.mean[:, None], space.whitener)
  np.testing.assert_allclose(inertia(y, ours.codewords), ours.loss, rtol=1e-4)
  if steps and rate > 1:
    assert ours.fallback, "a ruined head must fall back"


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_any_number_of_devices_gives_the_same(tmp_path, devices):
  """Five heads, so that most counts need padding."""
  keys = clustered(heads=5)
  results = []
  for count in (1, devices):
    run = phases(keys, tmp_path / str(count), devices=count, steps=8, lloyd_steps=2)
    seeds = run.seed()
    codewords, losses = run.adam(seeds)
    polished = run.lloyd("lloyd", codewords)
    results.append((seeds, losses, polished.codewords, polished.losses, polished.counts))
  for one, many in zip(*results):
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


def test_checkpoints_go_from_mesh_to_mesh(tmp_path):
  """Each piece of a run on another number of devices than wrote the checkpoint it goes on from."""
  keys, sizes = clustered(heads=5), {"steps": 12, "lloyd_steps": 3}

  def piece(directory, devices, until):
    """Both phases, or up to a checkpoint of one of them."""
    seen = []

    def stop(phase, step, total, **figures):
      if (phase, step) == until:
        raise KeyboardInterrupt
      seen.append((phase, step))

    run = phases(keys, directory, devices, **sizes)
    run.progress, run.save_seconds = stop, 0.0
    codewords, losses = run.adam(seeds)
    return seen, losses, run.lloyd("lloyd", codewords)

  seeds = phases(keys, tmp_path / "seeds", **sizes).seed()
  _, losses, want = piece(tmp_path / "whole", 1, None)
  for devices, until in ((8, ("adam", 4)), (1, ("adam", 8)), (4, ("lloyd", 2))):
    with pytest.raises(KeyboardInterrupt):
      piece(tmp_path / "pieces", devices, until)
  seen, resumed, got = piece(tmp_path / "pieces", 2, None)
  assert seen[:2] == [("adam", 12), ("lloyd", 2)]  # nothing was done again
  np.testing.assert_allclose(resumed, losses, rtol=1e-4)
  np.testing.assert_allclose(got.codewords, want.codewords, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got.losses, want.losses, rtol=1e-4)


def test_heads_are_spread_over_the_devices():
  heads = Heads.over(5, jax.local_devices())
  x = heads.put(np.arange(10.0, dtype=np.float32).reshape(5, 2))
  assert len(x.sharding.device_set) == 5
  np.testing.assert_array_equal(heads.get(x), np.arange(10.0).reshape(5, 2))


def test_several_heads_at_a_time(tmp_path, monkeypatch):
  """As on an accelerator; the shapes are used nowhere else, so nothing compiled before is met."""
  monkeypatch.setattr(Heads, "at_once", lambda self, size: 2)
  keys = clustered(heads=5, dim=7, tokens=611)
  run = phases(keys, tmp_path, steps=8, lloyd_steps=2, batch=611)
  seeds = run.seed()
  codewords, losses = run.adam(seeds)
  np.testing.assert_allclose(losses[:, 0], inertia(keys, seeds), rtol=1e-4)
  ours = run.lloyd("lloyd", codewords)
  np.testing.assert_allclose(ours.losses[0], inertia(keys, codewords), rtol=1e-4)
  np.testing.assert_allclose(ours.losses[-1], inertia(keys, ours.codewords), rtol=1e-4)
