"""A model that is ready to run: decoder, tokenizer and identity, from any of the formats."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from a2ats_jax.codebook import Codebook, load_codebooks
from a2ats_jax.models.checkpoint import Checkpoint, read_checkpoint
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder, from_tensors
from a2ats_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """Weights and what is needed to talk to them.

  Attributes:
    fingerprint: sha256 over heads, rotary embedding and all weights; equal for the same weights
      read from either format.
    source: where it was read from, for records.
  """

  config: ModelConfig
  decoder: Decoder
  tokenizer: Tokenizer
  fingerprint: str
  source: str

  def load_codebooks(self, directory: str | Path) -> tuple[Codebook, dict[str, Any]]:
    """Codebooks trained for this model, and their header.

    Raises:
      UserError: none there, damaged, or of another model, rope or shape.
    """
    return load_codebooks(
      Path(directory),
      fingerprint=self.fingerprint,
      layers=self.config.global_layers,
      kv_heads=self.config.kv_heads,
      rope=self.config.rope,
    )


def fingerprint_of(config: ModelConfig, decoder: Decoder) -> str:
  """Identity of a model: heads, rotary embedding and every weight."""
  shape: list[Any] = [config.layers, config.heads, config.kv_heads, dataclasses.asdict(config.rope)]
  if config.local is not None:
    shape.append(dataclasses.asdict(config.local))
  digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
  for leaf in jax.tree.leaves(decoder):
    digest.update(np.ascontiguousarray(leaf, np.float32))
  return digest.hexdigest()


def from_checkpoint(checkpoint: Checkpoint) -> Model:
  """Build the decoder of a checkpoint that was read."""
  decoder = from_tensors(checkpoint.config, checkpoint.tensors)
  return Model(
    config=checkpoint.config,
    decoder=decoder,
    tokenizer=checkpoint.tokenizer,
    fingerprint=fingerprint_of(checkpoint.config, decoder),
    source=checkpoint.source,
  )


def load_model(
  where: str | Path,
  cache: Path | None = None,
  progress: Callable[[str], None] | None = None,
) -> Model:
  """Load by known name, GGUF file, Hugging Face directory or (extra ``hub``) hub id.

  Args:
    cache: folder for downloaded models; the user's cache directory by default.
    progress: called with a line of text before a download.

  Raises:
    UserError: nothing there, damaged, or of an architecture or tensor type that is not supported.
  """
  return from_checkpoint(read_checkpoint(where, cache, progress))
