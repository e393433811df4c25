"""Budgets by layer: what each layer keeps so that all carry the same share of attention.

A profile of a model is one curve a layer: how much of the layer's attention its best tokens carry
(PrefixKV, 2412.03409). Any method that evicts can take its layers' shares of a budget from it.
"""

import json
from pathlib import Path

import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.files import write_atomically
from a2ats_jax.typing import Float, Int

POINTS = 200  # steps of a profile's curves, from no token to all

Curves = tuple[tuple[float, ...], ...]


def curves_of(sums: Float[np.ndarray, "L H T"]) -> Curves:
  """How much of each layer's attention its best tokens carry, for one prompt.

  Args:
    sums: attention that each of the prompt's tokens received, without padding.

  Returns:
    Of every layer ``POINTS + 1`` numbers: the share carried by the best 0, 1, ... of POINTS parts
    of the tokens. Average over prompts what is to serve many.
  """
  importance = np.sort(sums.astype(np.float64).mean(axis=1), axis=-1)[:, ::-1]
  carried = np.concatenate([np.zeros((len(sums), 1)), np.cumsum(importance, axis=-1)], axis=-1)
  carried /= carried[:, -1:]
  places = np.linspace(0, 1, sums.shape[2] + 1)
  grid = np.linspace(0, 1, POINTS + 1)
  return tuple(tuple(np.interp(grid, places, row).tolist()) for row in carried)


def shares_of(curves: Curves, ratio: float) -> tuple[float, ...]:
  """What each layer keeps, relative to the mean, so that all carry the same share of attention.

  One threshold for all layers, found by halving: each keeps its smallest prefix of tokens that
  carries at least that share, and all together keep ``ratio`` of the tokens.

  Args:
    ratio: of the tokens kept over all layers, above 0.
  """
  grid = np.linspace(0, 1, POINTS + 1)
  table = np.asarray(curves)

  def fractions(threshold: float) -> np.ndarray:
    return np.array([np.interp(threshold, row, grid) for row in table])

  low, high = 0.0, 1.0
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if fractions(middle).mean() < ratio else (low, middle)
  kept_of = fractions(high)
  return tuple((kept_of / kept_of.mean()).tolist())


def save_profile(path: Path, curves: Curves) -> None:
  """Write a profile as JSON: ``{"curves": [[...], ...]}``, one list a layer."""
  write_atomically(path, json.dumps({"curves": curves}))


def load_profile(text: str) -> Curves:
  """A profile from a file, or none for the word ``uniform``.

  Raises:
    UserError: no such file, or it holds no curves that rise from 0 to 1.
  """
  if text == "uniform":
    return ()
  try:
    read = json.loads(Path(text).read_text())["curves"]
    table = np.asarray(read, np.float64)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"profile: expected uniform or a profile's JSON file, got {text!r}") from error
  rising = table.ndim == 2 and table.shape[1] == POINTS + 1 and np.all(np.diff(table) >= 0)
  if not rising or np.any(table[:, 0] != 0) or not np.allclose(table[:, -1], 1):
    raise UserError(
      f"profile: {text}: expected curves of {POINTS + 1} points from 0 to 1, one a layer"
    )
  return tuple(tuple(row) for row in table.tolist())


def granted(
  budget: Budget, longest: int, layers: int, profile: Curves = ()
) -> Int[np.ndarray, "L lengths"]:
  """Tokens that a KV head of each layer may keep, at every context length 0 .. ``longest``.

  Args:
    budget: of a KV head, averaged over layers. No layer is granted more than the context.
    profile: curves of :func:`curves_of`; without one all layers are granted the same.

  Raises:
    UserError: the profile is of another number of layers.
  """
  tokens, shares = budget.resolve(longest).astype(np.float64), np.ones(layers)
  if profile:
    if len(profile) != layers:
      raise UserError(f"profile: expected curves of {layers} layers, got {len(profile)}")
    ratio = float(tokens[-1]) / max(longest, 1)
    shares = np.asarray(shares_of(profile, ratio)) if ratio > 0 else shares
  table = np.rint(tokens[None] * shares[:, None])
  return np.minimum(table, np.arange(longest + 1)).astype(np.int32)
