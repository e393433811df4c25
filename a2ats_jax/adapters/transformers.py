"""Flax models of Hugging Face transformers 4 (Linen): Llama and Gemma.

Both rotate by base 10000 whatever ``config.rope_theta`` says; so they do here.
"""

from typing import Any

from a2ats_jax.adapters.adapted import Adapted
from a2ats_jax.adapters.linen import LinenEnds, LinenLayer, Part
from a2ats_jax.errors import UserError
from a2ats_jax.prompt import Projected
from a2ats_jax.rope import RopeConfig
from a2ats_jax.typing import Array

try:
  from transformers import FlaxGemmaForCausalLM, FlaxLlamaForCausalLM
except ImportError as error:
  raise UserError(
    "transformers: version 4 is of an extra, pip install 'a2ats_jax[transformers]'; 5 has no Flax"
  ) from error


def _project(block: Any, x: Array) -> Projected:
  attn, x = block.self_attn, block.input_layernorm(x)
  shape = (*x.shape[:2], -1, attn.head_dim)
  q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
  return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def _finish(block: Any, x: Array, attended: Array) -> Array:
  x = x + block.self_attn.o_proj(attended.reshape(*x.shape[:2], -1))
  return x + block.mlp(block.post_attention_layernorm(x))


def _embed(module: Any, tokens: Array) -> Array:
  return module.model.embed_tokens(tokens)


def _embed_gemma(module: Any, tokens: Array) -> Array:
  return _embed(module, tokens) * module.config.hidden_size**0.5


def _logits(module: Any, x: Array) -> Array:
  return module.lm_head(module.model.norm(x))


def _logits_tied(module: Any, x: Array) -> Array:
  return module.model.embed_tokens.attend(module.model.norm(x))


def from_transformers(model: Any) -> Adapted:
  """A Flax model of transformers under this library's methods.

  Args:
    model: ``FlaxLlamaForCausalLM`` or ``FlaxGemmaForCausalLM``, with its parameters.

  Raises:
    UserError: another model; ``FlaxMistralForCausalLM`` too, in which every layer sees a window.
  """
  gemma = isinstance(model, FlaxGemmaForCausalLM)
  if not gemma and not isinstance(model, FlaxLlamaForCausalLM):
    raise UserError(
      "transformers: expected a FlaxLlamaForCausalLM or FlaxGemmaForCausalLM, got "
      f"{type(model).__name__}"
    )
  config, params = model.config, dict(model.params)
  inner = dict(params.pop("model"))
  layers = inner.pop("layers")
  bound = model.module.bind({"params": model.params})
  block = Part(bound.model.layers.blocks[0].unbind()[0], _project, _finish)
  logits = _logits_tied if gemma and config.tie_word_embeddings else _logits
  ends = Part(model.module, _embed_gemma if gemma else _embed, logits)
  head_dim = config.head_dim if gemma else config.hidden_size // config.num_attention_heads
  return Adapted(
    layers=tuple(
      LinenLayer(params=layers[str(i)], part=block) for i in range(config.num_hidden_layers)
    ),
    ends=LinenEnds(params={**params, "model": inner}, part=ends),
    vocab=config.vocab_size,
    rope=RopeConfig(head_dim=head_dim),
  )
