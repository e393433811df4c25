r"""The metric of a codebook: from the queries' second moment to a whitener.

A far query at distance d is :math:`q R_d`, so its second moment is
:math:`H_d = E[(q R_d)^\top (q R_d)] = R_d^\top M R_d` with :math:`M = E[q^\top q]` before rotary
embedding: one accumulated matrix gives the metric of every distance, exactly. A rope's attention
factor multiplies H by a constant, which no choice of codewords depends on.

H is nearly rank one in real models. All of this runs in float64, where M is positive up to
rounding, and what is still not positive is repaired and noted.
"""

import dataclasses
from typing import Literal

import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Float

_EPSILON = 1e-6  # published: added to the diagonal after normalisation
_FLOOR = 1e-9  # smallest eigenvalue kept, relative to the largest, where Cholesky fails


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """How keys are compared while a codebook is trained, and later when they are encoded.

  Attributes:
    kind: ``query`` weighs differences as queries see them (A2ATS, Eq. 10-15), ``plain`` is the
      Euclidean distance; the other fields then count for nothing.
    distances: H is the mean over these distances in tokens; 2048 alone as published.
    shrinkage: this times ``tr(H)/D`` is added to the diagonal; 0 as published.
    centred: use the queries' covariance in place of their second moment.
    power: H to this power, in (0, 1]; below 1 flattens the spectrum. 1 as published.
  """

  kind: Literal["query", "plain"] = "query"
  distances: tuple[int, ...] = (2048,)
  shrinkage: float = 0.0
  centred: bool = False
  power: float = 1.0

  def __post_init__(self):
    if self.kind not in ("query", "plain"):
      raise UserError(f"metric: kind is 'query' or 'plain', got {self.kind!r}")
    if not self.distances or min(self.distances) < 0:
      raise UserError(f"metric: expected distances of 0 or more, got {self.distances}")
    if not 0 <= self.shrinkage < float("inf"):
      raise UserError(f"metric: shrinkage must be 0 or more, got {self.shrinkage}")
    if not 0 < self.power <= 1:
      raise UserError(f"metric: power must lie in (0, 1], got {self.power}")


def log_spaced(first: int = 64, last: int = 4096, count: int = 7) -> tuple[int, ...]:
  """Distances to average H over, each about the same factor beyond the one before."""
  if not 1 <= first <= last or count < 1:
    raise UserError(f"metric: cannot space {count} distances from {first} to {last}")
  return tuple(dict.fromkeys(int(d) for d in np.round(np.geomspace(first, last, count))))


def rotation(distance: int, inv_freq: Float[np.ndarray, "D_half"]) -> Float[np.ndarray, "D D"]:
  """``R_d`` as a matrix for row vectors, ``x R_d``, in float64 and without attention factor."""
  angle = float(distance) * np.asarray(inv_freq, np.float64)
  cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
  return np.block([[cos, sin], [-sin, cos]])


def query_moment(
  metric: Metric,
  square: Float[np.ndarray, "D D"],
  total: Float[np.ndarray, "D"],
  count: int,
  inv_freq: Float[np.ndarray, "D_half"],
) -> Float[np.ndarray, "D D"]:
  """H of one KV head before normalisation: the mean over the metric's distances.

  Args:
    square, total: sums of ``q^T q`` and of ``q`` over the group's queries before rotary embedding.
    count: how many queries they sum.
  """
  moment = square / count
  if metric.centred:
    mean = total / count
    moment = moment - np.outer(mean, mean)
  turned = [r.T @ moment @ r for r in (rotation(d, inv_freq) for d in metric.distances)]
  return np.mean(turned, axis=0)


def factor(
  metric: Metric, moment: Float[np.ndarray, "D D"]
) -> tuple[Float[np.ndarray, "D D"], bool]:
  """Lower triangular L with ``L L^T`` the conditioned H; and whether H had to be repaired.

  H is divided by the root mean square of its entries (published), raised to the metric's power,
  shrunk, and given 1e-6 on the diagonal (published). Where that is not positive definite its
  eigenvalues are floored; this never fails on finite input.

  Raises:
    UserError: H holds non-finite numbers.
  """
  dim = len(moment)
  if not np.isfinite(moment).all():
    raise UserError("metric: the model's queries hold non-finite numbers")
  h = (moment + moment.T) / 2
  h = h / (float(np.max(np.abs(h))) or 1.0)  # first: squares of tiny or huge entries lose them
  h = h / (float(np.sqrt(np.mean(np.square(h)))) or 1.0)
  if metric.power != 1:
    values, vectors = np.linalg.eigh(h)
    h = (vectors * np.maximum(values, 0.0) ** metric.power) @ vectors.T
  h = h + (metric.shrinkage * np.trace(h) / dim + _EPSILON) * np.eye(dim)
  try:
    return np.linalg.cholesky(h), False
  except np.linalg.LinAlgError:
    values, vectors = np.linalg.eigh(h)
    values = np.maximum(values, _FLOOR * max(float(values[-1]), _EPSILON))
    upper = np.linalg.qr((vectors * np.sqrt(values)).T, mode="r")
    return (upper * np.where(np.diag(upper) < 0, -1.0, 1.0)[:, None]).T, True


def whiteners(
  metric: Metric,
  square: Float[np.ndarray, "heads D D"],
  total: Float[np.ndarray, "heads D"],
  count: int,
  inv_freq: Float[np.ndarray, "D_half"],
) -> tuple[Float[np.ndarray, "heads D D"], list[int]]:
  """The whitener L of every head, rounded to float32, and the heads whose H was repaired.

  Args:
    square, total, count: as in :func:`query_moment`, for all heads.
  """
  out, repaired = np.empty(square.shape, np.float32), []
  for head in range(len(square)):
    if metric.kind == "plain":
      out[head] = np.eye(square.shape[-1], dtype=np.float32)
      continue
    moment = query_moment(metric, square[head], total[head], count, inv_freq)
    lower, was_repaired = factor(metric, moment)
    out[head] = lower
    if was_repaired:
      repaired.append(head)
  return out, repaired
