"""Models in GGUF files: configuration, weights under Hugging Face names, tokenizer."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.models.checkpoint import Checkpoint, StoredTensor, StoredTensors
from a2ats_jax.models.config import LocalLayers, ModelConfig
from a2ats_jax.models.gemma import LOCAL_THETA, PERIOD, gemma3_options
from a2ats_jax.models.gguf_header import GgufTensor, read_header
from a2ats_jax.models.tokenizer_gguf import tokenizer_from_gguf
from a2ats_jax.rope import RopeConfig, make_rope

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_GLOBAL_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_POST_NORM_NAMES = _LAYER_NAMES | {
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}


def read_gguf(path: str | Path) -> Checkpoint:
  """Opens a GGUF file. Weights are dequantised one at a time, when asked for.

  Args:
    path: a little-endian GGUF file, version 2 or 3, of one of :data:`ARCHITECTURES`.
  Raises:
    UserError: no such file, damaged, or of an architecture, tensor type, rotary scaling or
      tokenizer that is not supported; the message names it.
  """
  path = Path(path)
  source = str(path)
  metadata, tensors = read_header(path)
  config = _config(metadata, tensors, source)
  tensors.pop("rope_freqs.weight", None)
  stored = {}
  names = _POST_NORM_NAMES if config.post_norms else _LAYER_NAMES
  for name, tensor in tensors.items():
    target = _hugging_face_name(name, names)
    load = tensor.read
    if config.architecture == "llama" and ".self_attn." in target:
      heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(target.split(".")[-2])
      if heads is not None:
        load = functools.partial(_unpermuted, tensor, heads)
    stored[target] = StoredTensor(tensor.shape, load)
  return Checkpoint(
    config=config,
    tensors=StoredTensors(config, stored, source),
    tokenizer=tokenizer_from_gguf(metadata, source),
    source=source,
  )


def _hugging_face_name(name: str, names: Mapping[str, str]) -> str:
  if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
    index, part, role = layer.groups()
    if part in names:
      return f"model.layers.{index}.{names[part]}.{role}"
  return _GLOBAL_NAMES.get(name, name)


def _unpermuted(tensor: GgufTensor, heads: int) -> np.ndarray:
  """Rows of q or k in Hugging Face order.

  llama.cpp interleaves the two halves of every head of its ``llama`` architecture, to rotate
  neighbouring rows: row ``2j + h`` of a head was row ``j + h D/2``.
  """
  values = tensor.read()
  split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
  return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def _config(
  metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], source: str
) -> ModelConfig:
  arch = metadata.get("general.architecture")
  if arch not in ARCHITECTURES:
    known = ", ".join(ARCHITECTURES)
    raise UserError(f"{source}: architecture {arch!r} is not supported; supported: {known}")

  def get(key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(f"{arch}.{key}", default)
    if value is None:
      raise UserError(f"{source}: GGUF metadata lacks {arch}.{key}")
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
      raise UserError(f"{source}: {arch}.{key} must be a {kind.__name__}, got {value!r}")
    return value

  def decimal(key: str, default: float | None = None) -> float:
    """A float32 as the short decimal it was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(get(key, float, default))))

  if get("expert_count", int, 0):
    raise UserError(f"{source}: mixtures of experts are not supported")
  heads, width, context = (
    get("attention.head_count", int),
    get("embedding_length", int),
    get("context_length", int),
  )
  window = get("attention.sliding_window", int, 0)
  if arch != "gemma3" and 0 < window < context:
    raise UserError(f"{source}: sliding-window attention is not supported")
  head_dim = get("attention.key_length", int, width // max(heads, 1))
  for key in ("attention.value_length", "rope.dimension_count"):
    if get(key, int, head_dim) != head_dim:
      raise UserError(
        f"{source}: {arch}.{key} must equal the head size {head_dim}, got {get(key, int)}"
      )
  theta = decimal("rope.freq_base", 10000.0)
  scaling = get("rope.scaling.type", str, "none")
  rope = RopeConfig(head_dim=head_dim, theta=theta)
  if scaling == "linear":
    rope = dataclasses.replace(rope, scaling="linear", factor=decimal("rope.scaling.factor"))
  elif scaling == "yarn":
    if decimal("rope.scaling.attn_factor", 1.0) != 1.0:
      raise UserError(f"{source}: yarn with {arch}.rope.scaling.attn_factor is not supported")
    rope = dataclasses.replace(
      rope,
      scaling="yarn",
      factor=decimal("rope.scaling.factor"),
      original_context=get("rope.scaling.original_context_length", int, context),
      beta_fast=decimal("rope.scaling.yarn_beta_fast", 32.0),
      beta_slow=decimal("rope.scaling.yarn_beta_slow", 1.0),
    )
  elif scaling != "none":
    raise UserError(
      f"{source}: rope scaling {scaling!r} is not supported; supported: none, linear, yarn, llama3"
    )
  if "rope_freqs.weight" in tensors:
    rope = _llama3_rope(rope, tensors["rope_freqs.weight"].read(), source)
  embedding = tensors.get("token_embd.weight")
  if embedding is None:
    raise UserError(f"{source}: tensor 'token_embd.weight' is missing")
  layers, local = get("block_count", int), None
  options: dict[str, Any] = {"qk_norm": arch == "qwen3"}
  if arch == "gemma3":
    if any(get(f"{name}_logit_softcapping", float, 0.0) for name in ("attn", "final")):
      raise UserError(f"{source}: soft-capped logits are not supported")
    # The file does not say it: the model of 62 layers, 27B, scales by width and not by head size.
    scalar = width / max(heads, 1) if layers == 62 else float(head_dim)
    options = gemma3_options(width, head_dim, scalar)
    if window:
      local = LocalLayers(
        period=get("attention.sliding_window_pattern", int, PERIOD),
        window=window,
        rope=RopeConfig(head_dim=head_dim, theta=decimal("rope.freq_base_swa", LOCAL_THETA)),
      )
  return ModelConfig(
    architecture=arch,
    vocab=embedding.shape[0],
    layers=layers,
    heads=heads,
    kv_heads=get("attention.head_count_kv", int, heads),
    width=width,
    mlp_width=get("feed_forward_length", int),
    context=context,
    rope=rope,
    norm_eps=decimal("attention.layer_norm_rms_epsilon"),
    qkv_bias="blk.0.attn_q.bias" in tensors,
    out_bias="blk.0.attn_output.bias" in tensors,
    mlp_bias="blk.0.ffn_gate.bias" in tensors,
    tied="output.weight" not in tensors,
    local=local,
    **options,
  )


def _llama3_rope(rope: RopeConfig, divisors: np.ndarray, source: str) -> RopeConfig:
  """The ``llama3`` scaling behind llama.cpp's table of per-plane divisors.

  The file keeps the table and not the parameters. The longest wavelengths are divided by
  ``factor``; band edges and original context are those every Llama 3.1 to 3.3 checkpoint has. The
  guess is accepted only if it gives back the whole table.
  """
  guess = dataclasses.replace(
    rope, scaling="llama3", factor=float(np.max(divisors)), original_context=8192
  )
  plain = np.asarray(make_rope(dataclasses.replace(rope, scaling="none")).inv_freq)
  with np.errstate(all="ignore"):  # the divisors of a damaged file may be anything
    made = plain / np.asarray(make_rope(guess).inv_freq)
  if (
    rope.scaling != "none"
    or divisors.shape != made.shape
    or not np.allclose(made, divisors, rtol=1e-4, atol=0)
  ):
    raise UserError(f"{source}: rope_freqs.weight is not a llama3 scaling of 8192 tokens, 1 and 4")
  return guess
