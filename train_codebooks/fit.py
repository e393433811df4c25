"""From collected keys to codewords: seeds, an optax loop, Lloyd, each resumable.

Every phase draws its randomness from the seed and the step number alone, and every state goes
through orbax, so a run that was cut off anywhere ends in the same codewords as an unbroken one.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.typing import Float
from train_codebooks import kmeans
from train_codebooks.checkpoints import checkpoints
from train_codebooks.collect import Collected
from train_codebooks.kmeans import AdamState, Heads, Space
from train_codebooks.options import TrainOptions
from train_codebooks.progress import Progress, silent

_SCAN = 4  # optimiser steps of one compiled call
_STREAM = 4096  # tokens of every head on the device at once in a Lloyd pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polished:
  """What Lloyd ended with, for all M heads.

  Attributes:
    codewords: in normalised space, ``[M, C, D]``.
    counts: keys that each serves, ``[M, C]``.
    losses: of every pass, ``[passes, M]``: mean squared distance over the keys' variance. The last
      one is the loss of ``codewords``.
    alive: fraction of codewords that serve a key, of every pass.
  """

  codewords: Float[np.ndarray, "M C D"]
  counts: Float[np.ndarray, "M C"]
  losses: Float[np.ndarray, "passes M"]
  alive: Float[np.ndarray, "passes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
  """The result of :func:`fit`.

  Attributes:
    codewords: in normalised space, ``[M, C, D]``.
    counts: calibration keys that each serves, ``[M, C]``.
    loss: of each head.
    adam: loss of each head before each optimiser step, ``[M, steps]``.
    lloyd: passes after the optimiser.
    plain: passes of Lloyd alone, where the guard was on and the optimiser ran.
    fallback: heads for which Lloyd alone was better, and kept.
  """

  codewords: Float[np.ndarray, "M C D"]
  counts: Float[np.ndarray, "M C"]
  loss: Float[np.ndarray, "M"]
  adam: Float[np.ndarray, "M steps"]
  lloyd: Polished
  plain: Polished | None
  fallback: tuple[int, ...]


def space_of(collected: Collected, whitener: Float[np.ndarray, "M D D"]) -> Space:
  """The normalised space of each head: centred, whitened, unit variance per coordinate on average.

  Centring keeps float32 distances exact where keys share a large offset; the scale makes one
  learning rate fit all heads. Neither changes which codeword is nearest.
  """
  dim = whitener.shape[-1]
  mean = collected.key_sum.reshape(-1, dim) / collected.tokens
  square = collected.key_square.reshape(-1, dim, dim) / collected.tokens
  wide = whitener.astype(np.float64)
  energy = np.einsum("mij,mik,mkj->m", wide, square, wide)
  offset = np.sum(np.square(np.einsum("mi,mij->mj", mean, wide)), axis=-1)
  variance = energy - offset
  # keys that are all the same have no scale of their own
  scale = np.where(variance > 1e-9 * energy, np.sqrt(np.maximum(variance, 0) / dim), 1.0)
  return Space(mean.astype(np.float32), (wide / scale[:, None, None]).astype(np.float32))


def rows_of(seed: int, step: int, tokens: int, batch: int) -> np.ndarray:
  """The tokens of a step's minibatch: an endless walk over fresh permutations, epoch by epoch."""
  picked, start = [], step * batch
  while sum(map(len, picked)) < batch:
    epoch, offset = divmod(start, tokens)
    order = np.random.default_rng([seed, epoch]).permutation(tokens)
    picked.append(order[offset : offset + batch - sum(map(len, picked))])
    start += len(picked[-1])
  return np.sort(np.concatenate(picked))


def _take(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Some tokens of all heads; as integers, which NumPy copies faster than bfloat16."""
  return np.take(keys.view(np.uint16), rows, axis=1).view(keys.dtype)


class _Fit:
  """What the phases share."""

  def __init__(
    self,
    keys: np.ndarray,
    space: Space,
    options: TrainOptions,
    directory: Path,
    progress: Progress,
    save_seconds: float,
    devices: Sequence[jax.Device] | None,
  ):
    self.keys, self.options, self.directory = keys, options, directory
    self.progress, self.save_seconds = progress, save_seconds
    self.heads = Heads.over(len(keys), devices)
    self.space = self.heads.put_tree(space)

  def seed(self) -> np.ndarray:
    """The first codewords, drawn from a sample of the tokens."""
    o, tokens = self.options, self.keys.shape[1]
    self.progress("seed", 0, 1)
    count = min(tokens, max(8192, 4 * o.codewords))
    rows = np.sort(np.random.default_rng([o.seed]).permutation(tokens)[:count])
    codewords = kmeans.seed_codewords(
      self.heads,
      self.space,
      self.heads.put(_take(self.keys, rows)),
      jax.random.key(o.seed),
      codewords=o.codewords,
      by_distance=o.seeding == "kmeans++",
    )
    self.progress("seed", 1, 1)
    return self.heads.get(codewords)

  def adam(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codewords and losses ``[M, steps]`` of the optimiser phase."""
    o, (m, tokens, dim) = self.options, self.keys.shape
    moments = kmeans.adam(o.learning_rate, o.steps).init(seeds)
    usage = np.ones(seeds.shape[:2], np.float32)
    fresh = AdamState(seeds, jax.tree.map(np.asarray, moments), usage)
    losses = np.zeros((m, o.steps), np.float32)
    batch = min(o.batch, tokens)

    def load(step):
      rows = [rows_of(o.seed, s, tokens, batch) for s in range(step, min(step + _SCAN, o.steps))]
      return self.heads.put(np.stack([_take(self.keys, r) for r in rows]), axis=1)

    with checkpoints(self.directory / "adam") as store:
      step, kept = store.restore({"state": fresh, "losses": losses})
      state, losses = self.heads.put_tree(kept["state"]), kept["losses"]
      if step:
        self.progress("adam", step, o.steps, loss=float(losses[:, step - 1].mean()))
      saved = time.monotonic()
      batches = load(step) if step < o.steps else None
      while step < o.steps:
        state, loss = kmeans.adam_steps(
          self.heads, state, self.space, batches, rate=o.learning_rate, steps=o.steps
        )
        end = min(step + _SCAN, o.steps)
        batches = load(end) if end < o.steps else None  # while the device works
        losses[:, step:end] = self.heads.get(loss) / dim
        step = end
        if step == o.steps or time.monotonic() - saved >= self.save_seconds:
          store.save(step, {"state": self.heads.get_tree(state), "losses": losses})
          saved = time.monotonic()
        self.progress("adam", step, o.steps, loss=float(losses[:, step - 1].mean()))
      return self.heads.get(state.codewords), losses

  def lloyd(self, phase: str, start: np.ndarray) -> Polished:
    """Full passes until the gain is below the tolerance, or the steps are spent."""
    o, (m, tokens, dim) = self.options, self.keys.shape
    fresh = {
      "codewords": start,
      "counts": np.zeros(start.shape[:2], np.float32),
      "losses": np.zeros((o.lloyd_steps + 1, m)),
      "alive": np.zeros(o.lloyd_steps + 1),
      "finished": np.zeros((), np.int32),
    }
    with checkpoints(self.directory / phase) as store:
      step, kept = store.restore(fresh)
      losses, alive = kept["losses"], kept["alive"]
      finished, counts = bool(kept["finished"]), kept["counts"]
      if step:
        self._tell(phase, step, losses, alive)
      codewords, saved = self.heads.put(kept["codewords"]), time.monotonic()
      while not finished:
        seen, distance = self._pass(codewords)
        counts = self.heads.get(seen.counts)
        losses[step], alive[step] = distance / (tokens * dim), np.mean(counts > 0)
        now, before = losses[step].mean(), losses[max(step - 1, 0)].mean()
        finished = step == o.lloyd_steps or bool(step and before - now <= o.tolerance * before)
        step += 1
        if not finished:
          codewords = kmeans.lloyd_update(self.heads, seen, codewords)
        if finished or time.monotonic() - saved >= self.save_seconds:
          kept = {"losses": losses, "alive": alive, "finished": np.asarray(finished, np.int32)}
          store.save(step, kept | {"codewords": self.heads.get(codewords), "counts": counts})
          saved = time.monotonic()
        self._tell(phase, step, losses, alive)
      return Polished(
        codewords=self.heads.get(codewords), counts=counts, losses=losses[:step], alive=alive[:step]
      )

  def _tell(self, phase: str, step: int, losses: np.ndarray, alive: np.ndarray) -> None:
    total = self.options.lloyd_steps + 1
    self.progress(
      phase, step, total, loss=float(losses[step - 1].mean()), alive=float(alive[step - 1])
    )

  def _pass(self, codewords: jax.Array) -> tuple[kmeans.Pass, np.ndarray]:
    _, tokens, dim = self.keys.shape
    width = min(_STREAM, tokens)
    seen = kmeans.empty_pass(self.heads, codewords.shape[1], dim)
    sums: list[jax.Array] = []
    for start in range(0, tokens, width):
      piece = np.asarray(self.keys[:, start : start + width])
      valid = np.arange(width) < piece.shape[1]
      piece = np.pad(piece, ((0, 0), (0, width - piece.shape[1]), (0, 0)))
      seen, distance = kmeans.lloyd_block(
        self.heads, seen, codewords, self.space, self.heads.put(piece), jnp.asarray(valid)
      )
      sums.append(distance)
      if len(sums) > 1:  # no more than two blocks in flight
        sums[-2].block_until_ready()
    return seen, np.sum([self.heads.get(s) for s in sums], axis=0, dtype=np.float64)


def fit(
  collected: Collected,
  space: Space,
  options: TrainOptions,
  directory: Path,
  *,
  progress: Progress = silent,
  save_seconds: float = 20.0,
  devices: Sequence[jax.Device] | None = None,
) -> Fitted:
  """Codewords of every head in its normalised space, or take up where a call was cut off.

  Args:
    directory: takes the checkpoints. The caller sees to it that it belongs to these keys and
      options.
    save_seconds: between checkpoints; each phase also saves its end.
    devices: to cut the heads over; all local ones by default.
  """
  keys = collected.keys.reshape(-1, *collected.keys.shape[2:])
  run = _Fit(keys, space, options, directory, progress, save_seconds, devices)
  seeds = run.seed()
  start, losses = run.adam(seeds)
  lloyd, plain = run.lloyd("lloyd", start), None
  if options.guard and options.steps:
    plain = run.lloyd("plain", seeds)
  best = lloyd
  fallback: tuple[int, ...] = ()
  if plain is not None:
    worse = ~(lloyd.losses[-1] <= plain.losses[-1])  # a loss that is no number is worse too
    fallback = tuple(int(i) for i in np.flatnonzero(worse))
    pick = worse[:, None]
    best = Polished(
      codewords=np.where(pick[..., None], plain.codewords, lloyd.codewords),
      counts=np.where(pick, plain.counts, lloyd.counts),
      losses=np.where(worse, plain.losses[-1:], lloyd.losses[-1:]),
      alive=lloyd.alive[-1:],
    )
  return Fitted(
    codewords=best.codewords,
    counts=best.counts,
    loss=best.losses[-1],
    adam=losses,
    lloyd=lloyd,
    plain=plain,
    fallback=fallback,
  )
