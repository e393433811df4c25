"""A tiny random model of every architecture that is adapted, and what its own zoo makes of it."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

VOCAB, PAD = 61, 0
SHAPE = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8}
LLAMA = {**SHAPE, "vocab_size": VOCAB, "num_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 77_000}
HF = {
  "vocab_size": VOCAB,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "pad_token_id": PAD,
  "eos_token_id": VOCAB + 1,
}


@dataclasses.dataclass(frozen=True)
class Zoo:
  """A model, adapted and as it was.

  Attributes:
    forward: logits of the zoo's own forward pass, ``[B, T, V]``, without padding.
    sample: greedy tokens of the zoo's own sampler after prompts of different lengths; 0 after a
      token that ends a row.
    seed: of prompts after which no row ends.
  """

  adapted: Any
  forward: Callable[[np.ndarray], np.ndarray]
  sample: Callable[[list[list[int]], int], list[list[int]]]
  vocab: int = VOCAB
  seed: int = 1


def random_like(tree: Any, scale: float = 0.4) -> Any:
  """Arrays of these shapes, norms of scales about 1 or 0 included; the embedding is smaller."""
  rng = np.random.default_rng(0)

  def draw(path: Any, x: Any) -> jax.Array:
    width = 0.15 if "embed" in jax.tree_util.keystr(path) else scale
    return jnp.asarray(width * rng.standard_normal(x.shape) + (x.ndim == 1) * 0.5, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, tree)


class Numbers:
  """A tokenizer whose texts are token ids."""

  def encode(self, text, **_):
    return [int(word) for word in text.split()]

  def decode(self, ids, **_):
    return " ".join(map(str, ids))

  def bos_id(self):
    return 0  # tunix puts none in front then

  def eos_id(self):
    return VOCAB + 1

  def pad_id(self):
    return PAD


def tunix_model(name: str) -> Any:
  """One of tunix's, with random parameters."""
  from flax import nnx

  kind, _, experts = name.partition("+")
  module = pytest.importorskip(f"tunix.models.{kind}.model")
  if kind == "gemma3":
    config = module.ModelConfig(
      **{**SHAPE, "num_layers": 7},
      num_embed=VOCAB,
      num_kv_heads=2,
      sliding_window_size=5,
      global_base_frequency=1_000_000,
      global_scale_factor=2.0,
      param_dtype=jnp.float32,
    )
  else:
    more = {"num_experts": 4, "num_experts_per_tok": 2} if experts else {}
    config = module.ModelConfig(**LLAMA, **more)
  build = getattr(module, kind.capitalize())
  graph, state = nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
  return nnx.merge(graph, random_like(state))


def tunix(name: str, model: Any = None) -> Zoo:
  installed("tunix")
  from tunix.generate.sampler import CacheConfig, Sampler

  from a2ats_jax.adapters.tunix import from_tunix

  model = tunix_model(name) if model is None else model
  layers = len(model.layers)

  def forward(tokens):
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    return jax.jit(lambda model: model(tokens, positions, None, mask)[0])(model)

  def sample(prompts, new):
    cache = CacheConfig(cache_size=64, num_layers=layers, num_kv_heads=2, head_dim=8)
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    out = Sampler(model, Numbers(), cache)(texts, max_generation_steps=new)
    return [list(map(int, row)) for row in out.tokens]

  return Zoo(from_tunix(model), forward, sample)


def gemma_config(**changes: Any) -> Any:
  """Gemma 3 of the package gemma, its first layer local."""
  installed("gemma")
  from gemma import gm

  kinds = gm.nn.AttentionType
  options = {
    **{name: size for name, size in SHAPE.items() if name != "num_layers"},
    "num_embed": 14,  # the words of the package's dummy tokenizer
    "num_kv_heads": 2,
    "attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.LOCAL_SLIDING, kinds.GLOBAL),
    "sliding_window_size": 5,
    "final_logit_softcap": 2.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "use_qk_norm": True,
    "query_pre_attn_norm": (
      gm.nn.config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
    ),
    "global_base_frequency": 1_000_000,
    "global_scale_factor": 2.0,
  }
  return gm.nn.config.TransformerConfig(**{**options, **changes})


def gemma(model: Any = None, params: Any = None) -> Zoo:
  config = gemma_config()
  from gemma import gm

  from a2ats_jax.adapters.gemma import from_gemma

  if model is None:
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])

  def forward(tokens):
    return model.apply({"params": params}, tokens).logits

  def sample(prompts, new):
    sampler = gm.text.Sampler(
      model=model,
      params=params,
      tokenizer=gm.testing.DummyTokenizer(),
      cache_length=64,
      max_out_length=new,
      pad_length=None,
    )
    texts = [sampler.tokenizer.decode(prompt[1:]) for prompt in prompts]  # it puts 2 in front
    out = sampler.sample(texts, max_new_tokens=new, return_state=True)
    return np.asarray(out.tokens).tolist()

  return Zoo(from_gemma(model, params), forward, sample, vocab=14, seed=3)


def installed(name: str) -> Any:
  """A zoo's package; the test is skipped where there is none, or no models of Flax in it."""
  if name == "transformers" and "gemma" in sys.modules:
    pytest.skip("gemma has replaced flax.linen.Module.param here: run with -k transformers alone")
  package = pytest.importorskip(name)
  if name == "transformers" and not hasattr(package, "FlaxLlamaForCausalLM"):
    pytest.skip("transformers 5 has no Flax models")
  return package


def transformers(name: str, model: Any = None) -> Zoo:
  package = installed("transformers")
  from a2ats_jax.adapters.transformers import from_transformers

  if model is None:
    more = {"head_dim": 8} if name == "Gemma" else {}
    config = getattr(package, f"{name}Config")(**HF, **more)
    model = getattr(package, f"Flax{name}ForCausalLM")(config)
    model.params = random_like(model.params)

  def forward(tokens):
    return model(tokens).logits

  def sample(prompts, new):
    width = max(map(len, prompts))
    padded = np.asarray([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    there = np.asarray([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(padded, attention_mask=there, max_new_tokens=new, do_sample=False)
    return out.sequences[:, width:].tolist()

  return Zoo(from_transformers(model), forward, sample)


BUILD = {
  "tunix-llama3": lambda: tunix("llama3"),
  "tunix-qwen2": lambda: tunix("qwen2"),
  "tunix-qwen3": lambda: tunix("qwen3"),
  "tunix-qwen3+experts": lambda: tunix("qwen3+experts"),
  "tunix-gemma3": lambda: tunix("gemma3"),
  "gemma-gemma3": gemma,
  "transformers-llama": lambda: transformers("Llama"),
  "transformers-gemma": lambda: transformers("Gemma"),
}
