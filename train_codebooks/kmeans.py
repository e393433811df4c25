"""k-means of many heads at once, each step a jitted function, sharded over devices by head.

Everything here lives in the normalised space of one head: keys come in as they were stored and go
through ``y = (key - mean) @ whitener``, after which Euclidean distance is the metric and the
coordinates have unit variance on average.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from a2ats_jax.typing import Array, Bool, Float, Int
from train_codebooks.heads import Heads

BLOCK = 512  # tokens whose distances to all codewords exist at once
WORST = 16  # badly served keys a step keeps as seats for unused codewords
_ROUNDS = 128  # at most, of seeding: codewords of one round are drawn together
_DECAY, _DEAD = 0.95, 0.02  # of the usage average; and the share of the mean usage that is too low
_TINY = 1e-30  # a squared distance that still has a logarithm
_HIGHEST = jax.lax.Precision.HIGHEST

Leaf = Any  # an array on the device or the host, or what stands for one in a tree of shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Space:
  """Where each head's keys are compared.

  Attributes:
    mean: of the keys, ``[M, D]`` for M heads of all layers.
    whitener: from a key less the mean to normalised coordinates, ``[M, D, D]``.
  """

  mean: Leaf
  whitener: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamState:
  """The optimiser phase between two steps.

  Attributes:
    codewords: ``[M, C, D]``.
    moments: optax's state.
    usage: running average of how often each codeword is nearest, 1 for the average codeword,
      ``[M, C]``.
  """

  codewords: Leaf
  moments: Any
  usage: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
  """What a Lloyd pass has seen so far.

  Attributes:
    sums, counts: of the keys nearest to each codeword, ``[M, C, D]`` and ``[M, C]``.
    worst, distance: the keys furthest from their codeword, and their squared distances,
      ``[M, 16, D]`` and ``[M, 16]``.
  """

  sums: Leaf
  counts: Leaf
  worst: Leaf
  distance: Leaf


def normalise(
  keys: Array, mean: Float[Array, "D"], whitener: Float[Array, "D D"]
) -> Float[Array, "n D"]:
  """Stored keys of one head to coordinates."""
  return jnp.matmul(keys.astype(jnp.float32) - mean[None], whitener, precision=_HIGHEST)


def nearest(y: Float[Array, "n D"], codewords: Float[Array, "C D"]) -> Int[Array, "n"]:
  """Index of the nearest codeword of every row, in blocks; ties to the lowest.

  A row maximum and a comparison are two fast passes over a block; XLA's own argmax on a CPU takes
  three times as long.
  """
  n, dim = y.shape
  size = len(codewords)
  offset = 0.5 * jnp.sum(jnp.square(codewords), axis=-1)[None]

  def block(rows):
    score = jnp.matmul(rows, codewords.T, precision=_HIGHEST) - offset
    best = jnp.max(score, axis=-1, keepdims=True)
    column = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    return jnp.min(jnp.where(score == best, column, size - 1), axis=-1)

  if n <= BLOCK:
    return block(y)
  pad = -n % BLOCK
  blocks = jnp.pad(y, ((0, pad), (0, 0))).reshape(-1, BLOCK, dim)
  return jax.lax.map(block, blocks).reshape(-1)[:n]


def _squared(x: Float[Array, "n D"]) -> Float[Array, "n"]:
  return jnp.sum(jnp.square(x), axis=-1)


@partial(jax.jit, static_argnames=("heads", "codewords", "by_distance"))
def seed_codewords(
  heads: Heads, space: Space, keys: Array, key: Array, *, codewords: int, by_distance: bool
) -> Float[Array, "M C D"]:
  """First codewords: distinct keys, drawn by squared distance (k-means++) or evenly.

  By distance they are drawn in up to 128 rounds, those of one round together and without
  replacement, each key with a weight of its squared distance to the codewords of earlier rounds.
  Up to 128 codewords that is k-means++ itself; beyond, it trades exactness within a round for a
  number of rounds that does not grow.

  Args:
    keys: stored keys to draw from, ``[M, n, D]`` with n at least C.
    key: of the random draws; every head folds in its number.
  """
  per = -(-codewords // _ROUNDS) if by_distance else codewords
  rounds = codewords // per + (codewords % per > 0)

  def head(mean, whitener, keys, number, key):
    y = normalise(keys, mean, whitener)
    key = jax.random.fold_in(key, number)

    def draw(index, carry):
      distance, taken, chosen = carry
      noise = jax.random.gumbel(jax.random.fold_in(key, index), distance.shape)
      # taken keys come last, also where every other distance is zero
      weight = jnp.where(taken, -jnp.inf, jnp.log(jnp.maximum(distance, _TINY)))
      _, rows = jax.lax.top_k(weight + noise, per)
      new = y[rows]
      cross = jnp.matmul(y, new.T, precision=_HIGHEST)
      to_new = _squared(y)[:, None] - 2 * cross + _squared(new)[None]
      nearer = jnp.maximum(jnp.min(to_new, axis=-1), 0.0)
      distance = jnp.where(index == 0, nearer, jnp.minimum(distance, nearer))
      chosen = jax.lax.dynamic_update_slice_in_dim(chosen, new, index * per, 0)
      return distance, taken.at[rows].set(True), chosen

    room = jnp.zeros_like(y, shape=(rounds * per, y.shape[1]))
    start = (jnp.ones_like(y[:, 0]), jnp.zeros_like(y[:, 0], bool), room)
    return jax.lax.fori_loop(0, rounds, draw, start)[2][:codewords]

  def run(space, keys, numbers, key):
    return jax.lax.map(
      lambda a: head(a[0], a[1], a[2], a[3], key), (space.mean, space.whitener, keys, numbers)
    )

  numbers = jnp.arange(heads.padded, dtype=jnp.int32)
  return heads.run(run, (space, keys, numbers, key), (0, 0, 0, None))


def adam(rate: float, steps: int) -> optax.GradientTransformation:
  """Adam with a cosine decay to zero over all steps."""
  return optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1)), b1=0.9, b2=0.95)


@partial(jax.jit, static_argnames=("heads", "rate", "steps"), donate_argnames="state")
def adam_steps(
  heads: Heads, state: AdamState, space: Space, batches: Array, *, rate: float, steps: int
) -> tuple[AdamState, Float[Array, "M n_steps"]]:
  """Some optimiser steps: the new state, and each step's loss before its update.

  A step minimises the mean squared distance of a minibatch to the nearest codewords. Codewords
  whose average usage has sunk below 2% of the mean are moved, at most 16 a step and head, to the
  keys of the minibatch that are served worst, with fresh moments.

  Args:
    batches: stored keys, a minibatch for each step, ``[n_steps, M, n, D]``.
    rate, steps: of the whole phase, see :func:`adam`.
  """
  optimiser, codewords = adam(rate, steps), state.codewords.shape[1]

  def head(codewords, mean, whitener, keys):
    y = normalise(keys, mean, whitener)
    index = nearest(y, codewords)

    def objective(c):
      distance = _squared(y - c[index])
      return jnp.mean(distance), distance

    (loss, distance), gradient = jax.value_and_grad(objective, has_aux=True)(codewords)
    counts = jnp.zeros(len(codewords)).at[index].add(1.0)
    _, rows = jax.lax.top_k(distance, min(WORST, len(y), len(codewords)))
    return gradient, loss, counts * (len(codewords) / len(y)), y[rows]

  def reseat(codewords, usage, worst):
    low, rows = jax.lax.top_k(-usage, len(worst))
    dead = -low < _DEAD
    fresh = jnp.where(dead[:, None], worst, codewords[rows])
    usage = usage.at[rows].set(jnp.where(dead, 1.0, usage[rows]))
    kept = jnp.ones_like(usage).at[rows].set(jnp.where(dead, 0.0, 1.0))
    return codewords.at[rows].set(fresh), usage, kept

  def run(state, space, batches):
    def step(state, keys):
      gradient, loss, counts, worst = jax.lax.map(
        lambda a: head(*a),
        (state.codewords, space.mean, space.whitener, keys),
        batch_size=heads.at_once(4 * BLOCK * codewords),
      )
      with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        updates, moments = optimiser.update(gradient, state.moments)
      moved = state.codewords + updates
      usage = _DECAY * state.usage + (1 - _DECAY) * counts
      moved, usage, kept = jax.vmap(reseat)(moved, usage, worst)
      moments = jax.tree.map(lambda m: m * kept[..., None] if m.ndim == 3 else m, moments)
      return AdamState(moved, moments, usage), loss

    state, losses = jax.lax.scan(step, state, batches)
    return state, losses.T

  return heads.run(run, (state, space, batches), (0, 0, 1))


def empty_pass(heads: Heads, codewords: int, dim: int) -> Pass:
  """A pass that has seen nothing."""
  m = heads.count
  return heads.put_tree(
    Pass(
      np.zeros((m, codewords, dim), np.float32),
      np.zeros((m, codewords), np.float32),
      np.zeros((m, WORST, dim), np.float32),
      np.zeros((m, WORST), np.float32),
    )
  )


@partial(jax.jit, static_argnames="heads", donate_argnames="seen")
def lloyd_block(
  heads: Heads,
  seen: Pass,
  codewords: Float[Array, "M C D"],
  space: Space,
  keys: Array,
  valid: Bool[Array, "n"],
) -> tuple[Pass, Float[Array, "M"]]:
  """Assign a block of keys and add it to a pass; also the block's sum of squared distances.

  Args:
    keys: stored keys, ``[M, n, D]``; those that are not ``valid`` are padding.
  """

  def head(seen, codewords, mean, whitener, keys, valid):
    y = normalise(keys, mean, whitener)
    index = nearest(y, codewords)
    weight = valid.astype(jnp.float32)
    distance = _squared(y - codewords[index]) * weight
    far = jnp.concatenate([seen.distance, distance])
    far, rows = jax.lax.top_k(far, WORST)
    return Pass(
      seen.sums.at[index].add(y * weight[:, None]),
      seen.counts.at[index].add(weight),
      jnp.concatenate([seen.worst, y])[rows],
      far,
    ), jnp.sum(distance)

  def run(seen, codewords, space, keys, valid):
    return jax.lax.map(
      lambda a: head(a[0], a[1], a[2], a[3], a[4], valid),
      (seen, codewords, space.mean, space.whitener, keys),
      batch_size=heads.at_once(4 * BLOCK * codewords.shape[1]),
    )

  return heads.run(run, (seen, codewords, space, keys, valid), (0, 0, 0, 0, None))


@partial(jax.jit, static_argnames="heads")
def lloyd_update(
  heads: Heads, seen: Pass, codewords: Float[Array, "M C D"]
) -> Float[Array, "M C D"]:
  """The centroids of what each codeword serves.

  Codewords that serve no key take the seats of the worst served keys, at most 16 a head, and stay
  where they are beyond that; either way the distortion cannot rise.
  """

  def head(seen, codewords):
    used: Bool[Array, "C"] = seen.counts > 0
    centre = seen.sums / jnp.maximum(seen.counts, 1.0)[:, None]
    moved = jnp.where(used[:, None], centre, codewords)
    seat = jnp.cumsum(~used) - 1
    seated = ~used & (seat < len(seen.worst))
    seated &= seen.distance[jnp.minimum(seat, len(seen.worst) - 1)] > 0
    return jnp.where(seated[:, None], seen.worst[jnp.clip(seat, 0, len(seen.worst) - 1)], moved)

  return heads.run(jax.vmap(head), (seen, codewords), (0, 0))
