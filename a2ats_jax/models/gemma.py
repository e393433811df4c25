"""What every Gemma 3 text model has in common and its files leave unsaid."""

from typing import Any

from a2ats_jax.errors import UserError

PERIOD = 6  # five local layers, then a global one
LOCAL_THETA = 10000.0


def gemma3_options(width: int, head_dim: int, scalar: float) -> dict[str, Any]:
  """Options of :class:`a2ats_jax.models.config.ModelConfig`.

  Args:
    scalar: logits are divided by its square root (``query_pre_attn_scalar``).
  Raises:
    UserError: that is not above 0.
  """
  if not scalar > 0:
    raise UserError(f"model config: query_pre_attn_scalar must be above 0, got {scalar}")
  return {
    "qk_norm": True,
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": width**0.5,
    "query_scale": (head_dim / scalar) ** 0.5,
  }
