"""Chips and model shapes that a plan knows by name, from vendors' sheets and public checkpoints."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from a2ats_jax.errors import UserError
from a2ats_jax.models.config import LocalLayers, ModelConfig
from a2ats_jax.models.gemma import LOCAL_THETA, PERIOD, gemma3_options
from a2ats_jax.rope import RopeConfig

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Nominal figures of one accelerator; nothing is taken off for what software reaches.

  Attributes:
    memory: bytes of device memory (HBM).
    memory_rate: bytes per second between it and the compute units.
    link_rate: bytes per second from host memory to the device, one direction.
    flops: operations per second of a bfloat16 matrix product, dense.
    source: of memory, memory rate and operations.
    link: what the link is; says so where that is assumed.
  """

  memory: float
  memory_rate: float
  link_rate: float
  flops: float
  source: str
  link: str


def _nvidia(*, memory: int, rate: int, gen: Literal[4, 5], teraflops: float) -> Chip:
  return Chip(
    memory=memory * GB,
    memory_rate=rate * GB,
    link_rate={4: 32, 5: 64}[gen] * GB,
    flops=teraflops * 1e12,
    source="vendor datasheet, dense bfloat16",
    link=f"PCIe Gen{gen} x16, nominal",
  )


def _tpu(*, memory: float, rate: int, link: int, teraflops: float) -> Chip:
  return Chip(
    memory=memory,
    memory_rate=rate * GB,
    link_rate=link * GB,
    flops=teraflops * 1e12,
    source="vendor documentation, per chip",
    link=f"assumed: {link} GB/s a chip, the vendor states none",
  )


CHIPS: Mapping[str, Chip] = MappingProxyType(
  {
    "tpu-v5e": _tpu(memory=16 * GB, rate=819, link=16, teraflops=197.0),
    "tpu-v5p": _tpu(memory=95 * GIB, rate=2765, link=16, teraflops=459.0),
    "tpu-v6e": _tpu(memory=32 * GIB, rate=1638, link=16, teraflops=918.0),
    "tpu7x": _tpu(memory=192 * GIB, rate=7370, link=32, teraflops=2307.0),
    "h100": _nvidia(memory=80, rate=3350, gen=5, teraflops=989.0),
    "h200": _nvidia(memory=141, rate=4800, gen=5, teraflops=989.0),
    "a100": _nvidia(memory=80, rate=2039, gen=4, teraflops=312.0),
    "rtx-4090": _nvidia(memory=24, rate=1008, gen=4, teraflops=165.2),
  }
)

CUSTOM = "custom"  # a chip or a model given by its numbers
CHIP_FLAGS: Mapping[str, str] = MappingProxyType(
  {
    "memory": "--memory-gb",
    "memory_rate": "--memory-gbs",
    "link_rate": "--link-gbs",
    "flops": "--tflops",
  }
)

MODELS: Mapping[str, ModelConfig] = MappingProxyType(
  {
    "llama-3.1-8b": ModelConfig(
      architecture="llama",
      vocab=128256,
      layers=32,
      heads=32,
      kv_heads=8,
      width=4096,
      mlp_width=14336,
      context=131072,
      rope=RopeConfig(head_dim=128, theta=500000.0),
    ),
    "qwen2.5-7b": ModelConfig(
      architecture="qwen2",
      vocab=152064,
      layers=28,
      heads=28,
      kv_heads=4,
      width=3584,
      mlp_width=18944,
      context=131072,
      rope=RopeConfig(head_dim=128, theta=1000000.0),
      qkv_bias=True,
    ),
    "mistral-7b": ModelConfig(  # v0.3
      architecture="mistral",
      vocab=32768,
      layers=32,
      heads=32,
      kv_heads=8,
      width=4096,
      mlp_width=14336,
      context=32768,
      rope=RopeConfig(head_dim=128, theta=1000000.0),
    ),
    "smollm2-135m": ModelConfig(
      architecture="llama",
      vocab=49152,
      layers=30,
      heads=9,
      kv_heads=3,
      width=576,
      mlp_width=1536,
      context=8192,
      rope=RopeConfig(head_dim=64, theta=100000.0),
      tied=True,
    ),
    "gemma-3-270m": ModelConfig(
      architecture="gemma3",
      vocab=262144,
      layers=18,
      heads=4,
      kv_heads=1,
      width=640,
      mlp_width=2048,
      context=32768,
      rope=RopeConfig(head_dim=256, theta=1000000.0),
      norm_eps=1e-6,
      tied=True,
      local=LocalLayers(
        period=PERIOD, window=512, rope=RopeConfig(head_dim=256, theta=LOCAL_THETA)
      ),
      **gemma3_options(640, 256, 256.0),
    ),
  }
)


def find_chip(name: str, **given: Any) -> Chip:
  """A chip of the table, or ``custom``.

  Args:
    given: numbers that replace the table's; 0 leaves them. ``custom`` needs all four.

  Raises:
    UserError: an unknown name, the message lists the known ones; or a number is missing.
  """
  given = {key: value for key, value in given.items() if value != 0}
  for key, value in given.items():
    if not 0 < value < math.inf:
      raise UserError(f"device: {CHIP_FLAGS[key]} must be a number above 0")
  if name == CUSTOM:
    if missing := [flag for key, flag in CHIP_FLAGS.items() if key not in given]:
      raise UserError(f"device: custom needs four numbers, missing: {', '.join(missing)}")
    return Chip(**given, source="as given", link="as given")
  if name not in CHIPS:
    raise UserError(f"device: unknown name {name!r}; known: {', '.join((*CHIPS, CUSTOM))}")
  changed: dict[str, Any] = {"link": "as given"} if "link_rate" in given else {}
  if set(given) - {"link_rate"}:
    changed["source"] = "partly as given"
  return dataclasses.replace(CHIPS[name], **given, **changed)


def find_model(where: str, **given: Any) -> ModelConfig:
  """The shape of a model, its weights unread.

  Args:
    where: a name of :data:`MODELS`, ``custom``, a .gguf file or a Hugging Face directory.
    given: ``layers``, ``heads``, ``kv_heads``, ``head_dim``, ``width``, ``mlp_width`` and ``vocab``
      that replace the model's; 0 leaves them. ``custom`` needs all seven.

  Raises:
    UserError: nothing of that name, a number is missing or out of range.
  """
  given = {key: value for key, value in given.items() if value != 0}
  if where == CUSTOM:
    fields = ("layers", "heads", "kv_heads", "head_dim", "width", "mlp_width", "vocab")
    if missing := ["--" + name.replace("_", "-") for name in fields if name not in given]:
      raise UserError(f"model: custom needs seven numbers, missing: {', '.join(missing)}")
    rope = RopeConfig(head_dim=given.pop("head_dim"))
    return ModelConfig(architecture="llama", context=2**31 - 1, rope=rope, **given)
  if where in MODELS:
    config = MODELS[where]
  elif Path(where).expanduser().exists():
    from a2ats_jax.models.checkpoint import read_checkpoint

    config = read_checkpoint(where).config
  else:
    raise UserError(
      f"model: {where!r} is neither a known shape ({', '.join((*MODELS, CUSTOM))}) nor a GGUF file "
      "or model folder"
    )
  size, local = given.pop("head_dim", config.head_dim), config.local
  rope = dataclasses.replace(config.rope, head_dim=size)
  if local is not None:
    local = dataclasses.replace(local, rope=dataclasses.replace(local.rope, head_dim=size))
  return dataclasses.replace(config, rope=rope, local=local, **given)
