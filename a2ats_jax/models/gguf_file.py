"""GGUF files: header, configuration and dequantised weights.

The header is parsed here, with every length checked against the file, because a damaged file must
end in one clear line; block layouts and dequantisation are those of the ``gguf`` package.
"""

import dataclasses
import functools
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from a2ats_jax.errors import UserError
from a2ats_jax.models.checkpoint import Checkpoint, StoredTensor, StoredTensors
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.tokenizer_gguf import tokenizer_from_gguf
from a2ats_jax.rope import RopeConfig, make_rope

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TENSOR_TYPES = (
  *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
)

_SCALARS = {
  GGUFValueType.UINT8: "<B",
  GGUFValueType.INT8: "<b",
  GGUFValueType.UINT16: "<H",
  GGUFValueType.INT16: "<h",
  GGUFValueType.UINT32: "<I",
  GGUFValueType.INT32: "<i",
  GGUFValueType.FLOAT32: "<f",
  GGUFValueType.BOOL: "<?",
  GGUFValueType.UINT64: "<Q",
  GGUFValueType.INT64: "<q",
  GGUFValueType.FLOAT64: "<d",
}

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTensor:
  """Where a tensor lies in the file.

  Attributes:
    kind: name of its number format, one of :data:`TENSOR_TYPES`.
    shape: in numpy order, ``(out, in)`` for a matrix.
    data: its bytes, still in the mapped file.
  """

  kind: str
  shape: tuple[int, ...]
  data: np.ndarray

  def read(self) -> np.ndarray:
    """The values as an owned float32 array of ``shape``."""
    rows = self.data.reshape(*self.shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged scale is reported as a value that is not finite
      values = dequantize(rows, GGMLQuantizationType[self.kind])
    return np.array(values, np.float32).reshape(self.shape)


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
  for name, tensor in tensors.items():
    target = _hugging_face_name(name)
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


def _hugging_face_name(name: str) -> str:
  if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
    index, part, role = layer.groups()
    if part in _LAYER_NAMES:
      return f"model.layers.{index}.{_LAYER_NAMES[part]}.{role}"
  return _GLOBAL_NAMES.get(name, name)


def _unpermuted(tensor: GgufTensor, heads: int) -> np.ndarray:
  """Rows of q or k in Hugging Face order.

  llama.cpp interleaves the two halves of every head of its ``llama`` architecture, to rotate
  neighbouring rows: row ``2j + h`` of a head was row ``j + h D/2``.
  """
  values = tensor.read()
  split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
  return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


class _Header:
  """A reading position in the file that refuses to pass its end."""

  def __init__(self, data: np.ndarray, source: str):
    self.data = memoryview(data)
    self.source = source
    self.at = 0

  def take(self, count: int) -> memoryview:
    if count > len(self.data) - self.at:
      raise UserError(
        f"{self.source}: truncated or damaged GGUF header: {count} bytes expected at byte "
        f"{self.at}, {len(self.data) - self.at} left"
      )
    piece = self.data[self.at : self.at + count]
    self.at += count
    return piece

  def number(self, layout: str) -> Any:
    return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

  def string(self) -> str:
    try:
      return str(self.take(self.number("<Q")), "utf-8")
    except UnicodeDecodeError:
      raise UserError(f"{self.source}: damaged GGUF header: text is not UTF-8") from None

  def kind(self) -> GGUFValueType:
    number = self.number("<I")
    try:
      return GGUFValueType(number)
    except ValueError:
      raise UserError(f"{self.source}: damaged GGUF header: value type {number}") from None

  def value(self) -> Any:
    kind = self.kind()
    if kind == GGUFValueType.STRING:
      return self.string()
    if kind != GGUFValueType.ARRAY:
      return self.number(_SCALARS[kind])
    kind, count = self.kind(), self.number("<Q")
    if kind == GGUFValueType.STRING:
      return [self.string() for _ in range(count)]
    if kind == GGUFValueType.ARRAY:
      raise UserError(f"{self.source}: a GGUF header with arrays of arrays is not supported")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
  """Metadata and tensors of a GGUF file by their names in the file.

  Metadata values are Python numbers, strings, or lists of those.

  Raises:
    UserError: the file cannot be opened, is not GGUF, is damaged, or holds a tensor type outside
      :data:`TENSOR_TYPES`.
  """
  source = str(path)
  try:
    with path.open("rb") as file:
      if file.read(4) != b"GGUF":
        raise UserError(f"{source}: not a GGUF file")
      data = np.memmap(file, np.uint8, mode="r")
  except OSError as error:
    raise UserError(f"{source}: {error.strerror or error}") from error
  header = _Header(data, source)
  header.take(4)
  if (version := header.number("<I")) not in (2, 3):
    raise UserError(f"{source}: GGUF version {version} is not supported; supported: 2, 3")
  tensor_count, value_count = header.number("<Q"), header.number("<Q")
  metadata = {}
  for _ in range(value_count):
    key = header.string()
    metadata[key] = header.value()
  entries = []
  for _ in range(tensor_count):
    name, rank = header.string(), header.number("<I")
    if not 1 <= rank <= 4:
      raise UserError(f"{source}: damaged GGUF header: tensor {name!r} has {rank} dimensions")
    shape = tuple(header.number("<Q") for _ in range(rank))[::-1]
    entries.append((name, shape, header.number("<I"), header.number("<Q")))
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise UserError(f"{source}: damaged GGUF header: alignment {alignment!r}")
  start = -(-header.at // alignment) * alignment
  tensors = {}
  for name, shape, number, offset in entries:
    if name in tensors:
      raise UserError(f"{source}: damaged GGUF header: tensor {name!r} appears twice")
    kind = GGMLQuantizationType(number).name if number in _TYPE_NUMBERS else f"number {number}"
    if kind not in TENSOR_TYPES:
      known = ", ".join(TENSOR_TYPES)
      raise UserError(f"{source}: tensor {name!r} of type {kind} is not supported; known: {known}")
    block, width = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    if shape[-1] % block or 0 in shape:
      raise UserError(f"{source}: tensor {name!r} of type {kind} cannot have shape {shape}")
    begin, size = start + offset, math.prod(shape) // block * width
    if begin + size > data.size:
      raise UserError(
        f"{source}: truncated or damaged GGUF file: tensor {name!r} ends at byte {begin + size}, "
        f"the file at {data.size}"
      )
    tensors[name] = GgufTensor(kind=kind, shape=shape, data=data[begin : begin + size])
  return metadata, tensors


_TYPE_NUMBERS = frozenset(kind.value for kind in GGMLQuantizationType)


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
  if 0 < get("attention.sliding_window", int, 0) < context:
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
  return ModelConfig(
    architecture=arch,
    vocab=embedding.shape[0],
    layers=get("block_count", int),
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
    qk_norm=arch == "qwen3",
    tied="output.weight" not in tensors,
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
  made = plain / np.asarray(make_rope(guess).inv_freq)
  if (
    rope.scaling != "none"
    or divisors.shape != made.shape
    or not np.allclose(made, divisors, rtol=1e-4, atol=0)
  ):
    raise UserError(f"{source}: rope_freqs.weight is not a llama3 scaling of 8192 tokens, 1 and 4")
  return guess
