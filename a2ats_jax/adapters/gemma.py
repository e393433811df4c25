"""Models of google-deepmind's gemma (Flax Linen): Gemma 3, for text."""

from typing import Any

import jax.numpy as jnp

from a2ats_jax.adapters.adapted import Adapted
from a2ats_jax.adapters.linen import LinenEnds, LinenLayer, Part
from a2ats_jax.errors import UserError
from a2ats_jax.prompt import Projected
from a2ats_jax.rope import RopeConfig
from a2ats_jax.typing import Array

try:
  from gemma import gm
except ImportError as error:
  raise UserError("gemma: the package is of an extra, pip install 'a2ats_jax[gemma]'") from error


def _project(block: Any, x: Array) -> Projected:
  """The norms of the heads are named as in the parameters."""
  attn, x = block.attn, block.pre_attention_norm(x)
  if attn.use_qkv_einsum:
    q, k, v = attn.qkv_einsum("BTD,SNDH->SBTNH", x)
  else:
    q = attn.q_einsum("BTD,NDH->BTNH", x)
    k, v = attn.kv_einsum("BSD,CKDH->CBSKH", x)
  if attn.use_qk_norm:
    q, k = attn._query_norm(q), attn._key_norm(k)
  return q * (attn.query_pre_attn_scalar * attn.head_dim**0.5), k, v


def _finish(block: Any, x: Array, attended: Array) -> Array:
  out = block.attn.attn_vec_einsum("BTNH,NHD->BTD", attended)
  if block.use_post_attn_norm:
    out = block.post_attention_norm(out)
  x = x + out
  out = block.mlp(block.pre_ffw_norm(x))
  return x + (block.post_ffw_norm(out) if block.use_post_ffw_norm else out)


def _embed(model: Any, tokens: Array) -> Array:
  return model.embedder.encode(tokens)


def _logits(model: Any, x: Array) -> Array:
  logits, cap = model.embedder.decode(model.final_norm(x)), model.config.final_logit_softcap
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def from_gemma(model: Any, params: Any) -> Adapted:
  """A model of ``gm.nn`` under this library's methods.

  Args:
    model: ``gm.nn.Gemma3_270M()`` and its kind, or any ``gm.nn.Transformer``.
    params: its parameters, as ``gm.ckpts.load_params`` gives them.

  Raises:
    UserError: Gemma 2, whose attention logits are soft-capped; Gemma 3n, Gemma 4 and wrappers,
      which are other classes.
  """
  if not isinstance(model, gm.nn.Transformer):
    raise UserError(f"gemma: expected a gm.nn.Transformer (Gemma 3), got {type(model).__name__}")
  config = model.config
  if config.attn_logits_soft_cap is not None:
    raise UserError(
      f"gemma: {type(model).__name__} soft-caps its attention logits at "
      f"{config.attn_logits_soft_cap:g}, which no method does; Gemma 3 does not"
    )

  def rope(theta: int, factor: float) -> RopeConfig:
    scaling = "none" if factor == 1 else "linear"
    return RopeConfig(
      head_dim=config.head_dim, theta=float(theta), scaling=scaling, factor=float(factor)
    )

  blocks = model.bind({"params": params}).blocks
  local = [kind == gm.nn.AttentionType.LOCAL_SLIDING for kind in config.attention_types]
  parts = {
    kind: Part(blocks[local.index(kind)].unbind()[0], _project, _finish) for kind in set(local)
  }
  layers = tuple(
    LinenLayer(params=params[f"layer_{i}"], part=parts[kind], local=kind)
    for i, kind in enumerate(local)
  )
  rest = {name: part for name, part in params.items() if not name.startswith("layer_")}
  return Adapted(
    layers=layers,
    ends=LinenEnds(params=rest, part=Part(model, _embed, _logits)),
    vocab=config.num_embed,
    rope=rope(config.global_base_frequency, config.global_scale_factor),
    window=config.sliding_window_size if any(local) else 0,
    local_rope=rope(config.local_base_frequency, config.local_scale_factor),
  )
