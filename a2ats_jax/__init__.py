"""Retrieval from a KV cache for Flax language models: A2ATS and what it is compared with."""

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook, encode, load_codebooks, make_codebook, save_codebooks
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import decode_step, pad_prompts, prefill
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.base import Geometry, Method, PromptLayer, Stats
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.methods.sharded import shard_method
from a2ats_jax.models.model import Model, load_model
from a2ats_jax.models.sharded import shard_decoder
from a2ats_jax.prefix import Prefix, continue_prefix, read_prefix
from a2ats_jax.prefix_file import load_prefix, save_prefix
from a2ats_jax.prompt import prefill_by_chunks, prefill_layer
from a2ats_jax.rope import Rope, RopeConfig, make_rope, rotate, windowed_logits
from a2ats_jax.sampling import Sampling
from a2ats_jax.sequence import OverSequence
from a2ats_jax.sharding import make_mesh

__all__ = [
  "A2ATS",
  "A2ATSReference",
  "Budget",
  "Codebook",
  "FarPosition",
  "Full",
  "Geometry",
  "Method",
  "Model",
  "Oracle",
  "OverSequence",
  "Prefix",
  "PromptLayer",
  "Rope",
  "RopeConfig",
  "Sampling",
  "Stats",
  "UserError",
  "continue_prefix",
  "decode_step",
  "encode",
  "load_codebooks",
  "load_model",
  "load_prefix",
  "make_codebook",
  "make_mesh",
  "make_rope",
  "pad_prompts",
  "prefill",
  "prefill_by_chunks",
  "prefill_layer",
  "read_prefix",
  "rotate",
  "save_codebooks",
  "save_prefix",
  "shard_decoder",
  "shard_method",
  "windowed_logits",
]
