"""Models of google-tunix (Flax NNX): Llama 3, Qwen 2, Qwen 3 and Gemma 3.

Llama 3 and Qwen 3 of tunix 0.1.7 rotate by base 1e6 whatever ``config.rope_theta`` says; so they do
here.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from a2ats_jax.adapters.adapted import Adapted
from a2ats_jax.errors import UserError
from a2ats_jax.prompt import Projected
from a2ats_jax.rope import RopeConfig
from a2ats_jax.typing import Array, Float, Int

try:
  from tunix.models.gemma3.model import AttentionType, Gemma3
  from tunix.models.llama3.model import Llama3
  from tunix.models.qwen2.model import Qwen2
  from tunix.models.qwen3.model import Qwen3
except ImportError as error:
  raise UserError("tunix: the package is of an extra, pip install 'a2ats_jax[tunix]'") from error

THETA = 1e6  # of tunix's Llama 3 and Qwen 3


@partial(jax.tree_util.register_dataclass, data_fields=["layer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LlamaLayer:
  """A decoder layer of Llama 3, Qwen 2 or Qwen 3, experts included."""

  layer: Any
  local = False

  def project(self, x: Float[Array, "B S E"]) -> Projected:
    attn, x = self.layer.attn, self.layer.input_layernorm(x)
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if hasattr(attn, "q_bias"):
      biases = (attn.q_bias, attn.k_bias, attn.v_bias)
      q, k, v = (
        a + bias[...].astype(a.dtype).reshape(1, 1, *a.shape[2:])
        for a, bias in zip((q, k, v), biases)
      )
    if hasattr(attn, "q_norm"):
      q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k, v

  def finish(
    self, x: Float[Array, "B S E"], attended: Float[Array, "B S H D"]
  ) -> Float[Array, "B S E"]:
    x = x + self.layer.attn.o_proj(attended)
    return x + self.layer.mlp(self.layer.post_attention_layernorm(x))


@partial(jax.tree_util.register_dataclass, data_fields=["layer"], meta_fields=["local"])
@dataclasses.dataclass(frozen=True)
class Gemma3Layer:
  """A decoder layer of Gemma 3; the norms of its heads are named as in its parameters."""

  layer: Any
  local: bool

  def project(self, x: Float[Array, "B S E"]) -> Projected:
    attn, x = self.layer.attn, self.layer.pre_attention_norm(x)
    if attn.use_qkv_einsum:
      q, k, v = attn.qkv_einsum(x)
    else:
      q, (k, v) = attn.q_einsum(x), attn.kv_einsum(x)
    scale = attn.query_pre_attn_scalar * attn.head_dim**0.5
    return attn._query_norm(q) * scale, attn._key_norm(k), v

  def finish(
    self, x: Float[Array, "B S E"], attended: Float[Array, "B S H D"]
  ) -> Float[Array, "B S E"]:
    layer = self.layer
    x = x + layer.post_attention_norm(layer.attn.attn_vec_einsum(attended))
    return x + layer.post_ffw_norm(layer.mlp(layer.pre_ffw_norm(x)))


@partial(jax.tree_util.register_dataclass, data_fields=["embedder", "norm", "head"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TunixEnds:
  """Embedding, final norm, and head where it is not the embedding."""

  embedder: Any
  norm: Any
  head: Any

  def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
    return self.embedder.encode(tokens)

  def logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
    head = self.embedder.decode if self.head is None else self.head
    return head(self.norm(x)).astype(jnp.float32)


def from_tunix(model: Any) -> Adapted:
  """A tunix model under this library's methods.

  Args:
    model: ``Llama3``, ``Qwen2``, ``Qwen3`` or ``Gemma3``, the last for text alone.

  Raises:
    UserError: another model.
  """
  if not isinstance(model, Llama3 | Qwen2 | Qwen3 | Gemma3):
    raise UserError(f"tunix: expected a Llama3, Qwen2, Qwen3 or Gemma3, got {type(model).__name__}")
  ends = TunixEnds(model.embedder, model.final_norm, getattr(model, "lm_head", None))
  config = model.config
  if isinstance(model, Gemma3):

    def rope(kind: str) -> RopeConfig:
      factor = float(getattr(config, f"{kind}_scale_factor"))
      theta = float(getattr(config, f"{kind}_base_frequency"))
      scaling = "none" if factor == 1 else "linear"
      return RopeConfig(head_dim=config.head_dim, theta=theta, scaling=scaling, factor=factor)

    local = [layer.attn.attn_type == AttentionType.LOCAL_SLIDING for layer in model.layers]
    return Adapted(
      layers=tuple(map(Gemma3Layer, model.layers, local)),
      ends=ends,
      vocab=config.num_embed,
      rope=rope("global"),
      window=config.sliding_window_size if any(local) else 0,
      local_rope=rope("local"),
    )
  theta = float(config.rope_theta) if isinstance(model, Qwen2) else THETA
  return Adapted(
    layers=tuple(map(LlamaLayer, model.layers)),
    ends=ends,
    vocab=config.vocab_size,
    rope=RopeConfig(head_dim=config.head_dim, theta=theta),
  )
