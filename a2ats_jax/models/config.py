"""What a decoder looks like, read from either weight format."""

import dataclasses
from typing import Literal

from a2ats_jax.errors import UserError
from a2ats_jax.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalLayers:
  """Layers that see the latest tokens only, among global ones that see all (Gemma 3).

  Attributes:
    period: of so many layers in a row the last is global; those left at the end are local.
    window: tokens that a query of a local layer sees, itself included.
    rope: rotary embedding of the local layers.
  """

  period: int
  window: int
  rope: RopeConfig

  def __post_init__(self):
    if self.period < 2 or self.window < 1:
      raise UserError(
        "model config: local layers need a period of at least 2 and a window of at least 1, got "
        f"{self.period} and {self.window}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Shape and options of a decoder-only language model of the Llama family.

  Attributes:
    architecture: as the file names it: ``llama`` (SmolLM too), ``mistral``, ``qwen2``, ``qwen3``,
      ``gemma3`` or ``gemma3_text``.
    vocab: V. layers: L. heads: H. kv_heads: K. width: E.
    mlp_width: hidden size of the gated MLP.
    context: longest sequence in tokens the checkpoint states.
    rope: rotary embedding, of the global layers where some are local; its ``head_dim`` is D.
    norm_eps: epsilon of every RMS norm.
    qkv_bias, out_bias, mlp_bias: which projections add a bias.
    qk_norm: RMS norm per head on queries and keys before rotary embedding (Qwen3).
    post_norms: RMS norm on what attention and MLP add to the residual stream (Gemma).
    activation: of the gated MLP.
    embedding_scale: multiplies token embeddings on their way in.
    query_scale: multiplies queries; logits are divided by the square root of D besides.
    tied: the output head is the embedding table.
    local: which layers see a window only; None where every layer is global.
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
  post_norms: bool = False
  activation: Literal["silu", "gelu_tanh"] = "silu"
  embedding_scale: float = 1.0
  query_scale: float = 1.0
  tied: bool = False
  local: LocalLayers | None = None

  def __post_init__(self):
    for field in ("vocab", "layers", "heads", "kv_heads", "width", "mlp_width", "context"):
      if getattr(self, field) < 1:
        raise UserError(f"model config: {field} must be at least 1, got {getattr(self, field)}")
    if self.heads % self.kv_heads:
      raise UserError(
        f"model config: {self.heads} query heads are not a multiple of {self.kv_heads} KV heads"
      )
    if self.local is not None:
      if self.period > self.layers:
        raise UserError(
          f"model config: expected at least the {self.period} layers of a period, got {self.layers}"
        )
      if self.local.rope.head_dim != self.head_dim:
        raise UserError(
          f"model config: head size is {self.head_dim}, of local layers {self.local.rope.head_dim}"
        )

  @property
  def head_dim(self) -> int:
    """D."""
    return self.rope.head_dim

  @property
  def group(self) -> int:
    """G, query heads of one KV head."""
    return self.heads // self.kv_heads

  @property
  def period(self) -> int:
    """Of so many layers in a row the last is global; 1 where all are."""
    return 1 if self.local is None else self.local.period

  @property
  def global_layers(self) -> int:
    """Layers that see every token: those whose cache is a KV method's."""
    return self.layers // self.period

  @property
  def local_layers(self) -> int:
    """Layers that see a window."""
    return self.layers - self.global_layers

  def is_local(self, layer: int) -> bool:
    """Whether a layer sees a window only."""
    return (layer + 1) % self.period != 0
