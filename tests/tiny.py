"""A tiny random decoder of any family, and the same decoder in plain NumPy."""

import functools

import jax
import numpy as np
from flax import nnx

from a2ats_jax.models.config import LocalLayers, ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.rope import RopeConfig, make_rope
from tests import independent

_LLAMA3 = {"scaling": "llama3", "factor": 8.0, "original_context": 64}
_YARN = {"scaling": "yarn", "factor": 4.0, "original_context": 64}
FAMILIES = {
  "llama": {"architecture": "llama"},
  "llama3": {
    "architecture": "llama",
    "tied": True,
    "rope": RopeConfig(head_dim=16, theta=10000.0, **_LLAMA3),
  },
  "qwen2": {
    "architecture": "qwen2",
    "qkv_bias": True,
    "rope": RopeConfig(head_dim=16, theta=10000.0, **_YARN),
  },
  "qwen3": {"architecture": "qwen3", "qk_norm": True, "tied": True, "norm_eps": 1e-6},
  # Local, local, global, twice, and one local layer more.
  "gemma3": {
    "architecture": "gemma3",
    "layers": 7,
    "heads": 2,
    "kv_heads": 1,
    "tied": True,
    "qk_norm": True,
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": 3.0,
    "query_scale": 1.5,
    "rope": RopeConfig(head_dim=16, theta=10000.0, scaling="linear", factor=2.0),
    "local": LocalLayers(period=3, window=5, rope=RopeConfig(head_dim=16, theta=100.0)),
  },
  "all biases": {"architecture": "llama", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
}


def tiny_config(family: str = "llama", **changes) -> ModelConfig:
  """3 layers, H=4, K=2, D=16; the width is not H D."""
  sizes = {
    "vocab": 97,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "width": 48,
    "mlp_width": 80,
    "context": 4096,
    "rope": RopeConfig(head_dim=16, theta=10000.0),
  }
  return ModelConfig(**(sizes | FAMILIES[family] | changes))


@functools.cache
def tiny_model(family: str = "llama", seed: int = 0) -> Decoder:
  """A random decoder whose norms and biases are not the identity."""
  decoder = Decoder(tiny_config(family), rngs=nnx.Rngs(seed))
  graph, state = nnx.split(decoder)
  flat = dict(nnx.to_flat_state(state))
  for number, (path, leaf) in enumerate(sorted(flat.items(), key=lambda item: str(item[0]))):
    noise = jax.random.normal(jax.random.key(number), leaf.shape) * 0.3
    if path[-1] in ("scale", "bias"):
      flat[path] = leaf.replace(leaf[...] + noise)
    elif path[0] != "embedding":
      flat[path] = leaf.replace(leaf[...] * 2.0)
  return nnx.merge(graph, nnx.from_flat_state(flat))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
  """Random prompts of these lengths."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 97, size=length).tolist() for length in lengths]


def _norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _linear(linear, layer, x):
  y = x @ np.asarray(linear.kernel[...][layer], np.float64)
  return y if linear.bias is None else y + np.asarray(linear.bias[...][layer], np.float64)


def forward(decoder: Decoder, tokens: list[int]) -> np.ndarray:
  """Logits ``[T, V]`` of one prompt in float64, every layer dense and causal."""
  head = decoder.embedding if decoder.config.tied else decoder.head
  return hidden(decoder, tokens) @ np.asarray(head[...], np.float64).T


def hidden(decoder: Decoder, tokens: list[int], attend=independent.causal_attention) -> np.ndarray:
  """What the output head is given, ``[T, E]``."""
  config, layers = decoder.config, decoder.layers

  def scales(norm, layer):
    return np.asarray(norm.scale[...], np.float64)[layer]

  x = np.asarray(decoder.embedding[...][np.asarray(tokens)], np.float64) * config.embedding_scale
  for n in range(config.layers):
    local = config.local
    if local and (n + 1) % local.period == 0:
      local = None  # this one is global
    rope = make_rope(local.rope if local else config.rope)
    inv_freq, scale = np.asarray(rope.inv_freq), float(rope.scale)
    y = _norm(x, scales(layers.attention_norm, n), config.norm_eps)
    q, k, v = (
      _linear(linear, n, y).reshape(len(tokens), -1, config.head_dim)
      for linear in (layers.q, layers.k, layers.v)
    )
    if config.qk_norm:
      q = _norm(q, scales(layers.q_norm, n), config.norm_eps)
      k = _norm(k, scales(layers.k_norm, n), config.norm_eps)
    attended = attend(
      q * config.query_scale, k, v, inv_freq, scale, local.window if local else None
    )
    y = _linear(layers.o, n, attended.reshape(len(tokens), -1))
    if config.post_norms:
      y = _norm(y, scales(layers.attention_post_norm, n), config.norm_eps)
    x = x + y
    y = _norm(x, scales(layers.mlp_norm, n), config.norm_eps)
    gate = _linear(layers.gate, n, y)
    gate = _gelu(gate) if config.activation == "gelu_tanh" else gate / (1 + np.exp(-gate))
    y = _linear(layers.down, n, gate * _linear(layers.up, n, y))
    if config.post_norms:
      y = _norm(y, scales(layers.mlp_post_norm, n), config.norm_eps)
    x = x + y
  return _norm(x, np.asarray(decoder.norm.scale[...], np.float64), config.norm_eps)
