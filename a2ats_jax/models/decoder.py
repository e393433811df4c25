"""A decoder-only language model in Flax NNX: Llama, Mistral, Qwen2/3, SmolLM, Gemma 3 by options.

The parameters of all layers are stacked on a leading axis, so that one compiled layer serves every
depth. A layer ends where keys, queries and values exist and begins again where attention is done:
rotary embedding, cache and attention belong to a KV method (:mod:`a2ats_jax.methods.base`).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2ats_jax.models.config import ModelConfig
from a2ats_jax.typing import Array, Float, Int


class Norm(nnx.Module):
  """Root-mean-square norm over the last axis, computed in float32."""

  def __init__(self, shape: tuple[int, ...], eps: float):
    self.scale = nnx.Param(jnp.ones(shape))
    self.eps = eps

  def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
    scale = jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
  """``x W + b``, the kernel stacked over layers outside a layer's own code."""

  def __init__(self, layers: int, n_in: int, n_out: int, bias: bool, *, rngs: nnx.Rngs):
    scale = n_in**-0.5
    self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (layers, n_in, n_out)))
    self.bias = nnx.Param(jnp.zeros((layers, n_out))) if bias else None

  def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
    y = jnp.matmul(x, self.kernel[...], precision=jax.lax.Precision.HIGHEST)
    if self.bias is not None:
      y = y + jnp.expand_dims(self.bias[...], tuple(range(x.ndim - 1)))
    return y


class Layer(nnx.Module):
  """One layer of the decoder, or all of them stacked."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    n, e, d = config.layers, config.width, config.head_dim
    h, kv = config.heads, config.kv_heads
    self.attention_norm = Norm((n, e), config.norm_eps)
    self.q = Linear(n, e, h * d, config.qkv_bias, rngs=rngs)
    self.k = Linear(n, e, kv * d, config.qkv_bias, rngs=rngs)
    self.v = Linear(n, e, kv * d, config.qkv_bias, rngs=rngs)
    self.o = Linear(n, h * d, e, config.out_bias, rngs=rngs)
    self.q_norm = Norm((n, d), config.norm_eps) if config.qk_norm else None
    self.k_norm = Norm((n, d), config.norm_eps) if config.qk_norm else None
    self.attention_post_norm = Norm((n, e), config.norm_eps) if config.post_norms else None
    self.mlp_norm = Norm((n, e), config.norm_eps)
    self.mlp_post_norm = Norm((n, e), config.norm_eps) if config.post_norms else None
    self.gate = Linear(n, e, config.mlp_width, config.mlp_bias, rngs=rngs)
    self.up = Linear(n, e, config.mlp_width, config.mlp_bias, rngs=rngs)
    self.down = Linear(n, config.mlp_width, e, config.mlp_bias, rngs=rngs)
    self.head_dim = d
    self.query_scale = config.query_scale
    self.activation = config.activation

  def project(
    self, x: Float[Array, "B S E"]
  ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Queries, keys and values before rotary embedding."""
    x = self.attention_norm(x)
    shape = (*x.shape[:-1], -1, self.head_dim)
    q, k, v = self.q(x).reshape(shape), self.k(x).reshape(shape), self.v(x).reshape(shape)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if self.query_scale != 1.0:
      q = q * self.query_scale
    return q, k, v

  def finish(
    self, x: Float[Array, "B S E"], attended: Float[Array, "B S H D"]
  ) -> Float[Array, "B S E"]:
    """Output projection and MLP, both residual."""
    y = self.o(attended.reshape(*x.shape[:-1], -1))
    x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
    y = self.mlp_norm(x)
    gate = self.gate(y)
    gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    y = self.down(gate * self.up(y))
    return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))


class Decoder(nnx.Module):
  """Embedding, stacked layers, final norm and output head."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shape, scale = (config.vocab, config.width), config.width**-0.5
    self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
    self.layers = Layer(config, rngs=rngs)
    self.norm = Norm((config.width,), config.norm_eps)
    self.head = None if config.tied else nnx.Param(scale * jax.random.normal(rngs.params(), shape))
    self.config = config

  def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
    """Token embeddings."""
    x = self.embedding[...][tokens]
    return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

  def layer(self, index: int | Array) -> Layer:
    """One layer out of the stack; the index may be traced."""
    return jax.tree.map(lambda p: p[index], self.layers)

  def logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
    """Next-token logits of final hidden states, float32."""
    table = self.embedding if self.head is None else self.head
    return jnp.einsum(
      "bse,ve->bsv",
      self.norm(x),
      table[...],
      preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST,
    )


_LAYER_NAMES = {
  "attention_norm.scale": "input_layernorm.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",
  "q_norm.scale": "self_attn.q_norm.weight",
  "k_norm.scale": "self_attn.k_norm.weight",
} | {
  f"{name}.{ours}": f"{block}.{name}_proj.{theirs}"
  for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
  for name in names
  for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
}
# With norms on both sides of attention and MLP another one has the name of the MLP's.
_POST_NORM_NAMES = _LAYER_NAMES | {
  "attention_post_norm.scale": "post_attention_layernorm.weight",
  "mlp_norm.scale": "pre_feedforward_layernorm.weight",
  "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}
_TOP_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "norm.scale": "model.norm.weight",
  "head": "lm_head.weight",
}


def from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Decoder:
  """A decoder with a checkpoint's weights, float32.

  Args:
    tensors: by Hugging Face name, linear weights as (out, in). Each is read once, layer by layer.
  """
  decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  graph, abstract = nnx.split(decoder)
  flat = dict(nnx.to_flat_state(abstract))
  names = _POST_NORM_NAMES if config.post_norms else _LAYER_NAMES
  for path, leaf in flat.items():
    ours = ".".join(map(str, path))
    if path[0] == "layers":
      name = names[ours.removeprefix("layers.")]
      stacked = np.empty(leaf.shape, np.float32)
      for i in range(config.layers):
        tensor = tensors[f"model.layers.{i}.{name}"]
        stacked[i] = tensor.T if path[-1] == "kernel" else tensor
      value = stacked
    else:
      value = np.asarray(tensors[_TOP_NAMES[ours]], np.float32)
    flat[path] = leaf.replace(jnp.asarray(value))
  return nnx.merge(graph, nnx.from_flat_state(flat))
