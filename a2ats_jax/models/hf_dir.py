"""Hugging Face folders: ``config.json``, safetensors and a tokenizer."""

import functools
import importlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from a2ats_jax.errors import UserError
from a2ats_jax.models.checkpoint import Checkpoint, StoredTensor, StoredTensors
from a2ats_jax.models.config import LocalLayers, ModelConfig
from a2ats_jax.models.gemma import LOCAL_THETA, PERIOD, gemma3_options
from a2ats_jax.models.tokenizer import Tokenizer
from a2ats_jax.rope import RopeConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# What a hub id brings down; nothing else of the repository is needed.
HUB_FILES = (
  *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
  *("chat_template.jinja", "model*.safetensors", "model.safetensors.index.json"),
)

_FLOATS = ("F64", "F32", "F16", "BF16")
# A buffer that older exports hold beside the weights; it follows from the configuration.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq")


def read_hf_dir(path: str | Path) -> Checkpoint:
  """Opens a model folder. Weights are read one at a time, when asked for.

  Args:
    path: a folder with ``config.json``, ``tokenizer.json``, and ``model.safetensors`` or the
      shards of ``model.safetensors.index.json``.
  Raises:
    UserError: a file is missing or damaged, or the model type, rotary scaling, attention window
      or a tensor is not supported; the message names it.
  """
  path = Path(path)
  source = str(path)
  raw = _Json(path / "config.json")
  config = _config(raw)
  stored = _stored(path)
  if config.tied:
    stored.pop("lm_head.weight", None)  # some exports write the shared table twice
  if raw.values["model_type"] == "gemma3_text":
    stored = {
      name: _shifted(x) if name.endswith("norm.weight") else x for name, x in stored.items()
    }
  return Checkpoint(
    config=config,
    tensors=StoredTensors(config, stored, source),
    tokenizer=_tokenizer(path, raw),
    source=source,
  )


def _shifted(norm: StoredTensor) -> StoredTensor:
  """Gemma's folders hold the weights of norms less 1."""
  return StoredTensor(norm.shape, lambda: norm.load() + 1)


def is_hub_id(name: str) -> bool:
  """Whether a string has the form ``org/name`` of the Hugging Face hub."""
  return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def hub_folder(name: str, cache: Path | None = None) -> Path:
  """Local folder of a hub model, downloaded on first use.

  Args:
    name: ``org/name``.
    cache: where to keep it; the hub library's own cache when None.
  Raises:
    UserError: the ``hub`` extra is not installed, or the download failed.
  """
  try:
    hub = importlib.import_module("huggingface_hub")
  except ImportError as error:
    raise UserError(
      f"model {name!r} is on the hub: install the extra first, pip install 'a2ats_jax[hub]'"
    ) from error
  try:
    return Path(hub.snapshot_download(name, allow_patterns=list(HUB_FILES), cache_dir=cache))
  except Exception as error:  # network, permission, and lookup errors share no base class
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"cannot fetch {name!r} from the hub: {reason}") from error


class _Json:
  """A JSON object on disk whose values are checked when read. A missing optional file is empty."""

  def __init__(self, path: Path, required: bool = True):
    self.path = path
    try:
      values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
      if required:
        raise UserError(f"{path.parent}: no {path.name}") from None
      values = {}
    except OSError as error:
      raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
      raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
      raise UserError(f"{path}: must hold a JSON object, got a {type(values).__name__}")
    self.values: dict[str, Any] = values

  def get(
    self, key: str, kind: type, default: Any = None, values: Mapping[str, Any] | None = None
  ) -> Any:
    """A value of the given type; absent and null mean the default, and no default an error."""
    values = self.values if values is None else values
    value = values.get(key)
    if value is None:
      value = default
    if value is None:
      raise UserError(f"{self.path}: {key} is missing")
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
      raise UserError(f"{self.path}: {key} must be a {kind.__name__}, got {value!r}")
    return value


def _config(raw: _Json) -> ModelConfig:
  kind = raw.values.get("model_type")
  if kind not in ARCHITECTURES:
    known = ", ".join(ARCHITECTURES)
    raise UserError(f"{raw.path}: model_type {kind!r} is not supported; supported: {known}")
  gemma = kind == "gemma3_text"
  key, known = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
  if (act := raw.get(key, str, known)) != known:
    raise UserError(f"{raw.path}: {key} {act!r} is not supported; supported: {known}")
  if raw.values.get("quantization_config") is not None:
    raise UserError(f"{raw.path}: quantization_config is not supported; use float weights or GGUF")
  heads, width = raw.get("num_attention_heads", int), raw.get("hidden_size", int)
  context = raw.get("max_position_embeddings", int)
  layers = raw.get("num_hidden_layers", int)
  biased = ("llama", "qwen3", "gemma3_text")
  bias = raw.get("attention_bias", bool, False) if kind in biased else False
  head_dim = raw.get("head_dim", int, width // max(heads, 1))
  options: dict[str, Any]
  if gemma:
    options = _gemma(raw, width, head_dim, context, layers)
  else:
    _refuse_sliding(raw, kind, layers, context)
    options = {"qk_norm": kind == "qwen3", "rope": _rope(raw, head_dim, context)}
  return ModelConfig(
    architecture=kind,
    vocab=raw.get("vocab_size", int),
    layers=layers,
    heads=heads,
    kv_heads=raw.get("num_key_value_heads", int, heads),
    width=width,
    mlp_width=raw.get("intermediate_size", int),
    context=context,
    norm_eps=raw.get("rms_norm_eps", float, 1e-6),
    qkv_bias=bias or kind == "qwen2",
    out_bias=bias,
    mlp_bias=kind == "llama" and raw.get("mlp_bias", bool, False),
    tied=raw.get("tie_word_embeddings", bool, gemma),
    **options,
  )


def _gemma(raw: _Json, width: int, head_dim: int, context: int, layers: int) -> dict[str, Any]:
  """What Gemma 3 says beside the others."""
  for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
    if raw.values.get(key):
      raise UserError(f"{raw.path}: {key} is not supported")
  both = raw.get("rope_parameters", dict, {})
  if "full_attention" in both:
    far, near = (
      raw.get("full_attention", dict, {}, both),
      raw.get("sliding_attention", dict, {}, both),
    )
    theta = raw.get("rope_theta", float, LOCAL_THETA, near)
    if (scaling := near.get("rope_type", "default")) != "default":
      raise UserError(f"{raw.path}: rope type {scaling!r} of local layers is not supported")
  else:
    far, theta = None, raw.get("rope_local_base_freq", float, LOCAL_THETA)
  options = gemma3_options(width, head_dim, raw.get("query_pre_attn_scalar", float, 256.0))
  options["rope"] = _rope(raw, head_dim, context, far, theta=1e6)
  if (period := _period(raw, layers)) > 1:
    local = RopeConfig(head_dim=head_dim, theta=theta)
    options["local"] = LocalLayers(period=period, window=raw.get("sliding_window", int), rope=local)
  return options


def _period(raw: _Json, layers: int) -> int:
  """Of so many layers in a row the last is global."""
  kinds = raw.get("layer_types", list, [])
  if not kinds:
    own = raw.get("_sliding_window_pattern", int, PERIOD)  # as newer exports call it
    return raw.get("sliding_window_pattern", int, own)
  named = {True: "sliding_attention", False: "full_attention"}
  period = kinds.index(named[False]) + 1 if named[False] in kinds else layers + 1
  if kinds != [named[(i + 1) % period != 0] for i in range(layers)]:
    raise UserError(
      f"{raw.path}: layer_types must be one {named[False]} after every so many "
      f"{named[True]}, {layers} in all, got {kinds}"
    )
  return period


def _refuse_sliding(raw: _Json, kind: str, layers: int, context: int) -> None:
  if kind == "mistral":
    slides = raw.values.get("sliding_window") is not None
  elif kind != "llama" and raw.values.get("layer_types") is not None:
    slides = any(layer != "full_attention" for layer in raw.get("layer_types", list))
  else:
    slides = raw.get("use_sliding_window", bool, False)
    slides = slides and raw.get("max_window_layers", int, 0) < layers
  if slides and (window := raw.get("sliding_window", int, 0)) < context:
    raise UserError(
      f"{raw.path}: sliding_window {window} below the context of {context} is not supported"
    )


def _rope(
  raw: _Json,
  head_dim: int,
  context: int,
  nested: Mapping[str, Any] | None = None,
  *,
  theta: float = 10000.0,
) -> RopeConfig:
  """Rotary options under the older keys (``rope_theta``, ``rope_scaling``) or the newer one.

  Args:
    nested: options in place of those.
    theta: where the file names none.
  """
  values = nested
  if values is None:
    values = raw.get("rope_parameters", dict, {}) or raw.get("rope_scaling", dict, {})

  def number(key: str, default: float | None = None) -> float:
    return raw.get(key, float, default, values)

  def original(default: int | None) -> int:
    return raw.get("original_max_position_embeddings", int, default, values)

  kind = values.get("rope_type", values.get("type", "default"))
  if kind not in ROPE_TYPES:
    known = ", ".join(ROPE_TYPES)
    raise UserError(f"{raw.path}: rope type {kind!r} is not supported; supported: {known}")
  for key in ("mscale", "mscale_all_dim", "truncate", "full_attention", "sliding_attention"):
    if values.get(key) is not None:
      raise UserError(f"{raw.path}: the rope option {key!r} is not supported")
  if number("partial_rotary_factor", raw.get("partial_rotary_factor", float, 1.0)) != 1.0:
    raise UserError(f"{raw.path}: partial_rotary_factor is not supported")
  theta = number("rope_theta", raw.get("rope_theta", float, theta))
  if kind == "linear":
    return RopeConfig(head_dim=head_dim, theta=theta, scaling="linear", factor=number("factor"))
  if kind == "llama3":
    return RopeConfig(
      head_dim=head_dim,
      theta=theta,
      scaling="llama3",
      factor=number("factor"),
      original_context=original(None),
      low_freq_factor=number("low_freq_factor"),
      high_freq_factor=number("high_freq_factor"),
    )
  if kind == "yarn":
    trained = original(context)
    given = values.get("attention_factor") is not None
    return RopeConfig(
      head_dim=head_dim,
      theta=theta,
      scaling="yarn",
      factor=number("factor", context / max(trained, 1)),
      original_context=trained,
      beta_fast=number("beta_fast", 32.0),
      beta_slow=number("beta_slow", 1.0),
      attention_factor=number("attention_factor") if given else None,
    )
  return RopeConfig(head_dim=head_dim, theta=theta)


def _stored(path: Path) -> dict[str, StoredTensor]:
  """Every tensor of the folder by name, unread."""
  if (path / "model.safetensors").is_file():
    files = ["model.safetensors"]
  elif (path / "model.safetensors.index.json").is_file():
    index = _Json(path / "model.safetensors.index.json")
    files = sorted({str(file) for file in index.get("weight_map", dict).values()})
    if outside := [file for file in files if Path(file).name != file]:
      raise UserError(f"{index.path}: {outside[0]!r} is not the name of a file in this folder")
  else:
    raise UserError(f"{path}: no model.safetensors and no model.safetensors.index.json")
  stored = {}
  for file in files:
    shard = path / file
    try:
      with safe_open(shard, framework="numpy") as held:
        for name in held.keys():  # noqa: SIM118 - not a mapping
          view = held.get_slice(name)
          if _HARMLESS.fullmatch(name):
            continue
          if view.get_dtype() not in _FLOATS:
            kind = view.get_dtype()
            known = ", ".join(_FLOATS)
            raise UserError(
              f"{shard}: tensor {name!r} of type {kind} is not supported; supported: {known}"
            )
          load = functools.partial(_load, shard, name)
          stored[name] = StoredTensor(tuple(view.get_shape()), load)
    except (OSError, SafetensorError) as error:
      raise UserError(f"{shard}: damaged or unreadable: {error}") from error
  return stored


def _load(shard: Path, name: str) -> np.ndarray:
  try:
    with safe_open(shard, framework="numpy") as held:
      values = held.get_tensor(name)
  except (OSError, SafetensorError) as error:
    raise UserError(f"{shard}: damaged or unreadable: {error}") from error
  with np.errstate(over="ignore"):  # reported as a value that is not finite
    return np.array(values, np.float32)


def _tokenizer(path: Path, config: _Json) -> Tokenizer:
  file = path / "tokenizer.json"
  if not file.is_file():
    raise UserError(f"{path}: no tokenizer.json")
  try:
    backend = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the tokenizers package raises bare Exception
    raise UserError(f"{file}: damaged or not supported: {error}") from error
  options = _Json(path / "tokenizer_config.json", required=False)
  generation = _Json(path / "generation_config.json", required=False)

  specials = {}
  for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
    value = options.values.get(key)
    if isinstance(value, dict):
      value = value.get("content")
    if isinstance(value, str):
      specials[key] = value
  bos, eos = specials.pop("bos_token", None), specials.pop("eos_token", None)
  ends = [] if eos is None else [eos]
  for raw in (generation, config):
    ids = raw.values.get("eos_token_id")
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
      token = backend.id_to_token(i) if type(i) is int and i >= 0 else None
      if token is None:
        raise UserError(f"{raw.path}: eos_token_id {i!r} is not in the vocabulary")
      ends.append(token)
  return Tokenizer(backend, bos=bos, eos=ends, template=_template(path, options), specials=specials)


def _template(path: Path, options: _Json) -> str | None:
  file = path / "chat_template.jinja"
  if file.is_file():
    try:
      return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"{file}: damaged or unreadable: {error}") from error
  value = options.values.get("chat_template")
  if isinstance(value, list):  # several named ones
    named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    value = named.get("default")
  if value is not None and not isinstance(value, str):
    raise UserError(f"{options.path}: chat_template must be text")
  return value
