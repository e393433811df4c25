"""Figures that compare a method with full attention, in float64 on the host."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from a2ats_jax.typing import Float, Int
from eval.decode import Figures


def log_softmax(logits: Float[np.ndarray, "N V"]) -> Float[np.ndarray, "N V"]:
  """Log-probabilities over the last axis, float64."""
  wide = logits.astype(np.float64)
  wide -= wide.max(axis=-1, keepdims=True)
  return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closeness:
  """Per token, how near a method's next-token distribution is to that of full attention.

  Attributes:
    kl: KL(full || method), nats.
    top1: whether the most likely tokens agree.
    nll: negative log-likelihood of the true next token under the method, nats.
  """

  kl: Float[np.ndarray, "N"]
  top1: Float[np.ndarray, "N"]
  nll: Float[np.ndarray, "N"]


def compare(
  full: Float[np.ndarray, "N V"], method: Float[np.ndarray, "N V"], targets: Int[np.ndarray, "N"]
) -> Closeness:
  """Closeness of one text's logits.

  Args:
    targets: the token that follows each input.
  """
  ours, theirs = log_softmax(method), log_softmax(full)
  return Closeness(
    kl=np.sum(np.exp(theirs) * (theirs - ours), axis=-1),
    top1=(full.argmax(axis=-1) == method.argmax(axis=-1)).astype(np.float64),
    nll=-np.take_along_axis(ours, targets[:, None], axis=-1)[:, 0],
  )


def nll(logits: Float[np.ndarray, "N V"], targets: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
  """Negative log-likelihood of the true next tokens, nats."""
  return -np.take_along_axis(log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def reading(stats: Figures, row: int) -> dict[str, float]:
  """What one row of a batch read, means over steps; see :func:`reading_by_step`."""
  return {name: float(np.mean(x)) for name, x in reading_by_step(stats, row).items()}


def reading_by_step(stats: Figures, row: int) -> dict[str, Float[np.ndarray, "N"]]:
  """What one row of a batch read at each step.

  Args:
    stats: fields of :class:`a2ats_jax.methods.base.Stats`, each ``[L, B, N, ...]``.

  Returns:
    ``read`` and ``selected``: fractions of the cached tokens, with and without sinks and window,
    mean over layers and KV heads. ``tail``: mean share of attention that was estimated.
    Bytes, summed over layers and KV heads: ``read_bytes`` of the cache as it is stored,
    and of whatever was looked at to choose; ``moved_bytes`` copied out of a store of pages. Empty
    for a method with other statistics.
  """
  if not {"length", "selected", "read", "tail", "read_bytes", "moved"} <= stats.keys():
    return {}
  length = np.maximum(stats["length"][:, row], 1)[..., None].astype(np.float64)

  def mean(values: np.ndarray) -> np.ndarray:
    return np.mean(values, axis=(0, 2), dtype=np.float64)

  def total(values: np.ndarray) -> np.ndarray:
    return np.sum(values, axis=(0, 2), dtype=np.float64)

  return {
    "read": mean(stats["read"][:, row] / length),
    "selected": mean(stats["selected"][:, row] / length),
    "tail": mean(stats["tail"][:, row]),
    "read_bytes": total(stats["read_bytes"][:, row]),
    "moved_bytes": total(stats["moved"][:, row]),
  }


def spread(values: Sequence[float]) -> tuple[float, float | None, float | None]:
  """Mean, standard deviation (n - 1) and standard error; the last two None for a single value."""
  n = len(values)
  mean = math.fsum(values) / n
  if n < 2:
    return mean, None, None
  deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
  return mean, deviation, deviation / math.sqrt(n)
