"""What a decoder looks like, read from either weight format."""

import dataclasses

from a2ats_jax.errors import UserError
from a2ats_jax.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Shape and options of a decoder-only language model of the Llama family.

  Attributes:
    architecture: ``llama``, ``mistral``, ``qwen2`` or ``qwen3`` (SmolLM is ``llama``).
    vocab: V. layers: L. heads: H. kv_heads: K. width: E.
    mlp_width: hidden size of the gated MLP.
    context: longest sequence in tokens the checkpoint states.
    rope: rotary embedding; its ``head_dim`` is D.
    norm_eps: epsilon of every RMS norm.
    qkv_bias, out_bias, mlp_bias: which projections add a bias.
    qk_norm: RMS norm per head on queries and keys before rotary embedding (Qwen3).
    tied: the output head is the embedding table.
  """

  architecture: str
  vocab: int
  layers: int
  heads: int
  kv_heads: int
  width: int
  mlp_width: int
  context: int
  rope: RopeConfig
  norm_eps: float = 1e-5
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  tied: bool = False

  def __post_init__(self):
    for field in ("vocab", "layers", "heads", "kv_heads", "width", "mlp_width", "context"):
      if getattr(self, field) < 1:
        raise UserError(f"model config: {field} must be at least 1, got {getattr(self, field)}")
    if self.heads % self.kv_heads:
      raise UserError(
        f"model config: {self.heads} query heads are not a multiple of {self.kv_heads} KV heads"
      )

  @property
  def head_dim(self) -> int:
    """D."""
    return self.rope.head_dim

  @property
  def group(self) -> int:
    """G, query heads of one KV head."""
    return self.heads // self.kv_heads
