"""A model read from anywhere: its configuration, its weights and its tokenizer.

Weights carry Hugging Face names and are ``(out, in)`` float32 arrays whatever file they came from.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.tokenizer import Tokenizer


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of every weight a checkpoint of this configuration holds.

  Projections are ``(out, in)``, biases ``(out,)``, norms ``(width,)``. ``lm_head.weight`` is
  absent when the head is tied to the embedding.
  """
  e, m, d = config.width, config.mlp_width, config.head_dim
  q, kv = config.heads * d, config.kv_heads * d
  shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, e)}

  def linear(name: str, out: int, into: int, bias: bool) -> None:
    shapes[f"{name}.weight"] = (out, into)
    if bias:
      shapes[f"{name}.bias"] = (out,)

  for i in range(config.layers):
    layer = f"model.layers.{i}"
    shapes[f"{layer}.input_layernorm.weight"] = (e,)
    linear(f"{layer}.self_attn.q_proj", q, e, config.qkv_bias)
    linear(f"{layer}.self_attn.k_proj", kv, e, config.qkv_bias)
    linear(f"{layer}.self_attn.v_proj", kv, e, config.qkv_bias)
    linear(f"{layer}.self_attn.o_proj", e, q, config.out_bias)
    if config.qk_norm:
      shapes[f"{layer}.self_attn.q_norm.weight"] = (d,)
      shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
    shapes[f"{layer}.post_attention_layernorm.weight"] = (e,)
    if config.post_norms:
      shapes[f"{layer}.pre_feedforward_layernorm.weight"] = (e,)
      shapes[f"{layer}.post_feedforward_layernorm.weight"] = (e,)
    linear(f"{layer}.mlp.gate_proj", m, e, config.mlp_bias)
    linear(f"{layer}.mlp.up_proj", m, e, config.mlp_bias)
    linear(f"{layer}.mlp.down_proj", e, m, config.mlp_bias)
  shapes["model.norm.weight"] = (e,)
  if not config.tied:
    shapes["lm_head.weight"] = (config.vocab, e)
  return shapes


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A weight still in its file: its shape, and how to read it as an owned float32 array."""

  shape: tuple[int, ...]
  load: Callable[[], np.ndarray]


class StoredTensors(Mapping[str, np.ndarray]):
  """Weights by Hugging Face name, read and checked each time one is asked for.

  Nothing is kept in memory: a loop over the names holds one float32 tensor at a time. Names and
  shapes are checked on construction, values on access.

  Args:
    config: decides the expected names and shapes.
    stored: what the file holds, under Hugging Face names.
    source: the file or folder, for messages.
  Raises:
    UserError: a tensor is missing, has another shape, or is not part of this architecture; on
      access, a value is not finite. The message names the tensor.
  """

  def __init__(self, config: ModelConfig, stored: Mapping[str, StoredTensor], source: str):
    if config.layers > len(stored):
      raise UserError(f"{source}: {config.layers} layers stated, only {len(stored)} tensors held")
    shapes = expected_tensors(config)
    if missing := [name for name in shapes if name not in stored]:
      more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
      raise UserError(f"{source}: tensor {missing[0]!r} is missing{more}")
    if extra := sorted(set(stored) - set(shapes)):
      more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
      names = ", ".join(map(repr, extra[:3]))
      raise UserError(f"{source}: tensors not part of {config.architecture!r}: {names}{more}")
    for name, shape in shapes.items():
      if stored[name].shape != shape:
        raise UserError(f"{source}: tensor {name!r} must be {shape}, got {stored[name].shape}")
    self._stored = {name: stored[name] for name in shapes}
    self._source = source

  def __getitem__(self, name: str) -> np.ndarray:
    array = self._stored[name].load()
    if not np.isfinite(array).all():
      raise UserError(f"{self._source}: tensor {name!r} holds values that are not finite")
    return array

  def __contains__(self, name: object) -> bool:
    return name in self._stored  # the inherited test would read the tensor

  def __iter__(self) -> Iterator[str]:
    return iter(self._stored)

  def __len__(self) -> int:
    return len(self._stored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A model ready to be built.

  Attributes:
    config: shape and options.
    tensors: float32 weights by Hugging Face name, those of :func:`expected_tensors`.
    tokenizer: text to ids and back.
    source: the file or folder it was read from.
  """

  config: ModelConfig
  tensors: Mapping[str, Any]  # np.ndarray; saying so makes run-time type checks read a weight
  tokenizer: Tokenizer
  source: str

  def __post_init__(self):
    if self.tokenizer.vocab > self.config.vocab:
      raise UserError(
        f"{self.source}: the tokenizer has {self.tokenizer.vocab} tokens, "
        f"the embedding only {self.config.vocab} rows"
      )


def read_checkpoint(
  where: str | Path,
  cache: Path | None = None,
  progress: Callable[[str], None] | None = None,
) -> Checkpoint:
  """Opens a model by whatever it is called.

  Args:
    where: tried in this order: the name of a model in :data:`a2ats_jax.models.fetch.MODELS`
      (fetched on first use), an existing ``.gguf`` file, an existing Hugging Face folder, the id
      ``org/name`` of a model on the Hugging Face hub.
    cache: where fetched models live; the default is :func:`a2ats_jax.models.fetch.default_cache`.
      Hub models use the hub's own cache unless it is given.
    progress: called with a line of text before a download of a named model.
  Raises:
    UserError: nothing of that name, or what is there is damaged or not supported.
  """
  # The readers build a Checkpoint, so they import this module.
  from a2ats_jax.models import fetch, gguf_file, hf_dir

  if str(where) in fetch.MODELS:
    return gguf_file.read_gguf(fetch.fetch(str(where), cache, progress))
  path = Path(where).expanduser()
  if path.is_dir():
    return hf_dir.read_hf_dir(path)
  if path.is_file():
    return gguf_file.read_gguf(path)
  if isinstance(where, str) and hf_dir.is_hub_id(where):
    return hf_dir.read_hf_dir(hf_dir.hub_folder(where, cache))
  known = ", ".join(fetch.MODELS)
  raise UserError(
    f"model {str(where)!r} is neither a known name ({known}), nor a GGUF file, "
    "nor a model folder, nor a hub id"
  )
