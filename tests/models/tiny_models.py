"""Writers of tiny models in both formats, for tests."""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from a2ats_jax.models.config import LocalLayers, ModelConfig
from a2ats_jax.rope import RopeConfig

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_symbols() -> list[str]:
  """The 256 printable stand-ins of byte-level BPE, in byte order."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  stand_in = {byte: chr(byte) for byte in printable}
  spare = iter(range(256, 512))
  return [stand_in.get(byte) or chr(next(spare)) for byte in range(256)]


def byte_vocabulary(merges: list[str]) -> tuple[list[str], list[int]]:
  """Tokens and GGUF token types: three control tokens, 256 bytes, one token for each merge."""
  tokens = [*SPECIALS, *byte_symbols(), *(merge.replace(" ", "") for merge in merges)]
  return tokens, [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))


def tiny_config(architecture: str = "llama", **changes) -> ModelConfig:
  """Two layers of width 32, four heads of size 8 over two KV heads, 260 tokens."""
  options = {
    "architecture": architecture,
    "vocab": 264,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "width": 32,
    "mlp_width": 64,
    "context": 128,
    "rope": RopeConfig(head_dim=8),
    "norm_eps": 1e-5,
    "qkv_bias": architecture == "qwen2",
    "qk_norm": architecture in ("qwen3", "gemma3", "gemma3_text"),
  }
  if architecture in ("gemma3", "gemma3_text"):
    options |= {
      "layers": 4,
      "norm_eps": 1e-6,
      "post_norms": True,
      "activation": "gelu_tanh",
      "embedding_scale": 32**0.5,
      "tied": True,
      "rope": RopeConfig(head_dim=8, theta=1e6, scaling="linear", factor=8.0),
      "local": LocalLayers(period=3, window=16, rope=RopeConfig(head_dim=8, theta=500.0)),
    }
  return ModelConfig(**{**options, **changes})


def tiny_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random float32 weights; the list is written out here, apart from the package's own."""
  rng = np.random.default_rng(seed)
  e, m, d = config.width, config.mlp_width, config.rope.head_dim
  q, kv = config.heads * d, config.kv_heads * d
  shapes = {"model.embed_tokens.weight": (config.vocab, e), "model.norm.weight": (e,)}
  if not config.tied:
    shapes["lm_head.weight"] = (config.vocab, e)
  for i in range(config.layers):
    rows = {
      "self_attn.q_proj": (q, e, config.qkv_bias),
      "self_attn.k_proj": (kv, e, config.qkv_bias),
      "self_attn.v_proj": (kv, e, config.qkv_bias),
      "self_attn.o_proj": (e, q, config.out_bias),
      "mlp.gate_proj": (m, e, config.mlp_bias),
      "mlp.up_proj": (m, e, config.mlp_bias),
      "mlp.down_proj": (e, m, config.mlp_bias),
    }
    for name, (out, into, bias) in rows.items():
      shapes[f"model.layers.{i}.{name}.weight"] = (out, into)
      if bias:
        shapes[f"model.layers.{i}.{name}.bias"] = (out,)
    norms = {"input_layernorm": e, "post_attention_layernorm": e}
    if config.post_norms:
      norms |= {"pre_feedforward_layernorm": e, "post_feedforward_layernorm": e}
    if config.qk_norm:
      norms |= {"self_attn.q_norm": d, "self_attn.k_norm": d}
    for name, size in norms.items():
      shapes[f"model.layers.{i}.{name}.weight"] = (size,)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


_GGUF_NAMES = (
  ("model.embed_tokens", "token_embd"),
  ("model.norm", "output_norm"),
  ("lm_head", "output"),
  ("model.layers", "blk"),
  ("input_layernorm", "attn_norm"),
  ("post_attention_layernorm", "ffn_norm"),
  ("self_attn.q_proj", "attn_q"),
  ("self_attn.k_proj", "attn_k"),
  ("self_attn.v_proj", "attn_v"),
  ("self_attn.o_proj", "attn_output"),
  ("self_attn.q_norm", "attn_q_norm"),
  ("self_attn.k_norm", "attn_k_norm"),
  ("mlp.gate_proj", "ffn_gate"),
  ("mlp.up_proj", "ffn_up"),
  ("mlp.down_proj", "ffn_down"),
)


def gguf_name(name: str) -> str:
  for hugging_face, llama_cpp in _GGUF_NAMES:
    name = name.replace(hugging_face, llama_cpp)
  return name


_GEMMA_NAMES = (
  ("post_attention_layernorm", "post_attention_norm"),
  ("pre_feedforward_layernorm", "ffn_norm"),
  ("post_feedforward_layernorm", "post_ffw_norm"),
)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's order of q and k: in each head, row j and row j + D/2 become neighbours."""
  size = rows.shape[0] // heads
  order = [
    h * size + j + half * size // 2
    for h in range(heads)
    for j in range(size // 2)
    for half in (0, 1)
  ]
  return rows[order]


def write_gguf(
  path: Path,
  config: ModelConfig,
  tensors: Mapping[str, np.ndarray],
  *,
  metadata: Mapping[str, object] | None = None,
  extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
  """A GGUF file of float32 weights as llama.cpp's converter lays it out.

  ``metadata`` replaces values (None drops one); ``extra`` adds tensors under GGUF names.
  """
  arch = "llama" if config.architecture == "mistral" else config.architecture
  merges = ["h e", "l l", "he ll", "Ġ w"]
  tokens, types = byte_vocabulary(merges)
  values: dict[str, object] = {
    f"{arch}.block_count": config.layers,
    f"{arch}.context_length": config.context,
    f"{arch}.embedding_length": config.width,
    f"{arch}.feed_forward_length": config.mlp_width,
    f"{arch}.attention.head_count": config.heads,
    f"{arch}.attention.head_count_kv": config.kv_heads,
    f"{arch}.attention.key_length": config.rope.head_dim,
    f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
    f"{arch}.rope.freq_base": config.rope.theta,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
  }
  if config.local is not None:
    values |= {
      f"{arch}.attention.sliding_window": config.local.window,
      f"{arch}.attention.sliding_window_pattern": config.local.period,
      f"{arch}.rope.freq_base_swa": config.local.rope.theta,
      f"{arch}.rope.scaling.type": config.rope.scaling,
      f"{arch}.rope.scaling.factor": config.rope.factor,
    }
  values |= metadata or {}
  writer = gguf.GGUFWriter(path, str(values.pop("general.architecture", arch)))
  for key, value in values.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    elif value is not None:
      writer.add_array(key, value)
  for name, array in tensors.items():
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
      array = interleaved(array, config.heads if ".q_proj." in name else config.kv_heads)
    for hugging_face, llama_cpp in _GEMMA_NAMES if config.post_norms else ():
      name = name.replace(hugging_face, llama_cpp)
    writer.add_tensor(gguf_name(name), array)
  for name, array in (extra or {}).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_hf(
  path: Path,
  config: ModelConfig,
  tensors: Mapping[str, np.ndarray],
  *,
  changes: Mapping[str, object] | None = None,
  shards: int = 1,
) -> Path:
  """A Hugging Face folder; ``changes`` replaces keys of ``config.json`` (None drops one)."""
  path.mkdir(parents=True, exist_ok=True)
  values: dict[str, object] = {
    "model_type": config.architecture,
    "vocab_size": config.vocab,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.rope.head_dim,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.context,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope.theta,
    "tie_word_embeddings": config.tied,
  }
  if config.local is not None:
    values |= {
      "hidden_activation": "gelu_pytorch_tanh",
      "query_pre_attn_scalar": config.head_dim,
      "sliding_window": config.local.window,
      "sliding_window_pattern": config.local.period,
      "rope_local_base_freq": config.local.rope.theta,
      "rope_scaling": {"rope_type": config.rope.scaling, "factor": config.rope.factor},
    }
    # Gemma's folders hold the weights of norms less 1.
    tensors = {
      name: array - 1 if name.endswith("norm.weight") else array for name, array in tensors.items()
    }
  values |= changes or {}
  kept = {key: value for key, value in values.items() if value is not None}
  (path / "config.json").write_text(json.dumps(kept))
  names = list(tensors)
  if shards == 1:
    safetensors.numpy.save_file(dict(tensors), path / "model.safetensors")
  else:
    where = {}
    for i in range(shards):
      file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
      part = {name: tensors[name] for name in names[i::shards]}
      safetensors.numpy.save_file(part, path / file)
      where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  tokens, _ = byte_vocabulary([])
  backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
  backend.add_special_tokens(SPECIALS)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.save(str(path / "tokenizer.json"))
  return path
