r"""Rotary position embedding, its scaling variants, and the windowed form of A2ATS.

A head vector of size D is rotated in D/2 planes, dimension ``j`` paired with ``j + D/2`` (the
layout of Hugging Face checkpoints). ``R_m`` is the rotation by position ``m``; rotations add up,
so the logit of a query at ``i`` and a key at ``j`` is :math:`q R_{i-j} k^\top`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """What a checkpoint says about its rotary embedding.

  Attributes:
    head_dim: D, even.
    theta: base of the geometric frequency ladder.
    scaling: how the frequencies were changed to reach longer contexts.
    factor: the stretch of ``linear``, ``llama3`` and ``yarn``.
    original_context: tokens of the unscaled training context (``llama3``, ``yarn``).
    low_freq_factor, high_freq_factor: the band edges of ``llama3``.
    beta_fast, beta_slow: the band edges of ``yarn``, in turns over the original context.
    attention_factor: ``yarn``'s multiplier of cos and sin; None means ``0.1 ln(factor) + 1``.
  """

  head_dim: int
  theta: float = 10000.0
  scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
  factor: float = 1.0
  original_context: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None

  def __post_init__(self):
    if self.head_dim < 2 or self.head_dim % 2:
      raise UserError(f"rope: head size must be even and at least 2, got {self.head_dim}")
    if not self.theta > 1:
      raise UserError(f"rope: theta must be above 1, got {self.theta}")
    if self.scaling in ("llama3", "yarn") and self.original_context < 1:
      raise UserError(f"rope: {self.scaling} scaling needs the original context length")
    if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor:
      raise UserError(
        f"rope: llama3 scaling needs its high frequency factor above the low one, got "
        f"{self.high_freq_factor} and {self.low_freq_factor}"
      )
    if not self.factor > 0:
      raise UserError(f"rope: scaling factor must be positive, got {self.factor}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
  """Frequencies ready to rotate with.

  Attributes:
    inv_freq: radians per position of each plane, ``[D/2]`` float32.
    scale: multiplier of a rotated vector (1 but for ``yarn``). A logit carries it twice.
  """

  inv_freq: Float[Array, "D_half"]
  scale: Float[Array, ""]


def make_rope(config: RopeConfig) -> Rope:
  """Frequencies of a checkpoint's rotary embedding, computed once in float64.

  ``llama3`` keeps short wavelengths, divides long ones by ``factor`` and blends between; ``yarn``
  (2309.00071) blends by the number of turns a plane makes over the original context.
  """
  half = config.head_dim // 2
  inv = config.theta ** (-np.arange(half, dtype=np.float64) * 2.0 / config.head_dim)
  scale = 1.0
  if config.scaling == "linear":
    inv = inv / config.factor
  elif config.scaling == "llama3":
    turns = config.original_context * inv / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    inv = keep * inv + (1 - keep) * inv / config.factor
  elif config.scaling == "yarn":

    def plane_of(turns: float) -> float:
      ratio = config.original_context / (turns * 2 * math.pi)
      return config.head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low = max(math.floor(plane_of(config.beta_fast)), 0)
    high = min(math.ceil(plane_of(config.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
    inv = (1 - ramp) * inv + ramp * inv / config.factor
    scale = config.attention_factor
    if scale is None:
      scale = 1.0 if config.factor <= 1 else 0.1 * math.log(config.factor) + 1.0
  return Rope(jnp.asarray(inv, jnp.float32), jnp.asarray(scale, jnp.float32))


def rotate(
  x: Float[Array, "*batch heads D"], positions: Int[Array, "*batch"], rope: Rope
) -> Float[Array, "*batch heads D"]:
  r"""``x R_m`` for every head vector, in float32, returned in x's dtype.

  Args:
    x: queries or keys before rotary embedding; the axis before the last holds heads.
    positions: ``m`` of each token, shared by its heads. May be a distance, or negative.
  """
  angle = positions.astype(jnp.float32)[..., None, None] * jnp.expand_dims(
    rope.inv_freq, tuple(range(positions.ndim + 1))
  )
  # Made once for all heads: a CPU's fusion would make them again for each.
  cos, sin = jax.lax.optimization_barrier(
    (jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale)
  )
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def far_query(
  q: Float[Array, "*batch heads D"], distance: Int[Array, "*batch"], rope: Rope
) -> Float[Array, "*batch heads D"]:
  r"""``q R_d``: the query side of a far score, to be multiplied with UNROTATED keys (Eq. 12).

  The whole rotation is on the query, so a checkpoint's logit multiplier (``rope.scale``, once on
  the query and once on the key) is applied here in full: ``far_query(q, i - j) . k`` equals
  ``rotate(q, i) . rotate(k, j)`` for every rope variant.
  """
  return rotate(q, distance, rope) * rope.scale.astype(q.dtype)


def windowed_logits(
  q: Float[Array, "S D"],
  k: Float[Array, "T D"],
  q_positions: Int[Array, "S"],
  k_positions: Int[Array, "T"],
  rope: Rope,
  *,
  window: int = 64,
  constant: int = 2048,
) -> Float[Array, "S T"]:
  r"""Windowed rotary embedding of one head, straight from Eq. 11 of A2ATS (2502.12665).

  .. math:: u_{ij} = q_i R_{i-j} k_j^\top \text{ if } i-j < w, \quad q_i R_b k_j^\top \text{ else}

  Nothing is scaled by ``1/sqrt(D)``. Entries with ``j > i`` are computed like near ones; mask
  them. A2ATS uses the far branch to RANK tokens only: attention over the chosen ones is exact.

  Args:
    window: ``w``; the keys at distances 0 .. w-1 are near.
    constant: ``b``; independent of ``w``.
  """
  distance = q_positions[:, None] - k_positions[None, :]
  near = far_query(
    jnp.broadcast_to(q[:, None, None, :], (*distance.shape, 1, q.shape[-1])), distance, rope
  )
  near = jnp.einsum("sthd,td->st", near, k)
  far_q = far_query(q[:, None, :], jnp.full(q.shape[:1], constant), rope)
  far = jnp.einsum("shd,td->st", far_q, k)
  return jnp.where(distance < window, near, far)
